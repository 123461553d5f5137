"""Tokens to what a client reads: the text of one choice, why it ended, and the log-probabilities beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2.generation.engine import SampledToken, TopLogprobs
from gpt2.generation.text import TextStream
from gpt2.serve.prompt_logprobs import PromptLogprob
from gpt2.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A token, and where in the text it begins (in characters)."""

    id: int
    logprob: float | None
    top_logprobs: TopLogprobs
    offset: int


ChoiceDelta = tuple[str, list[TokenLogprob]]


class Choice:
    """One text on its way. What `push` and a last `finish` give, joined, is `text` and `said`.

    A token is given out with the text that it begins in, once that is certain; of those that begin a stop string
    nothing is ever said. The end of the text is a token without text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer, stop)
        self._decoder = StreamDecoder(tokenizer)
        self._tokenizer = tokenizer
        self._num_characters = 0  # characters, those that are held back too
        self._held_back: list[TokenLogprob] = []
        self.text = ""
        self.token_logprobs: list[TokenLogprob] = []
        self.num_tokens = 0
        """How many were made, the end of the text among them."""
        self.finish_reason: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string or the end of the text was met."""
        return self._stream.finish_reason is not None

    def echo(self, text: str, prompt_logprobs: Sequence[PromptLogprob], offsets: Sequence[int]) -> ChoiceDelta:
        """Begin with the prompt."""
        said = [
            TokenLogprob(one.id, one.logprob, one.top_logprobs, at)
            for one, at in zip(prompt_logprobs, offsets, strict=True)
        ]
        self._num_characters = len(text)
        return self._emit(text, said)

    def push(self, token: SampledToken) -> ChoiceDelta:
        """What became certain with a token."""
        self.num_tokens += 1
        self._held_back.append(TokenLogprob(token.id, token.logprob, token.top_logprobs, self._num_characters))
        if token.id < self._tokenizer.vocab_size and token.id != self._tokenizer.end_of_text:
            self._num_characters += len(self._decoder.push(token.id))
        return self._emit_ready(self._stream.push(token.id))

    def finish(self, reason: str) -> ChoiceDelta:
        """What is left, now that it has ended: "stop" or "length"."""
        self.finish_reason = "stop" if self.stopped else reason
        by_string = self.stopped and self._num_characters > len(self.text)
        piece = self._stream.flush()
        if by_string:
            return self._emit_ready(piece)
        held, self._held_back = self._held_back, []
        return self._emit(piece, held)

    def _emit_ready(self, text: str) -> ChoiceDelta:
        shown = len(self.text) + len(text)
        ready = [said for said in self._held_back if said.offset < shown]
        self._held_back = self._held_back[len(ready) :]
        return self._emit(text, ready)

    def _emit(self, text: str, token_logprobs: list[TokenLogprob]) -> ChoiceDelta:
        self.text += text
        self.token_logprobs += token_logprobs
        return text, token_logprobs


def format_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as OpenAI writes it: its text, or ``bytes:\\xe2\\x82`` where it is no whole characters."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    spelling = tokenizer.token_bytes(token)
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
