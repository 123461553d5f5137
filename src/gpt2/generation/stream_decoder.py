"""Incremental decoding of tokens to text."""

import codecs

from gpt2.tokenizer import Tokenizer


class StreamDecoder:
    """Incremental decoding: a character whose bytes span several tokens is returned with the last of them.

    The concatenated results of all `push` calls and a final `flush` equal `tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that is complete with `token`, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def is_broken_by(self, token: int) -> bool:
        """Return whether the last character is incomplete and `token` does not continue it: U+FFFD comes before it."""
        waiting = self._utf8.getstate()[0]
        try:
            codecs.getincrementaldecoder("utf-8")().decode(waiting + self._tokenizer.token_bytes(token)[:1])
        except UnicodeDecodeError:
            return bool(waiting)
        return False

    def flush(self) -> str:
        """The rest: U+FFFD if the last character is incomplete, else the empty string."""
        return self._utf8.decode(b"", final=True)
