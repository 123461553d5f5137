"""Setup of a run: from a config, and the checkpoint to resume from, to everything that a training step needs.

`setup_run` does it in order: device, checkpoint, model and data, resolved config, distributed model, optimizers.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt2.config import AUTO_BATCH_SIZE, MOVABLE, TrainConfig
from gpt2.data.dataset import Dataset, TokenDataset
from gpt2.data.instruct import InstructDataset, open_instruct
from gpt2.data.loader import BatchLoader
from gpt2.data.mixture import Mixture, find_mixture, map_refs
from gpt2.data.prepare import open_data, open_mixture
from gpt2.data.resolve import Rows, resolve_data
from gpt2.data.sources import BUILTIN_SOURCES
from gpt2.distributed.parallel import DistributedModel, pick_parallel_kind
from gpt2.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt2.embeddings import extend_vocabulary
from gpt2.errors import ConfigError, ModelFilesError
from gpt2.files import expand_path
from gpt2.lora import add_adapter, base_fingerprint, load_adapter_weights, read_adapter
from gpt2.model import GPT
from gpt2.optimizers import build_optimizers
from gpt2.planning.plan import fits_full_model, largest_batch_size
from gpt2.planning.target import setup_device
from gpt2.reporting.metrics import read_metrics
from gpt2.runtime import (
    DTYPE_NAMES,
    DTYPES,
    apply_activation_checkpointing,
    auto_training_dtype,
    compile_blocks,
    pick_compile,
    pick_training_dtype,
    seed_everything,
)
from gpt2.templates import BUILTIN_TEMPLATES, ChatTemplate, get_template
from gpt2.terminal import shorten
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer, with_added_tokens, with_special_tokens
from gpt2.train.artifact import ModelArtifact
from gpt2.train.checkpoint import latest_checkpoint, load_optimizers
from gpt2.train.early_stopping import BestValidation
from gpt2.train.loss_scale import LossScale
from gpt2.train.outlier_batches import OutlierFilter
from gpt2.train.run_folder import check_run_metadata, run_metadata
from gpt2.vocabulary import NO_VOCABULARY
from gpt2.weights import (
    HUB_ALIASES,
    find_model_folder,
    load,
    model_from_state_dict,
    read_config,
    read_model_tokenizer,
    read_template,
)

_log = logging.getLogger("gpt2")


@dataclass
class Run:
    """Everything that a training step needs."""

    folder: Path
    config: TrainConfig
    data: Dataset
    loader: BatchLoader
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    artifact: ModelArtifact
    ranks: ProcessGroup
    distributed_model: DistributedModel
    dtype_reason: str = ""  # why `--dtype auto` chose it; "" for a dtype that was given
    step: int = 0  # updates done
    saved_step: int = 0  # that of the newest checkpoint, 0 without one
    checkpoint: Path | None = None  # the one that the run resumes from
    checkpoint_metadata: dict[str, Any] = field(default_factory=dict)  # of every checkpoint: see `run_metadata`
    outlier_filter: OutlierFilter = field(default_factory=lambda: OutlierFilter(0.0))
    best_validation: BestValidation = field(default_factory=BestValidation)
    loss_scale: LossScale = field(default_factory=lambda: LossScale(torch.float32))

    @property
    def early_stopped(self) -> bool:
        """Return whether `patience` validations in a row brought no improvement."""
        return 0 < self.config.patience <= self.best_validation.evals_since_best

    @property
    def should_publish(self) -> bool:
        """Return whether the current weights are to become the run's `model/`."""
        return not self.config.keep_best or self.best_validation.step in (None, self.step)

    def describe_loss(self) -> str:
        """What a run that ends now has saved, and what it loses."""
        lost = self.step - self.saved_step
        if not self.saved_step:
            return f"nothing is saved, {lost:,} step(s) are lost"
        kept = f"step {self.saved_step:,} is saved"
        if not lost:
            return f"{kept}, nothing is lost"
        return f"{kept}, {lost:,} step(s) after it are lost; --resume {self.folder} goes on from there"

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch on each rank."""
        return micro_batch_size_per_rank(self.config, self.ranks)

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.block_size


def setup_run(config: TrainConfig, folder: Path, ranks: ProcessGroup = SINGLE_PROCESS) -> Run:
    """A run that is ready for its next step: new, or resumed from the newest checkpoint in `folder`.

    All ranks call this together. Writes nothing.
    Raises UserError for data, models and settings that cannot be combined, and for ranks that differ.
    """
    with ranks.raise_on_all_ranks():
        device = setup_device(config)
        ranks.set_device(device)
    checkpoint = ranks.broadcast_from_main(lambda: _checkpoint_to_resume(config, folder))
    with ranks.raise_on_all_ranks():
        if checkpoint is not None and not checkpoint.exists():
            raise ConfigError(f"{checkpoint} does not exist here: --out-dir must be on a disk that all hosts share")
    model, data, artifact = ranks.main_process_first(lambda: load_model_and_data(config, checkpoint))
    dtype_reason = auto_training_dtype(device, model.config.n_embd)[1] if config.dtype == "auto" else ""
    config, kind = ranks.broadcast_from_main(lambda: _resolve_config(config, model, data, device, ranks))
    ranks = ranks.with_timeout(config.rank_timeout)
    metadata = run_metadata(config, data)
    ranks.assert_same_on_all_ranks(
        {"device type": device.type, "data": data.fingerprint}, "give all ranks the same data and device"
    )
    with ranks.raise_on_all_ranks():
        if checkpoint is not None:
            check_run_metadata(checkpoint, metadata, config.data)
        _check_compatible(config, model, data)
        loader = data.loader(config.batch_size, config.block_size, config.seed)
        config = config.with_steps_from_epochs(loader.windows_per_epoch).check()
    if config.activation_checkpointing:
        apply_activation_checkpointing(model.transformer.h)
    if config.compile:
        compile_blocks(model.transformer.h)
    distributed_model = DistributedModel(kind, model, ranks, device)
    run = Run(
        folder=folder,
        config=config,
        data=data,
        loader=loader,
        model=model,
        optimizers=build_optimizers(model, config, ranks.step_group),
        device=device,
        dtype=DTYPES[config.dtype],
        dtype_reason=dtype_reason,
        artifact=artifact,
        ranks=ranks,
        distributed_model=distributed_model,
        checkpoint=checkpoint,
        checkpoint_metadata=metadata,
    )
    if checkpoint is not None:
        with ranks.raise_on_all_ranks():
            run.step = run.saved_step = load_optimizers(checkpoint, model, run.optimizers)
            if run.step > config.max_steps:
                done = f"{folder} has done {run.step:,} steps"
                raise ConfigError(f"{done}, more than --max-steps ({config.max_steps:,})", field="max_steps")
    records = ranks.broadcast_from_main(lambda: _read_metrics_until(run.step, folder))
    run.best_validation = BestValidation(records)
    run.loss_scale = LossScale(run.dtype, records)
    if config.skip_spikes:
        run.outlier_filter = OutlierFilter(config.skip_spikes, records)
    return run


class ModelAndData(NamedTuple):
    """The model and the data of a run, before optimizers and ranks come in."""

    model: GPT
    data: Dataset
    artifact: ModelArtifact


def load_model_and_data(config: TrainConfig, checkpoint: Path | None) -> ModelAndData:
    """The model (new, from `init_from`, or from a checkpoint), the tokenized data, and what the run will write.

    Raises UserError for data, models and settings that cannot be combined.
    """
    if checkpoint is not None and not config.lora_rank:
        folder = checkpoint / "model"
    else:
        folder = find_model_folder(config.init_from) if config.init_from else None
    template = get_template(config.template) if config.template else read_template(folder) if folder else None
    tokenizer: str | Tokenizer | None = config.tokenizer
    if config.init_from is not None and folder is not None:
        tokenizer = _resolve_tokenizer(folder, config, template, is_new=checkpoint is None)
    elif folder is not None and tokenizer in (None, "gpt2"):  # resumed: without a download
        own = load_tokenizer(folder)
        tokenizer = own if own is not None and own.name == "gpt2" else tokenizer
    try:
        data = open_dataset(config, tokenizer, template)
    except ModelFilesError as error:
        if error.code != NO_VOCABULARY or folder is not None:
            raise
        fix = "or --tokenizer bpe:1024, which is trained on the data"
        raise ModelFilesError(f"{error}; {fix}", field="tokenizer", code=NO_VOCABULARY) from error
    seed_everything(config.seed)
    vocab_size = data.tokenizer.vocab_size
    model = _load_initial_model(config, folder, vocab_size) if folder else GPT(config.model_config(vocab_size))
    if isinstance(data, InstructDataset):
        template = template or ChatTemplate()
    artifact = ModelArtifact(model.config, data.tokenizer, template)
    if config.lora_rank:
        assert config.init_from is not None
        assert folder is not None
        lora = config.lora_config()
        name = str(folder.resolve()) if expand_path(config.init_from).exists() else config.init_from
        artifact = replace(artifact, lora=lora, base=name, base_fingerprint=base_fingerprint(model))
        add_adapter(model, lora)
        if checkpoint is not None:
            _load_adapter(model, checkpoint, artifact.base_fingerprint)
    if config.freeze:
        _freeze(model, config.freeze)
    return ModelAndData(model, data, artifact)


def open_dataset(config: TrainConfig, tokenizer: str | Tokenizer | None, template: ChatTemplate | None) -> Dataset:
    """The data of a run, as a tokenizer's tokens: rows of prompts and answers, or text."""
    data = resolve_data(config.data, config.columns, config.bad_rows)
    if isinstance(data, Mixture):
        return open_mixture(data, tokenizer, separate_documents=config.separate_documents)
    if not isinstance(data, Rows):
        return replace(open_data(data, tokenizer), separate_documents=config.separate_documents)
    return open_instruct(
        data,
        get_tokenizer(tokenizer or "gpt2") if isinstance(tokenizer, str | None) else tokenizer,
        template or ChatTemplate(),
        mask_prompt=config.mask_prompt,
    )


def _resolve_tokenizer(
    folder: Path, config: TrainConfig, template: ChatTemplate | None, *, is_new: bool
) -> str | Tokenizer | None:
    """The tokenizer for a given model: its own, or `config.tokenizer` if it has none.

    is_new: whether the run is new, so that tokens still have to be added.
    """
    own = read_model_tokenizer(folder, read_config(folder))
    if own is not None and not is_new:
        return own
    new_tokens = [token for token in (config.add_tokens or "").split(",") if token]
    if own is None and not new_tokens and template is None:
        return config.tokenizer
    tokenizer = own or get_tokenizer(config.tokenizer or "gpt2")
    special = template.missing_tokens(tokenizer) if template else []
    if special and (config.lora_rank or config.freeze):
        raise ConfigError(
            f"the template's {special[0]} is no token of the model, and would have to be trained: "
            "leave out --lora-rank and --freeze, or use --template plain",
            field="template",
        )
    tokenizer = with_special_tokens(tokenizer, special) if special else tokenizer
    return with_added_tokens(tokenizer, new_tokens) if new_tokens else tokenizer


def _load_initial_model(config: TrainConfig, folder: Path, vocab_size: int) -> GPT:
    """The model in a folder, with the dropout of this run and embeddings for new tokens."""
    given, own = load(folder)
    shape = replace(given.config, dropout=config.dropout, embd_dropout=None, attn_dropout=None)
    model = model_from_state_dict(shape, dict(given.named_parameters())).train()
    if own is not None and vocab_size > own.vocab_size:
        return extend_vocabulary(model, vocab_size, own.vocab_size)
    return model


def _load_adapter(model: GPT, checkpoint: Path, fingerprint: str) -> None:
    adapter = read_adapter(checkpoint / "adapter")
    if adapter.base_fingerprint != fingerprint:
        raise ModelFilesError(f"{checkpoint} has an adapter for {shorten(adapter.base_model)}, which has changed since")
    load_adapter_weights(model, adapter)


def _freeze(model: GPT, blocks: int) -> None:
    """Freeze the embeddings (with them the tied output head) and the first blocks."""
    layers = model.transformer.h
    if blocks > len(layers):
        raise ConfigError(f"--freeze {blocks} is more than the model's {len(layers)} blocks", field="freeze")
    for part in (model.transformer.wte, model.transformer.wpe, *layers[:blocks]):
        part.requires_grad_(False)


def _checkpoint_to_resume(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint that the run resumes from; None for a new run."""
    if not config.data:
        raise ConfigError(
            "--data is missing: name the training data (gpt2 data list shows the corpora by name)", field="data"
        )
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None and any((folder / name).exists() for name in ("model", "adapter")):
        raise ModelFilesError(f"{folder} has no whole checkpoint to resume: --init-from {folder}, with another --name")
    return checkpoint


def _resolve_config(
    config: TrainConfig, model: GPT, data: Dataset, device: torch.device, ranks: ProcessGroup
) -> tuple[TrainConfig, str]:
    """The config with every automatic value chosen, and the kind of parallelism: see `parallel.pick_parallel_kind`."""
    shape, dtype = model.config, pick_training_dtype(config.dtype, device, model.config.n_embd)
    config = replace(
        config,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        block_size=_block_size(min(config.block_size, shape.block_size), data),
        device=str(device),
        dtype=DTYPE_NAMES[dtype],
        **{name: _absolute_path(getattr(config, name)) for name in MOVABLE},
        compile=pick_compile(config.compile, device, config.max_steps),
    )
    if config.batch_size == AUTO_BATCH_SIZE:
        rows = largest_batch_size(config, shape, device, dtype, ranks.local_world_size)
        config = replace(config, batch_size=rows * ranks.world_size, micro_batch_size=None)
    micro_batch_size_per_rank(config, ranks)  # for its errors
    fits = fits_full_model(config, shape, device, dtype, config.batch_size // ranks.world_size, ranks.local_world_size)
    return config, pick_parallel_kind(config, ranks, fits=fits)


def _block_size(block_size: int, data: Dataset) -> int:
    """The tokens of a row: fewer, with a line in the log, where the whole text is shorter."""
    if not isinstance(data, TokenDataset) or data.train_tokens > block_size:
        return block_size
    rows = data.train_tokens - 1  # the last token is a target only
    _log.warning(
        "%s has %s training tokens: rows have %s, not %s", data.name, *map("{:,}".format, (rows + 1, rows, block_size))
    )
    return rows


def _absolute_path(ref: str | None) -> str | None:
    """A relative path of something that exists as an absolute one, so that a run can be resumed from another folder.

    Of a mixture, that of each part. Names (of corpora, templates and models) and patterns that match nothing stay.
    """
    if ref is None or ref in BUILTIN_SOURCES or ref in BUILTIN_TEMPLATES:
        return ref
    path = expand_path(ref)
    if ref in HUB_ALIASES and not (path / "config.json").is_file():
        return ref
    if not path.exists() and find_mixture(ref) is not None:
        return map_refs(ref, lambda part: _absolute_path(part) or part)
    is_pattern = any(character in ref for character in "*?[") and path.parent.is_dir()
    return str(path.absolute()) if path.exists() or is_pattern else ref


def micro_batch_size_per_rank(config: TrainConfig, ranks: ProcessGroup) -> int:
    """Rows of a micro-batch on each rank. Raises ConfigError where the batch cannot be divided equally."""
    share, remainder = divmod(config.batch_size, ranks.world_size)
    if remainder:
        problem = f"--batch-size {config.batch_size} cannot be shared by {ranks.world_size} ranks"
        raise ConfigError(f"{problem}: make it a multiple of them", field="batch_size")
    rows = min(config.micro_batch_size or share, share)
    if share % rows:
        raise ConfigError(
            f"each rank has {share} rows of the batch, which --micro-batch-size {rows} does not divide",
            field="micro_batch_size",
        )
    return rows


def _check_compatible(config: TrainConfig, model: GPT, data: Dataset) -> None:
    """Raises ConfigError when the data has more token ids than the model, or the sample prompt exceeds the context."""
    if data.tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{config.data} has {data.tokenizer.vocab_size:,} token ids, the model {model.config.vocab_size:,}",
            field="data",
        )
    prompt = data.tokenizer.encode(config.sample_prompt, allow_special=True)
    context = model.config.block_size
    if config.sample_tokens and len(prompt) > context:
        problem = f"--sample-prompt has {len(prompt)} tokens, more than the context of {context}"
        raise ConfigError(problem, field="sample_prompt")


def _read_metrics_until(step: int, folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "metrics.jsonl"
    return [record for record in read_metrics(metrics) if record["step"] <= step] if metrics.exists() else []
