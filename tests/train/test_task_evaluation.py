"""Evaluation on tasks during training: when it runs, that it changes nothing else, and its errors at the start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gpt2
from gpt2.config import TrainConfig, config_for_resume, read_toml, to_toml
from gpt2.errors import ConfigError, UserError
from gpt2.evaluation.evaluate import evaluate_tasks
from gpt2.evaluation.published import reference_scores
from gpt2.evaluation.training import TrainingEvaluator
from gpt2.reporting.metrics import read_metrics, without_timings
from gpt2.train.recipes import RECIPES
from gpt2.train.trainer import train
from tests.helpers.cli_helpers import run_cli
from tests.helpers.task_files import write_hellaswag
from tests.helpers.training_helpers import fixed_seed_sampler

KEY = "eval/hellaswag/acc_norm"


@pytest.fixture
def tasks(tiny: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A run with HellaSwag rows every 10 steps."""
    file = write_hellaswag(tmp_path / "rows.jsonl")
    return replace(tiny, eval_tasks="hellaswag", eval_tasks_every=10, eval_tasks_data=f"hellaswag={file}")


def run(config: TrainConfig) -> Path:
    return train(config, fixed_seed_sampler, evaluator=TrainingEvaluator(config))


def evaluated(folder: Path) -> dict[int, float]:
    return {r["step"]: r[KEY] for r in read_metrics(folder / "metrics.jsonl") if KEY in r}


def test_metrics_equal_those_of_the_published_model(tasks: TrainConfig, tmp_path: Path) -> None:
    config = replace(tasks, max_steps=25, eval_tasks_limit=20)
    folder = run(config)
    assert list(evaluated(folder)) == [10, 20, 25]
    model, tokenizer = gpt2.load(folder)
    assert tokenizer is not None
    files = {"hellaswag": str(tmp_path / "rows.jsonl")}
    result = evaluate_tasks(model, tokenizer, ["hellaswag"], 20, task_data=files)["hellaswag"]
    last = read_metrics(folder / "metrics.jsonl")[-1]
    for metric, value in result.metrics.items():
        assert last[f"eval/hellaswag/{metric}"] == value
        assert last[f"eval/hellaswag/{metric}_stderr"] == result.stderr[metric]
    assert last["eval_tasks_seconds"] > 0
    report = (folder / "report.md").read_text()
    assert f"| hellaswag | acc_norm | {result.metrics['acc_norm']:.4f} ±" in report
    assert "gpt2 0.3114, gpt2-xl 0.5089" in report


def test_training_is_the_same_with_and_without_tasks(tasks: TrainConfig) -> None:
    tasks = replace(tasks, dropout=0.2)
    plain = run(replace(tasks, name="plain", eval_tasks=None, eval_tasks_data=None))
    folder = run(tasks)
    for name in ("model/model.safetensors", "checkpoints/step-30/optimizer.safetensors"):
        assert (plain / name).read_bytes() == (folder / name).read_bytes()
    assert (plain / "samples.txt").exists() == (folder / "samples.txt").exists()


def test_resumed_equals_uninterrupted(tasks: TrainConfig) -> None:
    tasks = replace(tasks, dropout=0.2, sample_tokens=5, activation_checkpointing=True)
    whole = run(tasks)
    parts = run(replace(tasks, name="parts", keep_checkpoints=9))
    for later in ("step-30", "step-20"):
        (parts / "checkpoints" / later).rename(parts / later)
    assert run(config_for_resume(parts, {})) == parts
    records = [without_timings(read_metrics(folder / "metrics.jsonl")) for folder in (whole, parts)]
    assert records[0] == records[1]
    assert set(evaluated(parts)) == {10, 20, 30}
    assert (whole / "samples.txt").read_bytes() == (parts / "samples.txt").read_bytes()
    for name in ("model/model.safetensors", "checkpoints/step-30/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_evaluation_keeps_mode_and_random_state(tasks: TrainConfig, tmp_path: Path) -> None:
    from gpt2.distributed.process_group import SINGLE_PROCESS

    folder = train(replace(tasks, max_steps=10))
    model, tokenizer = gpt2.load(folder)
    assert tokenizer is not None
    evaluator = TrainingEvaluator(tasks)
    evaluator.prepare(model.train(), tokenizer)
    before = torch.get_rng_state()
    evaluator.evaluate(model, SINGLE_PROCESS)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_missing_data_fails_at_the_start(
    tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tmp_path / "run.toml"
    config.write_text(to_toml(replace(tiny, eval_tasks="hellaswag")))
    code, _, err = run_cli(capsys, "train", str(config), "--out-dir", str(tmp_path / "none"))
    assert (code, err.count("\n")) == (2, 1), err
    assert "hellaswag.parquet" in err
    assert not (tmp_path / "none").exists()
    more = ("--eval-tasks", "none", "--max-steps", "5")
    code, out, err = run_cli(capsys, "train", str(config), "--out-dir", str(tmp_path / "runs"), *more)
    assert code == 0, err
    assert read_toml(Path(out.strip()) / "config.toml").eval_tasks is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_tasks": "hellaswg"}, "there is no task 'hellaswg' .did you mean 'hellaswag'"),
        ({"eval_tasks": "lambada"}, "--eval-tasks has no such task"),
        ({"eval_tasks_data": "hellaswag"}, "must be TASK=FILE"),
        ({"eval_tasks_data": "hellaswag=/nowhere/rows"}, "there is no file /nowhere/rows"),
    ],
)
def test_invalid_settings(tasks: TrainConfig, changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingEvaluator(replace(tasks, **changes))
    with pytest.raises(ConfigError, match="--eval-tasks-every must be at least 0"):
        replace(tasks, eval_tasks_every=-1).check()


def test_a_context_too_small_fails_before_the_first_step(tasks: TrainConfig) -> None:
    config = replace(tasks, name="small", block_size=4)
    with pytest.raises(UserError, match="do not fit the model's context of 4"):
        run(config)
    assert not (Path(config.out_dir) / "small" / "metrics.jsonl").exists()


def test_finetune_takes_the_flags(tasks: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = train(replace(tasks, name="base", max_steps=5))
    flags = ["--data", tasks.data, "--max-steps", "4", "--warmup-steps", "1", "--eval-tasks", "hellaswag"]
    flags += ["--eval-tasks-every", "2", "--eval-tasks-data", str(tasks.eval_tasks_data), "--lora-rank", "2"]
    flags += ["--device", "cpu", "--dtype", "float32", "--out-dir", str(tmp_path / "tuned"), "--sample-tokens", "0"]
    code, out, err = run_cli(capsys, "finetune", str(base), *flags)
    assert code == 0, err
    assert list(evaluated(Path(out.strip()))) == [2, 4]
    assert "step 2  hellaswag acc_norm 0." in err


def test_the_reproduction_evaluates_hellaswag() -> None:
    recipe = RECIPES["gpt2-124m"]
    assert (recipe.eval_tasks, recipe.eval_tasks_every, recipe.eval_tasks_limit) == ("hellaswag", 250, 0)


def test_references_belong_to_the_protocol_of_the_task() -> None:
    scores = reference_scores(["hellaswag", "hellaswag-completion", "wikitext2", "lambada"])
    assert scores["hellaswag", "acc_norm"] == {"gpt2": 0.3114, "gpt2-xl": 0.5089}
    assert len(scores["hellaswag-completion", "acc_norm"]) == 4
    assert scores["lambada", "perplexity"]["gpt2"] == 40.0554
    assert scores["wikitext2", "word_perplexity"] == {"gpt2": 37.37}
    assert scores["wikitext2", "token_perplexity"]["gpt2"] == 29.94
