"""The names that tensors of a GPT-2 have in files, and what files hold besides the model."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from gpt2.errors import ModelFilesError
from gpt2.formats.stored import HEAD, Stored, Weights, transposed, zeros
from gpt2.terminal import shorten

_log = logging.getLogger("gpt2")

CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_PREFIXES = re.compile(r"^\.?(?:(?:module|model|base_model|pretrained_model|gpt2|transformer)\.)*")
_BUFFERS = re.compile(r"\.(attn|crossattention)\.(bias|masked_bias)$|(^|\.)position_ids$")  # masks, and 0, 1, 2, ...
_HEADS = ("score.", "v_head.", "multiple_choice_head.", "summary.", "classifier.", "qa_outputs.", "lm_head.bias")
_ADAPTED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|base_layer)\.")


def canonical(name: str) -> str | None:
    """This program's name for a tensor of a file, None for a buffer, the name without wrappers for any other."""
    plain = _PREFIXES.sub("", _WRAPPERS.sub("", name))
    if _BUFFERS.search(plain):
        return None
    return f"transformer.{plain}" if plain.startswith(("wte.", "wpe.", "h.", "ln_f.")) else plain


def by_our_names(stored: Iterable[Stored], path: Path, *, conv1d: bool) -> Weights:
    """The tensors of a file by this program's names; other heads and buffers are left out, the former with a warning.

    conv1d: the file keeps the matrices of the blocks as (in, out).
    Raises ModelFilesError for two tensors of one name, and for those of an adapter.
    """
    weights: Weights = {}
    others: list[str] = []
    for each in stored:
        name = canonical(each.key)
        if name is None:
            continue
        if _ADAPTED.search(each.key):
            raise ModelFilesError(
                f"{path}: {shorten(each.key)} belongs to an adapter: merge it with PEFT (merge_and_unload) first"
            )
        if name.startswith(_HEADS):
            others.append(each.key)
            continue
        if name in weights:
            raise ModelFilesError(
                f"{path}: {shorten(weights[name].key)} and {shorten(each.key)} are the same tensor of the model"
            )
        weights[name] = transposed(each) if conv1d and name.endswith(CONV1D_WEIGHTS) else each
    if others:
        _log.warning(
            "%s: left out, since a language model does not use them: %s", path, shorten(", ".join(sorted(others)), 300)
        )
    return weights


def with_zero_biases(weights: Weights) -> Weights:
    """The same, with a bias of zeros wherever a program that trains without them left none."""
    filled = dict(weights)
    for name, each in weights.items():
        bias = name.removesuffix("weight") + "bias"
        if (
            name.endswith(".weight")
            and name != HEAD
            and ".wte." not in name
            and ".wpe." not in name
            and bias not in filled
        ):
            filled[bias] = zeros(bias, each.shape[0])
    return filled
