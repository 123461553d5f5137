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
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FILES = {  # file name: sha256 of its contents
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_CONNECT_AND_READ_SECONDS = (10, 30)

LONG_WORD = 1_000  # characters; what a merge costs `tokenizers` in training grows with the square of a word's length
_RUNS = (r"\w", r"\s", r"(?:[^\w\s]|_)")  # GPT-2's words are runs of such: no word is longer than its run
_LONG_SPACE = re.compile(rf"\s{{{LONG_WORD}}}")
_LONG_RUN = re.compile("|".join(rf"(?<!{kind}){kind}{{{LONG_WORD},}}" for kind in _RUNS))

_log = logging.getLogger("gpt2")


class Table(NamedTuple):
    """A vocabulary: the bytes of each id, and the ids that are matched as a whole, never made by merging."""

    tokens: list[bytes]
    added: frozenset[int]


def cuts_like_gpt2(spec: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` leaves the text as it is and cuts it into words by GPT-2's pattern."""
    cut = spec["pre_tokenizer"]
    by_pattern = cut.get("type") == "ByteLevel" and cut.get("use_regex", True) and not cut.get("add_prefix_space")
    return by_pattern and not spec.get("normalizer")


def table_of_json(spec: Any) -> Table:
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
    return table_of_ids(ids, added.keys() | {END_OF_TEXT})


def symbols_of_json(spec: dict[str, Any]) -> list[int]:
    """The added tokens in a parsed `tokenizer.json` that are no special ones: text has them."""
    return [token["id"] for token in spec.get("added_tokens") or [] if not token.get("special", True)]


def table_of_ids(ids: Any, added: AbstractSet[str]) -> Table:
    """The table in a parsed `vocab.json`: each letter of a token is a byte, except in those `added`."""
    if not isinstance(ids, dict) or END_OF_TEXT not in ids:
        raise ValueError(f"it has no {END_OF_TEXT}")
    numbers = list(ids.values())
    if not all(type(i) is int for i in numbers) or sorted(numbers) != list(range(len(ids))):
        raise ValueError(f"its ids are not 0 to {len(ids) - 1}, each once")
    texts = sorted(ids, key=ids.__getitem__)
    tokens = [text.encode() if text in added else unspell(text) for text in texts]
    missing = 256 - sum(len(token) == 1 for token in set(tokens))
    if missing:
        raise ValueError(f"it lacks {missing} of the 256 bytes, so there is text that it cannot encode")
    return Table(tokens, frozenset(ids[text] for text in added if text in ids))


def read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    """The pairs in a `merges.txt`, one a line, first learned first."""
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"line {number} is not a pair of tokens")
        merges.append((unspell(pair[0]), unspell(pair[1])))
    return merges


def only_plain_marks(spec: dict[str, Any]) -> bool:
    """Whether the added tokens of a `tokenizer.json` are matched as they are, and never in plain text."""
    others = [token for token in spec.get("added_tokens") or [] if token["content"] != END_OF_TEXT]
    unusual = ("lstrip", "rstrip", "single_word")
    return all(token.get("special") and not any(token.get(name) for name in unusual) for token in others)


def added_tokens_beside(path: Path) -> dict[str, int]:
    """The added tokens and ids in `added_tokens.json` and `tokenizer_config.json` beside `path`, where they are.

    Raises UserError for a broken one.
    """
    added: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        file = path.with_name(name)
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            named = raw if name == "added_tokens.json" else raw.get("added_tokens_decoder") or {}
            added |= {
                str(key if name == "added_tokens.json" else value["content"]): int(
                    value if name == "added_tokens.json" else key
                )
                for key, value in named.items()
            }
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"cannot use {file}: {error!r}") from error
    return added


def extended(table: Table, texts: Sequence[str]) -> Table:
    """The table with these texts as added tokens at its end. Raises UserError for those that cannot be."""
    known = {_spell(token) for token in table.tokens} | {
        token.decode() for token in map(table.tokens.__getitem__, table.added)
    }
    for text in texts:
        if not text.strip():
            raise UserError(f"a special token needs characters that can be seen, not {text!r}")
        if without_surrogates(text) != text:
            raise UserError(f"the special token {text!r} is not UTF-8 text")
        if _overlap(text, END_OF_TEXT):
            raise UserError(f"the special token {text!r} overlaps {END_OF_TEXT}: name it otherwise")
        if text in known or _spell(text.encode()) in known:
            raise UserError(f"{text!r} is a token of the vocabulary already: name it otherwise")
        if not text.isascii() and all(letter in _bytes_of_letters() for letter in text):
            _log.warning("%r keeps its id in transformers, which takes its letters for bytes when it decodes it", text)
        known.add(text)
    tokens = [*table.tokens, *(text.encode() for text in texts)]
    if len(tokens) > MAX_VOCAB_SIZE:
        raise UserError(
            f"{len(texts):,} more tokens make {len(tokens):,}, and a vocabulary has {MAX_VOCAB_SIZE:,} at most"
        )
    return Table(tokens, table.added | set(range(len(table.tokens), len(tokens))))


def _overlap(one: str, other: str) -> bool:
    """Whether one text is in the other, or begins with what the other ends with."""
    if one in other or other in one:
        return True
    return any(a.endswith(b[:n]) for a, b in ((one, other), (other, one)) for n in range(1, len(b)))


def fingerprint_of(table: Table) -> str:
    """SHA-256 over the ids in order: of each, one byte for added or not, eight for its length, its bytes."""
    digest = hashlib.sha256()
    for i, token in enumerate(table.tokens):
        digest.update(bytes([i in table.added]) + len(token).to_bytes(8, "big") + token)
    return digest.hexdigest()


@cache
def _letters() -> list[str]:
    """The letter that stands for each byte in vocabulary files, so that every token is a word without spaces.

    A byte that Latin-1 prints is its own character. The others, in order, are the characters from U+0100 on,
    which makes ``Ġ`` of the space and ``Ċ`` of the newline.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


@cache
def _bytes_of_letters() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(_letters())}


def _spell(token: bytes) -> str:
    return "".join(_letters()[byte] for byte in token)


def unspell(text: str) -> bytes:
    try:
        return bytes(_bytes_of_letters()[letter] for letter in text)
    except KeyError:
        raise ValueError(f"its token {text!r} is not spelled in the letters that stand for bytes") from None


def without_surrogates(text: str) -> str:
    """`text` with what UTF-8 has no bytes for, half a surrogate pair from careless JSON, made U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut_long_words(text: str) -> Iterator[str]:
    """`text` as it is, or cut within words of more than `LONG_WORD` characters, such as a line without a space."""
    begin = 0
    if max(map(len, text.split()), default=0) < LONG_WORD and not _LONG_SPACE.search(text):
        yield text  # nearly always, and sooner known than by the search below
        return
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + LONG_WORD, run.end(), LONG_WORD):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]


def build_backend(table: Table, merges: Iterable[tuple[bytes, bytes]]) -> "tokenizers.Tokenizer":
    """GPT-2's tokenizer with this vocabulary, in the form of the `tokenizers` library and `transformers`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    ids = {token.decode() if i in table.added else _spell(token): i for i, token in enumerate(table.tokens)}
    backend = Backend(models.BPE(ids, [(_spell(left), _spell(right)) for left, right in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([table.tokens[i].decode() for i in sorted(table.added)])
    backend.encode_special_tokens = True
    return backend


def write_files(backend: "tokenizers.Tokenizer", folder: Path) -> None:
    """The four files of openai-community/gpt2: tokenizer.json, its contents as two, tokenizer_config.json.

    The last one names the added tokens, as `transformers` wants it.
    """
    spec = json.loads(backend.to_str())
    vocab = dict(sorted(backend.get_vocab().items(), key=lambda item: item[1]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"])]
    config = {
        "tokenizer_class": "GPT2Tokenizer" if cuts_like_gpt2(spec) else "PreTrainedTokenizerFast",
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


def recover_merges(table: Table) -> list[tuple[bytes, bytes]]:
    """The pair that made each token of GPT-2's table, in the order in which they were learned.

    The ids tell, because they follow that order: merge the bytes of a token as far as the tokens before it
    go, the oldest pair first, and two parts remain. It takes half a second for the 50,000.
    """
    ranks = {token: i for i, token in enumerate(table.tokens) if i not in table.added}
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


def encoding_of(table: Table) -> "tiktoken.Encoding":
    """tiktoken's encoder for GPT-2's table, with no download."""
    import tiktoken

    ranks = {token: i for i, token in enumerate(table.tokens) if i not in table.added}
    special = {table.tokens[i].decode(): i for i in table.added}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


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
    paths = {name: Path(where, hashlib.sha1((_GPT2_URL + name).encode()).hexdigest()) for name in _GPT2_FILES}
    wanted = paths if where else {}  # an empty name tells tiktoken to keep nothing
    try:
        for name, path in wanted.items():
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _GPT2_FILES[name]:
                _download(name, path)
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        puts = " and ".join(f"put {_GPT2_URL}{name} at {path}" for name, path in paths.items())
        mend = puts if where else "name a folder for it in TIKTOKEN_CACHE_DIR"
        reason = type(error).__name__ if isinstance(error, requests.RequestException) else error
        raise UserError(f"cannot get GPT-2's vocabulary ({reason}): {mend}") from error


def _download(name: str, path: Path) -> None:
    """Fetch and check one of GPT-2's files. A folder that cannot be written is left for tiktoken to judge."""
    import requests

    _log.info("downloading %s%s", _GPT2_URL, name)
    response = requests.get(_GPT2_URL + name, timeout=_CONNECT_AND_READ_SECONDS)
    response.raise_for_status()
    if hashlib.sha256(response.content).hexdigest() != _GPT2_FILES[name]:
        raise ValueError(f"{name} came damaged")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(response.content)
        part.replace(path)
