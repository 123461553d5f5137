"""Our model behind the harness's interface gives what its hf model gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2.model import GPT
from gpt2.tokenizer import BPETokenizer
from gpt2.weights import save

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'plain-gpt2[eval]'")
pytestmark = pytest.mark.slow


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return [Instance(kind, {}, one, i, metadata=("task", i // 2, 1)) for i, one in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def both(model: GPT, words: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from gpt2.evaluation.harness import HarnessModel

    folder = save(model, words, tmp_path_factory.mktemp("adapter") / "model")
    hf = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return HarnessModel(str(folder)), hf


PAIRS = [
    ("the dog", " runs to the sea"),
    ("the dog", " sleeps"),
    ("", "the man"),
    ("the river ", "runs"),
    ("the quick brown fox " * 12, " jumps"),  # longer than the context: cut on the left
    ("é", "è dog"),
]


def test_loglikelihood(both: tuple[Any, Any]) -> None:
    ours, theirs = (one.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for one in both)
    for (a, greedy), (b, also) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert greedy == also


def test_rolling(both: tuple[Any, Any]) -> None:
    texts = [("the dog sleeps in the sun. " * 12,), ("t",), ("the sea",)]
    ours, theirs = (one.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for one in both)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_generate_until(both: tuple[Any, Any]) -> None:
    asked = [("the dog", {"until": ["sea"], "max_gen_toks": 12}), ("a question", {"until": "z", "max_gen_toks": 6})]
    ours, theirs = (one.generate_until(instances("generate_until", asked), disable_tqdm=True) for one in both)
    assert ours == theirs


def test_a_task_of_the_harness_through_the_command(
    model: GPT, words: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    from gpt2.evaluation.harness import run_harness

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": "the dog", "c": ["runs", "sleeps"], "g": i % 2}) + "\n" for i in range(6)))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {rows}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: c\ndoc_to_target: g\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: manager)
    torch.manual_seed(0)
    result = run_harness(["mine"], model, words, None)["lm-eval:mine"]
    assert result.metrics == {"acc": 0.5, "acc_norm": 0.5}
    assert result.rows == 6
    assert result.stderr["acc"] is not None
    assert result.protocol.startswith("lm-evaluation-harness 0.4")
