"""A run: its folder, its parts, and how it is set up, fresh or from where a checkpoint left off."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt2.data.loader import Loader
from gpt2.data.prepare import TokenData, open_data
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import (
    DTYPE_NAMES,
    compile_blocks,
    pick_compile,
    pick_device,
    pick_training_dtype,
    seed_everything,
)
from gpt2.tokenizer import Tokenizer, load_tokenizer
from gpt2.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from gpt2.train.config import TrainConfig, check_same_run, to_toml
from gpt2.train.optim import build_optimizers
from gpt2.weights import find_model, load, save


@dataclass
class Run:
    """Everything a step needs."""

    folder: Path
    config: TrainConfig
    data: TokenData
    loader: Loader
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    step: int = 0  # updates done


def set_up(config: TrainConfig) -> Run:
    """From a config to a run that is ready for its next step: fresh, or where a checkpoint left off."""
    config.check()
    folder = _run_folder(config)
    device = pick_device(config.device)
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None and (folder / "model").exists():
        raise UserError(f"{folder} has no whole checkpoint to go on from: --init-from {folder}, with another --name")
    start = checkpoint / "model" if checkpoint else find_model(config.init_from) if config.init_from else None
    data = open_data(config.data, config.tokenizer if config.init_from is None else _tokenizer_of(start, config))
    seed_everything(config.seed)
    model = _fresh_model(config, data.tokenizer) if start is None else _given_model(config, start)
    if data.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{config.data} has {data.tokenizer.vocab_size:,} token ids, the model {model.config.vocab_size:,}"
        )
    model.to(device)
    shape, dtype = model.config, pick_training_dtype(config.dtype, device, model.config.n_embd)
    config = replace(
        config,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        block_size=min(config.block_size, shape.block_size),
        device=str(device),
        dtype=DTYPE_NAMES[dtype],
        compile=pick_compile(config.compile, device, config.max_steps),
    )
    prompt = data.tokenizer.encode(config.sample_prompt, allow_special=True)
    if config.sample_tokens and len(prompt) > shape.block_size:
        raise UserError(f"--sample-prompt has {len(prompt)} tokens, more than the context of {shape.block_size}")
    loader = Loader(data.train, config.batch_size, config.block_size, config.seed)
    run = Run(folder, config, data, loader, model, build_optimizers(model, config), device, dtype)
    if checkpoint is not None:
        run.step = load_checkpoint(checkpoint, run.model, run.optimizers)
        if run.step > config.max_steps:
            raise UserError(f"{folder} has done {run.step:,} steps, more than --max-steps ({config.max_steps:,})")
    _start_folder(run)
    _drop_samples_after(run.step, run.folder / "samples.txt")
    if config.compile:
        compile_blocks(model.transformer.h)
    return run


def describe(run: Run) -> str:
    """Two lines on what is about to be trained, on what."""
    config, data = run.config, run.data
    held_out = f"{len(data.val):,} held out" if data.val is not None else "none held out"
    compiled = ", compiled" if config.compile else ""
    return (
        f"model: {run.model.num_parameters():,} parameters, {config.n_layer} layers of {config.n_embd}, "
        f"context {config.block_size}, on {run.device} in {config.dtype}{compiled}\n"
        f"data: {data.name}, {len(data.train):,} tokens to learn from, {held_out}"
    )


def save_run(run: Run) -> None:
    """Write a checkpoint, and the weights as the run's model folder."""
    checkpoints = run.folder / "checkpoints"
    tokenizer = run.data.tokenizer
    save_checkpoint(checkpoints, run.step, run.model, tokenizer, run.optimizers, run.config.keep_checkpoints)
    save(run.model, tokenizer, run.folder / "model")


def _run_folder(config: TrainConfig) -> Path:
    """Where the run lives. Raises UserError for a folder that holds another run, or not the one to resume."""
    name = config.name or ""
    if name in ("", ".", "..") or Path(name).name != name or len(name.encode()) > 200:
        raise UserError(f"a run needs a --name that can be a folder's, not '{name}'")
    folder = Path(config.out_dir) / name
    if config.resume == "never" and folder.exists():
        raise UserError(f"{folder} exists: --resume auto goes on with it, another --name starts beside it")
    if (folder / "config.toml").is_file():
        check_same_run(folder, config)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} has something else in it: no run can be gone on with there")
    return folder


def _tokenizer_of(model_folder: Path | None, config: TrainConfig) -> str | None:
    """What to tokenize with for a model that is given: its own tokenizer; only without one, what was asked for."""
    if model_folder is not None and load_tokenizer(model_folder) is not None:
        return str(model_folder)
    return config.tokenizer


def _fresh_model(config: TrainConfig, tokenizer: Tokenizer) -> GPT:
    return GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size,
            block_size=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
        )
    )


def _given_model(config: TrainConfig, folder: Path) -> GPT:
    given, _ = load(folder)
    model = GPT(replace(given.config, dropout=config.dropout))
    model.load_state_dict(given.state_dict())
    return model


def _start_folder(run: Run) -> None:
    """Make the run folder, and write the config with all that was chosen for it."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        text = to_toml(replace(run.config, resume="never"))
        (run.folder / "config.toml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the run folder {run.folder}: {error.strerror or error}") from error


def _drop_samples_after(step: int, path: Path) -> None:
    """Take away what an interrupted run wrote after the checkpoint it goes on from: it will be written again."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        for header in re.finditer(r"^--- step ([0-9]+)$", text, re.MULTILINE):
            if int(header[1]) > step:
                path.write_text(text[: header.start()], encoding="utf-8")
                break
