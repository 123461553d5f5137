"""Prepare a model for inference on its device: the CPU kernel, or CUDA graphs."""

import copy

import torch

from gpt2.errors import ConfigError, did_you_mean
from gpt2.generation.cuda_graphs import GraphedGPT
from gpt2.generation.engine import LanguageModel
from gpt2.lora import lora_layers, merge_and_unload
from gpt2.model import GPT
from gpt2.native.build import load_library
from gpt2.native.model import NativeGPT
from gpt2.native.quantization import GROUP_SIZES, dequantize, quantize

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")


def prepare_for_inference(model: LanguageModel, precision: str | None = None) -> LanguageModel:
    """`model` for inference in a precision.

    precision: "float32", "bfloat16", "float16", "int8" or "int4"; None for the model's own dtype.

    On CUDA, decoding steps become CUDA graphs. On a CPU the kernel of `gpt2.native` runs the model; where it cannot be
    compiled, a warning says why, and torch runs the model with the same quantized weights. A model with LoRA adapters
    is returned unchanged, or merged into a copy if a precision is given.
    Raises ConfigError for a precision that the device does not support.
    """
    if not isinstance(model, GPT):  # prepared already
        return model
    if lora_layers(model):
        if precision is None:  # merging during training would double the memory
            return model
        model = merge_and_unload(model)
    if precision is None:
        precision = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if precision not in PRECISIONS:
        raise ConfigError(
            f"there is no precision '{precision}'{did_you_mean(precision, PRECISIONS)}", field="precision"
        )
    if model.device.type != "cpu" or precision == "float16":
        if precision in GROUP_SIZES:
            message = f"{precision} is for the CPU: {model.device} supports float32, bfloat16 and float16"
            raise ConfigError(message, field="precision")
        model = _to_dtype(model, precision)
        return GraphedGPT(model) if model.device.type == "cuda" else model
    kernel = load_library()
    if kernel is not None:
        return NativeGPT(model, precision, kernel)
    return _fake_quantized(model, precision) if precision in GROUP_SIZES else _to_dtype(model, precision)


def _to_dtype(model: GPT, dtype_name: str) -> GPT:
    """The model itself if it has this dtype, else a converted copy."""
    dtype = getattr(torch, dtype_name)
    return model if model.lm_head.weight.dtype == dtype else copy.deepcopy(model).to(dtype)


def _fake_quantized(model: GPT, precision: str) -> GPT:
    """A float32 model with the quantized weights that the kernel would use."""
    rounded = GPT(model.config)
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        if model.config.tie_word_embeddings:  # only the head is quantized, not the embedding
            rounded.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        for name, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear):
                own = "int8" if name == "lm_head" else precision
                module.weight.copy_(dequantize(*quantize(module.weight, own), own, module.weight.size(1)))
    return rounded.eval()
