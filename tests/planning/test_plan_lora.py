"""`gpt2 plan` of partial training: LoRA, and frozen first blocks."""

from dataclasses import replace
from pathlib import Path

import pytest

from gpt2.commands.plan import main
from gpt2.config import TrainConfig
from gpt2.errors import UserError
from gpt2.hardware import get_accelerator
from gpt2.lora import LoRAConfig
from gpt2.model import GPT, OPENAI_CONFIGS, GPTConfig
from gpt2.planning.costs import StepSetup, training_memory
from gpt2.planning.plan import Plan, plan
from gpt2.tokenizer import get_tokenizer
from gpt2.train.recipes import load_recipe
from gpt2.weights import save


def passes(result: Plan) -> float:
    """Seconds of a planned step without its update: 40 bytes of memory traffic per trainable parameter."""
    return result.seconds_per_step - 40 * result.trainable / (0.8 * get_accelerator(result.device).bandwidth)


def test_lora_of_gpt2_xl_fits_where_full_training_does_not() -> None:
    config = replace(TrainConfig(), init_from="gpt2-xl", batch_size=4, micro_batch_size=1)
    whole = plan(config, on="l4")
    result = plan(replace(config, lora_rank=8), on="l4")
    assert (whole.fits, result.fits) == (False, True)
    assert whole.trainable == whole.parameters == result.parameters == 1_557_611_200
    assert result.trainable == 48 * 8 * (4 * 1600 + 2 * 1600 + 2 * 5 * 1600) == result.memory.gradients / 4
    assert result.memory.optimizer == 2 * result.memory.gradients
    assert result.memory.weights == 4 * (result.parameters + result.trainable)  # the base is kept in float32
    assert result.memory.activations > whole.memory.activations  # the outputs of lora_A are saved too
    assert 2 / 3 < result.flops_per_token / whole.flops_per_token < 0.71  # attention has no weights to freeze
    assert passes(result) / passes(whole) == pytest.approx(result.flops / whole.flops)


def test_lora_of_gpt2_fits_in_two_gigabytes() -> None:
    setup = StepSetup(rows=1, length=1024, lora=LoRAConfig(rank=8))
    program = 350 * 2**20  # of Python and torch, about
    assert training_memory(OPENAI_CONFIGS["gpt2"], setup, program).peak < 2 * 10**9
    assert training_memory(OPENAI_CONFIGS["gpt2"], replace(setup, lora=None), program).step > 3 * 10**9


def test_activation_checkpointing_costs_another_forward_pass() -> None:
    config = replace(load_recipe("gpt2-124m"), micro_batch_size=8, activation_checkpointing=True)
    result, once = plan(config, on="h100"), plan(replace(config, activation_checkpointing=False), on="h100")
    assert passes(result) == pytest.approx(4 / 3 * passes(once))
    changes = replace(config, init_from="gpt2", lora_rank=8)
    result, once = plan(changes, on="h100"), plan(replace(changes, activation_checkpointing=False), on="h100")
    assert result.seconds_per_step == pytest.approx(3 / 2 * once.seconds_per_step, rel=0.05)


@pytest.mark.parametrize("changes", [{"lora_rank": 4}, {"freeze": 2}, {"freeze": 5}])
def test_partial_training_is_measured_locally(tmp_path: Path, changes: dict[str, int]) -> None:
    shape = GPTConfig(vocab_size=257, block_size=16, n_layer=5, n_head=2, n_embd=32)
    save(GPT(shape), get_tokenizer("bytes"), tmp_path / "base")
    result = plan(replace(TrainConfig(), init_from=str(tmp_path / "base"), dtype="float32", device="cpu", **changes))
    assert result.measured
    assert 0 < result.seconds_per_step < 60
    assert result.trainable < result.parameters


def test_plan_prints_trainable_parameters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(["finetune", "--init-from", "gpt2-xl", "--lora-rank", "8", "--data", "x", "--on", "a100"])
    out = capsys.readouterr().out
    for words in ("1,557,611,200", "9,830,400", "0.63% of them", "4 per frozen matrix weight", "37.5 MiB"):
        assert words in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--lora-rank", "8", "--lora-targets", "c_atn"], r"no 'c_atn' for an adapter \(did you mean 'c_attn'\?\)"),
        (["--freeze", "13"], "--freeze 13 is more than the model's 12 blocks"),
    ],
)
def test_invalid_lora_target_or_freeze_raises(flags: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        main(["finetune", "--init-from", "gpt2", *flags, "--on", "h100"])
