"""The tokenizers: GPT-2's own, BPE, and plain bytes. They encode, decode, and save their files.

`gpt2.tokenizer` makes them: by name, from files, or trained on your text.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt2.checks import check_integer, check_text
from gpt2.errors import RequestError
from gpt2.vocabulary import (
    END_OF_TEXT,
    Vocabulary,
    build_backend,
    gpt2_encoding,
    non_special_added_ids,
    recover_merges,
    replace_surrogates,
    split_long_whitespace,
    tiktoken_encoding,
    vocabulary_fingerprint,
    vocabulary_from_tokenizer_json,
    with_prompt_prefix,
    write_tokenizer_files,
)

if TYPE_CHECKING:
    import numpy as np
    import tiktoken
    import tokenizers

_NOT_UTF8 = b"\xff"  # a byte that UTF-8 does not have


class Tokenizer(Protocol):
    """The interface of every tokenizer."""

    name: str
    """``"gpt2"``, ``"bytes"`` or ``"bpe"``."""
    vocab_size: int
    """Number of ids, including added tokens."""
    end_of_text: int
    """The id of the token between documents: ``<|endoftext|>``, or what stands for it."""
    end_tokens: tuple[int, ...]
    """The ids that end a generated text: those that the model folder names, else `end_of_text`."""
    prompt_prefix: tuple[int, ...]
    """The ids that precede every prompt: of a tokenizer with `add_bos_token`, the token `bos_token`."""
    special_tokens: dict[str, int]
    """The tokens that ordinary text never encodes to, including ``<|endoftext|>``, and their ids."""
    fingerprint: str
    """SHA-256, in hex, of the vocabulary: the bytes of every id in order."""

    def __len__(self) -> int:
        """`vocab_size`."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The tokens of `text`. Without `allow_special`, the text of a special token is ordinary characters.

        Raises RequestError for anything but a str.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, in parallel threads if the library can."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, with U+FFFD for bytes that are not UTF-8. Raises RequestError for an unknown id."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token. Raises RequestError for an unknown id."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer` and `transformers` read into an existing folder."""
        ...


class ByteLevelTokenizer(ABC):
    """What the three tokenizers share: everything that depends on the vocabulary only."""

    name: str

    def __init__(
        self, vocabulary: Vocabulary, non_special_ids: Collection[int] = (), end_of_text: str = END_OF_TEXT
    ) -> None:
        """non_special_ids: added tokens that are matched in ordinary text. end_of_text: the text of that token."""
        self._vocabulary, self._end_of_text = vocabulary, end_of_text
        self.fingerprint = vocabulary_fingerprint(vocabulary)
        self.vocab_size = len(vocabulary.tokens)
        self.special_tokens = {
            vocabulary.tokens[i].decode(): i for i in sorted(vocabulary.added_ids.difference(non_special_ids))
        }
        self.end_of_text = self.special_tokens[end_of_text]
        self.end_tokens: tuple[int, ...] = (self.end_of_text,)
        self.prompt_prefix: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.vocab_size:,} tokens, ends {list(self.end_tokens)}>"

    @cached_property
    def _backend(self) -> "tokenizers.Tokenizer":
        """The same tokenizer as an object of the `tokenizers` library, to save it."""
        return build_backend(self._vocabulary, recover_merges(self._vocabulary))

    @cached_property
    def _special_token_pattern(self) -> re.Pattern[str]:
        """Matches any special token; of two at one position, the longer one."""
        return re.compile(f"({'|'.join(sorted(map(re.escape, self.special_tokens), key=len, reverse=True))})")

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        check_text("text", text)
        if not allow_special:
            return self.encode_batch([text])[0]
        parts = self._special_token_pattern.split(text)  # texts, with special tokens between them
        first, *others = self.encode_batch(parts[::2])
        for special, ids in zip(parts[1::2], others, strict=True):
            first += [self.special_tokens[special], *ids]
        return first

    def encode_pieces(self, pieces: Sequence[str | None]) -> "np.ndarray":
        """The tokens of the pieces one after the other, each encoded by itself; None is the end-of-text token."""
        import numpy as np

        tokens = array("I")
        ids = iter(self.encode_batch([piece for piece in pieces if piece is not None]))
        for piece in pieces:
            if piece is None:
                tokens.append(self.end_of_text)
            else:
                tokens.extend(next(ids))
        return np.frombuffer(tokens, np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        check_integer("token", token)
        if not 0 <= token < self.vocab_size:
            message = f"token {token} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}"
            raise RequestError(message, field="token")
        return self._vocabulary.tokens[token]

    def save(self, folder: Path) -> None:
        write_tokenizer_files(with_prompt_prefix(self._backend, self.prompt_prefix), folder, self._end_of_text)


class GPT2Tokenizer(ByteLevelTokenizer):
    """GPT-2's own vocabulary, encoded by tiktoken.

    Without an argument, it is read from tiktoken's cache, after a download on first use. Raises ModelFilesError if that
    fails.
    """

    name = "gpt2"

    def __init__(self, encoding: "tiktoken.Encoding | None" = None) -> None:
        self._encoding = encoding or gpt2_encoding()
        tokens = [self._encoding.decode_single_token_bytes(i) for i in range(self._encoding.n_vocab)]
        special = frozenset(map(self._encoding.encode_single_token, self._encoding.special_tokens_set))
        super().__init__(Vocabulary(tokens, special))

    @cached_property
    def _whitespace_encoding(self) -> "tiktoken.Encoding":
        return tiktoken_encoding(self._vocabulary, r"\s+")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(map(_has_long_whitespace, texts)):
            return [self._encode_array(text).tolist() for text in texts]
        if len(texts) == 1:
            return [self._encoding.encode_ordinary(texts[0])]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def _encode_array(self, text: str) -> "np.ndarray":
        parts = [
            (self._whitespace_encoding if is_whitespace else self._encoding).encode_to_numpy(
                replace_surrogates(part), disallowed_special=()
            )
            for part, is_whitespace in split_long_whitespace(text)
        ]
        if len(parts) == 1:
            return parts[0]
        import numpy as np

        return np.concatenate(parts)

    def encode_pieces(self, pieces: Sequence[str | None]) -> "np.ndarray":
        """See `ByteLevelTokenizer`. Neighbours with the end-of-text token between them are one call of tiktoken."""
        import numpy as np

        parts: list[np.ndarray] = []
        start = 0
        for i in range(1, len(pieces) + 1):
            if i == len(pieces) or (pieces[i] is not None and pieces[i - 1] is not None):
                parts.append(self._encode_run(pieces[start:i]))
                start = i
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts])

    def _encode_run(self, pieces: Sequence[str | None]) -> "np.ndarray":
        """`encode_pieces` without neighbours that are both text."""
        text = "".join([END_OF_TEXT if piece is None else piece for piece in pieces])
        if text.count(END_OF_TEXT) != pieces.count(None) or _has_long_whitespace(text):
            return super().encode_pieces(pieces)
        return self._encoding.encode_to_numpy(
            replace_surrogates(text), allowed_special={END_OF_TEXT}, disallowed_special=()
        )


class BPETokenizer(ByteLevelTokenizer):
    """A byte-level BPE of the `tokenizers` library: from `train_bpe`, or from a `tokenizer.json`.

    Raises ValueError for a `backend` that is not byte-level BPE, or lacks a byte or the token `end_of_text`.
    """

    name = "bpe"

    def __init__(self, backend: "tokenizers.Tokenizer", end_of_text: str = END_OF_TEXT) -> None:
        spec = json.loads(backend.to_str())
        vocabulary = vocabulary_from_tokenizer_json(spec, end_of_text)
        super().__init__(vocabulary, non_special_added_ids(spec), end_of_text)
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([end_of_text])
        backend.encode_special_tokens = True  # that is: encode their text like any other text
        self._backend = backend

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"end_tokens": self.end_tokens, "prompt_prefix": self.prompt_prefix}
        return BPETokenizer, (self._backend, self._end_of_text), state  # a pickled backend loses encode_special_tokens

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return _encode_with_backend(self._backend, texts)


class ByteTokenizer(ByteLevelTokenizer):
    """Ids 0 to 255 are the bytes, 256 is ``<|endoftext|>``, and the extra special tokens follow."""

    name = "bytes"

    def __init__(self, extra_special_tokens: Sequence[str] = ()) -> None:
        special = [text.encode() for text in (END_OF_TEXT, *extra_special_tokens)]
        tokens = [*(bytes([b]) for b in range(256)), *special]
        super().__init__(Vocabulary(tokens, frozenset(range(256, len(tokens)))))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(replace_surrogates(text).encode()) for text in texts]

    def encode_pieces(self, pieces: Sequence[str | None]) -> "np.ndarray":
        import numpy as np

        data = [_NOT_UTF8 if piece is None else replace_surrogates(piece).encode() for piece in pieces]
        tokens = np.frombuffer(b"".join(data), np.uint8).astype(np.uint16)
        tokens[tokens == _NOT_UTF8[0]] = self.end_of_text
        return tokens


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[str | None]) -> "np.ndarray":
    """The tokens of the pieces one after the other, unsigned; None is the end-of-text token."""
    import numpy as np

    if isinstance(tokenizer, ByteLevelTokenizer):
        return tokenizer.encode_pieces(pieces)
    end = [tokenizer.end_of_text]
    ids = iter(tokenizer.encode_batch([piece for piece in pieces if piece is not None]))
    return np.array([token for piece in pieces for token in (end if piece is None else next(ids))], np.uint32)


def _has_long_whitespace(text: str) -> bool:
    return any(is_whitespace for _, is_whitespace in split_long_whitespace(text))


def _encode_with_backend(backend: "tokenizers.Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    valid = [replace_surrogates(text) for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(valid, add_special_tokens=False)]
