"""`config.json` of a GPT-2, as `transformers` writes it."""

import logging
from pathlib import Path
from typing import Any

import torch

from gpt2.end_tokens import format_eos_token_id
from gpt2.errors import ModelFilesError, UserError
from gpt2.files import check_inside_folder
from gpt2.formats.stored import read_json, sizes_of
from gpt2.model import GPTConfig
from gpt2.runtime import DTYPE_NAMES
from gpt2.templates import ChatTemplate
from gpt2.tokenizer import Tokenizer

_log = logging.getLogger("gpt2")

MAX_CONFIG_NUMBER = 1e30  # JSON has integers that no float holds
_ALIASES = {  # names of these settings in most other models of transformers, which accepts them for GPT-2 too
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
    """The GPTConfig of a `config.json`. Raises UserError if it is not a GPT-2's, or links out of its folder."""
    check_inside_folder(path, path.parent)
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
        wrong = not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and _KINDS[key] is not bool)
        if wrong or (not isinstance(value, str) and not abs(value) < MAX_CONFIG_NUMBER):
            raise ModelFilesError(f"{path}: {key} cannot be {value!r:.100}")
    residual = others.pop("resid_pdrop", 0.0)
    dropouts = _dropouts(residual, *(others.pop(key, residual) for key in ("embd_pdrop", "attn_pdrop")))
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
    """The three rates as settings of GPTConfig: `embd_dropout` and `attn_dropout` only if they differ."""
    others = {"embd_dropout": embedding, "attn_dropout": attention}
    return {"dropout": residual, **{name: rate for name, rate in others.items() if rate != residual}}


def hf_config(config: GPTConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` for `transformers`, with `n_ctx` for llama.cpp's converter."""
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
        "torch_dtype": DTYPE_NAMES[dtype],  # its name in transformers before 5
        **_bos_eos_token_ids(tokenizer),
    }


def _bos_eos_token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """For config.json, where some programs read numbers only. All end tokens are in generation_config.json."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    return {"bos_token_id": tokenizer.end_of_text, "eos_token_id": next(iter(tokenizer.end_tokens), None)}


def generation_config(tokenizer: Tokenizer | None, template: ChatTemplate | None) -> dict[str, Any]:
    """`generation_config.json`: `eos_token_id` is every token that ends a text, or an answer of the template."""
    ids: dict[str, Any] = {**_bos_eos_token_ids(tokenizer)}
    if tokenizer is None:
        return {"_from_model_config": True, **ids}
    ends = dict.fromkeys((*tokenizer.end_tokens, *(template.end_tokens(tokenizer) if template else ())))
    return ids | {"eos_token_id": format_eos_token_id(tuple(ends))}
