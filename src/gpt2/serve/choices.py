"""Tokens to what a client reads: the text of one choice, why it ended, and the log-probabilities beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2.generation.engine import Alternatives, Token
from gpt2.generation.text import TextStream
from gpt2.serve.prompt_logprobs import Scored
from gpt2.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Said:
    """A token, and where in the text it begins (in characters)."""

    id: int
    logprob: float | None
    alternatives: Alternatives
    offset: int


Piece = tuple[str, list[Said]]


class Choice:
    """One text on its way. What `push` and a last `finish` give, joined, is `text` and `said`.

    A token is given out with the text that it begins in, once that is certain; of those that begin a stop string
    nothing is ever said. The end of the text is a token without text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer, stop)
        self._decoder = StreamDecoder(tokenizer)
        self._tokenizer = tokenizer
        self._read = 0  # characters, those that are held back too
        self._held: list[Said] = []
        self.text = ""
        self.said: list[Said] = []
        self.tokens = 0
        """How many were made, the end of the text among them."""
        self.finish_reason: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string or the end of the text was met."""
        return self._stream.finished is not None

    def echo(self, text: str, scored: Sequence[Scored], offsets: Sequence[int]) -> Piece:
        """Begin with the prompt."""
        said = [Said(one.id, one.logprob, one.alternatives, at) for one, at in zip(scored, offsets, strict=True)]
        self._read = len(text)
        return self._give(text, said)

    def push(self, token: Token) -> Piece:
        """What became certain with a token."""
        self.tokens += 1
        self._held.append(Said(token.id, token.logprob, token.alternatives, self._read))
        if token.id < self._tokenizer.vocab_size and token.id != self._tokenizer.end_of_text:
            self._read += len(self._decoder.push(token.id))
        return self._certain(self._stream.push(token.id))

    def finish(self, reason: str) -> Piece:
        """What is left, now that it has ended: "stop" or "length"."""
        self.finish_reason = "stop" if self.stopped else reason
        by_string = self.stopped and self._read > len(self.text)
        piece = self._stream.flush()
        if by_string:
            return self._certain(piece)
        held, self._held = self._held, []
        return self._give(piece, held)

    def _certain(self, piece: str) -> Piece:
        shown = len(self.text) + len(piece)
        ready = [said for said in self._held if said.offset < shown]
        self._held = self._held[len(ready) :]
        return self._give(piece, ready)

    def _give(self, piece: str, said: list[Said]) -> Piece:
        self.text += piece
        self.said += said
        return piece, said


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as OpenAI writes it: its text, or ``bytes:\\xe2\\x82`` where it is no whole characters."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    spelling = tokenizer.token_bytes(token)
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
