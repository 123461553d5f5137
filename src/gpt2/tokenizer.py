"""Text to tokens and back: GPT-2's own vocabulary, one trained on your text, or plain bytes.

All three are byte-level: a token is a piece of UTF-8, so every text can be encoded, and decoding concatenates bytes.

    gpt2     the 50,256 tokens that OpenAI trained on WebText (Radford et al. 2019, section 2.2)
    bpe:N    tokens trained on your text by the same method, byte-pair encoding (Sennrich et al. 2016)
    bytes    the 256 bytes

Each has one special token more, which ordinary text never encodes to: ``<|endoftext|>``, between documents.
"""

import copy
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt2.characters import characters_from_spec
from gpt2.checks import check_integer, check_text
from gpt2.end_tokens import read_end_tokens
from gpt2.errors import ConfigError, ModelFilesError, RequestError, UnsupportedTokenizer, did_you_mean
from gpt2.files import check_inside_folder, expand_path
from gpt2.sentencepieces import load_sentencepiece
from gpt2.tokenizer_components import check_components, check_file_size
from gpt2.tokenizer_settings import (
    apply_settings,
    end_of_text_name,
    merges_beside,
    prompt_prefix,
    read_settings,
    spec_from_vocab_json,
)
from gpt2.vocabulary import (
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    UnsupportedTokenizerError,
    Vocabulary,
    build_backend,
    check_byte_level_bpe,
    decode_byte_level,
    extend_vocabulary,
    gpt2_encoding,
    has_only_simple_special_tokens,
    non_special_added_ids,
    recover_merges,
    replace_surrogates,
    split_long_whitespace,
    split_long_words,
    tiktoken_encoding,
    tokenizers_errors,
    uses_gpt2_pre_tokenizer,
    vocabulary_fingerprint,
    vocabulary_from_tokenizer_json,
    with_prompt_prefix,
    write_tokenizer_files,
)

if TYPE_CHECKING:
    import numpy as np
    import tiktoken
    import tokenizers

GPT2_FINGERPRINT = "a66433cec9b7b05c65088583bc6c7110e4e6babdbb0fb4cf299aca8f31cd176e"

_log = logging.getLogger("gpt2")


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


class _ByteLevelTokenizer(ABC):
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

    def encode_array(self, text: str) -> "np.ndarray":
        import numpy as np

        return np.array(self.encode(text), np.uint32)

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


class GPT2Tokenizer(_ByteLevelTokenizer):
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
        if any(sum(1 for _ in split_long_whitespace(text)) > 1 for text in texts):
            return [self.encode_array(text).tolist() for text in texts]
        if len(texts) == 1:
            return [self._encoding.encode_ordinary(texts[0])]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_array(self, text: str) -> "np.ndarray":
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


class BPETokenizer(_ByteLevelTokenizer):
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


class ByteTokenizer(_ByteLevelTokenizer):
    """Ids 0 to 255 are the bytes, 256 is ``<|endoftext|>``, and the extra special tokens follow."""

    name = "bytes"

    def __init__(self, extra_special_tokens: Sequence[str] = ()) -> None:
        special = [text.encode() for text in (END_OF_TEXT, *extra_special_tokens)]
        tokens = [*(bytes([b]) for b in range(256)), *special]
        super().__init__(Vocabulary(tokens, frozenset(range(256, len(tokens)))))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(replace_surrogates(text).encode()) for text in texts]

    def encode_array(self, text: str) -> "np.ndarray":
        import numpy as np

        return np.frombuffer(replace_surrogates(text).encode(), np.uint8)


def encode_array(tokenizer: Tokenizer, text: str) -> "np.ndarray":
    """`tokenizer.encode(text)` as an array of unsigned integers.

    GPT-2's tokens are never a Python list, so that many threads can encode at the same time.
    """
    import numpy as np

    return (
        tokenizer.encode_array(text) if isinstance(tokenizer, _ByteLevelTokenizer) else np.array(tokenizer.encode(text))
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE: the most frequent pair of tokens becomes a token, again and again.

    `vocab_size` includes the 256 bytes, which are first, and ``<|endoftext|>``, which is last. Only pairs that occur
    twice are merged, so short texts give a smaller vocabulary, with a warning in the log. A word of more than 1,000
    characters counts as several. The result is deterministic.

    Raises ConfigError for a `vocab_size` outside 257 to 65,536.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(f"a BPE vocabulary has 257 to {MAX_VOCAB_SIZE} tokens, not {vocab_size}", field="tokenizer")
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in split_long_words(replace_surrogates(text)))
    backend.train_from_iterator(pieces, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [decode_byte_level(text) for text in sorted(model["vocab"], key=model["vocab"].__getitem__)]
    merges = [(decode_byte_level(left), decode_byte_level(right)) for left, right in model["merges"]]
    if len(tokens) + 1 < vocab_size:
        _log.warning("the text is enough for a vocabulary of %d tokens, not %d", len(tokens) + 1, vocab_size)
    vocabulary = Vocabulary([*tokens, END_OF_TEXT.encode()], frozenset({len(tokens)}))
    return BPETokenizer(build_backend(vocabulary, merges))


def with_special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer with more special tokens, such as ``<|user|>``, whose ids are last.

    Raises ConfigError for a text that is empty, a token already, or overlaps ``<|endoftext|>``, and for more than
    65,536 tokens.
    """
    vocabulary = _extend(tokenizer, texts)
    if isinstance(tokenizer, BPETokenizer):
        backend = copy.deepcopy(tokenizer._backend)
        backend.add_special_tokens(list(texts))
        extended = BPETokenizer(backend, tokenizer._end_of_text)
    elif isinstance(tokenizer, GPT2Tokenizer):
        extended = GPT2Tokenizer(tiktoken_encoding(vocabulary))
    else:
        extended = make_byte_tokenizer(vocabulary)
    extended.end_tokens, extended.prompt_prefix = tokenizer.end_tokens, tokenizer.prompt_prefix
    return extended


def with_added_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer with more words, whose ids are last: in any text each is encoded as one token.

    Raises ConfigError as `with_special_tokens` does.
    """
    from tokenizers import AddedToken

    _extend(tokenizer, texts)  # for its errors
    assert isinstance(tokenizer, _ByteLevelTokenizer)
    backend = copy.deepcopy(tokenizer._backend)
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    extended = BPETokenizer(backend, tokenizer._end_of_text)
    extended.end_tokens, extended.prompt_prefix = tokenizer.end_tokens, tokenizer.prompt_prefix
    return extended


def _extend(tokenizer: Tokenizer, texts: Sequence[str]) -> Vocabulary:
    if not isinstance(tokenizer, _ByteLevelTokenizer):
        raise TypeError(f"{type(tokenizer).__name__} is not a tokenizer of this module")
    return extend_vocabulary(tokenizer._vocabulary, texts)


def get_tokenizer(ref: str | Path) -> Tokenizer:
    """The tokenizer ``gpt2`` or ``bytes``, or the one in a folder. Raises UserError for any other name."""
    if ref == "gpt2":
        return GPT2Tokenizer()
    if ref == "bytes":
        return ByteTokenizer()
    if isinstance(ref, str) and ref.split(":")[0] == "bpe":
        if not ref.removeprefix("bpe:").isdecimal():
            raise ConfigError(f"tokenizer '{ref}': bpe:N needs a number of tokens, as in bpe:1024", field="tokenizer")
        raise ConfigError(
            f"tokenizer '{ref}' is trained on text, which there is none of here: name gpt2, bytes, or the folder of a "
            "tokenizer (gpt2 data prepare writes one)",
            field="tokenizer",
        )
    folder = expand_path(ref)
    if not folder.is_dir():
        hint = did_you_mean(str(ref), ["gpt2", "bytes", "bpe:N"])
        raise ConfigError(
            f"no tokenizer '{ref}'{hint}: name gpt2, bytes, bpe:N, or a folder with tokenizer files", field="tokenizer"
        )
    tokenizer = load_tokenizer(folder) or load_tokenizer(folder / "model")  # in a run folder
    if tokenizer is None:
        raise ModelFilesError(f"no tokenizer in {folder}: it needs tokenizer.json, or vocab.json with merges.txt")
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer whose files are in `folder`; None if there are none.

    `tokenizer.json` has precedence over `vocab.json` with `merges.txt`, these over `encoder.json` with `vocab.bpe`,
    OpenAI's names, and these over `spiece.model`. GPT-2's vocabulary and the plain bytes are recognized by their
    contents, and need no merges. Its `end_tokens` are those of the model folder.
    Raises ModelFilesError for a broken file, and UnsupportedTokenizer for one that is not byte-level BPE.
    """
    for name in ("tokenizer.json", "vocab.json", "encoder.json"):
        path = folder / name
        if path.is_file():
            for used in (path, folder / "merges.txt", folder / "vocab.bpe"):
                check_inside_folder(used, folder)
            try:
                check_file_size(path)
                return _read_tokenizer(path)
            except UnsupportedTokenizerError as error:
                raise UnsupportedTokenizer(f"cannot use {path}: {error}") from error
            except (OSError, ValueError, RecursionError) as error:
                raise ModelFilesError(f"cannot use {path}: {error}") from error
    tokenizer = load_sentencepiece(folder)
    if tokenizer is not None:
        tokenizer.end_tokens = read_end_tokens(folder, tokenizer.vocab_size, tokenizer.end_tokens)
    elif (folder / "vocab.txt").is_file():
        raise UnsupportedTokenizer(f"cannot use {folder / 'vocab.txt'}: it is not byte-level BPE")
    return tokenizer


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or `vocab.json`, and the files beside it. Raises ValueError and UserError."""
    import tokenizers

    settings, raw = read_settings(path.parent), json.loads(path.read_text(encoding="utf-8"))
    is_complete = path.name == "tokenizer.json"
    tokenizer: Tokenizer | None = characters_from_spec(raw) if is_complete else None
    if tokenizer is None:
        spec = raw if is_complete else spec_from_vocab_json(raw)
        check_byte_level_bpe(spec)
        apply_settings(spec, settings)
        end_of_text = end_of_text_name(spec, settings)
        vocabulary = vocabulary_from_tokenizer_json(spec, end_of_text)
        check_components(spec)
        if uses_gpt2_pre_tokenizer(spec) and has_only_simple_special_tokens(spec) and end_of_text == END_OF_TEXT:
            tokenizer = recognize_tokenizer(vocabulary)
        if tokenizer is None:
            if not is_complete:
                spec["model"]["merges"] = merges_beside(path, vocabulary)
            with tokenizers_errors():
                backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
            tokenizer = BPETokenizer(backend, end_of_text)
        bos, eos = (settings.names.get(name, end_of_text) for name in ("bos_token", "eos_token"))
        adds_bos = settings.add_bos_token and not is_complete  # tokenizer.json has a post-processor for it
        tokenizer.prompt_prefix = (tokenizer.special_tokens[bos],) if adds_bos else prompt_prefix(spec)
        tokenizer.end_tokens = (tokenizer.special_tokens[eos],)
    tokenizer.end_tokens = read_end_tokens(path.parent, tokenizer.vocab_size, tokenizer.end_tokens)
    return tokenizer


def recognize_tokenizer(vocabulary: Vocabulary) -> Tokenizer | None:
    """GPT-2's tokenizer or the bytes, if the vocabulary is that, with only added tokens after ``<|endoftext|>``."""
    size = vocabulary.tokens.index(END_OF_TEXT.encode()) + 1
    if not vocabulary.added_ids.issuperset(range(size, len(vocabulary.tokens))):
        return None
    base = Vocabulary(vocabulary.tokens[:size], vocabulary.added_ids.intersection(range(size)))
    fingerprint = vocabulary_fingerprint(base)
    if fingerprint == GPT2_FINGERPRINT:
        return GPT2Tokenizer(tiktoken_encoding(vocabulary))
    return make_byte_tokenizer(vocabulary) if fingerprint == ByteTokenizer().fingerprint else None


def make_byte_tokenizer(vocabulary: Vocabulary) -> ByteTokenizer:
    """The byte tokenizer with the special tokens that follow ``<|endoftext|>`` in `vocabulary`."""
    return ByteTokenizer([token.decode() for token in vocabulary.tokens[257:]])


def _encode_with_backend(backend: "tokenizers.Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    valid = [replace_surrogates(text) for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(valid, add_special_tokens=False)]
