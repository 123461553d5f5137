"""The fastest way to run a model where it is: the CPU kernel, or CUDA graphs."""

import copy

import torch

from gpt2.errors import UserError, did_you_mean
from gpt2.generation.cuda_graphs import GraphedGPT
from gpt2.generation.engine import LanguageModel
from gpt2.lora import lora_layers, merge_and_unload
from gpt2.model import GPT
from gpt2.native.build import load_library
from gpt2.native.model import NativeGPT
from gpt2.native.quantization import GROUP_SIZES, dequantize, quantize

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")


def prepare_for_inference(model: LanguageModel, precision: str | None = None) -> LanguageModel:
    """`model` for inference in a precision: "float32", "bfloat16", "float16", "int8" or "int4"; None for its own.

    On CUDA its decoding steps become CUDA graphs. On a CPU it runs through the kernel of `gpt2.native`; where that
    cannot be compiled, the log says why, and torch runs it, with the same rounded weights. A model with adapters runs
    as it is, or merged into a copy if a precision is asked for.
    Raises UserError for a precision that the device does not have.
    """
    if not isinstance(model, GPT):  # somebody has chosen
        return model
    if lora_layers(model):
        if precision is None:  # to merge a model while it learns would take as much memory again
            return model
        model = merge_and_unload(model)
    if precision is None:
        precision = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if precision not in PRECISIONS:
        raise UserError(f"there is no precision '{precision}'{did_you_mean(precision, PRECISIONS)}")
    if model.device.type != "cpu" or precision == "float16":
        if precision in GROUP_SIZES:
            raise UserError(f"{precision} is for the CPU: on {model.device} there are float32, bfloat16 and float16")
        model = _to_dtype(model, precision)
        return GraphedGPT(model) if model.device.type == "cuda" else model
    kernel = load_library()
    if kernel is not None:
        return NativeGPT(model, precision, kernel)
    return _fake_quantized(model, precision) if precision in GROUP_SIZES else _to_dtype(model, precision)


def _to_dtype(model: GPT, dtype_name: str) -> GPT:
    """The model itself if that is its dtype, else a copy: the caller's stays as it is."""
    dtype = getattr(torch, dtype_name)
    return model if model.lm_head.weight.dtype == dtype else copy.deepcopy(model).to(dtype)


def _fake_quantized(model: GPT, precision: str) -> GPT:
    """A float32 model of the weights that the kernel would use."""
    rounded = GPT(model.config)
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        if model.config.tie_word_embeddings:  # the head alone is rounded
            rounded.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        for name, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear):
                own = "int8" if name == "lm_head" else precision
                module.weight.copy_(dequantize(*quantize(module.weight, own), own, module.weight.size(1)))
    return rounded.eval()
