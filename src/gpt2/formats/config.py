"""`config.json` of a GPT-2, as `transformers` writes it."""

import logging
from pathlib import Path
from typing import Any

import torch

from gpt2.errors import ModelFilesError, UserError
from gpt2.formats.stored import read_json, sizes_of
from gpt2.model import GPTConfig
from gpt2.runtime import DTYPE_NAMES
from gpt2.tokenizer import Tokenizer

_log = logging.getLogger("gpt2")

_ALIASES = {  # the names that transformers gives these settings in most other models, and takes here too
    "n_positions": ("n_ctx", "max_position_embeddings"),
    "n_embd": ("hidden_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_inner": ("intermediate_size",),
    "activation_function": ("hidden_act",),
    "layer_norm_epsilon": ("layer_norm_eps",),
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "activation_function": str,
    "layer_norm_epsilon": (int, float),
    "tie_word_embeddings": bool,
    "scale_attn_weights": bool,
    "scale_attn_by_inverse_layer_idx": bool,
    "resid_pdrop": (int, float),
    "embd_pdrop": (int, float),
    "attn_pdrop": (int, float),
}
_DEFAULT_HEADS = 12  # transformers'


def read_config(path: Path) -> GPTConfig:
    """The GPTConfig of a `config.json`. Raises ModelFilesError for what is not a GPT-2."""
    try:
        raw = read_json(path)
    except UserError as error:
        raise ModelFilesError(str(error).replace("is no JSON object", "does not describe a GPT-2 model")) from error
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ModelFilesError(f"{path} does not describe a GPT-2 model")
    if raw.get("add_cross_attention"):
        raise ModelFilesError(f"{path}: add_cross_attention=True is not supported")
    sizes = _sizes(raw, path)
    others = {key: value for key in _KINDS if (value := _setting(raw, key)) is not None}
    for key, value in others.items():
        if not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and _KINDS[key] is not bool):
            raise ModelFilesError(f"{path}: {key} cannot be {value!r}")
    dropouts = _dropouts(*(others.pop(key, 0.0) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")))
    try:
        return GPTConfig(block_size=sizes.pop("n_positions"), **sizes, **others, **dropouts)
    except UserError as error:
        raise ModelFilesError(f"{path}: {error}") from error


def _setting(raw: dict[str, Any], key: str) -> Any:
    return next((raw[name] for name in (key, *_ALIASES.get(key, ())) if raw.get(name) is not None), None)


def _sizes(raw: dict[str, Any], path: Path) -> dict[str, int]:
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner")
    sizes = {name: _setting(raw, name) for name in names}
    if sizes["n_inner"] is None:
        del sizes["n_inner"]
    if sizes["n_head"] is None:
        _log.warning("%s does not have n_head: %d is assumed, as transformers does", path, _DEFAULT_HEADS)
        sizes["n_head"] = _DEFAULT_HEADS
    return sizes_of(sizes, sizes, path)


def _dropouts(residual: float, embedding: float, attention: float) -> dict[str, Any]:
    if residual == embedding == attention:
        return {"dropout": residual}
    return {"dropout": residual, "embd_dropout": embedding, "attn_dropout": attention}


def hf_config(config: GPTConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` for `transformers`, and `n_ctx` for llama.cpp's converter."""
    embedding = config.dropout if config.embd_dropout is None else config.embd_dropout
    attention = config.dropout if config.attn_dropout is None else config.attn_dropout
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": config.activation_function,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        "embd_pdrop": embedding,
        "attn_pdrop": attention,
        "resid_pdrop": config.dropout,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],  # what transformers before 5 called it
        **bos_eos_token_ids(tokenizer),
    }


def bos_eos_token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """The ids of the tokens around a text, as `config.json` and `generation_config.json` name them."""
    end = tokenizer.end_of_text if tokenizer is not None else None
    return {"bos_token_id": end, "eos_token_id": end}
