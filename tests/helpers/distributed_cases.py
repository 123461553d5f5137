"""Training runs of several ranks for the tests, and the comparison of their results."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2
from gpt2.config import TrainConfig
from gpt2.reporting.metrics import read_metrics
from gpt2.train.setup import load_model_and_data
from tests.helpers.training_helpers import NUMBERS_TEXT

BATCH_SIZE, BLOCK_SIZE = 12, 32
DOUBLING_ROWS = [{"prompt": f"double {'once more ' * (i % 4)}{i}", "answer": str(2**i)} for i in range(60)]
INSTRUCT_VALUES: dict[str, Any] = {
    "data": "doubles.jsonl",
    "init_from": "base/model",
    "block_size": 64,
    "tokenizer": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"sample_tokens": 5},
    "micro": {"micro_batch_size": 1},
    "activation_checkpointing": {"activation_checkpointing": True},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "muon": {"optimizer": "muon"},
    "bfloat16": {"dtype": "bfloat16"},
    "answers": INSTRUCT_VALUES,
    "freeze": {**INSTRUCT_VALUES, "freeze": 1},
    "lora": {**INSTRUCT_VALUES, "lora_rank": 2},
    "compile": {"compile": True},
}
BFLOAT16_VARIANTS = ("bfloat16",)


@contextmanager
def workspace(folder: Path, compiled: Path) -> Iterator[Path]:
    """A working folder with data, an initial model, and its own cache; compiled CPU kernels are in `compiled`."""
    (folder / "numbers.txt").write_text(NUMBERS_TEXT[:1800])  # 49 windows: five steps of BATCH_SIZE go beyond an epoch
    (folder / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOUBLING_ROWS))
    (folder / "home").mkdir()
    (folder / "home" / "native").symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GPT2_HOME", str(folder / "home"))
        begin = load_model_and_data(small_config("base", block_size=64), None)
        gpt2.save(begin.model, begin.data.tokenizer, folder / "base" / "model")
        yield folder


def small_config(name: str, **given: Any) -> TrainConfig:
    """A run of five steps of a model of 34,720 weights; all paths are relative to the working folder."""
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": BLOCK_SIZE}
    shape |= {"data": "numbers.txt", "tokenizer": "bytes", "dtype": "float32", "device": "cpu", "sample_tokens": 0}
    shape |= {"batch_size": BATCH_SIZE, "max_steps": 5, "warmup_steps": 2, "lr": 3e-3, "eval_every": 3, "save_every": 0}
    return TrainConfig(name=name, **{**shape, **given})


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights of a run folder or model folder, by name."""
    return {name: p.detach().numpy() for name, p in gpt2.load(folder)[0].named_parameters()}


def max_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float(np.abs(value - other[name]).max()) for name, value in one.items())


def mean_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The mean difference of two sets of weights."""
    assert one.keys() == other.keys()
    return float(np.mean(np.concatenate([np.abs(value - other[name]).ravel() for name, value in one.items()])))


def assert_equal_training(single_folder: Path, parallel_folder: Path, variant: str = "plain") -> None:
    """Equal to float32 rounding; variants that round to bfloat16 are close, except for single weights."""
    one, other = (read_metrics(folder / "metrics.jsonl") for folder in (single_folder, parallel_folder))
    assert len(other) == len(one) == one[-1]["step"]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert [mine[name] for name in ("step", "lr", "tokens")] == [theirs[name] for name in ("step", "lr", "tokens")]
        for name in {"loss", "grad_norm", "val_loss"} & mine.keys():
            bound = 1e-3 if variant in BFLOAT16_VARIANTS else 3e-6
            assert theirs[name] == pytest.approx(mine[name], rel=bound), (name, mine["step"])
    assert sum("val_loss" in line for line in other) > 1
    if variant in BFLOAT16_VARIANTS:  # AdamW makes full steps from gradients that are rounding errors (key biases)
        assert mean_difference(weights(single_folder), weights(parallel_folder)) < 1e-4
    else:
        assert max_difference(weights(single_folder), weights(parallel_folder)) < 1e-5
