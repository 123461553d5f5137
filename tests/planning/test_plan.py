"""The plan of a run: by datasheet and measured, what fits, and what it says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt2.commands.plan import _parse_count, main
from gpt2.config import TrainConfig
from gpt2.errors import UserError
from gpt2.model import OPENAI_CONFIGS, GPTConfig
from gpt2.planning.costs import StepSetup, training_memory
from gpt2.planning.plan import TargetDevice, fits_full_model, largest_batch_size, model_shape, plan, suggest_micro_batch
from gpt2.train.recipes import load_recipe

CPU = torch.device("cpu")


def test_karpathys_reproduction_on_eight_h100s() -> None:
    made = plan(load_recipe("gpt2-124m"), on="h100", devices=8, tokens=10 * 10**9, price_per_hour=24)
    assert (made.steps, made.tokens_per_step, made.micro_batch_size) == (19_074, 2**19, 16)
    assert made.parameters == 124_439_808
    assert made.flops_per_token == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    computing = made.flops_per_step / (8 * 0.45 * 989.4e12)
    assert made.ways["ddp"].step.compute == pytest.approx(computing, rel=0.02)  # and the update
    assert made.seconds_per_step == made.ways[made.parallel].step.seconds > made.ways["ddp"].step.compute
    assert made.seconds == made.seconds_per_step * made.steps
    assert made.cost == pytest.approx(made.seconds / 3600 * 24)
    assert made.fits
    assert not made.measured
    assert made.dtype == "bfloat16"


def test_the_dtype_is_what_that_gpu_has() -> None:
    assert plan(load_recipe("gpt2-124m"), on="l4").dtype == "bfloat16"
    assert plan(load_recipe("gpt2-124m"), on="t4").dtype == "float32"
    with pytest.raises(UserError, match="loss scaling"):
        plan(replace(load_recipe("gpt2-124m"), dtype="float16"), on="t4")


def test_an_unknown_gpu_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^no datasheet of 'h1000' \(did you mean 'h100'\?\): there are [^\n]+$"):
        plan(load_recipe("gpt2-124m"), on="h1000")


def test_what_does_not_fit_gets_a_suggestion_and_needs_the_less_memory_the_more_it_gives_up() -> None:
    config = replace(load_recipe("gpt2-124m"), n_layer=48, n_head=25, n_embd=1600, micro_batch_size=32)
    made = plan(config, on="a100")
    assert not made.fits
    assert made.suggestion is not None
    fitting = plan(replace(config, **made.suggestion), on="a100")
    assert fitting.fits
    assert not plan(replace(config, **{**made.suggestion, "micro_batch_size": 512}), on="a100").fits
    assert plan(config, on="t4").suggestion is None  # 24 GiB of weights and their company, for 15


def test_recomputing_is_suggested_only_where_nothing_else_helps() -> None:
    setup = StepSetup(rows=1, length=8192, dtype=torch.bfloat16, device="cuda")
    shape = replace(OPENAI_CONFIGS["gpt2"], block_size=8192)
    without = training_memory(shape, setup)
    tight = TargetDevice("a GPU", "cuda", None, None, without.peak, 0)
    assert suggest_micro_batch(shape, setup, tight, 1) == {"micro_batch_size": 1, "recompute": True}
    roomy = replace(tight, memory=2 * without.peak)
    assert suggest_micro_batch(shape, setup, roomy, 1) == {"micro_batch_size": 1, "recompute": False}


def test_a_batch_found_for_you_fits_and_twice_as_many_rows_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = replace(TrainConfig(), save_every=0), GPTConfig(vocab_size=101, n_layer=3, n_head=4, n_embd=64)
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: 2**30)
    found = largest_batch_size(config, shape, CPU, torch.float32)
    setup = StepSetup(rows=found, length=1024, saves_midway=False)
    assert (
        training_memory(shape, setup).peak <= 0.9 * 2**30 < training_memory(shape, replace(setup, rows=2 * found)).peak
    )
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: 2**31)
    beside = replace(setup, buckets=True)  # two ranks on this machine have half of its memory each
    assert largest_batch_size(config, shape, CPU, torch.float32, 2) in (found, found // 2)
    assert training_memory(shape, beside).peak > training_memory(shape, setup).peak
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: 2**20)
    with pytest.raises(UserError, match="not even one row"):
        largest_batch_size(config, shape, CPU, torch.float32)


def test_the_vocabulary_comes_from_the_name_of_the_tokenizer(tmp_path: Path) -> None:
    for spec, size in (("gpt2", 50257), ("bytes", 257), ("bpe:1024", 1024), (None, 50257)):
        assert model_shape(TrainConfig(tokenizer=spec, data=str(tmp_path / "none.txt"))).vocab_size == size
    assert model_shape(TrainConfig(init_from="gpt2-medium")).n_embd == 1024


SMALL = ["--n-layer", "4", "--n-embd", "32", "--n-head", "2", "--block-size", "16", "--dtype", "float32"]


def test_a_plan_for_here_in_json_and_no_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(
        [
            "quickstart",
            *SMALL,
            "--batch-size",
            "16",
            "--device",
            "cpu",
            "--tokens",
            "1M",
            "--price-per-hour",
            "2",
            "--json",
        ]
    )
    made = json.loads(capsys.readouterr().out)
    assert set(made) == {
        *("nodes", "parallel", "network", "ways"),
        *("device", "devices", "measured", "dtype", "compile", "parameters", "trainable", "vocab_size"),
        *("batch_size", "micro_batch_size", "recompute", "flops_per_token", "flops_per_step", "flops"),
        *("memory", "device_memory"),
        *("fits", "suggestion", "tokens_per_step", "steps", "tokens", "seconds_per_step", "seconds"),
        *("tokens_per_second", "matmul_rate", "utilization", "cost"),
    }
    assert set(made["memory"]) == {
        *("program", "weights", "gradients", "optimizer", "gathered", "casts", "activations", "logits"),
        *("working", "allocator", "snapshot", "step", "peak"),
    }
    assert made["measured"]
    assert made["steps"] == 3907  # of 16 * 16 tokens
    assert 0 < made["seconds_per_step"] * made["steps"] == pytest.approx(made["seconds"])
    assert 0 < made["utilization"] < 1.5
    assert made["cost"] == pytest.approx(made["seconds"] / 1800)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(["gpt2-124m", "--on", "h100", "--gpus", "8", "--tokens", "10B", "--price-per-hour", "24"])
    out = capsys.readouterr().out
    for words in ("124,439,808", "optimizer", "949.4 MiB", "8 devices", "estimate: 45% MFU", "fits", "cost"):
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
def test_what_cannot_be_planned_is_one_line(flags: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        main(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "number"), [("10B", 10**10), ("500M", 5 * 10**8), ("1e9", 10**9), ("2,000", 2000)])
def test_budgets_as_people_write_them(text: str, number: int) -> None:
    assert _parse_count(text) == number


@pytest.mark.parametrize(("share", "micro"), [(8, None), (8, 2), (1, 4)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_whole_copy_fits_to_the_byte(
    monkeypatch: pytest.MonkeyPatch, share: int, micro: int | None, ranks: int
) -> None:
    shape, config = GPTConfig(vocab_size=101, n_layer=3, n_head=4, n_embd=64), TrainConfig(micro_batch_size=micro)
    rows = min(share, micro or share)
    setup = StepSetup(rows=rows, micro_batches=share // rows, length=1024, buckets=ranks > 1)
    memory = training_memory(shape, setup)
    needed = ranks * memory.step + memory.peak - memory.step  # one of them saves
    for free, fits in ((needed / 0.9 + 2, True), (needed / 0.9 - 2, False)):
        monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device, free=free: int(free))
        assert fits_full_model(config, shape, CPU, torch.float32, share, ranks) is fits


def test_on_a_gpu_of_ones_own_other_ranks_take_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, gpu = OPENAI_CONFIGS["gpt2"], torch.device("cuda", 0)
    needed = training_memory(
        shape, StepSetup(rows=8, length=1024, dtype=torch.bfloat16, device="cuda", buckets=True)
    ).peak
    monkeypatch.setattr("gpt2.planning.plan.available_memory", lambda device: int(needed / 0.9) + 2)
    assert fits_full_model(TrainConfig(), shape, gpu, torch.bfloat16, 8, 8)
    assert not fits_full_model(TrainConfig(), shape, gpu, torch.bfloat16, 16, 8)


def test_ddps_buckets_are_there_from_the_start() -> None:
    setup = StepSetup(rows=16, length=1024, dtype=torch.bfloat16, device="cuda")
    alone = training_memory(OPENAI_CONFIGS["gpt2"], setup)
    assert training_memory(OPENAI_CONFIGS["gpt2"], replace(setup, buckets=True)).step == alone.step + alone.gradients
