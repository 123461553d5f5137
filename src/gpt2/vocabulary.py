"""The table behind a tokenizer, which bytes each id stands for, the files that hold it, the text it is made from.

Vocabulary files are text, but tokens are bytes and need not be UTF-8: so each byte has a letter (`_letters`).
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gpt2.errors import UserError

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 65536  # token shards are uint16

# How GPT-2 cuts text into words, within which bytes are merged: the tail of a contraction; letters, digits or
# other marks, each with the space before them; and other white space, less the space that goes with a word.
GPT2_SPLIT_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FILE_SHA256 = {  # file name: sha256 of its contents
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_DOWNLOAD_TIMEOUT = (10, 30)

MAX_WORD_LENGTH = (
    1_000  # characters; what a merge costs `tokenizers` in training grows with the square of a word's length
)
_CHARACTER_CLASSES = (r"\w", r"\s", r"(?:[^\w\s]|_)")  # GPT-2's words are runs of such: no word is longer than its run
_LONG_WHITESPACE = re.compile(rf"\s{{{MAX_WORD_LENGTH}}}")
_LONG_RUN = re.compile("|".join(rf"(?<!{kind}){kind}{{{MAX_WORD_LENGTH},}}" for kind in _CHARACTER_CLASSES))

_log = logging.getLogger("gpt2")


class Vocabulary(NamedTuple):
    """A vocabulary: the bytes of each id, and the ids that are matched as a whole, never made by merging."""

    tokens: list[bytes]
    added_ids: frozenset[int]


def uses_gpt2_pre_tokenizer(spec: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` leaves the text as it is and cuts it into words by GPT-2's pattern."""
    cut = spec["pre_tokenizer"]
    by_pattern = cut.get("type") == "ByteLevel" and cut.get("use_regex", True) and not cut.get("add_prefix_space")
    return by_pattern and not spec.get("normalizer")


def vocabulary_from_tokenizer_json(spec: Any) -> Vocabulary:
    """The table in a parsed `tokenizer.json`; a `ValueError` if that is not byte-level BPE."""
    try:
        cut = spec["pre_tokenizer"]
        cuts = {part["type"] for part in cut.get("pretokenizers", [cut])}
        model = spec["model"]
        marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")  # on tokens, for their place
        if model.get("type", "BPE") != "BPE" or "ByteLevel" not in cuts or marks:
            raise ValueError("it is not byte-level BPE")
        added = {str(token["content"]): token["id"] for token in spec.get("added_tokens") or []}
        ids = {**model["vocab"], **added}
    except (AttributeError, KeyError, TypeError):
        raise ValueError("it is not byte-level BPE") from None
    return vocabulary_from_token_ids(ids, added.keys() | {END_OF_TEXT})


def non_special_added_ids(spec: dict[str, Any]) -> list[int]:
    """The added tokens in a parsed `tokenizer.json` that are no special ones: text has them."""
    return [token["id"] for token in spec.get("added_tokens") or [] if not token.get("special", True)]


def vocabulary_from_token_ids(token_to_id: Any, added_tokens: AbstractSet[str]) -> Vocabulary:
    """The table in a parsed `vocab.json`: each letter of a token is a byte, except in those `added`."""
    if not isinstance(token_to_id, dict) or END_OF_TEXT not in token_to_id:
        raise ValueError(f"it has no {END_OF_TEXT}")
    numbers = list(token_to_id.values())
    if not all(type(i) is int for i in numbers) or sorted(numbers) != list(range(len(token_to_id))):
        raise ValueError(f"its ids are not 0 to {len(token_to_id) - 1}, each once")
    texts = sorted(token_to_id, key=token_to_id.__getitem__)
    tokens = [text.encode() if text in added_tokens else decode_byte_level(text) for text in texts]
    missing = 256 - sum(len(token) == 1 for token in set(tokens))
    if missing:
        raise ValueError(f"it lacks {missing} of the 256 bytes, so there is text that it cannot encode")
    return Vocabulary(tokens, frozenset(token_to_id[text] for text in added_tokens if text in token_to_id))


def read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    """The pairs in a `merges.txt`, one a line, first learned first."""
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"line {number} is not a pair of tokens")
        merges.append((decode_byte_level(pair[0]), decode_byte_level(pair[1])))
    return merges


def has_only_simple_special_tokens(spec: dict[str, Any]) -> bool:
    """Whether the added tokens of a `tokenizer.json` are matched as they are, and never in plain text."""
    others = [token for token in spec.get("added_tokens") or [] if token["content"] != END_OF_TEXT]
    unusual = ("lstrip", "rstrip", "single_word")
    return all(token.get("special") and not any(token.get(name) for name in unusual) for token in others)


def added_tokens_from_config(path: Path) -> list[str]:
    """The added tokens that a `tokenizer_config.json` names, if there is one. A broken one is a `UserError`."""
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        return [str(token["content"]) for token in named.values()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"cannot use {path}: {error!r}") from error


def extend_vocabulary(vocabulary: Vocabulary, texts: Sequence[str]) -> Vocabulary:
    """The table with these texts as added tokens at its end. Raises UserError for those that cannot be."""
    known = {_encode_byte_level(token) for token in vocabulary.tokens} | {
        token.decode() for token in map(vocabulary.tokens.__getitem__, vocabulary.added_ids)
    }
    for text in texts:
        if not text.strip():
            raise UserError(f"a special token needs characters that can be seen, not {text!r}")
        if replace_surrogates(text) != text:
            raise UserError(f"the special token {text!r} is not UTF-8 text")
        if _texts_overlap(text, END_OF_TEXT):
            raise UserError(f"the special token {text!r} overlaps {END_OF_TEXT}: name it otherwise")
        if text in known or _encode_byte_level(text.encode()) in known:
            raise UserError(f"{text!r} is a token of the vocabulary already: name it otherwise")
        if not text.isascii() and all(letter in _byte_decoder() for letter in text):
            _log.warning("%r keeps its id in transformers, which takes its letters for bytes when it decodes it", text)
        known.add(text)
    tokens = [*vocabulary.tokens, *(text.encode() for text in texts)]
    if len(tokens) > MAX_VOCAB_SIZE:
        raise UserError(
            f"{len(texts):,} more tokens make {len(tokens):,}, and a vocabulary has {MAX_VOCAB_SIZE:,} at most"
        )
    return Vocabulary(tokens, vocabulary.added_ids | set(range(len(vocabulary.tokens), len(tokens))))


def _texts_overlap(one: str, other: str) -> bool:
    """Whether one text is in the other, or begins with what the other ends with."""
    if one in other or other in one:
        return True
    return any(a.endswith(b[:n]) for a, b in ((one, other), (other, one)) for n in range(1, len(b)))


def vocabulary_fingerprint(vocabulary: Vocabulary) -> str:
    """SHA-256 over the ids in order: of each, one byte for added or not, eight for its length, its bytes."""
    digest = hashlib.sha256()
    for i, token in enumerate(vocabulary.tokens):
        digest.update(bytes([i in vocabulary.added_ids]) + len(token).to_bytes(8, "big") + token)
    return digest.hexdigest()


@cache
def _byte_encoder() -> list[str]:
    """The letter that stands for each byte in vocabulary files, so that every token is a word without spaces.

    A byte that Latin-1 prints is its own character. The others, in order, are the characters from U+0100 on,
    which makes ``Ġ`` of the space and ``Ċ`` of the newline.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


@cache
def _byte_decoder() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(_byte_encoder())}


def _encode_byte_level(token: bytes) -> str:
    return "".join(_byte_encoder()[byte] for byte in token)


def decode_byte_level(text: str) -> bytes:
    try:
        return bytes(_byte_decoder()[letter] for letter in text)
    except KeyError:
        raise ValueError(f"its token {text!r} is not spelled in the letters that stand for bytes") from None


def replace_surrogates(text: str) -> str:
    """`text` with what UTF-8 has no bytes for, half a surrogate pair from careless JSON, made U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def split_long_words(text: str) -> Iterator[str]:
    """`text` as it is, or cut within words of more than `LONG_WORD` characters, such as a line without a space."""
    begin = 0
    if max(map(len, text.split()), default=0) < MAX_WORD_LENGTH and not _LONG_WHITESPACE.search(text):
        yield text  # nearly always, and sooner known than by the search below
        return
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + MAX_WORD_LENGTH, run.end(), MAX_WORD_LENGTH):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]


def build_backend(vocabulary: Vocabulary, merges: Iterable[tuple[bytes, bytes]]) -> "tokenizers.Tokenizer":
    """GPT-2's tokenizer with this vocabulary, in the form of the `tokenizers` library and `transformers`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    ids = {
        token.decode() if i in vocabulary.added_ids else _encode_byte_level(token): i
        for i, token in enumerate(vocabulary.tokens)
    }
    backend = Backend(
        models.BPE(ids, [(_encode_byte_level(left), _encode_byte_level(right)) for left, right in merges])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([vocabulary.tokens[i].decode() for i in sorted(vocabulary.added_ids)])
    backend.encode_special_tokens = True
    return backend


def write_tokenizer_files(backend: "tokenizers.Tokenizer", folder: Path) -> None:
    """The four files of openai-community/gpt2: tokenizer.json, its contents as two, tokenizer_config.json.

    The last one names the added tokens, as `transformers` wants it.
    """
    spec = json.loads(backend.to_str())
    vocab = dict(sorted(backend.get_vocab().items(), key=lambda item: item[1]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"])]
    config = {
        "tokenizer_class": "GPT2Tokenizer" if uses_gpt2_pre_tokenizer(spec) else "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    marks = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]}
    if len(marks) > 1:
        config["added_tokens_decoder"] = marks
        others = [token["content"] for token in marks.values() if token["special"] and token["content"] != END_OF_TEXT]
        config["additional_special_tokens"] = others
    (folder / "tokenizer.json").write_bytes(backend.to_str(pretty=True).encode())
    (folder / "vocab.json").write_bytes(json.dumps(vocab, ensure_ascii=False).encode())
    (folder / "merges.txt").write_bytes("\n".join([*merges, ""]).encode())
    (folder / "tokenizer_config.json").write_bytes(json.dumps(config, indent=2).encode())


def recover_merges(vocabulary: Vocabulary) -> list[tuple[bytes, bytes]]:
    """The pair that made each token of GPT-2's table, in the order in which they were learned.

    The ids tell, because they follow that order: merge the bytes of a token as far as the tokens before it
    go, the oldest pair first, and two parts remain. It takes half a second for the 50,000.
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


def tiktoken_encoding(vocabulary: Vocabulary) -> "tiktoken.Encoding":
    """tiktoken's encoder for GPT-2's table, with no download."""
    import tiktoken

    ranks = {token: i for i, token in enumerate(vocabulary.tokens) if i not in vocabulary.added_ids}
    special = {vocabulary.tokens[i].decode(): i for i in vocabulary.added_ids}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@cache
def gpt2_encoding() -> "tiktoken.Encoding":
    """tiktoken's own GPT-2 encoder, or a `UserError` that says what to put where.

    The two files it is made of are fetched here, to where tiktoken looks for them, because tiktoken itself
    would wait for a silent server without end.
    """
    import requests  # comes with tiktoken
    import tiktoken

    default = str(Path(tempfile.gettempdir(), "data-gym-cache"))
    where = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    paths = {name: Path(where, hashlib.sha1((_GPT2_URL + name).encode()).hexdigest()) for name in _GPT2_FILE_SHA256}
    wanted = paths if where else {}  # an empty name tells tiktoken to keep nothing
    try:
        for name, path in wanted.items():
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _GPT2_FILE_SHA256[name]:
                _download_gpt2_file(name, path)
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        puts = " and ".join(f"put {_GPT2_URL}{name} at {path}" for name, path in paths.items())
        mend = puts if where else "name a folder for it in TIKTOKEN_CACHE_DIR"
        reason = type(error).__name__ if isinstance(error, requests.RequestException) else error
        raise UserError(f"cannot get GPT-2's vocabulary ({reason}): {mend}") from error


def _download_gpt2_file(name: str, path: Path) -> None:
    """Fetch and check one of GPT-2's files. A folder that cannot be written is left for tiktoken to judge."""
    import requests

    _log.info("downloading %s%s", _GPT2_URL, name)
    response = requests.get(_GPT2_URL + name, timeout=_DOWNLOAD_TIMEOUT)
    response.raise_for_status()
    if hashlib.sha256(response.content).hexdigest() != _GPT2_FILE_SHA256[name]:
        raise ValueError(f"{name} came damaged")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(response.content)
        part.replace(path)
