"""llm.c's `gpt2_124M.bin` and `gpt2_124M_bf16.bin`: 256 int32 of header, then all parameters in a fixed order.

Header: magic, version (3 float32, 5 bfloat16), context, vocabulary, layers, heads, channels, padded vocabulary.
Source: `write_model` in llm.c's train_gpt2.py. Every kind of parameter comes for all layers in a row, matrices as
(out, in), the token embedding with its padding.
"""

from pathlib import Path

import numpy as np
import torch

from gpt2.errors import ModelFilesError, UserError
from gpt2.files import check_regular_file
from gpt2.formats.stored import WTE, Stored, Weights, first_rows, read_part
from gpt2.model import GPT, GPTConfig

MAGIC, HEADER = 20240326, 256
_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
_PADDING = 128


def find(path: Path) -> Path | None:
    """`path` if it is a file with llm.c's magic number for models."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(4) == MAGIC.to_bytes(4, "little") else None


def _order(c: GPTConfig, padded: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter, as the file has them one after another."""
    C = c.n_embd
    blocks: list[tuple[str, tuple[int, ...]]] = [
        ("ln_1.weight", (C,)),
        ("ln_1.bias", (C,)),
        ("attn.c_attn.weight", (3 * C, C)),
        ("attn.c_attn.bias", (3 * C,)),
        ("attn.c_proj.weight", (C, C)),
        ("attn.c_proj.bias", (C,)),
        ("ln_2.weight", (C,)),
        ("ln_2.bias", (C,)),
        ("mlp.c_fc.weight", (4 * C, C)),
        ("mlp.c_fc.bias", (4 * C,)),
        ("mlp.c_proj.weight", (C, 4 * C)),
        ("mlp.c_proj.bias", (C,)),
    ]
    return [
        (WTE, (padded, C)),
        ("transformer.wpe.weight", (c.block_size, C)),
        *((f"transformer.h.{i}.{name}", shape) for name, shape in blocks for i in range(c.n_layer)),
        ("transformer.ln_f.weight", (C,)),
        ("transformer.ln_f.bias", (C,)),
    ]


def read(path: Path) -> tuple[GPTConfig, Weights]:
    """Config and weights. Raises ModelFilesError for a broken file or one of an old version."""
    check_regular_file(path)
    if path.stat().st_size < 4 * HEADER:
        raise ModelFilesError(f"{path} is cut short within its header")
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * HEADER), "<i4")
    version, context, vocabulary, layers, heads, channels, padded = map(int, header[1:8])
    if version not in _VERSIONS:
        raise ModelFilesError(f"{path} has version {version} of llm.c's format: 3 (float32) and 5 (bfloat16) are read")
    try:
        config = GPTConfig(vocabulary, context, layers, heads, channels)
    except UserError as error:
        raise ModelFilesError(f"{path}: {error}") from error
    if not vocabulary <= padded <= 2**31:
        raise ModelFilesError(
            f"{path}: the padded vocabulary of {padded} is smaller than the vocabulary of {vocabulary}"
        )
    dtype, offset, weights = _VERSIONS[version], 4 * HEADER, Weights()
    size = path.stat().st_size
    for name, shape in _order(config, padded):
        weights[name] = _stored(path, name, shape, offset, dtype)
        offset += int(np.prod(shape, dtype=object)) * dtype.itemsize
        if offset > size:
            break
    if offset != size:
        raise ModelFilesError(f"{path} is {size:,} bytes, other than its header says")
    weights[WTE] = first_rows(weights[WTE], vocabulary)
    return config, weights


def _stored(path: Path, name: str, shape: tuple[int, ...], offset: int, dtype: torch.dtype) -> Stored:
    return Stored(name, shape, lambda: read_part(path, offset, shape, dtype))


def write(model: GPT, path: Path, dtype: torch.dtype) -> None:
    """Write float32 (version 3) or bfloat16 (version 5). Raises ModelFilesError for a model that llm.c cannot run."""
    c, version = model.config, next((number for number, each in _VERSIONS.items() if each == dtype), None)
    if version is None:
        raise ModelFilesError("llm.c has float32 and bfloat16: choose with --dtype")
    if not c.tie_word_embeddings:
        raise ModelFilesError("llm.c ties the head to the token embedding, and this model has a head of its own")
    if c.n_inner not in (None, 4 * c.n_embd) or c.layer_norm_epsilon != 1e-5:
        raise ModelFilesError("llm.c has only an MLP of 4 * n_embd and a layer_norm_epsilon of 1e-5")
    if c.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        raise ModelFilesError(f"llm.c has only the tanh approximation of GELU, not {c.activation_function}")
    padded = -(-c.vocab_size // _PADDING) * _PADDING
    header = np.zeros(HEADER, "<i4")
    header[:8] = (MAGIC, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded)
    parameters = dict(model.named_parameters())
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name, shape in _order(c, padded):
            tensor = parameters[name].detach().to("cpu", dtype).contiguous()
            file.write(tensor.view(torch.uint8).numpy().tobytes())
            file.write(bytes((shape[0] - len(tensor)) * (shape[-1] if len(shape) > 1 else 1) * dtype.itemsize))
