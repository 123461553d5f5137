"""A conversation with a model that knows no turns, only text that goes on.

GPT-2 was never taught to answer. So the talk is written down as a transcript, which the model continues:

    The system text, if there is one.
    <empty line>
    User: what was said
    Assistant: what the model says, until it would begin a line with "User:" itself
    User: ...

A model that was taught a template of its own is asked by that instead, and ends its answer where the template says.

Without roles it is one text that both write in turns: what is said begins a new line, or goes on in the last one if
it begins with a space, and saying nothing lets the model go on.

The tokens of the transcript never change once they were said, and one engine with one row reads them: it finds what it
has read before in its cache, so that a turn costs no more than its own tokens.
"""

import secrets
from collections import abc
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from gpt2.errors import UserError
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel, Sequence
from gpt2.generation.sampling import Sampling
from gpt2.generation.text import TextStream, check_stop_strings
from gpt2.templates import ASSISTANT_PREFIX, USER_PREFIX, ChatTemplate
from gpt2.tokenizer import Tokenizer


@dataclass
class Turn:
    """What was said, and what the model answered: the text that was shown, and its tokens."""

    user_text: str
    answer: str = ""
    tokens: list[int] = field(default_factory=list)


class Conversation:
    """Turns, and the model that answers them. `say` something, and read the answer as it comes.

        conversation = Conversation(model, tokenizer, Sampling(temperature=0.8), seed=1)
        for piece in conversation.say("Where is the library?"):
            print(piece, end="")

    sampling, max_new_tokens, stop, seed, system: may be changed between two turns. The same seed gives the same answers
    to the same words, and another answer to each `retry`.
    template: the model's own; None for the transcript above. It has no say where there are no roles.

    When transcript and answer would not fit the context, the oldest turns are no longer read: so many that the
    others take three quarters of the room, for reading them again is what that costs. `forgotten` counts them.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 100,
        stop: abc.Sequence[str] = (),
        seed: int | None = None,
        system: str = "",
        roles: bool = True,
        template: ChatTemplate | None = None,
    ) -> None:
        if tokenizer is None:
            raise UserError("this model folder has no tokenizer: text needs one")
        check_stop_strings(stop)
        self.model, self.tokenizer, self.roles = model, tokenizer, roles
        self.template = template if roles else None
        self.sampling = sampling or Sampling()
        self.max_new_tokens, self.stop, self.system = max_new_tokens, tuple(stop), system
        self.turns: list[Turn] = []
        self.num_dropped_turns = 0
        """So many of the oldest turns are no longer read."""
        self.seed = secrets.randbits(32) if seed is None else seed
        self._engine = Engine(model, slots=1)

    @property
    def seed(self) -> int:
        """Of all random numbers. Setting it begins its numbers anew."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed, self._next_sample_index = seed, 0

    @property
    def transcript(self) -> str:
        """The whole talk, what is no longer read included."""
        if self.template is not None:
            return self.template.render(self._messages(self.turns)) if self.turns else ""
        return self._system_prefix() + "".join(
            self._format_user_turn(self.turns, i) + turn.answer for i, turn in enumerate(self.turns)
        )

    @property
    def answer_prefix(self) -> str:
        """What an answer begins with that is none of its words."""
        return " " if self.template is None else self.template.answer_prefix

    @property
    def num_prompt_tokens(self) -> int:
        """How many tokens of the context the next turn finds taken."""
        return len(self._prompt_tokens(self.turns, self.num_dropped_turns))

    def send(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, a piece for every step of the engine: often empty, whole characters otherwise.

        Whoever has enough closes the iterator; what was said until then is the answer. Raises UserError when the turn
        alone does not fit the context, or what the engine raises; the turns are then as they were.
        """
        return self._generate(self.turns, text)

    def retry(self) -> Generator[str, None, None]:
        """Another answer to what was said last, in place of the one there is; otherwise as `say`."""
        if not self.turns:
            raise UserError("nothing has been said yet")
        return self._generate(self.turns[:-1], self.turns[-1].user_text)

    def undo(self) -> Turn:
        """Take the last turn back. Raises UserError when there is none."""
        if not self.turns:
            raise UserError("nothing has been said yet")
        turn = self.turns.pop()
        self.num_dropped_turns = min(self.num_dropped_turns, len(self.turns))
        return turn

    def reset(self) -> None:
        """Forget all that was said; the settings stay."""
        self.turns, self.num_dropped_turns = [], 0

    def _generate(self, previous_turns: list[Turn], user_text: str) -> Generator[str, None, None]:
        before = self.turns, self.num_dropped_turns
        turns = [*previous_turns, Turn(user_text)]
        forgotten, prompt = self._fit_to_context(turns)
        room = max(1, self.model.config.block_size - len(prompt))
        end = (self.tokenizer.end_of_text,)
        request = GenerationRequest(
            prompt, self.sampling, min(self.max_new_tokens, room), self.seed, self._next_sample_index, end
        )
        answer = self._engine.submit(request)
        self._next_sample_index += 1
        self.turns, self.num_dropped_turns = turns, forgotten
        try:
            yield from self._stream_answer(answer, turns[-1])
        except UserError:
            self.turns, self.num_dropped_turns = before
            raise
        except KeyboardInterrupt:  # in the midst of a step: who knows what the cache holds
            self._engine, answer.finish_reason = Engine(self.model, slots=1), "cancelled"
            raise
        finally:
            self._engine.cancel(answer)
            turns[-1].tokens = self._retokenize(turns[-1].answer, answer.new_tokens)

    def _stream_answer(self, sequence: Sequence, turn: Turn) -> Iterator[str]:
        ends = [f"\n{USER_PREFIX}"] if self.template is None else self.template.stop_strings
        text = TextStream(self.tokenizer, (*self.stop, *ends) if self.roles else self.stop)
        while not sequence.finish_reason:
            tokens = self._engine.step()
            if sequence.error:
                raise sequence.error
            piece = "".join([text.push(token.id) for token in tokens if token.sequence is sequence])
            if text.finish_reason:
                self._engine.cancel(sequence)
            if sequence.finish_reason:
                piece += text.flush()
            turn.answer += piece
            yield piece

    def _fit_to_context(self, turns: list[Turn]) -> tuple[int, list[int]]:
        """How many of the turns to leave out so that an answer has room, and the tokens of the others."""
        context = self.model.config.block_size
        room = context - min(self.max_new_tokens, context // 2)
        forgotten = min(self.num_dropped_turns, len(turns) - 1)
        prompt = self._prompt_tokens(turns, forgotten)
        if len(prompt) > room:
            while forgotten < len(turns) - 1 and len(prompt) > room * 3 // 4:
                forgotten += 1
                prompt = self._prompt_tokens(turns, forgotten)
        return forgotten, prompt

    def _prompt_tokens(self, turns: list[Turn], num_dropped: int) -> list[int]:
        if self.template is not None and turns:
            said = [turn.tokens for turn in turns[num_dropped:]]
            messages = self._messages(turns[num_dropped:])[:-1]  # up to the last answer
            tokens = self.template.encode_prompt(self.tokenizer, messages, said[:-1])
            return (tokens or [self.tokenizer.end_of_text]) + said[-1]
        tokens = self.tokenizer.encode(self._system_prefix())
        for i in range(num_dropped, len(turns)):
            tokens += self.tokenizer.encode(self._format_user_turn(turns, i)) + turns[i].tokens
        return tokens or [self.tokenizer.end_of_text]  # which is what a text begins after

    def _messages(self, turns: list[Turn]) -> list[tuple[str, str]]:
        """The turns as the template wants them."""
        answers = [turn.answer.removeprefix(self.answer_prefix) for turn in turns]
        talk = [(("user", turn.user_text), ("assistant", text)) for turn, text in zip(turns, answers, strict=True)]
        return [("system", self.system)] * bool(self.system) + [message for pair in talk for message in pair]

    def _system_prefix(self) -> str:
        return f"{self.system}\n" if self.system else ""

    def _format_user_turn(self, turns: list[Turn], i: int) -> str:
        """Turn i as the transcript has it, up to its answer."""
        said, first = turns[i].user_text, i == 0 and not self.system
        if self.roles:
            return f"{'' if first else chr(10)}{USER_PREFIX} {said}\n{ASSISTANT_PREFIX}"
        return said if i == 0 or not said or said.startswith(" ") else f"\n{said}"

    def _retokenize(self, text: str, tokens: list[int]) -> list[int]:
        """`tokens` as far as they spell `text`, and the rest of it encoded anew: a stop string may begin in a token."""
        kept = [token for token in tokens if token < self.tokenizer.vocab_size and token != self.tokenizer.end_of_text]
        while kept and not text.startswith(self.tokenizer.decode(kept)):
            kept.pop()
        return kept + self.tokenizer.encode(text[len(self.tokenizer.decode(kept)) :])
