"""Multi-turn chat with a language model.

Plain GPT-2 has no chat format, so the conversation is written as a transcript that the model continues:

    The system text, if there is one.
    <empty line>
    User: the user's message
    Assistant: the model's answer, up to the point where it begins a line with "User:"
    User: ...

A model that was fine-tuned on a chat template gets its prompts from that template, which also gives the stop strings.

Without roles the transcript is one text: a user message begins a new line, or continues the last line if it begins with
a space; an empty message lets the model continue.

The tokens of earlier turns never change, and an engine with one slot serves the conversation: its prefix cache holds
the earlier turns, so that only new tokens are prefilled.
"""

from collections import abc
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from gpt2.errors import RequestError, UserError
from gpt2.generation.defaults import MAX_NEW_TOKENS
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel, Sequence
from gpt2.generation.sampling import Sampling, resolve_seed
from gpt2.generation.text import TextStream, check_stop_strings, make_sampling, require_tokenizer
from gpt2.templates import ASSISTANT_PREFIX, USER_PREFIX, ChatTemplate
from gpt2.tokenizer import Tokenizer


@dataclass
class Turn:
    """A user message and the model's answer, as text and as token ids."""

    user_text: str
    answer: str = ""
    tokens: list[int] = field(default_factory=list)


class Conversation:
    """The turns of a conversation: `send` a message and iterate over the answer.

        conversation = Conversation(model, tokenizer, Sampling(temperature=0.8), seed=1)
        for piece in conversation.send("Where is the library?"):
            print(piece, end="")

    sampling, max_new_tokens, stop, seed, system: may be changed between two turns. The same seed gives the same answers
    to the same messages, and another answer to each `retry`.
    template: the model's chat template; None for the transcript above. Ignored without roles.
    num_dropped_turns: how many of the oldest turns are no longer part of the prompt.

    When prompt and answer do not fit the context, the oldest turns are dropped until the rest takes at most three
    quarters of the room: each time, the rest must be prefilled again.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: abc.Sequence[str] = (),
        seed: int | None = None,
        system: str = "",
        roles: bool = True,
        template: ChatTemplate | None = None,
    ) -> None:
        check_stop_strings(stop)
        self.model, self.tokenizer, self.roles = model, require_tokenizer(tokenizer), roles
        self.template = template if roles else None
        self.sampling = make_sampling({}, sampling)
        self.max_new_tokens, self.stop, self.system = max_new_tokens, tuple(stop), system
        self.turns: list[Turn] = []
        self.num_dropped_turns = 0
        self.seed = resolve_seed(seed)
        self._engine = Engine(model, slots=1)

    @property
    def seed(self) -> int:
        """The seed of all random numbers. Setting it restarts the random streams; -1 draws a new seed."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed, self._next_sample_index = resolve_seed(seed), 0

    @property
    def transcript(self) -> str:
        """The whole conversation as text, dropped turns included."""
        if self.template is not None:
            return self.template.render(self._messages(self.turns)) if self.turns else ""
        return self._system_prefix() + "".join(
            self._format_user_turn(self.turns, i) + turn.answer for i, turn in enumerate(self.turns)
        )

    @property
    def answer_prefix(self) -> str:
        """The fixed text that every answer begins with."""
        return " " if self.template is None else self.template.answer_prefix

    @property
    def num_prompt_tokens(self) -> int:
        """The number of prompt tokens before the next message."""
        return len(self._prompt_tokens(self.turns, self.num_dropped_turns))

    def send(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to `text`, one piece for every step of the engine: whole characters, often none.

        Closing the iterator ends the answer there. Raises RequestError if the turn alone does not fit the context, and
        any UserError of the engine; the turns are then unchanged.
        """
        return self._generate(self.turns, text)

    def retry(self) -> Generator[str, None, None]:
        """Replace the last answer by another one; otherwise as `send`."""
        if not self.turns:
            raise RequestError("there is no turn yet")
        return self._generate(self.turns[:-1], self.turns[-1].user_text)

    def undo(self) -> Turn:
        """Remove and return the last turn. Raises RequestError if there is none."""
        if not self.turns:
            raise RequestError("there is no turn yet")
        turn = self.turns.pop()
        self.num_dropped_turns = min(self.num_dropped_turns, len(self.turns))
        return turn

    def reset(self) -> None:
        """Remove all turns; the settings stay."""
        self.turns, self.num_dropped_turns = [], 0

    def _generate(self, previous_turns: list[Turn], user_text: str) -> Generator[str, None, None]:
        before = self.turns, self.num_dropped_turns
        turns = [*previous_turns, Turn(user_text)]
        num_dropped, prompt = self._fit_to_context(turns)
        room = max(1, self.model.config.block_size - len(prompt))
        end_tokens, max_new_tokens = self.tokenizer.end_tokens, min(self.max_new_tokens, room)
        request = GenerationRequest(
            prompt, self.sampling, max_new_tokens, self.seed, self._next_sample_index, end_tokens
        )
        answer = self._engine.submit(request)
        self._next_sample_index += 1
        self.turns, self.num_dropped_turns = turns, num_dropped
        try:
            yield from self._stream_answer(answer, turns[-1])
        except UserError:
            self.turns, self.num_dropped_turns = before
            raise
        except KeyboardInterrupt:  # during a step: the state of the cache is unknown
            self._engine, answer.finish_reason = Engine(self.model, slots=1), "cancelled"
            raise
        finally:
            self._engine.cancel(answer)
            turns[-1].tokens = self._retokenize(turns[-1].answer, answer.new_tokens)

    def _stream_answer(self, sequence: Sequence, turn: Turn) -> Iterator[str]:
        stop = [f"\n{USER_PREFIX}"] if self.template is None else self.template.stop_strings
        stop = (*self.stop, *stop) if self.roles else self.stop
        text = TextStream(self.tokenizer, stop, min_tokens=self.sampling.min_new_tokens)
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
        """(number of turns to drop so that an answer has room, prompt tokens of the others)"""
        context = self.model.config.block_size
        room = context - min(self.max_new_tokens, context // 2)
        num_dropped = min(self.num_dropped_turns, len(turns) - 1)
        prompt = self._prompt_tokens(turns, num_dropped)
        if len(prompt) > room:
            while num_dropped < len(turns) - 1 and len(prompt) > room * 3 // 4:
                num_dropped += 1
                prompt = self._prompt_tokens(turns, num_dropped)
        return num_dropped, prompt

    def _prompt_tokens(self, turns: list[Turn], num_dropped: int) -> list[int]:
        if self.template is not None and turns:
            answers = [turn.tokens for turn in turns[num_dropped:]]
            messages = self._messages(turns[num_dropped:])[:-1]  # up to the last answer
            tokens = self.template.encode_prompt(self.tokenizer, messages, answers[:-1])
            return (tokens or [self.tokenizer.end_of_text]) + answers[-1]
        tokens = self.tokenizer.encode(self._system_prefix())
        for i in range(num_dropped, len(turns)):
            tokens += self.tokenizer.encode(self._format_user_turn(turns, i)) + turns[i].tokens
        return tokens or [self.tokenizer.end_of_text]  # as before every training document

    def _messages(self, turns: list[Turn]) -> list[tuple[str, str]]:
        """The turns as (role, text) messages for the template."""
        answers = [turn.answer.removeprefix(self.answer_prefix) for turn in turns]
        pairs = [(("user", turn.user_text), ("assistant", text)) for turn, text in zip(turns, answers, strict=True)]
        return [("system", self.system)] * bool(self.system) + [message for pair in pairs for message in pair]

    def _system_prefix(self) -> str:
        return f"{self.system}\n" if self.system else ""

    def _format_user_turn(self, turns: list[Turn], i: int) -> str:
        """Turn i in the transcript, up to its answer."""
        text, first = turns[i].user_text, i == 0 and not self.system
        if self.roles:
            return f"{'' if first else chr(10)}{USER_PREFIX} {text}\n{ASSISTANT_PREFIX}"
        return text if i == 0 or not text or text.startswith(" ") else f"\n{text}"

    def _retokenize(self, text: str, tokens: list[int]) -> list[int]:
        """The longest prefix of `tokens` that spells a prefix of `text`, and the rest of `text` encoded.

        A stop string may begin inside a token.
        """
        ends = self.tokenizer.end_tokens
        kept = [token for token in tokens if token < self.tokenizer.vocab_size and token not in ends]
        while kept and not text.startswith(self.tokenizer.decode(kept)):
            kept.pop()
        return kept + self.tokenizer.encode(text[len(self.tokenizer.decode(kept)) :])
