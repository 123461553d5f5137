"""CTranslate2's model folder, through the package's own description of a decoder."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2.errors import UserError, missing_extra
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

DTYPES = ("float32", "float16", "bfloat16", "int8")
_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "GELUTanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "GELU"),
    **dict.fromkeys(("silu", "swish"), "SWISH"),
    "quick_gelu": "GELUSigmoid",
    "relu": "RELU",
    "tanh": "Tanh",
}


def write(model: GPT, tokenizer: Tokenizer | None, folder: Path, dtype: str) -> None:
    """Write model and vocabulary. Raises UserError when ctranslate2 is not installed or cannot have the model."""
    package("writing for CTranslate2")
    from ctranslate2.specs import common_spec, transformer_spec  # pyright: ignore[reportMissingImports]

    c = model.config
    activation = getattr(common_spec.Activation, _ACTIVATIONS[c.activation_function], None)
    if activation is None:
        raise UserError(f"this version of CTranslate2 has no {c.activation_function}")
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        c.n_layer, c.n_head, pre_norm=True, activation=activation
    )
    weights = {name: _array(parameter) for name, parameter in model.named_parameters()}
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["transformer.wte.weight"]
    decoder.position_encodings.encodings = weights["transformer.wpe.weight"]
    decoder.projection.weight = weights.get("lm_head.weight", weights["transformer.wte.weight"])
    _set_norm(decoder.layer_norm, weights, "transformer.ln_f")
    for i, layer in enumerate(decoder.layer):
        name = f"transformer.h.{i}"
        _set_norm(layer.self_attention.layer_norm, weights, f"{name}.ln_1")
        _set_linear(layer.self_attention.linear[0], weights, f"{name}.attn.c_attn")
        _set_linear(layer.self_attention.linear[1], weights, f"{name}.attn.c_proj")
        _set_norm(layer.ffn.layer_norm, weights, f"{name}.ln_2")
        _set_linear(layer.ffn.linear_0, weights, f"{name}.mlp.c_fc")
        _set_linear(layer.ffn.linear_1, weights, f"{name}.mlp.c_proj")
    tokens, end = _vocabulary(tokenizer, c.vocab_size)
    spec.register_vocabulary(tokens)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.config.layer_norm_epsilon = c.layer_norm_epsilon
    spec.validate()
    spec.optimize(quantization=None if dtype == "float32" else dtype)
    spec.save(str(folder))


def package(purpose: str) -> Any:
    """The `ctranslate2` package. Raises UserError when it is not installed."""
    try:
        import ctranslate2  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("ctranslate2", "ctranslate2", purpose) from None
    return ctranslate2


def _vocabulary(tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list[str], str]:
    """The tokens as `vocab.json` spells them, numbers where there is no tokenizer, and the one that ends a text."""
    tokens = [f"[{i}]" for i in range(vocab_size)]
    if tokenizer is None:
        return tokens, tokens[-1]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        spec = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
    ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    for token, i in ids.items():
        tokens[i] = token
    return tokens, tokens[tokenizer.end_of_text]


def _set_norm(spec: Any, weights: dict[str, np.ndarray], name: str) -> None:
    spec.gamma, spec.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]


def _set_linear(spec: Any, weights: dict[str, np.ndarray], name: str) -> None:
    spec.weight, spec.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]


def _array(parameter: Tensor) -> np.ndarray:
    return parameter.detach().to("cpu", torch.float32).numpy().copy()  # CTranslate2 rounds in place
