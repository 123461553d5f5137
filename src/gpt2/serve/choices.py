"""One choice of a response: generated tokens to text, finish reason and log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpt2.generation.engine import SampledToken
from gpt2.generation.text import TextStream
from gpt2.serve.prompt_logprobs import TokenLogprob
from gpt2.serve.schema import FinishReason
from gpt2.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class ChoiceDelta:
    """The next part of a choice: text that is certain, the tokens it belongs to, and in the last one why it ended."""

    index: int
    text: str
    token_logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None = None


class Choice:
    """One generated text of a response. The deltas of `push` and a last `finish`, joined, are all of it.

    A token is part of the delta in which its text begins. Text that may turn out to be the beginning of a stop string
    is held back, and so are its tokens; those of a stop string are never part of a delta. The end-of-text token has
    no text.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.index = index
        self._stream = TextStream(tokenizer, stop)
        self._decoder = StreamDecoder(tokenizer)
        self._tokenizer = tokenizer
        self._num_characters = 0  # including text that is held back
        self._held_back: list[TokenLogprob] = []
        self.text = ""
        self.token_logprobs: list[TokenLogprob] = []
        self.num_tokens = 0
        """New tokens, including the end-of-text token and those that are held back."""
        self.finish_reason: FinishReason | None = None

    def echo(self, text: str, token_logprobs: Sequence[TokenLogprob], offsets: Sequence[int]) -> ChoiceDelta:
        """Begin the choice with its prompt."""
        self._num_characters = len(text)
        self._held_back = [replace(one, offset=offset) for one, offset in zip(token_logprobs, offsets, strict=True)]
        return self._emit(text, all_tokens=True)

    def push(self, token: SampledToken) -> ChoiceDelta:
        """Add a new token. The delta may be empty; it has the finish reason if the token ends the text."""
        self.num_tokens += 1
        self._held_back.append(TokenLogprob(token.id, token.logprob, token.top_logprobs, self._num_characters))
        if token.id < self._tokenizer.vocab_size and token.id != self._tokenizer.end_of_text:
            self._num_characters += len(self._decoder.push(token.id))
        text = self._stream.push(token.id)
        self.finish_reason = "stop" if self._stream.finish_reason else None
        stop_string = self._num_characters > len(self.text) + len(text)  # and not the end-of-text token
        return self._emit(text, all_tokens=self.finish_reason is not None and not stop_string)

    def finish(self) -> ChoiceDelta:
        """The last delta, with what was held back, when the sequence has its length and no token has ended it."""
        self.finish_reason = "length"
        return self._emit(self._stream.flush(), all_tokens=True)

    def _emit(self, text: str, all_tokens: bool) -> ChoiceDelta:
        """`text` with the tokens that begin in it, or with all that are held back."""
        end = len(self.text) + len(text)
        tokens = [one for one in self._held_back if all_tokens or one.offset < end]
        self._held_back = self._held_back[len(tokens) :]
        self.text += text
        self.token_logprobs += tokens
        return ChoiceDelta(self.index, text, tokens, self.finish_reason)


def format_token(tokenizer: Tokenizer, token: int) -> str:
    """A token as OpenAI writes it: its text, or ``bytes:\\xe2\\x82`` where that is not valid UTF-8."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    spelling = tokenizer.token_bytes(token)
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
