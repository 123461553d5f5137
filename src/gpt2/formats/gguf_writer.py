"""A model as a GGUF file, tokenizer and chat template inside."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.errors import UserError
from gpt2.formats.gguf_file import CONTROL, MODULES, NORMAL, PARTS, UNUSED, USER_DEFINED, package
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer
from gpt2.vocabulary import uses_gpt2_pre_tokenizer

PRECISIONS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
_MODULES = {ours: theirs for theirs, ours in MODULES.items()}
_PARTS = {ours: theirs for theirs, ours in PARTS.items()}


def write(model: GPT, tokenizer: Tokenizer | None, path: Path, precision: str, template: str | None = None) -> None:
    """Write `model` for llama.cpp.

    precision: of the matrices: "f32", "f16", "q8_0" or "q4_0" (then the token embedding keeps 8 bits).
        Rows that are no multiple of 32 long cannot be quantized and become f16; all else is float32.
    Raises UserError for a model or a tokenizer that llama.cpp does not have.
    """
    gguf = package("writing GGUF")
    c = model.config
    if c.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        raise UserError(f"llama.cpp's GPT-2 has only the tanh approximation of GELU, not {c.activation_function}")
    if precision not in PRECISIONS:
        raise UserError(f"GGUF precision '{precision}' is not one of {', '.join(PRECISIONS)}")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_inner or 4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType[PRECISIONS[precision]])
    _add_tokenizer(writer, tokenizer, c.vocab_size)
    if template is not None:
        writer.add_chat_template(template)
    _write_tensors(gguf, writer, model, precision)


def _write_tensors(gguf: Any, writer: Any, model: GPT, precision: str) -> None:
    """One tensor at a time, so that no second copy of the model is in memory."""
    kinds = {name: _kind(gguf, name, p, precision) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        kind, shape = kinds[name], tuple(parameter.shape)
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
            writer.add_tensor_info(_gguf_name(name), shape, dtype, parameter.numel() * dtype.itemsize)
        else:
            held = gguf.quants.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(_gguf_name(name), held, np.dtype(np.uint8), int(np.prod(held)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parameter in model.named_parameters():
        writer.write_tensor_data(gguf.quants.quantize(_array(parameter), kinds[name]))
    writer.close()


def _kind(gguf: Any, name: str, parameter: Tensor, precision: str) -> Any:
    if parameter.dim() == 1 or "wpe" in name or precision == "f32":
        return gguf.GGMLQuantizationType.F32
    if precision == "f16" or parameter.size(1) % 32:
        return gguf.GGMLQuantizationType.F16
    outer = name.startswith(("transformer.wte", "lm_head"))
    return gguf.GGMLQuantizationType["Q8_0" if outer else precision.upper()]


def _array(parameter: Tensor) -> np.ndarray:
    return parameter.detach().to("cpu", torch.float32).contiguous().numpy()


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}"
    _, _, number, part = module.split(".", 3)  # transformer.h.0.attn.c_attn
    return f"blk.{number}.{_PARTS[part]}.{kind}"


def _add_tokenizer(writer: Any, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """llama.cpp's "gpt2" tokenizer: any byte-level BPE that cuts text as GPT-2 does, and the plain bytes."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(vocab_size)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        spec = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
    if spec["model"].get("type") != "BPE" or not uses_gpt2_pre_tokenizer(spec):
        raise UserError("llama.cpp's tokenizer for GPT-2 does not split text as this model's tokenizer does")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, i in spec["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    end = tokens[tokenizer.end_of_text]
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [f"{end} {end}"])  # an empty list cannot be written; this pair never occurs
    writer.add_bos_token_id(tokenizer.end_of_text)
    for add, end in zip((writer.add_eos_token_id, writer.add_eot_token_id), tokenizer.end_tokens, strict=False):
        add(end)  # llama.cpp ends a text at either
    writer.add_add_bos_token(False)
