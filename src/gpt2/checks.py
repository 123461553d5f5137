"""Checks of the arguments of public functions: a wrong type or value raises a UserError that names the argument."""

from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from gpt2.errors import ConfigError, RequestError


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise RequestError unless `value` is an integer (no bool) of at least `least`."""
    rule = "an integer" if least is None else f"an integer of {least} or more"
    if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and int(value) < least):
        raise RequestError(f"{name} must be {rule}, not {value!r:.80}", field=name)


def check_number(name: str, value: Any) -> None:
    """Raise RequestError unless `value` is an integer or a float (no bool)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, not {value!r:.80}", field=name)


def check_text(name: str, value: Any) -> None:
    """Raise RequestError unless `value` is a str."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, not {value!r:.80}", field=name)


def check_texts(name: str, value: Any) -> None:
    """Raise RequestError unless `value` is a text, or a list or tuple of texts."""
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise RequestError(f"{name} must be text, or a list of texts, not {value!r:.80}", field=name)


def check_path(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a str or a Path."""
    if not isinstance(value, str | Path):
        raise ConfigError(f"{name} must be a name or a path, not {value!r:.80}", field=name)


def check_token_ids(name: str, ids: Any, size: int, ignored: int | None = None) -> None:
    """Raise RequestError unless `ids` is an integer tensor (B, T) of ids below `size`.

    ignored: one more id that is allowed. The values of a tensor on a GPU are not read, which would wait for the GPU;
    nothing is checked while torch compiles or exports the model.
    """
    import torch  # here: gpt2.tokenizer, which uses the other checks, is imported without it

    if torch.compiler.is_compiling():
        return
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else f"{type(ids).__name__}"
        raise RequestError(f"{name} must be an int64 tensor of shape (B, T), not {found}", field=name)
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(value) for value in ids.aminmax())
    if low >= 0 and high < size:
        return
    outside = ids[(ids < 0) | (ids >= size)]
    outside = outside if ignored is None else outside[outside != ignored]
    if outside.numel():
        wrong = int(outside[0])
        raise RequestError(f"{name} has the token id {wrong}, and the model's ids are 0 to {size - 1:,}", field=name)
