"""TrainConfig: every setting of a training run, in one flat dataclass. A recipe is a set of values for it."""

import json
import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from gpt2.errors import ConfigError, did_you_mean
from gpt2.files import expand_path

if TYPE_CHECKING:
    from gpt2.lora import LoRAConfig
    from gpt2.model import GPTConfig

OPTIMIZERS = ("adamw", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
AUTO_BATCH_SIZE = -1  # --batch-size auto: the largest that fits in memory
CHOICES = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "matmul_precision": ("highest", "high", "medium"),
    "parallel": ("auto", "ddp", "fsdp"),
}


def option(
    default: Any,
    help: str,
    *,
    named_values: dict[str, Any] | None = None,
    aliases: tuple[str, ...] = (),
    fixed: bool = False,
    tuning: bool = False,
) -> Any:
    """A dataclass field with its default and its `--help` text.

    named_values: words that stand for values, such as "auto".
    aliases:      older names of the setting, still read as flags and TOML keys.
    fixed:        a resumed run must keep the value.
    tuning:       for fine-tuning: only `gpt2 finetune --help` shows the flag.
    """
    metadata = {"help": help, "words": named_values or {}, "aliases": aliases, "fixed": fixed, "tuning": tuning}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run. Each field is a command-line flag; `check` validates the values."""

    name: str | None = option(
        None, "name of the run folder under --out-dir; by default the recipe's name, or recipe-2 ..."
    )
    out_dir: str = option("runs", "folder in which run folders are created")
    data: str = option(
        "python-docs", "a corpus by name, a text file, a folder of them, or a folder of shards", fixed=True
    )
    tokenizer: str | None = option(
        None, "gpt2, bytes, bpe:N or a folder; by default the data's own, else gpt2", fixed=True
    )
    init_from: str | None = option(None, "model to start from: its weights, shape and tokenizer", fixed=True)
    add_tokens: str | None = option(
        None, "new tokens for the model's tokenizer, separated by commas", fixed=True, tuning=True
    )
    template: str | None = option(
        None,
        "chat template: plain, raw, chatml, or a Jinja file; by default the model's own",
        fixed=True,
        tuning=True,
    )
    columns: str | None = option(
        None, "columns to read from rows of data: prompt=question,answer=reply, or text=body", fixed=True, tuning=True
    )
    bad_rows: str = option(
        "error", "rows of data that cannot be used: error, or skip to count and skip them", fixed=True, tuning=True
    )
    mask_prompt: bool = option(
        True, "in rows of prompts and answers, compute the loss on the answers only", fixed=True, tuning=True
    )
    separate_documents: bool = option(
        False, "documents packed into one row do not attend to each other", fixed=True, tuning=True
    )

    n_layer: int = option(12, "number of transformer blocks", fixed=True)
    n_head: int = option(12, "number of attention heads", fixed=True)
    n_embd: int = option(768, "embedding size; a multiple of --n-head", fixed=True)
    block_size: int = option(1024, "context length in tokens", fixed=True)
    dropout: float = option(0.0, "dropout probability on embeddings, attention and residuals")
    freeze: int = option(0, "freeze the embeddings and this many of the first blocks", fixed=True, tuning=True)
    lora_rank: int = option(
        0,
        "train LoRA adapters of this rank and freeze the weights; 0 for full training",
        fixed=True,
        tuning=True,
    )
    lora_alpha: float | None = option(
        None, "LoRA scale is alpha / rank; by default alpha is twice the rank", fixed=True, tuning=True
    )
    lora_dropout: float = option(0.0, "dropout probability on the inputs of adapters", tuning=True)
    lora_targets: str = option("c_attn,c_proj,c_fc", "the matrices that get adapters", fixed=True, tuning=True)

    batch_size: int = option(
        8,
        "sequences per optimizer step, over all ranks; auto for the largest that fits in memory",
        named_values={"auto": AUTO_BATCH_SIZE},
        fixed=True,
    )
    micro_batch_size: int | None = option(
        None, "sequences per forward pass (gradient accumulation); by default the whole batch"
    )
    activation_checkpointing: bool = option(
        False,
        "recompute each block's activations in the backward pass instead of storing them: less memory, slower",
        aliases=("recompute",),
    )
    max_steps: int = option(1000, "optimizer steps in the whole run")
    epochs: float = option(0.0, "passes over the data, instead of --max-steps; 0 for --max-steps")
    patience: int = option(
        0, "early stopping: stop after this many validations without improvement; 0 for never", tuning=True
    )
    keep_best: bool = option(False, "publish the weights of the best validation instead of the last", tuning=True)
    max_minutes: float = option(0.0, "save and stop after this many minutes; 0 for no limit")
    optimizer: str = option(
        "adamw", "adamw, sgd, or muon (muon for the blocks' matrices, adamw for the rest)", fixed=True
    )
    lr: float = option(6e-4, "peak learning rate")
    min_lr: float | None = option(None, "final learning rate; by default a tenth of --lr")
    warmup_steps: int = option(100, "steps of linear warm-up from zero to the peak")
    schedule: str = option(
        "cosine", "learning rate after the warm-up: cosine, linear, constant, or wsd (warm-up, stable, decay)"
    )
    decay_steps: int | None = option(None, "steps of decay of the wsd schedule; by default a fifth of the run")
    weight_decay: float = option(0.1, "weight decay of matrices and embeddings; biases and layer norms have none")
    beta1: float = option(0.9, "decay rate of AdamW's first moment; momentum of SGD")
    beta2: float = option(0.95, "decay rate of AdamW's second moment")
    grad_clip: float = option(1.0, "gradient clipping: largest norm of the gradient; 0 for no clipping")
    skip_spikes: float = option(
        0.0, "skip outlier batches: those whose loss is this many standard deviations too high; 0 for never"
    )

    seed: int = option(1337, "random seed of the weights, the dropout and the order of the data", fixed=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option("auto", "dtype of matrix products: float32, bfloat16, float16, or auto, by hardware and width")
    matmul_precision: str = option(
        "high", "precision of float32 matrix products on a GPU: highest, high (TF32) or medium"
    )
    compile: bool | None = option(None, "torch.compile the blocks; by default on a GPU for runs of 200 steps or more")
    parallel: str = option("auto", "under torchrun: ddp, fsdp, or auto for ddp where the whole model fits on a device")
    rank_timeout: float = option(300.0, "seconds to wait for a rank before it counts as lost")

    eval_every: int = option(250, "steps between validations, each with a sample; 0 for only at the end")
    eval_tokens: int = option(2**20, "validation tokens per evaluation; 0 for all")
    eval_tasks: str | None = option(
        None,
        "evaluation tasks to run during training, separated by commas: hellaswag,lambada; none for no tasks",
        named_values={"none": None},
    )
    eval_tasks_every: int = option(500, "steps between evaluations on --eval-tasks; 0 for only at the end")
    eval_tasks_limit: int = option(1000, "rows of each evaluation task, the first ones; 0 for all")
    eval_tasks_data: str | None = option(
        None, "local files of evaluation tasks, separated by commas: hellaswag=FILE,lambada=FILE"
    )
    save_every: int = option(500, "steps between checkpoints; 0 for only at the end")
    keep_checkpoints: int = option(2, "number of checkpoints to keep")
    sample_prompt: str = option("", "prompt of the samples written during the run")
    sample_tokens: int = option(200, "new tokens of each sample; 0 for no samples")
    tensorboard: bool = option(False, "also write TensorBoard files into the run folder")
    wandb: str | None = option(None, "also log to this Weights & Biases project; WANDB_MODE=offline is honoured")
    profile: bool = option(False, "write a profiler trace of a few early steps into the run folder")
    resume: str = option(
        "never", "the run folder to resume, without a value the newest; or auto: the run of this name if it exists"
    )

    def check(self) -> "TrainConfig":
        """Return the config itself. Raises ConfigError for the first value that is not supported."""
        _check_ranges(self)
        _check_finetuning(self)
        if self.warmup_steps > self.max_steps and not self.epochs:
            raise _error("warmup_steps", f"({self.warmup_steps}) is more than --max-steps ({self.max_steps})")
        if self.n_embd % self.n_head:
            raise _error("n_embd", f"({self.n_embd}) must be a multiple of --n-head ({self.n_head})")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise _error("batch_size", f"({self.batch_size}) must be a multiple of --micro-batch-size")
        room = self.max_steps - self.warmup_steps
        if self.decay_steps is not None and not 0 <= self.decay_steps <= room and not self.epochs:
            raise _error("decay_steps", f"({self.decay_steps}) and the warm-up do not fit in --max-steps")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise _error(name, f"'{value}' is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
        if self.resume not in ("never", "auto"):
            raise ConfigError(f"resume must be never or auto, not '{self.resume}'", field="resume")
        for name in ("weight_decay", "grad_clip", "skip_spikes", "max_minutes", "epochs", "rank_timeout"):
            if getattr(self, name) == float("inf"):
                raise _error(name, "must be finite")
        for name, value in asdict(self).items():
            if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
                raise _error(name, "is not UTF-8 text")
        return self

    @property
    def needs_full_model(self) -> bool:
        """Return whether every rank must hold the whole model (no FSDP)."""
        return self.lora_rank > 0

    def with_steps_from_epochs(self, windows_per_epoch: int) -> "TrainConfig":
        """The config with `epochs` turned into `max_steps`; other settings in steps shrink to fit.

        windows_per_epoch: rows in one pass over the data.
        """
        if not self.epochs:
            return self
        steps = max(1, math.ceil(self.epochs * windows_per_epoch / self.batch_size))
        return replace(
            self,
            max_steps=steps,
            warmup_steps=min(self.warmup_steps, steps // 10),
            decay_steps=None if self.decay_steps is None else min(self.decay_steps, steps - steps // 10),
            eval_every=min(self.eval_every, max(1, steps // 10)),
        )

    def model_config(self, vocab_size: int) -> "GPTConfig":
        """The shape of a new model with these settings and this vocabulary size."""
        from gpt2.model import GPTConfig  # here: it imports torch, which `gpt2 train --help` does not need

        return GPTConfig(
            vocab_size=vocab_size,
            block_size=self.block_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
        )

    def lora_config(self) -> "LoRAConfig":
        """The LoRA settings of the run; without `lora_alpha`, alpha is twice the rank."""
        from gpt2.lora import LoRAConfig

        targets = tuple(target.strip() for target in self.lora_targets.split(",") if target.strip())
        return LoRAConfig(self.lora_rank, self.lora_alpha or 2.0 * self.lora_rank, self.lora_dropout, targets)


FIXED_ON_RESUME = tuple(f.name for f in fields(TrainConfig) if f.metadata["fixed"])
MOVABLE = ("data", "init_from", "template")  # paths: the fingerprints of what they name decide, in each checkpoint
FINETUNING_FIELDS = tuple(f.name for f in fields(TrainConfig) if f.metadata["tuning"])


def _check_ranges(config: TrainConfig) -> None:
    at_least = {
        **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "max_steps", "keep_checkpoints"), 1),
        **dict.fromkeys(("warmup_steps", "eval_every", "eval_tokens", "save_every", "sample_tokens"), 0),
        **dict.fromkeys(("eval_tasks_every", "eval_tasks_limit"), 0),
        **dict.fromkeys(("weight_decay", "grad_clip", "skip_spikes", "max_minutes", "seed"), 0),
        **dict.fromkeys(("freeze", "lora_rank", "epochs", "patience"), 0),
        "rank_timeout": 1,
    }
    if config.batch_size != AUTO_BATCH_SIZE:
        at_least["batch_size"] = 1
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            raise _error(name, f"must be at least {least}, not {getattr(config, name)}")
    if config.seed >= 2**63:
        raise _error("seed", f"must be below 2**63, not {config.seed}")
    if not 0 < config.lr < float("inf"):
        raise _error("lr", f"must be over 0, not {config.lr}")
    if config.min_lr is not None and not 0 <= config.min_lr <= config.lr:
        raise _error("min_lr", f"must be between 0 and --lr ({config.lr}), not {config.min_lr}")
    for name in ("dropout", "lora_dropout", "beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise _error(name, f"must be in [0, 1), not {getattr(config, name)}")


def _check_finetuning(config: TrainConfig) -> None:
    """Check the settings that need a given model, and the combinations that are not supported."""
    used = [name for name in ("add_tokens", "freeze", "lora_rank") if getattr(config, name)]
    if used and config.init_from is None:
        raise _error(used[0], "needs a model to start from: --init-from")
    if len(used) > 1:
        reason = {"add_tokens": "the new tokens could not be trained", "freeze": "LoRA freezes all weights anyway"}
        raise _error(used[0], f"and {_flag(used[1])} cannot be combined: {reason[used[0]]}")
    if config.parallel == "fsdp" and config.needs_full_model:
        problem = "LoRA needs whole matrices, and --parallel fsdp shards them: --parallel ddp"
        raise ConfigError(problem, field="parallel")
    if config.lora_alpha is not None and not 0 < config.lora_alpha < float("inf"):
        raise _error("lora_alpha", f"must be over 0, not {config.lora_alpha}")


def _error(name: str, problem: str) -> ConfigError:
    """The error for one setting; `problem` follows the name of its flag."""
    return ConfigError(f"{_flag(name)} {problem}", field=name)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_name(out_dir: str, stem: str, *, resume: bool) -> str:
    """The name of a run of recipe `stem`: the first unused of stem, stem-2, ...; to resume, the last used."""
    number = 1
    while (expand_path(out_dir) / _numbered_name(stem, number)).exists():
        number += 1
    return _numbered_name(stem, max(1, number - 1) if resume else number)


def _numbered_name(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def config_for_resume(folder: Path, overrides: dict[str, Any]) -> TrainConfig:
    """The config for resuming the run in `folder`, with the given values on top."""
    stored = read_toml(folder / "config.toml")
    if overrides.get("batch_size") == AUTO_BATCH_SIZE:  # the stored config has the size that was chosen
        overrides = {name: value for name, value in overrides.items() if name != "batch_size"}
    if "max_steps" in overrides:
        overrides = {"epochs": 0.0, **overrides}
    values = {**overrides, "name": folder.name, "out_dir": str(folder.parent), "resume": "auto"}
    return with_overrides(stored, values, "the command line")


def check_same_run(folder: Path, config: TrainConfig) -> None:
    """Raises ConfigError when `config` differs from the run in `folder` in a setting that must not change.

    Once there is a checkpoint, which has the fingerprint of the data, the files in MOVABLE may have another path.
    """
    stored = read_toml(folder / "config.toml")
    shape = ("n_layer", "n_head", "n_embd", "block_size")
    has_checkpoint = any((folder / "checkpoints").glob("step-*"))
    for name in FIXED_ON_RESUME:
        was, value = getattr(stored, name), getattr(config, name)
        if name in MOVABLE and has_checkpoint and was and value:
            continue
        if was != value and not (name in shape and config.init_from):  # the stored shape is that of the given model
            raise ConfigError(
                f"{folder} was started with {_flag(name)} {was}: it cannot be resumed with {value}", field=name
            )


def to_toml(config: TrainConfig) -> str:
    """`config` as TOML, one line per setting; settings that are None are left out."""
    lines = []
    for f in fields(config):
        value = getattr(config, f.name)
        value = next((word for word, meant in f.metadata["words"].items() if meant == value), value)
        if value is not None:  # a JSON string, number or boolean is also a TOML one
            lines.append(f"{f.name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def read_toml(path: Path) -> TrainConfig:
    """The config in a TOML file; missing settings keep their defaults. Raises ConfigError for an invalid file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    return with_overrides(TrainConfig(), values, str(path))


def with_overrides(config: TrainConfig, overrides: dict[str, Any], source: str) -> TrainConfig:
    """`config` with `overrides`, each checked against the type of its field; `source` is named in errors."""
    types, known = get_type_hints(TrainConfig), {f.name: f for f in fields(TrainConfig)}
    aliases = {alias: f.name for f in known.values() for alias in f.metadata["aliases"]}
    changes: dict[str, Any] = {}
    for given_name, value in overrides.items():
        name = aliases.get(given_name, given_name)
        if name not in known:
            raise ConfigError(f"{source}: there is no setting '{name}'{did_you_mean(name, known)}", field=name)
        words = known[name].metadata["words"]
        if isinstance(value, str) and value in words:
            changes[name] = words[value]
        elif types[name] in (float, float | None) and type(value) is int:
            changes[name] = float(value)
        elif not isinstance(value, types[name]) or (isinstance(value, bool) and "bool" not in str(types[name])):
            raise ConfigError(f"{source}: {name} cannot be {value!r}", field=name)
        else:
            changes[name] = value
    return replace(config, **changes)
