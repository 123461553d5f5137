"""Low-rank adapters: a frozen model, and beside each of its matrices two thin ones that learn; PEFT's file format.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021): ``y = x W^T + b + scale * (x A^T) B^T``, with A
drawn and B zero, so that an adapter begins as nothing. On disk it is what `peft` writes and reads: a folder with
`adapter_config.json` and `adapter_model.safetensors`.

Shapes: r = rank; a matrix (out, in) of the model gets A (r, in) and B (out, r).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2.errors import UserError, did_you_mean
from gpt2.files import expand_path, staging_folder
from gpt2.model import GPT

TARGET_MODULES = ("c_attn", "c_proj", "c_fc")  # c_proj is the attention's and the MLP's
LORA_A, LORA_B = ".lora_A", ".lora_B"

_CONFIG_FILE, _TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's names; its own wrappers are called so
_LAYER_PATTERN = re.compile(r"transformer\.h\.[0-9]+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
_SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base model as well
_UNSUPPORTED_SETTINGS = (  # settings of PEFT that make an adapter more than pairs of A and B, with the value that does not
    *(("use_dora", False), ("bias", "none"), ("lora_bias", False), ("use_qalora", False)),
    *((name, None) for name in ("modules_to_save", "trainable_token_indices", "layer_replication")),
    *((name, None) for name in ("target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora")),
    *((name, None) for name in ("rank_pattern", "alpha_pattern", "velora_config", "monteclora_config", "kasa_config")),
)


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is like.

    rank:       the columns that A and B have between them.
    alpha:      what A and B give is multiplied by alpha / rank, with use_rslora by alpha / sqrt(rank)
                (Kalajdzievski 2023).
    dropout:    on what A reads, in training only.
    targets:    the matrices, by the end of their names: "c_attn", "c_proj", "c_fc", or more of a name ("mlp.c_proj").

    Raises UserError for what cannot be.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGET_MODULES
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the rank of an adapter must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"the alpha of an adapter must be over 0, not {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of an adapter must be in [0, 1), not {self.dropout:g}")
        if not self.targets:
            raise UserError(f"an adapter needs targets: some of {', '.join(TARGET_MODULES)}")

    @property
    def scale(self) -> float:
        """What stands before B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Linear):
    """A linear layer that is frozen, and an adapter beside it: (..., in) -> (..., out).

    `weight` and `bias` are those of the layer it replaces, under their old names; `lora_A` (r, in) and `lora_B`
    (out, r) are new, in the weight's dtype. A is drawn on the CPU, so that it is the same wherever the model is.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout, self.scale = config.dropout, config.scale
        drawn = torch.empty(config.rank, self.in_features, device="cpu")
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        self.lora_A = nn.Parameter(drawn.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, config.rank))
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(F.dropout(input, self.dropout, self.training), self.lora_A)  # (..., r)
        return super().forward(input) + F.linear(low, self.lora_B) * self.scale  # (..., out)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read.

    tensors:          lora_A (r, in) and lora_B (out, r), float32, by their names in an attached model.
    base:             what its maker called the model it is for.
    base_fingerprint: of that model, if this program made the adapter.
    folder:           where it was.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    base_model: str
    base_fingerprint: str | None
    folder: Path


def add_adapter(model: GPT, config: LoRAConfig) -> None:
    """Give `model` a fresh adapter, in place, and freeze all else; A is drawn from torch's global random state.

    Raises UserError when a target is nowhere in the model.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already")
    linears = _block_linears(model)
    names = match_target_modules(linears, config)
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linears[name], config))


def match_target_modules(names: Iterable[str], config: LoRAConfig) -> list[str]:
    """Those of a model's matrices, by name, that `config` is for. Raises UserError for a target that none is."""
    names = list(names)
    for target in config.targets:
        if not any(_matches_target(name, target) for name in names):
            hint = did_you_mean(target, TARGET_MODULES)
            raise UserError(f"the model has no '{target}' for an adapter{hint}: there are {', '.join(TARGET_MODULES)}")
    return [name for name in names if any(_matches_target(name, target) for target in config.targets)]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of a model that have an adapter, by name; empty for a plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The lora_A and lora_B of an attached model, by name; they share its memory."""
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith((LORA_A, LORA_B))}


def load_adapter_weights(model: GPT, adapter: Adapter) -> None:
    """Copy an adapter into a model that one of the same kind was attached to. Raises UserError if it does not fit."""
    own = adapter_state_dict(model)
    for name in sorted(own.keys() ^ adapter.tensors.keys()):
        which = "lacks" if name in own else "has"
        raise UserError(f"the adapter {adapter.folder} {which} {name}, other than its targets say")
    for name, tensor in adapter.tensors.items():
        if tensor.shape != own[name].shape:
            raise _base_mismatch_error(
                adapter, f"{name} is {tuple(tensor.shape)}, the model wants {tuple(own[name].shape)}"
            )
    for name, tensor in adapter.tensors.items():
        own[name].copy_(tensor)


def merge_and_unload(model: GPT, *, copy: bool = True) -> GPT:
    """A plain copy of an attached model that gives the same: ``W + scale * B A`` in place of W. All of it can learn.

    keep: else the copy has the model's own memory, and only the copy is good for anything afterwards.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters() if not name.endswith((LORA_A, LORA_B))}
    if copy:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, layer in lora_layers(model).items():
        _add_delta_weight(tensors[f"{name}.weight"], layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
    with torch.device("meta"):  # no memory, and nothing is drawn
        plain = GPT(model.config)
    plain.load_state_dict(tensors, strict=False, assign=True)
    plain.tie_weights()
    return plain.train(model.training)


def merge_adapter(model: GPT, adapter: Adapter) -> None:
    """Add an adapter to the weights of a plain model, in place. Raises UserError when it is for another one."""
    if adapter.base_fingerprint not in (None, base_fingerprint(model)):
        raise _base_mismatch_error(adapter, "the fingerprints differ")
    linears = _block_linears(model)
    pairs = [(name.removesuffix(LORA_A), tensor) for name, tensor in adapter.tensors.items() if name.endswith(LORA_A)]
    for name, a in pairs:
        if name not in linears:
            raise _base_mismatch_error(adapter, f"it has {name}, and the model has no such layer")
        wanted, shape = tuple(linears[name].weight.shape), (len(adapter.tensors[name + LORA_B]), a.size(1))
        if shape != wanted:
            raise _base_mismatch_error(adapter, f"{name} is {shape} in it and {wanted} in the model")
    for name, a in pairs:
        _add_delta_weight(linears[name].weight.detach(), a, adapter.tensors[name + LORA_B], adapter.config.scale)


def base_fingerprint(model: GPT) -> str:
    """16 hex digits that tell one base model from another; an adapter that is attached changes nothing.

    Made of every parameter's name and shape, all biases and layer norms, and the first row of each matrix, rounded to
    bfloat16: so a model exported in that precision is still the same base.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not name.endswith((LORA_A, LORA_B)):
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            row = parameter.detach() if parameter.dim() == 1 else parameter.detach()[0]
            digest.update(row.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def peft_name(name: str) -> str:
    """What PEFT's file calls a tensor of `adapter_tensors`."""
    return f"{_PREFIX}{name}.weight"


def save_adapter(
    folder: str | Path, config: LoRAConfig, tensors: dict[str, Tensor], base_model: str, base_fingerprint: str
) -> Path:
    """Write an adapter as PEFT does: ``PeftModel.from_pretrained(base_model, folder)`` reads it.

    tensors: as `adapter_tensors` gives them; written as float32.
    base:    what the base model is called: a hub name or a folder.

    It is whole or not there: an older one in `folder` is gone before the new one appears. Raises UserError when it
    cannot be written.
    """
    folder = expand_path(folder)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets),
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": True,  # transformers keeps GPT-2's matrices as (in, out)
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    named = {peft_name(name): t.to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    try:
        with staging_folder(folder.resolve()) as written:
            save_file(named, written / _TENSOR_FILE, {"base_fingerprint": base_fingerprint})  # of two, any order
            (written / _CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            folder.mkdir(exist_ok=True)
            (folder / _CONFIG_FILE).unlink(missing_ok=True)
            for name in (_TENSOR_FILE, _CONFIG_FILE):
                (written / name).replace(folder / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the adapter {folder}: {error}") from error
    return folder


def read_adapter(ref: str | Path) -> Adapter:
    """Read an adapter that this program or `peft` wrote.

    ref: its folder, or that of the run that made it.

    Raises UserError when there is none, a file is broken, or it is of a kind that is more than pairs of A and B.
    """
    folder = find_adapter(ref)
    raw = _read_config(folder / _CONFIG_FILE)
    tensors, metadata = _read_tensors(folder / _TENSOR_FILE)
    layers = sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in tensors})
    _check_lora_pairs(folder, layers, tensors, raw["r"])
    targets = raw["target_modules"]
    if isinstance(targets, str) or raw.get("layers_to_transform") is not None or raw.get("exclude_modules"):
        targets = layers  # a pattern, or some of the blocks: which they were, the tensors tell
    for target in targets:
        if not any(_matches_target(layer, target) for layer in layers):
            hint = did_you_mean(target, TARGET_MODULES)
            raise UserError(f"{folder}: it has no tensors for its target '{target}'{hint}")
    config = LoRAConfig(
        raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), tuple(targets), raw.get("use_rslora", False)
    )
    for layer in layers:
        if not any(_matches_target(layer, target) for target in config.targets):
            raise UserError(f"{folder}: it has tensors for {layer}, which is none of its targets")
    base = raw.get("base_model_name_or_path")
    return Adapter(config, tensors, str(base or "an unnamed model"), metadata.get("base_fingerprint"), folder)


def find_adapter(ref: str | Path) -> Path:
    """The folder of an adapter: `ref` itself, or `adapter` in it, as a run has. Raises UserError if there is none."""
    path = expand_path(ref)
    for folder in (path, path / "adapter"):
        if (folder / _CONFIG_FILE).is_file():
            return folder
    what = "is no adapter: it has no" if path.is_dir() else "is no folder with an"
    raise UserError(f"{path} {what} {_CONFIG_FILE}, as fine-tuning with --lora-rank (or PEFT) writes it")


def _block_linears(model: GPT) -> dict[str, nn.Linear]:
    """The matrices that can have an adapter: those of the blocks."""
    return {
        f"transformer.h.{name}": module
        for name, module in model.transformer.h.named_modules()
        if isinstance(module, nn.Linear)
    }


def _matches_target(name: str, target: str) -> bool:
    """Does PEFT take `target` for the module of this name?"""
    return name == target or name.endswith(f".{target}")


def _add_delta_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``weight += scale * b @ a``, the sum rounded once to the weight's dtype."""
    product = b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)  # (out, in)
    weight.copy_(weight.float() + scale * product)


def _base_mismatch_error(adapter: Adapter, reason: str) -> UserError:
    return UserError(f"the adapter {adapter.folder} is for another model ({adapter.base_model}): {reason}")


def _read_config(path: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`. Raises UserError for what is no plain LoRA."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else None
        raise UserError(f"{path} is of the kind {kind}: only LORA is read here")
    for key, plain in _UNSUPPORTED_SETTINGS:
        if raw.get(key) and raw[key] != plain:
            raise UserError(f"{path}: {key}={json.dumps(raw[key])} is not supported: plain LoRA is")
    if raw.get("init_lora_weights") not in _SUPPORTED_INITS:
        raise UserError(f"{path}: init_lora_weights={raw['init_lora_weights']} changes the base: merge it with PEFT")
    kinds: dict[str, type | tuple[type, ...]] = {
        "r": int,
        "lora_alpha": (int, float),
        "lora_dropout": (int, float),
        "use_rslora": bool,
        "target_modules": (list, str),
    }
    for key, kind in kinds.items():
        value = raw.get(key)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        missing = value is None and key in ("lora_dropout", "use_rslora")
        if (wrong and not missing) or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            raise UserError(f"{path}: {key} cannot be {json.dumps(value)}")
    return {key: value for key, value in raw.items() if value is not None}


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 by this program's names, and the file's metadata."""
    if not path.is_file():
        hint = "; pickled weights are not loaded" if path.with_suffix(".bin").is_file() else ""
        raise UserError(f"{path.parent} has no {path.name}{hint}")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                name = key.removeprefix(_PREFIX).removesuffix(".weight")
                if not name.endswith((LORA_A, LORA_B)):
                    raise UserError(f"{path}: {key} is neither a lora_A nor a lora_B of a linear layer")
                name = f"transformer.{name}" if name.startswith("h.") else name  # made without the head
                tensors[name] = file.get_tensor(key).to(torch.float32, copy=True)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from error


def _check_lora_pairs(folder: Path, layers: list[str], tensors: dict[str, Tensor], rank: int) -> None:
    """Raise UserError unless every layer is one that we adapt, and has an A (rank, in) and a B (out, rank)."""
    if not layers:
        raise UserError(f"{folder}: it has no tensors")
    for layer in layers:
        if not _LAYER_PATTERN.fullmatch(layer):
            raise UserError(f"{folder}: {layer} cannot have an adapter here: there are {', '.join(TARGET_MODULES)}")
        for name, ranked in ((layer + LORA_A, 0), (layer + LORA_B, 1)):
            if name not in tensors:
                raise UserError(f"{folder}: it lacks {name}")
            shape = tuple(tensors[name].shape)
            if len(shape) != 2 or shape[ranked] != rank:
                raise UserError(f"{folder}: {name} is {shape}, which is not of rank {rank}")
