"""LoRA: low-rank adapters for a frozen model, in PEFT's file format.

"LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al. 2021): ``y = x W^T + b + scale * (x A^T) B^T``, with A
random and B zero at first, so that a new adapter changes nothing. On disk it is what `peft` writes and reads: a folder
with `adapter_config.json` and `adapter_model.safetensors`.

Shapes: r = rank; a matrix (out, in) of the model has A (r, in) and B (out, r).
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2.errors import ConfigError, ModelFilesError, did_you_mean
from gpt2.files import check_inside_folder, expand_path, staging_folder
from gpt2.model import GPT
from gpt2.peft_format import (
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    PREFIX,
    TARGET_MODULES,
    TENSOR_FILE,
    alpha_by_layer,
    check_lora_pairs,
    check_replaced,
    matches_target,
    read_config,
    read_tensors,
)
from gpt2.terminal import shorten


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of an adapter.

    rank:       the inner dimension of A and B.
    alpha:      their product is multiplied by alpha / rank, with use_rslora by alpha / sqrt(rank) (Kalajdzievski 2023).
    dropout:    on the input of A, in training only.
    targets:    the matrices, by the end of their names: "c_attn", "c_proj", "c_fc", or more of a name ("mlp.c_proj").

    Raises ConfigError for values that are not supported.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGET_MODULES
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank of an adapter must be at least 1, not {self.rank}", field="rank")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"the alpha of an adapter must be over 0, not {self.alpha:g}", field="alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"the dropout of an adapter must be in [0, 1), not {self.dropout:g}", field="dropout")
        if not self.targets:
            raise ConfigError(f"an adapter needs targets: some of {', '.join(TARGET_MODULES)}", field="targets")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter: (..., in) -> (..., out).

    `weight` and `bias` are those of the layer it replaces, under their old names; `lora_A` (r, in) and `lora_B`
    (out, r) are new, in the weight's dtype. A is sampled on the CPU, so that it does not depend on the device.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.dropout, self.scale = config.dropout, config.scale
        lora_A = torch.empty(config.rank, self.in_features, device="cpu")
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        self.lora_A = nn.Parameter(lora_A.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, config.rank))
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        low = F.linear(F.dropout(input, self.dropout, self.training), self.lora_A)  # (..., r)
        return super().forward(input) + F.linear(low, self.lora_B) * self.scale  # (..., out)


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk.

    tensors:          lora_A (r, in) and lora_B (out, r), float32, by their names in a model with adapter.
    scales:           the factor of B A, by the name of the layer.
    magnitudes, replaced: what only PEFT writes, see `AdapterTensors`. Such an adapter can be merged, not trained.
    base_model:       the name of its base model in the file.
    base_fingerprint: of the base model, if this program wrote the adapter.
    folder:           where it was read from.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]
    scales: dict[str, float]
    magnitudes: dict[str, Tensor]
    replaced: dict[str, Tensor]
    base_model: str
    base_fingerprint: str | None
    folder: Path


def add_adapter(model: GPT, config: LoRAConfig) -> None:
    """Add a new adapter to `model`, in place, and freeze all other parameters. A uses torch's global random state.

    Raises ConfigError for a target that is not in the model.
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
    """The matrices, by name, that `config` targets. Raises ConfigError for a target that matches none."""
    names = list(names)
    for target in config.targets:
        if not any(matches_target(name, target) for name in names):
            hint = did_you_mean(target, TARGET_MODULES)
            modules = ", ".join(TARGET_MODULES)
            raise ConfigError(f"the model has no '{target}' for an adapter{hint}: there are {modules}", field="targets")
    return [name for name in names if any(matches_target(name, target) for target in config.targets)]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers of a model that have an adapter, by name; empty for a plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The lora_A and lora_B of a model with adapter, by name, in its memory."""
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith((LORA_A, LORA_B))}


def load_adapter_weights(model: GPT, adapter: Adapter) -> None:
    """Copy an adapter into a model with an adapter of the same shape. Raises ModelFilesError if it does not fit."""
    if adapter.magnitudes or adapter.replaced:
        raise ModelFilesError(f"the adapter {adapter.folder} has DoRA or whole parameters: it can only be merged")
    own = adapter_state_dict(model)
    for name in sorted(own.keys() ^ adapter.tensors.keys()):
        which = "lacks" if name in own else "has"
        raise ModelFilesError(f"the adapter {adapter.folder} {which} {shorten(name)}, unlike its targets")
    for name, tensor in adapter.tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{name} is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}"
            raise base_mismatch_error(adapter, shapes)
    for name, tensor in adapter.tensors.items():
        own[name].copy_(tensor)


def merge_and_unload(model: GPT, *, copy: bool = True) -> GPT:
    """A plain model with ``W + scale * B A`` in place of W and all parameters trainable.

    copy: if False, the result takes over the memory of `model`, which must not be used afterwards.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters() if not name.endswith((LORA_A, LORA_B))}
    if copy:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, layer in lora_layers(model).items():
        add_delta_weight(tensors[f"{name}.weight"], layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
    with torch.device("meta"):  # no memory, no random numbers
        plain = GPT(model.config)
    plain.load_state_dict(tensors, strict=False, assign=True)
    plain.tie_weights()
    return plain.train(model.training)


def base_fingerprint(model: GPT) -> str:
    """16 hex digits that identify a base model; an adapter does not change them.

    A hash of every parameter's name and shape, all biases and layer norms, and the first row of each matrix, rounded to
    bfloat16, so that a model exported in that precision is still the same base.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not name.endswith((LORA_A, LORA_B)):
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            row = parameter.detach() if parameter.dim() == 1 else parameter.detach()[0]
            digest.update(row.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def peft_name(name: str) -> str:
    """The name in PEFT's file of a tensor of `adapter_state_dict`."""
    return f"{PREFIX}{name}.weight"


def save_adapter(
    folder: str | Path, config: LoRAConfig, tensors: dict[str, Tensor], base_model: str, base_fingerprint: str
) -> Path:
    """Write an adapter in PEFT's format: ``PeftModel.from_pretrained(base_model, folder)`` reads it.

    tensors:    those of `adapter_state_dict`; written as float32.
    base_model: a hub name or a folder.

    Atomic: an older adapter in `folder` is removed before the new one appears. Raises ModelFilesError if it cannot be
    written.
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
        "fan_in_fan_out": True,  # in transformers, GPT-2's matrices are (in, out)
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    named = {peft_name(name): t.to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    try:
        with staging_folder(folder.resolve()) as staging:
            metadata = {"base_fingerprint": base_fingerprint}  # one entry: the order of several would vary
            save_file(named, staging / TENSOR_FILE, metadata)
            (staging / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            folder.mkdir(exist_ok=True)
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            for name in (TENSOR_FILE, CONFIG_FILE):
                (staging / name).replace(folder / name)
    except (OSError, SafetensorError) as error:
        raise ModelFilesError(f"cannot write the adapter {folder}: {error}") from error
    return folder


def read_adapter(ref: str | Path) -> Adapter:
    """Read an adapter that this program or `peft` wrote.

    ref: its folder, or a run folder.

    Raises ModelFilesError if there is none, if a file is broken, or if it has what cannot be merged here.
    """
    folder = find_adapter(ref)
    for name in (CONFIG_FILE, TENSOR_FILE):
        check_inside_folder(folder / name, folder)
    raw = read_config(folder / CONFIG_FILE)
    found = read_tensors(folder / TENSOR_FILE)
    tensors = found.pairs
    layers = sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in tensors})
    check_lora_pairs(folder, layers, tensors, None if raw.get("rank_pattern") else raw["r"])
    check_replaced(folder, raw, found)
    try:
        alphas = alpha_by_layer(raw, layers)
    except ValueError as error:
        raise ModelFilesError(f"{folder / CONFIG_FILE}: {error}") from error
    targets = raw["target_modules"]
    if isinstance(targets, str) or raw.get("layers_to_transform") is not None or raw.get("exclude_modules"):
        targets = layers  # a pattern, or some of the blocks: the tensors show which
    for target in targets:
        if not any(matches_target(layer, target) for layer in layers):
            hint = did_you_mean(target, TARGET_MODULES)
            raise ModelFilesError(f"{folder}: it has no tensors for its target '{shorten(target)}'{hint}")
    config = LoRAConfig(
        raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), tuple(targets), raw.get("use_rslora", False)
    )
    for layer in layers:
        if not any(matches_target(layer, target) for target in config.targets):
            raise ModelFilesError(f"{folder}: it has tensors for {shorten(layer)}, which is not among its targets")
    base = raw.get("base_model_name_or_path")
    power = 0.5 if config.use_rslora else 1.0
    scales = {layer: alphas[layer] / len(tensors[layer + LORA_A]) ** power for layer in layers}
    fingerprint = found.metadata.get("base_fingerprint")
    name = str(base or "an unnamed model")
    return Adapter(config, tensors, scales, found.magnitudes, found.replaced, name, fingerprint, folder)


def find_adapter(ref: str | Path) -> Path:
    """The folder of an adapter: `ref`, or `adapter` in it (a run folder). Raises ModelFilesError if there is none."""
    path = expand_path(ref)
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    what = "is no adapter: it has no" if path.is_dir() else "is no folder with an"
    raise ModelFilesError(f"{path} {what} {CONFIG_FILE}, as fine-tuning with --lora-rank (or PEFT) writes it")


def _block_linears(model: GPT) -> dict[str, nn.Linear]:
    """The linear layers that can have an adapter: those of the blocks."""
    return {
        f"transformer.h.{name}": module
        for name, module in model.transformer.h.named_modules()
        if isinstance(module, nn.Linear)
    }


def add_delta_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``weight += scale * b @ a``, the sum rounded once to the weight's dtype."""
    product = b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)  # (out, in)
    weight.copy_(weight.float() + scale * product)


def base_mismatch_error(adapter: Adapter, reason: str) -> ModelFilesError:
    base = shorten(adapter.base_model)
    return ModelFilesError(f"the adapter {adapter.folder} is for another model ({base}): {reason}")
