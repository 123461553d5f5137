"""Text to tokens and back: GPT-2's own vocabulary, one trained on your text, or plain bytes.

All three are byte-level. A token is a piece of UTF-8, so there is no text that cannot be encoded, and to
decode is nothing but to join bytes. They differ in the pieces they know:

    gpt2     the 50,256 that OpenAI found in WebText (Radford et al. 2019, section 2.2)
    bpe:N    those found in your own text by the same method, byte-pair encoding (Sennrich et al. 2016)
    bytes    the 256 bytes themselves

Each has one token more, which no text can spell: ``<|endoftext|>``, which stands between documents.
"""

import codecs
import copy
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt2.characters import characters_of
from gpt2.errors import UserError, did_you_mean
from gpt2.files import path_of
from gpt2.vocabulary import (
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    Table,
    added_tokens_beside,
    build_backend,
    cut_long_words,
    cuts_like_gpt2,
    encoding_of,
    extended,
    fingerprint_of,
    gpt2_encoding,
    only_plain_marks,
    read_merges,
    recover_merges,
    symbols_of_json,
    table_of_ids,
    table_of_json,
    unspell,
    without_surrogates,
    write_files,
)

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

GPT2_FINGERPRINT = "a66433cec9b7b05c65088583bc6c7110e4e6babdbb0fb4cf299aca8f31cd176e"

_LONG_SPACE = 500_000  # tiktoken's regular expressions give up on a run of a million spaces
_LONG_SPACE_PATTERN = re.compile(rf"\s{{{_LONG_SPACE}}}")

_log = logging.getLogger("gpt2")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    name: str
    """``"gpt2"``, ``"bytes"`` or ``"bpe"``."""
    vocab_size: int
    """How many ids there are, end-of-text included."""
    end_of_text: int
    """The id of ``<|endoftext|>``."""
    special_tokens: dict[str, int]
    """The tokens that no text can spell, ``<|endoftext|>`` among them, and their ids."""
    fingerprint: str
    """SHA-256, in hex, of the bytes of every id in order: the same vocabulary, the same fingerprint."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The tokens of `text`, in which ``<|endoftext|>`` is 13 plain characters unless `allow_special`."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, in parallel threads where the library can."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, with U+FFFD for bytes that are not UTF-8; an unknown id is a `UserError`."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; an unknown id is a `UserError`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer` and `transformers` read into an existing folder."""
        ...


class _ByteLevelTokenizer(ABC):
    """What the three tokenizers share: all that follows from the table of bytes."""

    name: str

    def __init__(self, table: Table, symbols: Collection[int] = ()) -> None:
        """symbols: those of the added tokens that a text becomes wherever it has them."""
        self._table = table
        self.fingerprint = fingerprint_of(table)
        self.vocab_size = len(table.tokens)
        self.special_tokens = {table.tokens[i].decode(): i for i in sorted(table.added.difference(symbols))}
        self.end_of_text = self.special_tokens[END_OF_TEXT]

    @cached_property
    def _backend(self) -> "tokenizers.Tokenizer":
        """The same tokenizer as the `tokenizers` library has it, which is how it is saved."""
        return build_backend(self._table, recover_merges(self._table))

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        """Any special token; where two begin, the longer one."""
        return re.compile(f"({'|'.join(sorted(map(re.escape, self.special_tokens), key=len, reverse=True))})")

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return self.encode_batch([text])[0]
        parts = self._specials.split(text)  # texts, and between them special tokens
        ids = self.encode_batch(parts[::2])
        return ids[0] + [
            i for name, more in zip(parts[1::2], ids[1:], strict=True) for i in (self.special_tokens[name], *more)
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise UserError(f"token {token} is not in the vocabulary, whose ids are 0 to {self.vocab_size - 1}")
        return self._table.tokens[token]

    def save(self, folder: Path) -> None:
        write_files(self._backend, folder)


class GPT2Tokenizer(_ByteLevelTokenizer):
    """GPT-2's own vocabulary, encoded by tiktoken.

    Without an argument it is the one that tiktoken has in its cache, or downloads into it; when that fails, a
    `UserError` says what to put where by hand.
    """

    name = "gpt2"

    def __init__(self, encoding: "tiktoken.Encoding | None" = None) -> None:
        self._encoding = encoding or gpt2_encoding()
        tokens = [self._encoding.decode_single_token_bytes(i) for i in range(self._encoding.n_vocab)]
        special = frozenset(map(self._encoding.encode_single_token, self._encoding.special_tokens_set))
        super().__init__(Table(tokens, special))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(len(text) >= _LONG_SPACE and _LONG_SPACE_PATTERN.search(text) for text in texts):
            return _encode_with_library(self._backend, texts)  # tiktoken would panic
        if len(texts) == 1:
            return [self._encoding.encode_ordinary(texts[0])]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)


class BPETokenizer(_ByteLevelTokenizer):
    """A byte-level BPE run by the `tokenizers` library: made by `train_bpe`, or read from a `tokenizer.json`.

    A `backend` that is no byte-level BPE, or lacks a byte or ``<|endoftext|>``, is a `ValueError`.
    """

    name = "bpe"

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        spec = json.loads(backend.to_str())
        super().__init__(table_of_json(spec), symbols_of_json(spec))
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([END_OF_TEXT])
        backend.encode_special_tokens = True  # encode their text like any other text, that is
        self._backend = backend

    def __reduce__(self) -> tuple[Any, ...]:
        return BPETokenizer, (self._backend,), {"end_of_text": self.end_of_text}  # forgets encode_special_tokens

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return _encode_with_library(self._backend, texts)


class ByteTokenizer(_ByteLevelTokenizer):
    """The plainest vocabulary: ids 0 to 255 are the bytes, 256 is ``<|endoftext|>``, and then come `others` like it."""

    name = "bytes"

    def __init__(self, others: Sequence[str] = ()) -> None:
        special = [text.encode() for text in (END_OF_TEXT, *others)]
        table = Table([*(bytes([b]) for b in range(256)), *special], frozenset(range(256, 256 + len(special))))
        super().__init__(table)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(without_surrogates(text).encode()) for text in texts]


class StreamDecoder:
    """Tokens in, whole characters out: one whose bytes span two tokens waits for the second.

    What all calls of `push` and a last `flush` return, joined, is `tokenizer.decode` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that became whole with `token`: often its own, sometimes none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD when the last character never became whole, else nothing."""
        return self._utf8.decode(b"", final=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn a byte-level BPE: again and again, the pair of tokens seen most often becomes a token.

    `vocab_size` counts the 256 bytes, which come first, and ``<|endoftext|>``, which comes last; one outside
    257 to 65,536 is a `UserError`. Only pairs seen twice are merged, so short texts give a smaller vocabulary
    and a warning in the log. A word of more than 1,000 characters counts as several. The same texts always give
    the same vocabulary.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"a BPE vocabulary has 257 to {MAX_VOCAB_SIZE} tokens, not {vocab_size}")
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in cut_long_words(without_surrogates(text)))
    learner.train_from_iterator(pieces, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokens = [unspell(letters) for letters in sorted(learned["vocab"], key=learned["vocab"].__getitem__)]
    merges = [(unspell(left), unspell(right)) for left, right in learned["merges"]]
    if len(tokens) + 1 < vocab_size:
        _log.warning("the text is enough for a vocabulary of %d tokens, not %d", len(tokens) + 1, vocab_size)
    table = Table([*tokens, END_OF_TEXT.encode()], frozenset({len(tokens)}))
    return BPETokenizer(build_backend(table, merges))


def with_special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The same tokenizer with more tokens that no text can spell, such as ``<|user|>``; their ids come last.

    Raises UserError for a text that is empty, there already, or overlaps ``<|endoftext|>``, and beyond 65,536 tokens.
    """
    if not isinstance(tokenizer, _ByteLevelTokenizer):
        raise TypeError(f"{type(tokenizer).__name__} is none of this module's tokenizers")
    table = extended(tokenizer._table, texts)
    if isinstance(tokenizer, BPETokenizer):
        backend = copy.deepcopy(tokenizer._backend)
        backend.add_special_tokens(list(texts))
        return BPETokenizer(backend)
    return GPT2Tokenizer(encoding_of(table)) if isinstance(tokenizer, GPT2Tokenizer) else _bytes_of(table)


def with_symbols(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The same tokenizer with more words: wherever a text has one of these, it is that token; their ids come last.

    Raises UserError as `with_special_tokens` does.
    """
    if not isinstance(tokenizer, _ByteLevelTokenizer):
        raise TypeError(f"{type(tokenizer).__name__} is none of this module's tokenizers")
    from tokenizers import AddedToken

    extended(tokenizer._table, texts)  # for its errors
    backend = copy.deepcopy(tokenizer._backend)
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    return BPETokenizer(backend)


def get_tokenizer(ref: str | Path) -> Tokenizer:
    """The tokenizer called ``gpt2`` or ``bytes``, or the one in a folder; anything else is a `UserError`."""
    if ref == "gpt2":
        return GPT2Tokenizer()
    if ref == "bytes":
        return ByteTokenizer()
    if isinstance(ref, str) and ref.split(":")[0] == "bpe":
        raise UserError(
            f"tokenizer '{ref}' does not exist before it is trained on the data, which `gpt2 train` and "
            "`gpt2 data prepare` do: afterwards, name the folder that holds it"
        )
    folder = path_of(ref)
    if not folder.is_dir():
        hint = did_you_mean(str(ref), ["gpt2", "bytes", "bpe:N"])
        raise UserError(f"no tokenizer '{ref}'{hint}: there are gpt2, bytes, bpe:N, and folders with tokenizer files")
    tokenizer = load_tokenizer(folder) or load_tokenizer(folder / "model")  # of a run
    if tokenizer is None:
        raise UserError(f"no tokenizer in {folder}: it has neither tokenizer.json nor vocab.json with merges.txt")
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer whose files lie in `folder`, or None when there are none.

    `tokenizer.json` is read where there is one, else `vocab.json` with `merges.txt`, which OpenAI called
    `encoder.json` and `vocab.bpe`. GPT-2's vocabulary and
    the plain bytes are known by what they hold, and need no merges. A file that is broken, or no byte-level
    BPE, is a `UserError` that names it.
    """
    readers = {"tokenizer.json": _load_tokenizer_json, "vocab.json": _load_vocab_json, "encoder.json": _load_vocab_json}
    for name, load in readers.items():
        path = folder / name
        if path.is_file():
            try:
                return load(path)
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"cannot use {path}: {error}") from error
    return None


def _load_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`, or a `ValueError` that says what is wrong with the file."""
    import tokenizers

    text = path.read_text(encoding="utf-8")
    spec = json.loads(text)
    if characters := characters_of(spec):
        return characters
    table = table_of_json(spec)
    if cuts_like_gpt2(spec) and only_plain_marks(spec) and (known := _known_tokenizer(table)):
        return known
    with _library_errors():
        backend = tokenizers.Tokenizer.from_str(text)
    return BPETokenizer(backend)


def _load_vocab_json(path: Path) -> Tokenizer:
    """The tokenizer in a `vocab.json`, or a `ValueError`; a `UserError` when a file beside it is at fault."""
    marks = added_tokens_beside(path)
    ids = json.loads(path.read_text(encoding="utf-8"))
    table = table_of_ids({**ids, **marks} if isinstance(ids, dict) else ids, added={END_OF_TEXT, *marks})
    if known := _known_tokenizer(table):
        return known
    merges_path = path.with_name("vocab.bpe" if path.name == "encoder.json" else "merges.txt")  # OpenAI's names
    try:
        merges = read_merges(merges_path)
        made = {left + right for left, right in merges}
        for i, token in enumerate(table.tokens):
            if len(token) > 1 and token not in made and i not in table.added:
                raise ValueError(f"no merge in it makes token {i} of vocab.json; is it cut short?")
        with _library_errors():
            backend = build_backend(table, merges)
        return BPETokenizer(backend)
    except FileNotFoundError:
        raise UserError(f"no {merges_path}, without which vocab.json is of no use") from None
    except ValueError as error:
        raise UserError(f"cannot use {merges_path}: {error}") from error


def tokenizer_of(
    tokens: Sequence[str], merges: Iterable[tuple[str, str]], special: Sequence[int] = (), symbols: Sequence[int] = ()
) -> Tokenizer:
    """The tokenizer of a list of tokens and merges, spelled as in `vocab.json`.

    special: ids of the tokens that no text can spell; symbols: of those that a text becomes wherever it has them.
    Raises ValueError for what is no byte-level BPE.
    """
    from tokenizers import Tokenizer as Backend

    added = {tokens[i] for i in (*special, *symbols)} | {END_OF_TEXT}
    if len(set(tokens)) != len(tokens):
        raise ValueError("a token is there twice")
    table = table_of_ids({token: i for i, token in enumerate(tokens)}, added)
    if not symbols and (known := _known_tokenizer(table)):
        return known
    known_tokens = {token for i, token in enumerate(table.tokens) if i not in table.added}
    pairs = [(unspell(left), unspell(right)) for left, right in merges if left not in added]
    for left, right in pairs:
        if not known_tokens.issuperset((left, right, left + right)):
            raise ValueError(f"a merge makes {(left + right)!r} of {left!r} and {right!r}, not all of which are tokens")
    with _library_errors():
        spec = json.loads(build_backend(table, pairs).to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["id"] not in symbols
        backend = Backend.from_str(json.dumps(spec))
    return BPETokenizer(backend)


@contextmanager
def _library_errors() -> Iterator[None]:
    """Make what `tokenizers` raises a ValueError: it has nothing more precise, and panics of Rust in between."""
    try:
        yield
    except Exception as error:
        raise ValueError(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panicked: {error}") from error


def fitted(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer without the added tokens for which a model of `vocab_size` has no embedding.

    Raises ValueError when ordinary tokens are among them, so that it is the tokenizer of another model.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    table = tokenizer._table if isinstance(tokenizer, _ByteLevelTokenizer) else None
    if table is None or not table.added.issuperset(range(vocab_size, len(table.tokens))):
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    left = Table(table.tokens[:vocab_size], frozenset(i for i in table.added if i < vocab_size))
    if not isinstance(tokenizer, BPETokenizer):
        return GPT2Tokenizer(encoding_of(left)) if isinstance(tokenizer, GPT2Tokenizer) else _bytes_of(left)
    from tokenizers import Tokenizer as Backend

    spec = json.loads(tokenizer._backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < vocab_size]
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if i < vocab_size}
    return BPETokenizer(Backend.from_str(json.dumps(spec)))


def ending_with(tokenizer: Tokenizer, token: int) -> Tokenizer:
    """The same tokenizer, of which a text ends with another of its special tokens, as a model may want."""
    other = copy.copy(tokenizer)
    other.end_of_text = token
    return other


def _known_tokenizer(table: Table) -> Tokenizer | None:
    """GPT-2's tokenizer or the bytes, if that is what the table holds up to ``<|endoftext|>``, with more like it."""
    size = table.tokens.index(END_OF_TEXT.encode()) + 1
    if not table.added.issuperset(range(size, len(table.tokens))):
        return None
    fingerprint = fingerprint_of(Table(table.tokens[:size], frozenset(i for i in table.added if i < size)))
    if fingerprint == GPT2_FINGERPRINT:
        return GPT2Tokenizer(encoding_of(table))
    return _bytes_of(table) if fingerprint == ByteTokenizer().fingerprint else None


def _bytes_of(table: Table) -> ByteTokenizer:
    return ByteTokenizer([token.decode() for token in table.tokens[257:]])


def _encode_with_library(backend: "tokenizers.Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    whole = [without_surrogates(text) for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(whole, add_special_tokens=False)]
