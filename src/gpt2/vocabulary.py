"""The table behind a tokenizer, which bytes each id stands for, the files that hold it, the text it is made from.

Vocabulary files are text, but tokens are bytes and need not be UTF-8: so each byte has a letter (`_letters`).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
LONG_WORD = 1_000  # characters; what a merge costs `tokenizers` in training grows with the square of a word's length
_RUNS = (r"\w", r"\s", r"(?:[^\w\s]|_)")  # GPT-2's words are runs of such: no word is longer than its run
_LONG_SPACE = re.compile(rf"\s{{{LONG_WORD}}}")
_LONG_RUN = re.compile("|".join(rf"(?<!{kind}){kind}{{{LONG_WORD},}}" for kind in _RUNS))


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
    backend.add_special_tokens([END_OF_TEXT])
    backend.encode_special_tokens = True
    return backend


def write_files(backend: "tokenizers.Tokenizer", folder: Path) -> None:
    """The four files of openai-community/gpt2: tokenizer.json, its contents as two, tokenizer_config.json."""
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
