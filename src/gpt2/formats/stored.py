"""Tensors that stay in their file until they are wanted, and a model made of them in little more than its memory."""

import ctypes
import json
import logging
import mmap
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt2.errors import ModelFilesError
from gpt2.model import GPT, GPTConfig
from gpt2.terminal import shorten

_log = logging.getLogger("gpt2")

READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_JSON = 2**28  # bytes; the largest tokenizer.json there are have some 20 MB
_LARGE = 2**20  # bytes, from which memory is mapped
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


class Stored(NamedTuple):
    """One tensor of a file.

    key:   its name there.
    shape: of what `read` returns.
    read:  reads it, (out, in) for a matrix, in the dtype of the file; the result is not shared with the file.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Weights = dict[str, Stored]  # by the names of `gpt2.model.GPT`


def transposed(stored: Stored) -> Stored:
    """A matrix that the file keeps as (in, out), as `nn.Linear` does: (out, in)."""
    if len(stored.shape) != 2:
        return stored
    return Stored(stored.key, stored.shape[::-1], lambda: stored.read().t())


def first_rows(stored: Stored, rows: int) -> Stored:
    """An embedding without the rows that only pad its vocabulary."""
    if len(stored.shape) != 2 or stored.shape[0] <= rows:
        return stored
    return Stored(stored.key, (rows, stored.shape[1]), lambda: stored.read()[:rows])


def zeros(key: str, size: int) -> Stored:
    """A bias that the file's program does without."""
    return Stored(key, (size,), lambda: torch.zeros(size))


def read_part(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Little-endian numbers at `offset` of a file. Raises ModelFilesError when the file ends before."""
    if sys.byteorder != "little":
        raise ModelFilesError(f"{path} is little-endian, which is not supported on this machine")
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if offset < 0 or offset + size > path.stat().st_size:
        raise ModelFilesError(f"{path} is cut short: it ends before byte {offset + size:,}")
    if not size:
        return torch.empty(shape, dtype=dtype)
    buffer = _buffer(size)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        at, view = 0, memoryview(buffer)
        while at < size and (got := file.readinto(view[at : at + 2**30])):
            at += got
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def own_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor.clone()
    return torch.frombuffer(_buffer(size), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _buffer(size: int) -> bytearray | mmap.mmap:
    """Memory that goes back to the system when it is let go of; on the heap, what is short-lived would leave holes."""
    return bytearray(size) if size < _LARGE else mmap.mmap(-1, size)


def copied_out(tensor: Tensor) -> Tensor:
    """A copy of a tensor in a private, read-only mapping of a file, whose pages are given back at once."""
    copy = own_copy(tensor)
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
    return copy


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises ModelFilesError for what is none."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("it is too large for a file of settings")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} is no JSON object")
    return value


def sizes_of(raw: Mapping[str, Any], names: Iterable[str], where: object) -> dict[str, int]:
    """The settings of these names. Raises ModelFilesError for one that is missing or no size."""
    sizes: dict[str, int] = {}
    for name in names:
        value = raw.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ModelFilesError(f"{where}: {name} is missing or no integer that a size can be")
        sizes[name] = value
    return sizes


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as transformers does: indented, sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build(config: GPTConfig, weights: Weights, dtype: torch.dtype | None, path: Path) -> GPT:
    """The model of `config` with these weights, in `dtype`; None for that of the token embedding.

    All shapes are checked before anything is read. Raises ModelFilesError for tensors that are missing, left over, of
    another shape, or not floating-point.
    """
    config, weights = _with_one_head(config, weights, path)
    check_shapes(_size_defining_shapes(config), weights, path)  # or a mistyped config would build a model of any size
    expected = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    check_shapes(expected, weights, path)
    for name, stored in weights.items():
        if name not in expected and name != HEAD:
            raise ModelFilesError(
                f"{path}: the weights hold {shorten(stored.key)}, which config.json does not call for"
            )
    tensors: dict[str, Tensor] = {}
    for name in sorted(expected, key=lambda name: name not in (WTE, HEAD)):  # the largest first, while there is room
        read = checked(weights[name], path)
        dtype = dtype or (torch.float32 if read.dtype == torch.float64 else read.dtype)
        tensors[name] = read if read.is_contiguous() and read.dtype == dtype else _copy(read, dtype)
    return model_from_state_dict(config, tensors)


def checked(stored: Stored, path: Path) -> Tensor:
    """Read a tensor. Raises ModelFilesError when it is not floating-point or not of the shape that was announced."""
    tensor = stored.read()
    if tensor.dtype not in READABLE:
        raise ModelFilesError(f"{path}: {stored.key} is {tensor.dtype}, which is not read here")
    if tuple(tensor.shape) != stored.shape:
        raise ModelFilesError(f"{path}: {stored.key} is {tuple(tensor.shape)}, not {stored.shape}")
    return tensor


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)


def _with_one_head(config: GPTConfig, weights: Weights, path: Path) -> tuple[GPTConfig, Weights]:
    """Of two names for one matrix, either is enough; two matrices make an untied model, whatever the config says."""
    head, wte = weights.get(HEAD), weights.get(WTE)
    if not config.tie_word_embeddings or head is None:
        return config, weights
    if wte is None:
        return config, {name: stored for name, stored in weights.items() if name != HEAD} | {WTE: head}
    if head.shape != wte.shape:
        raise ModelFilesError(f"{path}: {head.key} is {head.shape} and {wte.key} {wte.shape}, which cannot be tied")
    expected = (config.vocab_size, config.n_embd)
    if wte.shape == expected and not torch.equal(checked(head, path), checked(wte, path)):
        _log.warning("%s: lm_head differs from the token embedding, so the two are not tied", path)
        return replace(config, tie_word_embeddings=False), weights
    return config, {name: stored for name, stored in weights.items() if name != HEAD}


def _size_defining_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that determine all numbers of a config."""
    return {
        WTE: (config.vocab_size, config.n_embd),
        "transformer.wpe.weight": (config.block_size, config.n_embd),
        f"transformer.h.{config.n_layer - 1}.mlp.c_fc.weight": (config.n_inner or 4 * config.n_embd, config.n_embd),
    }


def check_shapes(expected: dict[str, tuple[int, ...]], weights: Weights, path: Path) -> None:
    """Raise ModelFilesError unless all expected tensors are there in their shapes; it has the names of the file."""
    wte = weights.get(WTE)
    unprefixed = wte is not None and not wte.key.endswith("transformer.wte.weight")
    for name, shape in expected.items():
        if name not in weights:
            shown = name.removeprefix("transformer.") if unprefixed else name
            raise ModelFilesError(f"{path}: the weights lack {shown}, which config.json calls for")
        if weights[name].shape != shape:
            raise ModelFilesError(
                f"{path}: {weights[name].key} is {weights[name].shape} in the weights, {shape} by config.json"
            )


def model_from_state_dict(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model whose parameters are these very tensors, by name; what else there is by name is left out.

    Nothing is copied, and no random numbers are drawn.
    """
    model = meta_model(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def meta_model(config: GPTConfig) -> GPT:
    """A model whose parameters have shapes and no memory."""
    with torch.device("meta"), _SkipInit():
        return GPT(config)


class _SkipInit(TorchFunctionMode):
    """Parameters without memory are not initialized; merely to try it, torch would import its compiler for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
