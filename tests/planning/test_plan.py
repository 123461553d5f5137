"""`gpt2 plan`: from a datasheet and measured, what fits, and its output."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.cli import parse_count
from gpt2.commands.plan import main
from gpt2.config import TrainConfig
from gpt2.data.corpora import HUB_CORPORA
from gpt2.errors import UserError
from gpt2.model import OPENAI_CONFIGS, GPTConfig
from gpt2.planning.costs import StepSetup, training_memory
from gpt2.planning.plan import fits_full_model, largest_batch_size, model_shape, plan, suggest_micro_batch
from gpt2.planning.target import TargetDevice
from gpt2.train.recipes import load_recipe

CPU = torch.device("cpu")


def test_plan_of_gpt2_124m_on_eight_h100s() -> None:
    result = plan(load_recipe("gpt2-124m"), on="h100", devices=8, tokens=10 * 10**9, price_per_hour=24)
    assert (result.steps, result.tokens_per_step, result.micro_batch_size) == (19_074, 2**19, 16)
    assert result.parameters == 124_439_808
    assert result.flops_per_token == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    computing = result.flops_per_step / (8 * 0.45 * 989.4e12)
    assert result.ways["ddp"].step.compute == pytest.approx(computing, rel=0.02)  # the update is not in `computing`
    assert result.seconds_per_step == result.ways[result.parallel].step.seconds > result.ways["ddp"].step.compute
    assert result.seconds == result.seconds_per_step * result.steps
    assert result.cost == pytest.approx(result.seconds / 3600 * 24)
    assert result.fits
    assert not result.measured
    assert result.dtype == "bfloat16"


def test_dtype_depends_on_the_gpu() -> None:
    assert plan(load_recipe("gpt2-124m"), on="l4").dtype == "bfloat16"
    assert plan(load_recipe("gpt2-124m"), on="t4").dtype == "float32"
    half = plan(replace(load_recipe("gpt2-124m"), dtype="float16"), on="t4")
    assert half.dtype == "float16"
    assert half.seconds < plan(load_recipe("gpt2-124m"), on="t4").seconds / 3


def test_unknown_gpu_raises() -> None:
    with pytest.raises(UserError, match=r"^no datasheet of 'h1000' \(did you mean 'h100'\?\): there are [^\n]+$"):
        plan(load_recipe("gpt2-124m"), on="h1000")


def test_suggestion_for_a_plan_that_does_not_fit() -> None:
    config = replace(load_recipe("gpt2-124m"), n_layer=48, n_head=25, n_embd=1600, micro_batch_size=32)
    result = plan(config, on="a100")
    assert not result.fits
    assert result.suggestion is not None
    fitting = plan(replace(config, **result.suggestion), on="a100")
    assert fitting.fits
    assert not plan(replace(config, **{**result.suggestion, "micro_batch_size": 512}), on="a100").fits
    assert plan(config, on="t4").suggestion is None  # weights, gradients and optimizer alone are 24 GiB, of 15


def test_a_plan_that_does_not_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    too_large = ["gpt2-124m", "--n-layer", "48", "--n-head", "25", "--n-embd", "1600", "--micro-batch-size", "32"]
    assert main([*too_large, "--on", "a100"]) == 1
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1].startswith("The run does not fit in the memory of ")
    assert main([*too_large, "--on", "a100", "--json", "-"]) == 1
    assert main(["quickstart", "--on", "a100"]) == 0
    assert "the whole batch of a device" in capsys.readouterr().out


def test_activation_checkpointing_is_suggested_only_if_needed() -> None:
    setup = StepSetup(rows=1, length=8192, dtype=torch.bfloat16, device="cuda")
    shape = replace(OPENAI_CONFIGS["gpt2"], block_size=8192)
    without = training_memory(shape, setup)
    small = TargetDevice("a GPU", "cuda", None, None, without.peak, 0)
    assert suggest_micro_batch(shape, setup, small, 1) == {"micro_batch_size": 1, "activation_checkpointing": True}
    large = replace(small, memory=2 * without.peak)
    assert suggest_micro_batch(shape, setup, large, 1) == {"micro_batch_size": 1, "activation_checkpointing": False}


def test_largest_batch_size_fits_and_twice_as_many_rows_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = replace(TrainConfig(), save_every=0), GPTConfig(vocab_size=101, n_layer=3, n_head=4, n_embd=64)
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: 2**30)
    rows = largest_batch_size(config, shape, CPU, torch.float32)
    setup = StepSetup(rows=rows, length=1024, saves_midway=False)
    assert (
        training_memory(shape, setup).peak <= 0.9 * 2**30 < training_memory(shape, replace(setup, rows=2 * rows)).peak
    )
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: 2**31)
    shared = replace(setup, buckets=True)  # two ranks on this machine share its memory
    assert largest_batch_size(config, shape, CPU, torch.float32, 2) in (rows, rows // 2)
    assert training_memory(shape, shared).peak > training_memory(shape, setup).peak
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: 2**20)
    with pytest.raises(UserError, match="not even one row"):
        largest_batch_size(config, shape, CPU, torch.float32)


def test_vocabulary_size_comes_from_the_tokenizers_name(tmp_path: Path) -> None:
    for spec, size in (("gpt2", 50257), ("bytes", 257), ("bpe:1024", 1024), (None, 50257)):
        assert model_shape(TrainConfig(tokenizer=spec, data=str(tmp_path / "none.txt"))).vocab_size == size
    assert model_shape(TrainConfig(init_from="gpt2-medium")).n_embd == 1024


SMALL = ["--n-layer", "4", "--n-embd", "32", "--n-head", "2", "--block-size", "16", "--dtype", "float32"]


def test_local_plan_as_json_creates_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--batch-size", "16", "--device", "cpu", "--tokens", "1M", "--price-per-hour", "2", "--json", "-"]
    main(["quickstart", *SMALL, *flags])
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        *("nodes", "parallel", "network", "ways"),
        *("device", "devices", "measured", "dtype", "compile", "parameters", "trainable", "vocab_size"),
        *("batch_size", "micro_batch_size", "activation_checkpointing", "flops_per_token", "flops_per_step", "flops"),
        *("memory", "device_memory"),
        *("fits", "suggestion", "tokens_per_step", "steps", "tokens", "seconds_per_step", "seconds"),
        *("tokens_per_second", "matmul_rate", "utilization", "cost", "disk"),
    }
    assert set(result["memory"]) == {
        *("program", "weights", "gradients", "optimizer", "gathered", "casts", "activations", "logits"),
        *("working", "allocator", "snapshot", "step", "peak"),
    }
    assert result["measured"]
    assert result["steps"] == 3907  # of 16 * 16 tokens
    assert 0 < result["seconds_per_step"] * result["steps"] == pytest.approx(result["seconds"])
    assert 0 < result["utilization"] < 1.5
    assert result["cost"] == pytest.approx(result["seconds"] / 1800)
    assert list(tmp_path.iterdir()) == []


def test_plan_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(["gpt2-124m", "--on", "h100", "--gpus", "8", "--tokens", "10B", "--price-per-hour", "24"])
    out = capsys.readouterr().out
    for words in ("124,439,808", "optimizer", "949.4 MiB", "8 devices", "estimate: passes at 45% MFU", "fits", "cost"):
        assert words in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--gpus", "3", "--on", "h100"], "must be a multiple of --gpus"),
        (["--tokens", "many"], "'many' is not a number"),
        (["--price-per-hour", "-1"], "is not a price"),
        (["--on", "tpu"], "no datasheet of 'tpu'"),
        (["--optimizer", "adamm"], "did you mean 'adamw'"),
        (["nonsense"], "no recipe 'nonsense'"),
    ],
)
def test_invalid_plan_is_a_one_line_error(flags: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        main(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "number"), [("10B", 10**10), ("500M", 5 * 10**8), ("1e9", 10**9), ("2,000", 2000)])
def test_parse_token_budgets(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize(("share", "micro"), [(8, None), (8, 2), (1, 4)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_fits_full_model_is_exact(monkeypatch: pytest.MonkeyPatch, share: int, micro: int | None, ranks: int) -> None:
    shape, config = GPTConfig(vocab_size=101, n_layer=3, n_head=4, n_embd=64), TrainConfig(micro_batch_size=micro)
    rows = min(share, micro or share)
    setup = StepSetup(rows=rows, micro_batches=share // rows, length=1024, buckets=ranks > 1)
    memory = training_memory(shape, setup)
    needed = ranks * memory.step + memory.peak - memory.step  # one of them saves
    for free, fits in ((needed / 0.9 + 2, True), (needed / 0.9 - 2, False)):
        monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device, free=free: int(free))
        assert fits_full_model(config, shape, CPU, torch.float32, share, ranks) is fits


def test_ranks_on_separate_gpus_do_not_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, gpu = OPENAI_CONFIGS["gpt2"], torch.device("cuda", 0)
    needed = training_memory(
        shape, StepSetup(rows=8, length=1024, dtype=torch.bfloat16, device="cuda", buckets=True)
    ).peak
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: int(needed / 0.9) + 2)
    assert fits_full_model(TrainConfig(), shape, gpu, torch.bfloat16, 8, 8)
    assert not fits_full_model(TrainConfig(), shape, gpu, torch.bfloat16, 16, 8)


def test_ddp_buckets_are_allocated_from_the_start() -> None:
    setup = StepSetup(rows=16, length=1024, dtype=torch.bfloat16, device="cuda")
    alone = training_memory(OPENAI_CONFIGS["gpt2"], setup)
    assert training_memory(OPENAI_CONFIGS["gpt2"], replace(setup, buckets=True)).step == alone.step + alone.gradients


def test_the_plan_of_the_reproduction_names_the_disk_for_its_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("gpt2-124m")
    assert plan(recipe, on="h100", devices=8).disk == 2 * HUB_CORPORA[recipe.data].tokens
    assert plan(replace(recipe, data="notes/"), on="h100").disk is None
    assert plan(load_recipe("gpt2-124m-1gpu"), on="h100").fits
    main(["gpt2-124m", "--on", "h100", "--gpus", "8"])
    assert "token shards, made first" in capsys.readouterr().out
