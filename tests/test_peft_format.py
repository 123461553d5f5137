"""Adapters in PEFT's format: settings and tensors that are not supported, or do not agree, are one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.errors import UserError
from gpt2.lora import lora_layers, read_adapter
from tests.helpers.adapters import with_adapter, write_adapter


def write_with_settings(folder: Path, **changes: Any) -> Path:
    path = write_adapter(folder, with_adapter()) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"peft_type": "IA3"}, "has the peft_type IA3: only LORA is supported"),
        ({"use_dora": True}, r"transformer\.h\.0\.attn\.c_attn has a magnitude without use_dora or LoRA, or lacks it"),
        ({"lora_bias": True}, "lora_bias=true is not supported: merge it with PEFT first"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"modules_to_save": "wte"}, 'modules_to_save cannot be "wte"'),
        ({"alpha_pattern": {"(a+)+$": 4}}, "alpha_pattern=.* is not supported: merge it with PEFT first"),
        ({"alpha_pattern": {"c_attn": "4"}}, "alpha_pattern=.* is not supported: merge it with PEFT first"),
        ({"alpha_pattern": [4]}, "alpha_pattern=.* is not supported: merge it with PEFT first"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base"),
        ({"target_modules": ["q_proj"]}, "has no tensors for its target 'q_proj'"),
        ({"target_modules": ["c_attn"]}, r"it has tensors for transformer\.h\.0\.attn\.c_proj, which is not among its"),
        ({"target_modules": 3}, "target_modules cannot be 3"),
        ({"target_modules": []}, "tensors for|needs targets"),
        ({"r": "8"}, 'r cannot be "8"'),
        ({"r": True}, "r cannot be true"),
        ({"r": 4}, r"is \(3, 24\), which is not of rank 4"),
        ({"lora_alpha": None}, "lora_alpha cannot be null"),
        ({"lora_alpha": -1}, "alpha of an adapter must be over 0"),
        ({"lora_dropout": 1.0}, "dropout of an adapter"),
    ],
)
def test_unsupported_peft_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        read_adapter(write_with_settings(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_targets_of_patterns_or_some_blocks_follow_from_the_tensors(tmp_path: Path) -> None:
    layers = list(lora_layers(with_adapter()))
    for changes in ({"target_modules": ".*c_.*"}, {"layers_to_transform": [0, 1]}, {"exclude_modules": ["wte"]}):
        assert read_adapter(write_with_settings(tmp_path, **changes)).config.targets == tuple(sorted(layers))


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"]


def _embedding(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"] = torch.zeros(3, 97)


def _position(tensors: dict[str, Tensor]) -> None:
    tensors |= {f"base_model.model.transformer.wpe.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"}


def _weight(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.transformer.ln_f.weight"] = torch.zeros(24)


def _magnitude(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector"] = torch.zeros(72)


def _flat(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_drop, r"it lacks transformer\.h\.1\.mlp\.c_fc\.lora_B"),
        (_embedding, "wte.token_adapter.trainable_tokens_delta is not supported: merge it with PEFT"),
        (_position, "transformer.wpe cannot have an adapter; c_attn, c_proj, c_fc, wte and lm_head can"),
        (_weight, r"its settings do not name transformer\.ln_f\.weight: neither bias nor modules_to_save"),
        (_magnitude, r"transformer\.h\.0\.attn\.c_attn has a magnitude without use_dora"),
        (_flat, r"lora_A is \(3,\), which is not of rank 3"),
        (dict.clear, "it has no tensors"),
    ],
)
def test_inconsistent_tensors_are_one_line(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], line: str
) -> None:
    path = write_adapter(tmp_path, with_adapter()) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=line) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)
