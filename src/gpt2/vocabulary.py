"""Vocabularies of byte-level BPE: the bytes of each token id, the files that hold them, and GPT-2's own.

Vocabulary files are text, but tokens are bytes and need not be UTF-8. So the files spell each byte as one character
(`_byte_encoder`).
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpt2.downloads import download
from gpt2.errors import ConfigError, DataError, ModelFilesError
from gpt2.files import cache_home, file_sha256
from gpt2.terminal import shorten

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 65536  # token shards are uint16

# GPT-2's pre-tokenizer splits text into words, within which bytes are merged: the end of a contraction; letters, digits
# or other characters, each with the space before them; and other whitespace, except the space that belongs to a word.
GPT2_SPLIT_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FILE_SHA256 = {  # file name: sha256 of its contents
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

NO_VOCABULARY = "no_vocabulary"  # code of the error for a download that failed
MAX_WORD_LENGTH = 1_000  # characters; BPE training in `tokenizers` takes time quadratic in the length of a word
_CHARACTER_CLASSES = (r"\w", r"\s", r"(?:[^\w\s]|_)")  # no word of GPT-2's is longer than a run of one class
_LONG_WHITESPACE = re.compile(rf"(?<!\s)\s{{{MAX_WORD_LENGTH}}}")
MAX_WHITESPACE_LENGTH = 500_000  # characters; GPT2_SPLIT_PATTERN overflows tiktoken's stack on a run of a million
_LONG_RUN = re.compile("|".join(rf"(?<!{kind}){kind}{{{MAX_WORD_LENGTH},}}" for kind in _CHARACTER_CLASSES))

_log = logging.getLogger("gpt2")


class UnsupportedTokenizerError(ValueError):
    """A tokenizer that is not broken, but of a kind that is not supported."""


class Vocabulary(NamedTuple):
    """The bytes of each id, and the ids of added tokens, which are matched as a whole and never made by merging."""

    tokens: list[bytes]
    added_ids: frozenset[int]


def uses_gpt2_pre_tokenizer(spec: dict[str, Any]) -> bool:
    """Return whether a `tokenizer.json` has no normalizer and splits text by GPT-2's pattern."""
    pre = spec["pre_tokenizer"]
    by_pattern = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    return by_pattern and not spec.get("normalizer")


def vocabulary_from_tokenizer_json(spec: Any, end_of_text: str = END_OF_TEXT) -> Vocabulary:
    """The vocabulary of a parsed `tokenizer.json`. Raises ValueError if it is not byte-level BPE."""
    check_byte_level_bpe(spec)
    added = {str(token["content"]): token["id"] for token in spec.get("added_tokens") or []}
    vocab = spec["model"]["vocab"]
    if any(vocab.get(text, i) != i for text, i in added.items()):
        raise ValueError("an added token has two ids")
    return vocabulary_from_token_ids({**vocab, **added}, added.keys() | {end_of_text}, end_of_text)


def check_byte_level_bpe(spec: Any) -> None:
    """Raise UnsupportedTokenizerError for anything but a parsed `tokenizer.json` of a byte-level BPE."""
    try:
        pre = spec["pre_tokenizer"]
        kinds = {part["type"] for part in pre.get("pretokenizers", [pre])}
        model = spec["model"]
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model.get("type", "BPE") != "BPE" or "ByteLevel" not in kinds or affixes:
            raise UnsupportedTokenizerError("it is not byte-level BPE")
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        dict(**model["vocab"])  # raises TypeError for anything but an object
        dict(**added)  # raises TypeError for a content that is no text
        hash(tuple(added.values()))
    except (AttributeError, KeyError, TypeError):
        raise UnsupportedTokenizerError("it is not byte-level BPE") from None


def non_special_added_ids(spec: dict[str, Any]) -> list[int]:
    """The ids of added tokens in a parsed `tokenizer.json` that are not special: they are matched in plain text."""
    return [token["id"] for token in spec.get("added_tokens") or [] if not token.get("special", True)]


def vocabulary_from_token_ids(
    token_to_id: Any, added_tokens: AbstractSet[str], end_of_text: str = END_OF_TEXT
) -> Vocabulary:
    """The vocabulary of a parsed `vocab.json`: each character of a token is a byte, except in `added_tokens`.

    Raises ValueError for ids that are not 0 to n - 1, and if a byte or the token `end_of_text` is missing.
    """
    if not isinstance(token_to_id, dict) or end_of_text not in token_to_id:
        raise UnsupportedTokenizerError(f"it has no {end_of_text}")
    ids = list(token_to_id.values())
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(f"its ids are not 0 to {len(token_to_id) - 1}, each once")
    texts = sorted(token_to_id, key=token_to_id.__getitem__)
    tokens = [text.encode() if text in added_tokens else decode_byte_level(text) for text in texts]
    missing = 256 - sum(len(token) == 1 for token in set(tokens))
    if missing:
        raise UnsupportedTokenizerError(f"it lacks {missing} of the 256 bytes, so it cannot encode every text")
    return Vocabulary(tokens, frozenset(token_to_id[text] for text in added_tokens if text in token_to_id))


def read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    """The pairs of a `merges.txt`, one per line, in the order of training. Raises ValueError for any other file."""
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"line {number} is not a pair of tokens")
        merges.append((decode_byte_level(pair[0]), decode_byte_level(pair[1])))
    return merges


def check_merges(vocabulary: Vocabulary, merges: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ValueError unless the merges make all tokens of more than one byte, and no others."""
    made = {left + right for left, right in merges}
    tokens = {token for i, token in enumerate(vocabulary.tokens) if i not in vocabulary.added_ids}
    for token in made - tokens:
        raise ValueError(
            f"a merge in it makes {shorten(token.decode(errors='replace'))!r}, which is no token of vocab.json"
        )
    for i, token in enumerate(vocabulary.tokens):
        unused = token == f"<|unused_{i}|>".encode()
        if len(token) > 1 and token not in made and i not in vocabulary.added_ids and not unused:
            raise ValueError(f"no merge in it makes token {i} of vocab.json; is it truncated?")


def has_only_simple_special_tokens(spec: dict[str, Any]) -> bool:
    """Return whether the added tokens of a `tokenizer.json` are special, and matched without options."""
    others = [token for token in spec.get("added_tokens") or [] if token["content"] != END_OF_TEXT]
    options = ("lstrip", "rstrip", "single_word")
    return all(token.get("special") and not any(token.get(name) for name in options) for token in others)


@contextmanager
def tokenizers_errors() -> Iterator[None]:
    """Turn what the `tokenizers` library raises into ValueError: plain Exception, and Rust panics."""
    try:
        yield
    except Exception as error:
        raise ValueError(shorten(error, 300)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panicked: {shorten(error, 300)}") from error


def extend_vocabulary(vocabulary: Vocabulary, texts: Sequence[str]) -> Vocabulary:
    """The vocabulary with these texts as added tokens at the end. Raises ConfigError for an invalid text."""
    known = {encode_byte_level(token) for token in vocabulary.tokens} | {
        token.decode() for token in map(vocabulary.tokens.__getitem__, vocabulary.added_ids)
    }
    for text in texts:
        if not text.strip():
            raise ConfigError(f"a special token needs visible characters, not {shorten(text)!r}")
        if replace_surrogates(text) != text:
            raise ConfigError(f"the special token {shorten(text)!r} is not UTF-8 text")
        if _texts_overlap(text, END_OF_TEXT):
            raise ConfigError(f"the special token {shorten(text)!r} overlaps {END_OF_TEXT}: choose another text")
        if text in known or encode_byte_level(text.encode()) in known:
            raise ConfigError(f"{shorten(text)!r} is a token of the vocabulary already: choose another text")
        if not text.isascii() and all(character in _byte_decoder() for character in text):
            _log.warning("transformers encodes %r to the same id, but decodes it as bytes", text)
        known.add(text)
    tokens = [*vocabulary.tokens, *(text.encode() for text in texts)]
    if len(tokens) > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"{len(texts):,} more tokens make {len(tokens):,}, and a vocabulary has {MAX_VOCAB_SIZE:,} at most"
        )
    return Vocabulary(tokens, vocabulary.added_ids | set(range(len(vocabulary.tokens), len(tokens))))


def _texts_overlap(one: str, other: str) -> bool:
    """Return whether one text contains the other, or starts with the end of the other."""
    if one in other or other in one:
        return True
    return any(a.endswith(b[:n]) for a, b in ((one, other), (other, one)) for n in range(1, len(b)))


def vocabulary_fingerprint(vocabulary: Vocabulary) -> str:
    """SHA-256 (hex) over the ids in order: for each, one byte for added or not, eight for its length, and its bytes."""
    digest = hashlib.sha256()
    for i, token in enumerate(vocabulary.tokens):
        digest.update(bytes([i in vocabulary.added_ids]) + len(token).to_bytes(8, "big") + token)
    return digest.hexdigest()


@cache
def _byte_encoder() -> list[str]:
    """The character that represents each byte in vocabulary files, so that no token contains whitespace.

    A byte that is printable in Latin-1 is its own character. The others, in order, are the characters from U+0100 on:
    ``Ġ`` is the space and ``Ċ`` the newline. Source: `bytes_to_unicode` in OpenAI's encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@cache
def _byte_decoder() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_byte_encoder())}


def encode_byte_level(token: bytes) -> str:
    """A token as vocabulary files spell it: one character for each byte."""
    return "".join(_byte_encoder()[byte] for byte in token)


def decode_byte_level(text: str) -> bytes:
    """The bytes of a token as vocabulary files spell it. Raises ValueError for any other character."""
    try:
        return bytes(_byte_decoder()[character] for character in text)
    except KeyError:
        raise ValueError(f"its token {shorten(text)!r} has characters that do not represent bytes") from None


def replace_surrogates(text: str) -> str:
    """`text` with unpaired surrogates, which UTF-8 cannot encode, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def split_long_words(text: str) -> Iterator[str]:
    """`text`, split within words of more than `MAX_WORD_LENGTH` characters, such as a line without a space."""
    start = 0
    if max(map(len, text.split()), default=0) < MAX_WORD_LENGTH and not _LONG_WHITESPACE.search(text):
        yield text  # the common case, and faster than the search below
        return
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + MAX_WORD_LENGTH, run.end(), MAX_WORD_LENGTH):
            yield text[start:cut]
            start = cut
    yield text[start:]


def build_backend(vocabulary: Vocabulary, merges: Iterable[tuple[bytes, bytes]]) -> "tokenizers.Tokenizer":
    """A `tokenizers` object with this vocabulary and GPT-2's pre-tokenizer."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    ids = {
        token.decode() if i in vocabulary.added_ids else encode_byte_level(token): i
        for i, token in enumerate(vocabulary.tokens)
    }
    backend = Backend(models.BPE(ids, [(encode_byte_level(left), encode_byte_level(right)) for left, right in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([vocabulary.tokens[i].decode() for i in sorted(vocabulary.added_ids)])
    backend.encode_special_tokens = True
    return backend


def with_prompt_prefix(backend: "tokenizers.Tokenizer", prefix: Sequence[int]) -> "tokenizers.Tokenizer":
    """The backend, which puts these ids before a text where special tokens are asked for."""
    if not prefix:
        return backend
    from tokenizers import processors

    tokens = [backend.id_to_token(i) for i in prefix]
    pairs = list(zip(tokens, prefix, strict=True))
    single, pair = [*tokens, "$A"], [*tokens, "$A", "$B:1"]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=pairs)
    return backend


def write_tokenizer_files(backend: "tokenizers.Tokenizer", folder: Path, end_of_text: str) -> None:
    """Write tokenizer.json, its contents as vocab.json and merges.txt, and tokenizer_config.json.

    The last one lists the added tokens, as `transformers` requires. end_of_text: the text of the token between texts.
    """
    spec = json.loads(backend.to_str())
    vocab = dict(sorted(backend.get_vocab().items(), key=lambda item: item[1]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"])]
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer" if uses_gpt2_pre_tokenizer(spec) else "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    added = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]}
    if len(added) > 1:
        config["added_tokens_decoder"] = added
        special = [token["content"] for token in added.values() if token["special"]]
        config["additional_special_tokens"] = [text for text in special if text != end_of_text]
    (folder / "tokenizer.json").write_bytes(backend.to_str(pretty=True).encode())
    (folder / "vocab.json").write_bytes(json.dumps(vocab, ensure_ascii=False).encode())
    (folder / "merges.txt").write_bytes("\n".join([*merges, ""]).encode())
    (folder / "tokenizer_config.json").write_bytes(json.dumps(config, indent=2).encode())


def recover_merges(vocabulary: Vocabulary) -> list[tuple[bytes, bytes]]:
    """The merges of GPT-2's vocabulary, in the order of training.

    Ids follow that order: merging the bytes of a token with the earlier tokens only, lowest id first, leaves the two
    parts of its merge. It takes half a second for the 50,000 tokens.
    """
    ranks = {token: i for i, token in enumerate(vocabulary.tokens) if i not in vocabulary.added_ids}
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            i = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def split_long_whitespace(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of `text`, and whether each is a run of `MAX_WHITESPACE_LENGTH` whitespace characters or more.

    Such a part is one word of GPT-2's pre-tokenizer: the last character of a run belongs to the text that follows. The
    time is linear in the length of the text.
    """
    start = 0
    if len(text) >= MAX_WHITESPACE_LENGTH:
        space = r"[^\S\x1c-\x1f]"  # Unicode's White_Space: four characters less than in Python
        for run in re.finditer(rf"(?<!{space}){space}{{{MAX_WHITESPACE_LENGTH},}}", text):
            stop = run.end() - (run.end() < len(text))
            yield text[start : run.start()], False
            yield text[run.start() : stop], True
            start = stop
    yield text[start:], False


def tiktoken_encoding(vocabulary: Vocabulary, pattern: str = GPT2_SPLIT_PATTERN) -> "tiktoken.Encoding":
    """tiktoken's encoder for GPT-2's vocabulary, without a download."""
    import tiktoken

    ranks = {token: i for i, token in enumerate(vocabulary.tokens) if i not in vocabulary.added_ids}
    special = {vocabulary.tokens[i].decode(): i for i in vocabulary.added_ids}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@cache
def gpt2_encoding() -> "tiktoken.Encoding":
    """GPT-2's encoder. Its two files are downloaded to tiktoken's cache where an environment variable names one.

    Otherwise they are in `$GPT2_HOME/tiktoken`: tiktoken's default is a folder that other users of the machine can
    write. Raises ModelFilesError that names the addresses of the files and their paths in the cache.
    """
    given = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = str(cache_home() / "tiktoken") if given is None else given
    paths = {name: Path(folder, hashlib.sha1((_GPT2_URL + name).encode()).hexdigest()) for name in _GPT2_FILE_SHA256}
    try:
        for name, path in paths.items() if folder else ():  # an empty name disables tiktoken's cache
            if path.is_file() and file_sha256(path) != _GPT2_FILE_SHA256[name]:
                path.unlink()
            download(_GPT2_URL + name, path, _GPT2_FILE_SHA256[name])
        if not folder:
            import tiktoken

            return tiktoken.get_encoding("gpt2")
        ids = json.loads(paths["encoder.json"].read_text(encoding="utf-8"))
        return tiktoken_encoding(vocabulary_from_token_ids(ids, frozenset({END_OF_TEXT})))
    except (OSError, ValueError, DataError) as error:
        others = [f", and {_GPT2_URL}{name} at {path}" for name, path in paths.items() if not path.is_file()][1:]
        fix = "".join(others) if folder else ": name a cache folder in TIKTOKEN_CACHE_DIR"
        raise ModelFilesError(f"cannot get GPT-2's vocabulary: {error}{fix}", code=NO_VOCABULARY) from error
