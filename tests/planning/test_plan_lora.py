"""The plan of a run that learns in part: adapters, or all but the first blocks."""

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


def passes(made: Plan) -> float:
    """Seconds of a planned step without its update, which takes 40 bytes of memory for each number that learns."""
    return made.seconds_per_step - 40 * made.trainable / (0.8 * get_accelerator(made.device).bandwidth)


def test_adapters_of_the_largest_gpt2_fit_where_all_of_it_does_not() -> None:
    config = replace(TrainConfig(), init_from="gpt2-xl", batch_size=4, micro_batch_size=1)
    whole = plan(config, on="l4")
    made = plan(replace(config, lora_rank=8), on="l4")
    assert (whole.fits, made.fits) == (False, True)
    assert whole.trainable == whole.parameters == made.parameters == 1_557_611_200
    assert made.trainable == 48 * 8 * (4 * 1600 + 2 * 1600 + 2 * 5 * 1600) == made.memory.gradients / 4
    assert made.memory.optimizer == 2 * made.memory.gradients
    assert made.memory.weights == 4 * (made.parameters + made.trainable)  # the base is all there, in float32
    assert made.memory.activations > whole.memory.activations  # A's results are kept too
    assert 2 / 3 < made.flops_per_token / whole.flops_per_token < 0.71  # attention has no weights to freeze
    assert passes(made) / passes(whole) == pytest.approx(made.flops / whole.flops)


def test_adapters_of_the_smallest_gpt2_are_learned_in_two_gigabytes() -> None:
    setup = StepSetup(rows=1, length=1024, lora=LoRAConfig(rank=8))
    program = 350 * 2**20  # of Python and torch, about
    assert training_memory(OPENAI_CONFIGS["gpt2"], setup, program).peak < 2 * 10**9
    assert training_memory(OPENAI_CONFIGS["gpt2"], replace(setup, lora=None), program).step > 3 * 10**9


def test_computing_again_costs_another_forward_pass() -> None:
    config = replace(load_recipe("gpt2-124m"), micro_batch_size=8, recompute=True)
    made, once = plan(config, on="h100"), plan(replace(config, recompute=False), on="h100")
    assert passes(made) == pytest.approx(4 / 3 * passes(once))
    tuned = replace(config, init_from="gpt2", lora_rank=8)
    made, once = plan(tuned, on="h100"), plan(replace(tuned, recompute=False), on="h100")
    assert made.seconds_per_step == pytest.approx(3 / 2 * once.seconds_per_step, rel=0.05)


@pytest.mark.parametrize("tuned", [{"lora_rank": 4}, {"freeze": 2}, {"freeze": 5}])
def test_a_step_of_what_learns_in_part_is_measured_here(tmp_path: Path, tuned: dict[str, int]) -> None:
    shape = GPTConfig(vocab_size=257, block_size=16, n_layer=5, n_head=2, n_embd=32)
    save(GPT(shape), get_tokenizer("bytes"), tmp_path / "base")
    made = plan(replace(TrainConfig(), init_from=str(tmp_path / "base"), dtype="float32", device="cpu", **tuned))
    assert made.measured
    assert 0 < made.seconds_per_step < 60
    assert made.trainable < made.parameters


def test_a_plan_says_what_learns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_cannot_learn_is_one_line(flags: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        main(["finetune", "--init-from", "gpt2", *flags, "--on", "h100"])
