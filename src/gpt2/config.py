"""TrainConfig: every knob of a run, flat and by name. A recipe is nothing but values for these."""

import json
import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from gpt2.errors import UserError, did_you_mean
from gpt2.files import expand_path
from gpt2.lora import LoRAConfig
from gpt2.model import GPTConfig

OPTIMIZERS = ("adamw", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
AUTO_BATCH_SIZE = -1  # a --batch-size that is to be found out
CHOICES = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "matmul_precision": ("highest", "high", "medium"),
    "parallel": ("auto", "ddp", "fsdp"),
}


def option(
    default: Any, help: str, named_values: dict[str, Any] | None = None, *, fixed: bool = False, tuning: bool = False
) -> Any:
    """A dataclass field: its default, the sentence that `--help` shows, and words that stand for values.

    same:   it makes a run this run, and cannot change when that goes on.
    tuning: it is for a given model, so that only `gpt2 finetune --help` tells of it.
    """
    return field(default=default, metadata={"help": help, "words": named_values or {}, "same": fixed, "tuning": tuning})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `check` says what is wrong with it; the command line offers each field as a flag."""

    name: str | None = option(None, "the run's folder under --out-dir; by default the recipe's name, or recipe-2 ...")
    out_dir: str = option("runs", "where run folders are made")
    data: str = option(
        "python-docs", "a corpus by name, a text file, a folder of them, or a folder of shards", fixed=True
    )
    tokenizer: str | None = option(
        None, "gpt2, bytes, bpe:N or a folder; by default the data's own, else gpt2", fixed=True
    )
    init_from: str | None = option(None, "start from this model's weights, shape and tokenizer", fixed=True)
    add_tokens: str | None = option(
        None, "new tokens for that model's tokenizer, with commas between them", fixed=True, tuning=True
    )
    template: str | None = option(
        None,
        "of conversations: plain, raw, chatml, or a Jinja file; the model's own by default",
        fixed=True,
        tuning=True,
    )
    columns: str | None = option(
        None, "which columns of the rows are what: prompt=question,answer=reply, or text=body", fixed=True, tuning=True
    )
    mask_prompt: bool = option(
        True, "of rows with prompts and answers, learn the answers only", fixed=True, tuning=True
    )
    separate_documents: bool = option(
        False, "documents that share a row do not see each other", fixed=True, tuning=True
    )

    n_layer: int = option(12, "blocks", fixed=True)
    n_head: int = option(12, "attention heads", fixed=True)
    n_embd: int = option(768, "width; a multiple of the heads", fixed=True)
    block_size: int = option(1024, "context in tokens", fixed=True)
    dropout: float = option(0.0, "on embeddings, attention and residuals")
    freeze: int = option(0, "keep the embeddings and so many of the first blocks as they are", fixed=True, tuning=True)
    lora_rank: int = option(
        0,
        "learn adapters of this rank beside the matrices, which stay as they are; 0 for none",
        fixed=True,
        tuning=True,
    )
    lora_alpha: float | None = option(
        None, "adapters count alpha / rank times; by default twice the rank", fixed=True, tuning=True
    )
    lora_dropout: float = option(0.0, "on what adapters read", tuning=True)
    lora_targets: str = option("c_attn,c_proj,c_fc", "the matrices that have adapters", fixed=True, tuning=True)

    batch_size: int = option(
        8, "sequences in a step, over all ranks; auto for what fits", {"auto": AUTO_BATCH_SIZE}, fixed=True
    )
    micro_batch_size: int | None = option(None, "sequences on the device at once; by default the whole batch")
    recompute: bool = option(False, "compute activations twice instead of keeping them: slower, in less memory")
    max_steps: int = option(1000, "optimizer steps in the whole run")
    epochs: float = option(0.0, "instead of --max-steps: how often to go through the data; 0 for --max-steps")
    patience: int = option(0, "stop after so many validations without a better one; 0 for never", tuning=True)
    keep_best: bool = option(False, "the run's model is the one of the best validation, not the last", tuning=True)
    max_minutes: float = option(0.0, "stop after so many minutes of this process, with all saved; 0 for no limit")
    optimizer: str = option("adamw", "adamw, sgd, or muon (for the blocks' matrices, adamw for the rest)", fixed=True)
    lr: float = option(6e-4, "peak learning rate")
    min_lr: float | None = option(None, "learning rate at the end; by default a tenth of --lr")
    warmup_steps: int = option(100, "steps from zero to the peak")
    schedule: str = option("cosine", "after the warm-up: cosine, linear, constant, or wsd (constant, then a fall)")
    decay_steps: int | None = option(None, "length of wsd's fall; by default a fifth of the run")
    weight_decay: float = option(0.1, "on matrices and embeddings, never on biases and layer norms")
    beta1: float = option(0.9, "AdamW's first moment; the momentum of SGD")
    beta2: float = option(0.95, "AdamW's second moment")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 for no clipping")
    skip_spikes: float = option(0.0, "leave out a batch whose loss is so many deviations above the last; 0 for never")

    seed: int = option(1337, "of the weights, the dropout and the order of the data", fixed=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = option("auto", "of matrix products: float32, bfloat16, or auto for the faster here")
    matmul_precision: str = option("high", "of float32 products on a GPU: highest, high (TF32) or medium")
    compile: bool | None = option(None, "torch.compile the blocks; by default where it pays")
    parallel: str = option("auto", "under torchrun: ddp, fsdp, or auto for ddp where a whole copy fits")
    rank_timeout: float = option(300.0, "seconds after which a rank that the others wait for counts as lost")

    eval_every: int = option(250, "steps between validations (with a sample); 0 for only at the end")
    eval_tokens: int = option(2**20, "validation tokens read each time; 0 for all there are")
    save_every: int = option(500, "steps between checkpoints; 0 for only at the end")
    keep_checkpoints: int = option(2, "how many of the newest to keep")
    sample_prompt: str = option("", "what samples during the run begin with")
    sample_tokens: int = option(200, "length of those samples; 0 for none")
    tensorboard: bool = option(False, "write TensorBoard's files into the run folder too")
    wandb: str | None = option(None, "log to this Weights & Biases project too; WANDB_MODE=offline is honoured")
    profile: bool = option(False, "write a trace of a few early steps into the run folder")
    resume: str = option("never", "auto: go on with the run of this name; or the run folder to go on with")

    def check(self) -> "TrainConfig":
        """Returns the config itself. Raises UserError for the first value that cannot be."""
        _check_ranges(self)
        _check_finetuning(self)
        if self.warmup_steps > self.max_steps and not self.epochs:
            raise UserError(f"--warmup-steps ({self.warmup_steps}) is more than --max-steps ({self.max_steps})")
        if self.n_embd % self.n_head:
            raise UserError(f"--n-embd ({self.n_embd}) must be a multiple of --n-head ({self.n_head})")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise UserError(f"--batch-size ({self.batch_size}) must be a multiple of --micro-batch-size")
        room = self.max_steps - self.warmup_steps
        if self.decay_steps is not None and not 0 <= self.decay_steps <= room and not self.epochs:
            raise UserError(f"--decay-steps ({self.decay_steps}) and the warm-up do not fit in --max-steps")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = ", ".join(choices)
                raise UserError(f"{_flag(name)} '{value}' is not one of {known}{did_you_mean(value, choices)}")
        if self.resume not in ("never", "auto"):
            raise UserError(f"resume must be never or auto, not '{self.resume}'")
        for name in ("weight_decay", "grad_clip", "skip_spikes", "max_minutes", "epochs", "rank_timeout"):
            if getattr(self, name) == float("inf"):
                raise UserError(f"{_flag(name)} must be finite")
        for name, value in asdict(self).items():
            if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
                raise UserError(f"{_flag(name)} is not UTF-8 text")
        return self

    @property
    def needs_full_model(self) -> bool:
        """Has every rank to have the whole model, whatever else would fit?"""
        return self.optimizer == "muon" or self.lora_rank > 0

    def with_steps_from_epochs(self, windows_per_epoch: int) -> "TrainConfig":
        """`epochs` as steps, where one goes through `windows` rows; what is counted in steps shrinks to fit them."""
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

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The fresh model that these settings ask for, with a vocabulary of this size."""
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=self.block_size,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
        )

    def lora_config(self) -> LoRAConfig:
        """The adapters that the run trains; `lora_alpha` 0 stands for twice the rank."""
        targets = tuple(target.strip() for target in self.lora_targets.split(",") if target.strip())
        return LoRAConfig(self.lora_rank, self.lora_alpha or 2.0 * self.lora_rank, self.lora_dropout, targets)


FIXED_ON_RESUME = tuple(f.name for f in fields(TrainConfig) if f.metadata["same"])
FINETUNING_FIELDS = tuple(f.name for f in fields(TrainConfig) if f.metadata["tuning"])


def _check_ranges(config: TrainConfig) -> None:
    at_least = {
        **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "max_steps", "keep_checkpoints"), 1),
        **dict.fromkeys(("warmup_steps", "eval_every", "eval_tokens", "save_every", "sample_tokens"), 0),
        **dict.fromkeys(("weight_decay", "grad_clip", "skip_spikes", "max_minutes", "seed"), 0),
        **dict.fromkeys(("freeze", "lora_rank", "epochs", "patience"), 0),
        "rank_timeout": 1,
    }
    if config.batch_size != AUTO_BATCH_SIZE:
        at_least["batch_size"] = 1
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            raise UserError(f"{_flag(name)} must be at least {least}, not {getattr(config, name)}")
    if config.seed >= 2**63:
        raise UserError(f"--seed must be below 2**63, not {config.seed}")
    if not 0 < config.lr < float("inf"):
        raise UserError(f"--lr must be over 0, not {config.lr}")
    if config.min_lr is not None and not 0 <= config.min_lr <= config.lr:
        raise UserError(f"--min-lr must be between 0 and --lr ({config.lr}), not {config.min_lr}")
    for name in ("dropout", "lora_dropout", "beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{_flag(name)} must be in [0, 1), not {getattr(config, name)}")


def _check_finetuning(config: TrainConfig) -> None:
    """What makes sense for a given model only, and what of that goes together, or with whole matrices only."""
    asked = [name for name in ("add_tokens", "freeze", "lora_rank") if getattr(config, name)]
    if asked and config.init_from is None:
        raise UserError(f"{_flag(asked[0])} needs a model to begin with: --init-from")
    if len(asked) > 1:
        why = {"add_tokens": "the new tokens could not be learned", "freeze": "adapters freeze all the rest anyway"}
        raise UserError(f"{_flag(asked[0])} and {_flag(asked[1])} do not go together: {why[asked[0]]}")
    if config.parallel == "fsdp" and config.needs_full_model:
        what = "--optimizer muon works on" if config.optimizer == "muon" else "adapters are learned beside"
        raise UserError(f"{what} whole matrices, and --parallel fsdp divides them: --parallel ddp")
    if config.lora_alpha is not None and not 0 < config.lora_alpha < float("inf"):
        raise UserError(f"--lora-alpha must be over 0, not {config.lora_alpha}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_name(out_dir: str, stem: str, *, resume: bool) -> str:
    """A name for a run of recipe `stem`: to start, the first free of stem, stem-2, ...; to resume, the last taken."""
    number = 1
    while (expand_path(out_dir) / _numbered_name(stem, number)).exists():
        number += 1
    return _numbered_name(stem, max(1, number - 1) if resume else number)


def _numbered_name(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def config_for_resume(folder: Path, overrides: dict[str, Any]) -> TrainConfig:
    """The config of the run in `folder`, to be gone on with, under the values `given`."""
    stored = read_toml(folder / "config.toml")
    overrides = {
        name: value for name, value in overrides.items() if (name, value) != ("batch_size", AUTO_BATCH_SIZE)
    }  # it was found
    if "max_steps" in overrides:
        overrides = {"epochs": 0.0, **overrides}
    values = {**overrides, "name": folder.name, "out_dir": str(folder.parent), "resume": "auto"}
    return with_overrides(stored, values, "the command line")


def check_same_run(folder: Path, config: TrainConfig) -> None:
    """Raises UserError when `config` differs from that of the run in `folder` in what makes a run this run."""
    stored = read_toml(folder / "config.toml")
    shape = ("n_layer", "n_head", "n_embd", "block_size")
    for name in FIXED_ON_RESUME:
        was, value = getattr(stored, name), getattr(config, name)
        if was != value and not (name in shape and config.init_from):  # there the given model's shape was stored
            raise UserError(f"{folder} was begun with {_flag(name)} {was}: it cannot go on with {value}")


def to_toml(config: TrainConfig) -> str:
    """`config` as TOML, one line a value; what is None is left out."""
    lines = []
    for f in fields(config):
        value = getattr(config, f.name)
        value = next((word for word, meant in f.metadata["words"].items() if meant == value), value)
        if value is not None:  # a JSON string, number or boolean is a TOML one
            lines.append(f"{f.name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def read_toml(path: Path) -> TrainConfig:
    """The config in a TOML file; what it leaves out keeps its default. Raises UserError for what is not one."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}") from error
    return with_overrides(TrainConfig(), values, str(path))


def with_overrides(config: TrainConfig, overrides: dict[str, Any], source: str) -> TrainConfig:
    """`config` with `values` put in, each checked against its field's type."""
    types = get_type_hints(TrainConfig)
    names = [f.name for f in fields(TrainConfig)]
    words = {f.name: f.metadata["words"] for f in fields(TrainConfig)}
    for name, value in overrides.items():
        if name not in types:
            raise UserError(f"{source}: there is no setting '{name}'{did_you_mean(name, names)}")
        if isinstance(value, str) and value in words[name]:
            overrides = {**overrides, name: words[name][value]}
            continue
        if types[name] in (float, float | None) and type(value) is int:
            overrides = {**overrides, name: float(value)}
        elif not isinstance(value, types[name]) or (isinstance(value, bool) and "bool" not in str(types[name])):
            raise UserError(f"{source}: {name} cannot be {value!r}")
    return replace(config, **overrides)
