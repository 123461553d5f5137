"""Recipes: named sets of training settings."""

from dataclasses import replace
from pathlib import Path

from gpt2.config import TrainConfig, read_toml
from gpt2.errors import ConfigError, did_you_mean
from gpt2.files import expand_path

RECIPES = {
    # a small GPT-2 on the Python reference: about half a minute on two cores, offline
    "quickstart": TrainConfig(
        data="python-docs",
        tokenizer="bpe:1024",
        n_layer=3,
        n_head=4,
        n_embd=128,
        block_size=64,
        batch_size=32,
        max_steps=300,
        optimizer="muon",
        lr=0.01,
        min_lr=0.0,
        warmup_steps=50,
        schedule="linear",
        beta2=0.99,
        eval_every=100,
        save_every=100,
        sample_prompt="The ",
    ),
    # bytes, about a minute on two cores: what benchmarks/shakespeare_race.py runs
    "shakespeare-cpu": TrainConfig(
        data="shakespeare",
        tokenizer="bytes",
        n_layer=2,
        n_head=4,
        n_embd=128,
        block_size=64,
        batch_size=48,
        max_steps=1000,
        optimizer="muon",
        lr=0.014,
        min_lr=0.0,
        warmup_steps=100,
        schedule="linear",
        beta2=0.99,
        eval_every=0,
        save_every=0,
    ),
    # bytes, the size of nanoGPT's shakespeare_char
    "shakespeare": TrainConfig(
        data="shakespeare",
        tokenizer="bytes",
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=256,
        dropout=0.2,
        batch_size=64,
        max_steps=5000,
        lr=1e-3,
        beta2=0.99,
    ),
    # the same size, with a BPE vocabulary trained on the data
    "shakespeare-bpe": TrainConfig(
        data="shakespeare",
        tokenizer="bpe:2048",
        n_layer=6,
        n_head=6,
        n_embd=384,
        block_size=128,
        dropout=0.3,
        batch_size=64,
        max_steps=2000,
        lr=1e-3,
        beta2=0.99,
    ),
    # the defaults of `gpt2 finetune`: three epochs, early stopping, the best weights kept, documents separate
    "finetune": TrainConfig(
        data="",
        separate_documents=True,
        dropout=0.1,
        block_size=512,
        batch_size=8,
        epochs=3.0,
        patience=3,
        keep_best=True,
        lr=5e-5,
        warmup_steps=50,
        schedule="linear",
        weight_decay=0.01,
        beta2=0.999,
        eval_every=100,
        sample_tokens=100,
    ),
    # Karpathy's reproduction: 0.5M tokens a step, 10B tokens in all, GPT-3's schedule
    "gpt2-124m": TrainConfig(
        data="fineweb-edu-10B",
        tokenizer="gpt2",
        batch_size=512,
        micro_batch_size=16,
        max_steps=19073,
        lr=6e-4,
        warmup_steps=715,
        eval_every=250,
        eval_tasks="hellaswag",
        eval_tasks_every=250,
        eval_tasks_limit=0,
        save_every=1000,
        sample_prompt="Hello, I'm a language model,",
        sample_tokens=32,
    ),
}
# the same run on a single GPU: days instead of hours, so it saves more often
RECIPES["gpt2-124m-1gpu"] = replace(RECIPES["gpt2-124m"], save_every=250)


def load_recipe(ref: str) -> TrainConfig:
    """The recipe called `ref`, or the one in the TOML file at that path."""
    if ref in RECIPES:
        return RECIPES[ref]
    if ref.endswith(".toml"):
        return read_toml(Path(ref))
    if expand_path(ref).exists():
        raise ConfigError(f"{ref} is no recipe, and no .toml file: to train on it, use --data {ref}", field="data")
    known = ", ".join(RECIPES)
    raise ConfigError(f"no recipe '{ref}'{did_you_mean(ref, RECIPES)}: there are {known}, or a file.toml")
