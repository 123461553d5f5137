"""The files beside a tokenizer's vocabulary: added tokens, the names of special tokens and options.

They are `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, as `transformers` reads them: the
first has precedence if it lists the added tokens (`added_tokens_decoder`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2.errors import ModelFilesError
from gpt2.files import check_inside_folder
from gpt2.tokenizer_components import MAX_FILE_BYTES
from gpt2.vocabulary import (
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    UnsupportedTokenizerError,
    Vocabulary,
    check_merges,
    encode_byte_level,
    read_merges,
)

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a vocabulary say.

    added:            the added tokens by id, each with the fields of `tokenizers.AddedToken`.
    names:            the text of `eos_token`, `pad_token` and the like.
    special:          the texts of all special tokens that are named, in the order in which missing ones are added.
    add_prefix_space: whether a space precedes every text; None if the vocabulary's own setting holds.
    add_bos_token:    whether `bos_token` precedes every prompt.
    """

    added: dict[int, dict[str, Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    add_prefix_space: bool | None = None
    add_bos_token: bool = False


def read_settings(folder: Path) -> TokenizerSettings:
    """The settings in a folder. Raises UserError for a file that is broken or links out of the folder."""
    config, special_map, added = (_read_object(folder / name) for name in SETTINGS_FILES)
    path = folder / SETTINGS_FILES[0]
    try:
        if "added_tokens_decoder" in config:
            tokens = {int(i): _added_token(value) for i, value in config["added_tokens_decoder"].items()}
            named = _named_tokens(config)
        else:
            path = folder / SETTINGS_FILES[1]
            named = {**_named_tokens(config), **_named_tokens(special_map)}
            path = folder / SETTINGS_FILES[2]
            special = {text for texts in named.values() for text in texts}
            tokens = {int(i): _added_token({"content": text, "special": text in special}) for text, i in added.items()}
        if any(not 0 <= i < MAX_VOCAB_SIZE * 16 for i in tokens):
            raise ValueError("the id of an added token is out of range")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFilesError(f"cannot use {path}: {error!r}") from error
    names = {name: texts[0] for name, texts in named.items() if name in _NAMES and texts}
    order = [text for name in (*_NAMES, *_LISTS) for text in named.get(name, ())]
    prefix = config.get("add_prefix_space") if config.get("tokenizer_class") in _GPT2_CLASSES else None
    return TokenizerSettings(
        tokens,
        names,
        tuple(dict.fromkeys(order)),
        prefix if isinstance(prefix, bool) else None,
        config.get("add_bos_token") is True,
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    check_inside_folder(path, path.parent)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES // 2**20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"cannot use {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"cannot use {path}: it is not a JSON object")
    return value


def _named_tokens(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The texts under `eos_token` and the like, each a text, or an object with the text in `content`."""
    named: dict[str, list[str]] = {}
    for name in (*_NAMES, *_LISTS):
        value = config.get(name)
        values = value if isinstance(value, list) else list(value.values()) if name in _LISTS and value else [value]
        texts = [each["content"] if isinstance(each, dict) else each for each in values if each is not None]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} is not a text")
        named[name] = [text for text in texts if text]
    return {name: texts for name, texts in named.items() if texts}


def _added_token(value: Any) -> dict[str, Any]:
    """The fields of an added token in the order of `tokenizer.json`. Raises KeyError or TypeError for anything else."""
    if not isinstance(value["content"], str) or not value["content"]:
        raise TypeError("the content of an added token is not a text")
    options = {name: value.get(name, False) for name in _OPTIONS}
    if not all(isinstance(option, bool) for option in options.values()):
        raise TypeError("an option of an added token is not true or false")
    return {"content": value["content"], **options}


def apply_settings(spec: dict[str, Any], settings: TokenizerSettings) -> None:
    """Add tokens and options to a parsed `tokenizer.json` of a byte-level BPE, in place.

    An added token keeps its id; a special token that is only named gets the next free id. Ids that no token has are
    filled with tokens that no text encodes to. Raises ValueError for ids that cannot be.
    """
    vocab: dict[str, int] = spec["model"]["vocab"]
    known = {token["content"]: token for token in spec.setdefault("added_tokens", []) or []}
    spec["added_tokens"] = list(known.values())
    ids = {**vocab, **{text: token["id"] for text, token in known.items()}}
    if not all(type(i) is int and 0 <= i < MAX_VOCAB_SIZE * 16 for i in ids.values()):
        raise ValueError(f"its ids are not 0 to {len(ids) - 1}, each once")
    for i, token in sorted(settings.added.items()):
        if token["content"] not in known:
            _add(spec, {"id": ids.get(token["content"], i), **token})
    for text in settings.special:
        if text not in {token["content"] for token in spec["added_tokens"]}:
            following = 1 + max((*vocab.values(), *(token["id"] for token in spec["added_tokens"])), default=-1)
            _add(spec, {"id": vocab.get(text, following), **_added_token({"content": text, "special": True})})
    spec["added_tokens"].sort(key=lambda token: token["id"])
    _fill_holes(spec)
    if settings.add_prefix_space is not None:
        for part in spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]]):
            if part["type"] == "ByteLevel":
                part["add_prefix_space"] = settings.add_prefix_space


def _add(spec: dict[str, Any], token: dict[str, Any]) -> None:
    """Add a token to the list, and to the vocabulary, so that the library keeps its id."""
    spec["added_tokens"].append(token)
    spec["model"]["vocab"][token["content"]] = token["id"]


def _fill_holes(spec: dict[str, Any]) -> None:
    vocab, added = spec["model"]["vocab"], spec["added_tokens"]
    used = {*vocab.values(), *(token["id"] for token in added)}
    size = 1 + max(used, default=-1)
    if size == len(used):
        return
    if size - len(used) > MAX_VOCAB_SIZE:
        raise ValueError(f"its ids go up to {size - 1:,}, but it has only {len(used):,} tokens")
    vocab |= {token["content"]: token["id"] for token in added}
    vocab |= {f"<|unused_{i}|>": i for i in range(size) if i not in used}


def end_of_text_name(spec: dict[str, Any], settings: TokenizerSettings) -> str:
    """The text of the token between documents: ``<|endoftext|>``, else `eos_token`, else `bos_token`.

    Raises UnsupportedTokenizerError if the vocabulary has none of them.
    """
    texts = {*spec["model"]["vocab"], *(token["content"] for token in spec["added_tokens"])}
    for text in (END_OF_TEXT, settings.names.get("eos_token", ""), settings.names.get("bos_token", "")):
        if text in texts:
            return text
    raise UnsupportedTokenizerError(f"it has no {END_OF_TEXT}, and no file names an eos_token")


def prompt_prefix(spec: dict[str, Any]) -> tuple[int, ...]:
    """The ids that the post-processor of a parsed `tokenizer.json` puts before a text."""
    post = spec.get("post_processor") or {}
    for part in post.get("processors", [post]):
        if part.get("type") == "RobertaProcessing":
            return (part["cls"][1],)
        if part.get("type") == "TemplateProcessing":
            ids: list[int] = []
            for item in part["single"]:
                if "SpecialToken" not in item:
                    return tuple(ids)
                ids += part["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return ()


def spec_from_vocab_json(ids: Any) -> dict[str, Any]:
    """A parsed `vocab.json` as a `tokenizer.json` with GPT-2's pre-tokenizer and no merges. Raises ValueError."""
    if not isinstance(ids, dict):
        raise ValueError("it is not a JSON object")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": []},
    }


def merges_beside(path: Path, vocabulary: Vocabulary) -> list[list[str]]:
    """The merges for a `vocab.json`, as `tokenizer.json` spells them. Raises ModelFilesError if they do not fit it."""
    merges_path = path.with_name("vocab.bpe" if path.name == "encoder.json" else "merges.txt")  # OpenAI's names
    try:
        merges = read_merges(merges_path)
        check_merges(vocabulary, merges)
    except FileNotFoundError:
        raise ModelFilesError(f"no {merges_path}, which vocab.json needs") from None
    except ValueError as error:
        raise ModelFilesError(f"cannot use {merges_path}: {error}") from error
    return [[encode_byte_level(left), encode_byte_level(right)] for left, right in merges]
