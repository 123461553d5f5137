"""Training settings: recipes, TOML files, aliases and invalid values."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2.config import TrainConfig, read_toml, run_name, to_toml, with_overrides
from gpt2.errors import ConfigError, UserError
from gpt2.train.recipes import RECIPES, load_recipe
from tests.helpers.cli_helpers import run_cli


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_sound_and_survive_toml(name: str, tmp_path: Path) -> None:
    config = load_recipe(name).check()
    (tmp_path / "r.toml").write_text(to_toml(config))
    assert load_recipe(str(tmp_path / "r.toml")) == config


def test_toml_keeps_any_text(tmp_path: Path) -> None:
    config = TrainConfig(sample_prompt='"quoted" \\ é 🙂\n\ttab', lr=1e-5, compile=False)
    (tmp_path / "r.toml").write_text(to_toml(config), encoding="utf-8")
    assert read_toml(tmp_path / "r.toml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "--lr must be over 0"),
        ({"lr": math.nan}, "--lr must be over 0"),
        ({"min_lr": 1.0}, "--min-lr must be between 0 and --lr"),
        ({"warmup_steps": 2000}, "--warmup-steps (2000) is more than --max-steps (1000)"),
        ({"batch_size": 8, "micro_batch_size": 3}, "--batch-size (8) must be a multiple"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"optimizer": "adamx"}, "--optimizer 'adamx' is not one of adamw, muon, sgd (did you mean 'adamw'?)"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"dropout": 1.5}, "--dropout must be in [0, 1)"),
        ({"n_head": 5}, "--n-embd (768) must be a multiple of --n-head (5)"),
        ({"seed": 2**63}, "--seed must be below 2**63"),
        ({"data": "\udcff.txt"}, "--data is not UTF-8 text"),
        ({"weight_decay": math.nan}, "--weight-decay must be at least 0"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints must be at least 1"),
    ],
)
def test_invalid_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        replace(TrainConfig(), **values).check()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1.0", "there is no setting 'learning_rate'"),
        ("batchsize = 1", "did you mean 'batch_size'?"),
        ('lr = "fast"', "lr cannot be 'fast'"),
        ("max_steps = true", "max_steps cannot be True"),
        ("max_steps = ", "cannot be read as TOML"),
    ],
)
def test_bad_toml(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(tmp_path / "bad.toml"))
    assert message in str(error.value)


def test_run_names(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert run_name(out, "quick", resume=False) == run_name(out, "quick", resume=True) == "quick"
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick-2").mkdir()
    assert run_name(out, "quick", resume=False) == "quick-3"
    assert run_name(out, "quick", resume=True) == "quick-2"


def test_with_overrides_accepts_an_integer_for_a_float() -> None:
    assert with_overrides(TrainConfig(), {"lr": 1, "min_lr": 0}, "here").lr == 1.0
    with pytest.raises(UserError, match=r"here: max_steps cannot be 1\.5"):
        with_overrides(TrainConfig(), {"max_steps": 1.5}, "here")


def test_the_older_name_of_activation_checkpointing_is_still_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.toml of an older run folder, and the older flag."""
    (tmp_path / "config.toml").write_text('name = "old"\nrecompute = true\n')
    assert read_toml(tmp_path / "config.toml") == TrainConfig(name="old", activation_checkpointing=True)
    assert "\nactivation_checkpointing = true\n" in to_toml(read_toml(tmp_path / "config.toml"))
    for flags in (
        ["--recompute"],
        ["--activation-checkpointing"],
        ["--no-recompute"],
        ["--no_activation_checkpointing"],
    ):
        code, out, _ = run_cli(capsys, "train", *flags, "--print-config")
        assert code == 0
        expected = "false" if flags[0].startswith("--no") else "true"
        assert f"\nactivation_checkpointing = {expected}\n" in out


def test_errors_name_the_setting() -> None:
    with pytest.raises(ConfigError) as error:
        replace(TrainConfig(), min_lr=1.0).check()
    assert (error.value.field, error.value.code) == ("min_lr", "invalid_config")
