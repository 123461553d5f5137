"""Adapters in PEFT's format: the settings and the tensors of a LoRA, read with every value checked."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2.errors import ModelFilesError
from gpt2.files import safetensors_header
from gpt2.terminal import shorten

TARGET_MODULES = ("c_attn", "c_proj", "c_fc")  # c_proj is in the attention and in the MLP
LORA_A, LORA_B = ".lora_A", ".lora_B"

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names, from its wrapper classes
EMBEDDING, HEAD = "transformer.wte", "lm_head"
BLOCK_LINEAR = r"transformer\.h\.[0-9]+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
_LAYER_PATTERN = re.compile(rf"{BLOCK_LINEAR}|{EMBEDDING}|{HEAD}")
_PARAMETER = re.compile(r"(transformer|lm_head)\.([a-z0-9_]+\.)*(weight|bias)")
MAX_NUMBER = 1e30  # JSON's integers have no bound
_SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base
_UNSUPPORTED_SETTINGS = (  # of PEFT, each with the one value that is supported
    *(("lora_bias", False), ("use_qalora", False)),
    *((name, None) for name in ("trainable_token_indices", "layer_replication")),
    *((name, None) for name in ("target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora")),
    *((name, None) for name in ("velora_config", "monteclora_config", "kasa_config")),
)


def matches_target(name: str, target: str) -> bool:
    """Whether PEFT matches `target` to the module of this name."""
    return name == target or name.endswith(f".{target}")


def alpha_by_layer(settings: dict[str, Any], layers: list[str]) -> dict[str, float]:
    """The alpha of each layer: `lora_alpha`, or that of the first name in `alpha_pattern` which ends the layer's name.

    Raises ValueError for a pattern that is more than a name, and for a value that is no number over 0.
    """
    pattern = settings.get("alpha_pattern") or {}
    for name, value in pattern.items() if isinstance(pattern, dict) else [("", pattern)]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER
        if not is_number or not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"alpha_pattern={shorten(json.dumps(pattern))} is not supported: merge it with PEFT first")
    return {
        layer: next((alpha for name, alpha in pattern.items() if matches_target(layer, name)), settings["lora_alpha"])
        for layer in layers
    }


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`. Raises ModelFilesError for what cannot be merged here."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise ModelFilesError(f"{path} has the peft_type {shorten(kind)}: only LORA is supported")
    for key, plain in _UNSUPPORTED_SETTINGS:
        if raw.get(key) and raw[key] != plain:
            raise ModelFilesError(
                f"{path}: {key}={shorten(json.dumps(raw[key]))} is not supported: merge it with PEFT first"
            )
    if raw.get("init_lora_weights") not in _SUPPORTED_INITS:
        init = shorten(raw["init_lora_weights"])
        raise ModelFilesError(f"{path}: init_lora_weights={init} changes the base: merge it with PEFT")
    kinds: dict[str, type | tuple[type, ...]] = {
        "r": int,
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "use_rslora": bool,
        "target_modules": (list, str),
        "modules_to_save": list,
        "use_dora": bool,
        "bias": str,
    }
    optional = ("lora_dropout", "use_rslora", "modules_to_save", "use_dora", "bias")
    for key, kind in kinds.items():
        value = raw.get(key)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        wrong = wrong or (isinstance(value, int | float) and not abs(value) < MAX_NUMBER)
        missing = value is None and key in optional
        if (wrong and not missing) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            raise ModelFilesError(f"{path}: {key} cannot be {shorten(json.dumps(value))}")
    return {key: value for key, value in raw.items() if value is not None}


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter in float32, by the names of this program, and the file's metadata.

    pairs:      lora_A (r, in) and lora_B (out, r), by the layer's name and `LORA_A` or `LORA_B`. Those of an embedding
                (V, C) are B (V, r) and A (r, C).
    magnitudes: of DoRA (Liu et al. 2024), (out,), by the layer's name.
    replaced:   whole parameters by name: biases, `modules_to_save`, embeddings of another vocabulary size.
    """

    pairs: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, tensor: Tensor) -> bool:
        """Store a tensor of the file by its name there. False for one of another kind."""
        name = key.removeprefix(PREFIX)
        if re.match(r"(h|wte|wpe|ln_f)\.", name):
            name = f"transformer.{name}"  # saved from a model without head
        layer, _, kind = name.rpartition(".lora_")
        if ".original_module." in name:  # of the base, beside a module of `modules_to_save`
            return True
        if kind in ("A.weight", "B.weight"):
            self.pairs[layer + (LORA_A if kind[0] == "A" else LORA_B)] = tensor
        elif kind in ("embedding_A", "embedding_B") and layer == EMBEDDING:
            self.pairs[layer + (LORA_B if kind[-1] == "A" else LORA_A)] = tensor.t()
        elif kind in ("magnitude_vector", "magnitude_vector.weight") and layer != EMBEDDING:
            self.magnitudes[layer] = tensor
        else:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if not _PARAMETER.fullmatch(name):
                return False
            is_transposed = re.fullmatch(rf"{BLOCK_LINEAR}\.weight", name)  # transformers' Conv1D is (in, out)
            self.replaced[name] = tensor.t() if is_transposed else tensor
        return True


def read_tensors(path: Path) -> AdapterTensors:
    """The tensors of `adapter_model.safetensors`. Raises ModelFilesError for a broken file or an unknown tensor."""
    if not path.is_file():
        hint = "; pickled weights are not loaded" if path.with_suffix(".bin").is_file() else ""
        raise ModelFilesError(f"{path.parent} has no {path.name}{hint}")
    safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = AdapterTensors(metadata=file.metadata() or {})
            for key in sorted(file.keys()):
                if not found.add(key, file.get_tensor(key).to(torch.float32, copy=True)):
                    raise ModelFilesError(f"{path}: the tensor {shorten(key)} is not supported: merge it with PEFT")
            return found
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(f"{path} is not a complete safetensors file: {error}") from error


def check_replaced(folder: Path, settings: dict[str, Any], tensors: AdapterTensors) -> None:
    """Raise ModelFilesError for whole parameters and magnitudes that the settings do not name."""
    saved = settings.get("modules_to_save") or []
    for name in tensors.replaced:
        module, _, kind = name.rpartition(".")
        is_bias = kind == "bias" and settings.get("bias", "none") in ("all", "lora_only")
        if not (is_bias or module in (EMBEDDING, HEAD) or any(matches_target(module, each) for each in saved)):
            raise ModelFilesError(f"{folder}: its settings do not name {name}: neither bias nor modules_to_save")
    layers = {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in tensors.pairs}
    for layer in sorted(layers ^ tensors.magnitudes.keys() if settings.get("use_dora") else tensors.magnitudes):
        raise ModelFilesError(f"{folder}: {layer} has a magnitude without use_dora or LoRA, or lacks it")


def check_lora_pairs(folder: Path, layers: list[str], tensors: dict[str, Tensor], rank: int | None) -> None:
    """Raise ModelFilesError unless every layer can have an adapter, and has an A (rank, in) and a B (out, rank).

    rank: None if every layer has its own.
    """
    if not layers:
        raise ModelFilesError(f"{folder}: it has no tensors")
    for layer in layers:
        if not _LAYER_PATTERN.fullmatch(layer):
            modules = ", ".join(TARGET_MODULES)
            raise ModelFilesError(f"{folder}: {shorten(layer)} cannot have an adapter; {modules}, wte and lm_head can")
        names = (layer + LORA_A, layer + LORA_B)
        for name in names:
            if name not in tensors:
                raise ModelFilesError(f"{folder}: it lacks {shorten(name)}")
        a, b = (tuple(tensors[name].shape) for name in names)
        expected = a[0] if rank is None and len(a) == 2 else rank
        for name, shape, rank_dim in ((names[0], a, 0), (names[1], b, 1)):
            if len(shape) != 2 or shape[rank_dim] != expected or expected == 0:
                raise ModelFilesError(f"{folder}: {name} is {shape}, which is not of rank {expected}")
