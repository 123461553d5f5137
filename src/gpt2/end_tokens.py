"""The tokens that end a text: `eos_token_id` of `config.json` and `generation_config.json`."""

import json
from pathlib import Path
from typing import Any

from gpt2.errors import ModelFilesError
from gpt2.files import check_inside_folder
from gpt2.terminal import shorten


def read_end_tokens(folder: Path, vocab_size: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that `eos_token_id` names in the model folder's two configs, a number or a list in each.

    Ids outside the vocabulary are ignored: GPT-2's 50256 stands in many configs of smaller models. Without any id left
    it is `default`, the tokenizer's own. Raises ModelFilesError for values that are not ids.
    """
    found: dict[int, None] = {}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        check_inside_folder(path, folder)
        if path.is_file():
            found |= dict.fromkeys(_eos_token_ids(path))
    return tuple(token for token in found if token < vocab_size) or default


def format_eos_token_id(tokens: tuple[int, ...]) -> int | list[int] | None:
    """`eos_token_id` as `transformers` writes it: None without a token, a number for one, else a list."""
    return list(tokens) if len(tokens) > 1 else next(iter(tokens), None)


def _eos_token_ids(path: Path) -> list[int]:
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from error
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token in values:
        if type(token) is not int or token < 0:
            raise ModelFilesError(f"{path}: eos_token_id must be a token id or a list of them, not {shorten(value)}")
    return values
