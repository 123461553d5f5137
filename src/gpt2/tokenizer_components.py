"""Which parts a `tokenizer.json` may have: those of tokenizers like GPT-2's. The library builds no others.

Other parts can make the `tokenizers` library panic, abort the process, or take time that is exponential in the text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2.terminal import shorten
from gpt2.vocabulary import GPT2_SPLIT_PATTERN, UnsupportedTokenizerError

MAX_FILE_BYTES = 64 * 2**20
MAX_SEQUENCE_LENGTH = 8
COMPONENTS = {  # field: the key of the parts of a sequence, and the types that are supported
    "normalizer": ("normalizers", {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}),
    "pre_tokenizer": ("pretokenizers", {"ByteLevel", "Digits", "Punctuation", "Split"}),
    "post_processor": ("processors", {"ByteLevel", "TemplateProcessing", "RobertaProcessing"}),
    "decoder": ("decoders", {"ByteLevel"}),
}
# The patterns of GPT-2 and of the tokenizers of cl100k, Llama 3, Qwen 2 and o200k: an arbitrary pattern can backtrack.
_ENDINGS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLIT_PATTERNS = {
    GPT2_SPLIT_PATTERN,
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_ENDINGS}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_ENDINGS}",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def check_file_size(path: Path) -> None:
    """Raise ValueError for a file that is larger than any tokenizer."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES // 2**20} MiB")


def check_components(spec: dict[str, Any]) -> None:
    """Raise UnsupportedTokenizerError for a parsed `tokenizer.json` with parts that no tokenizer like GPT-2's has."""
    for field, (key, supported) in COMPONENTS.items():
        for part in _parts(field, key, spec.get(field)):
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or kind not in supported:
                raise UnsupportedTokenizerError(f"its {field} {shorten(kind)!r} is not supported")
            if kind == "Split":
                _check_pattern(part.get("pattern"))
    if spec["model"].get("dropout"):
        raise UnsupportedTokenizerError("BPE dropout is not supported")


def _parts(field: str, key: str, component: Any) -> Iterator[Any]:
    """The parts of a component: itself, or those of a sequence, which may not be nested."""
    if component is None:
        return
    if not isinstance(component, dict) or component.get("type") != "Sequence":
        yield component
        return
    parts = component.get(key)
    if not isinstance(parts, list) or len(parts) > MAX_SEQUENCE_LENGTH:
        raise UnsupportedTokenizerError(f"its {field} must be a sequence of at most {MAX_SEQUENCE_LENGTH} parts")
    yield from parts


def _check_pattern(pattern: Any) -> None:
    text = pattern.get("Regex") if isinstance(pattern, dict) else None
    if text is not None and text not in SPLIT_PATTERNS:
        raise UnsupportedTokenizerError(f"its pattern {shorten(text)!r} is not supported: it may take unbounded time")
