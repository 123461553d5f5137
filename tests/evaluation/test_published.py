"""Published values: the package's file is whole, and a check tells a right value from a wrong one."""

import json
from typing import Any

import pytest
import torch

from gpt2.evaluation import published as module
from gpt2.evaluation.evaluate import TaskResult
from gpt2.evaluation.published import openai_size, published, published_scores, run_checks
from gpt2.evaluation.report import ModelReport, checks_table, table, to_json
from gpt2.evaluation.tasks import TASKS
from gpt2.model import GPT, OPENAI_CONFIGS, GPTConfig
from gpt2.tokenizer import BPETokenizer
from tests.evaluation.task_rows import EVAL_DATA


def test_the_data_file_fits_the_tasks() -> None:
    for entry in published()["scores"]:
        assert entry["task"] in TASKS
        assert entry["values"].keys() <= OPENAI_CONFIGS.keys()
        assert entry["protocol"]
        assert entry["source"]
    for check in published()["checks"]:
        assert check["model"] in OPENAI_CONFIGS
        assert check["kind"] in module._KINDS
        assert check["source"]
    assert {check["model"] for check in published()["checks"]} == OPENAI_CONFIGS.keys()


def test_the_logits_are_those_that_were_collected() -> None:
    path = EVAL_DATA / "openai-gpt2" / "expected_logits.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    collected: dict[str, Any] = json.loads(path.read_text())
    known = [check["expected"] for check in published()["checks"] if check["kind"] == "logits"]
    for name, part in collected.items():
        rows = part if isinstance(part, list) else []
        if isinstance(part, dict) and name.startswith("flaxmodels"):
            rows = [row for model in part.values() for row in model["rows"]]
        assert all(row["last_position_logits"] in known for row in rows)


def test_a_size_is_known_by_its_shape() -> None:
    assert openai_size(GPTConfig(dropout=0.1)) == "gpt2"
    assert openai_size(GPTConfig(n_inner=3072)) == "gpt2"
    assert openai_size(OPENAI_CONFIGS["gpt2-xl"]) == "gpt2-xl"
    assert openai_size(GPTConfig(n_layer=2)) is None


def test_published_scores_follow_the_stride() -> None:
    assert [value for value, _ in published_scores("gpt2", "wikitext2", "token_perplexity")] == [29.94]
    assert [value for value, _ in published_scores("gpt2", "wikitext2", "token_perplexity", 512)] == [25.17]
    assert published_scores(None, "lambada", "acc") == []
    values = [published_scores(size, "lambada", "acc_last_token")[0][0] for size in OPENAI_CONFIGS]
    assert values == [0.4599, 0.5548, 0.6012, 0.6324]


@pytest.fixture
def checks(model: GPT, words: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One check of each kind with what this model gives, written out here."""
    ids = words.encode("the dog runs")
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0]
        after_end = model(torch.tensor([[words.end_of_text, *ids[:-1]]]))[0].log_softmax(-1)
        greedy = list(ids)
        for _ in range(4):
            greedy.append(int(model(torch.tensor([greedy]))[0, -1].argmax()))
    labels = [1, 2, 3, *range(4, 4 + len(ids) - 3)]
    nll = -float(after_end.gather(1, torch.tensor(ids)[:, None]).sum())
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]))
    more = words.encode(" to")
    with torch.inference_mode():
        both = model(torch.tensor([[*ids, *more]]))[0].log_softmax(-1)
    pair = float(sum(both[len(ids) - 1 + i, token] for i, token in enumerate(more)))
    common = {"model": "gpt2", "source": "here"}
    made = [
        {"kind": "tokens", "text": "the dog runs", "expected": ids},
        {"kind": "logits", "tokens": ids, "expected": {"3": float(logits[-1, 3])}, "tolerance": 1e-3},
        {"kind": "argmax", "text": "the dog runs", "expected": logits.argmax(-1).tolist()},
        {"kind": "loss", "tokens": [ids], "labels": [labels], "expected": float(loss), "tolerance": 1e-3},
        {
            "kind": "loglikelihood",
            "context": "the dog runs",
            "continuation": " to",
            "expected": pair,
            "tolerance": 1e-3,
        },
        {"kind": "rolling", "text": "the dog runs", "expected": nll, "tolerance": 1e-3},
        {"kind": "rolling", "text": "the dog runs", "expected": nll / len(ids), "mean": True, "tolerance": 1e-3},
        {"kind": "greedy", "tokens": ids, "expected": greedy[len(ids) :]},
    ]
    found = [{"name": f"{i} {check['kind']}", **common, **check} for i, check in enumerate(made)]
    monkeypatch.setattr(module, "published", lambda: {"scores": [], "checks": found})
    monkeypatch.setattr(module, "openai_size", lambda config: "gpt2")
    return found


def test_right_values_pass(model: GPT, words: BPETokenizer, checks: list[dict[str, Any]]) -> None:
    assert [check.name for check in run_checks(model, words) if not check.passed] == []


def test_other_weights_fail(model: GPT, words: BPETokenizer, checks: list[dict[str, Any]]) -> None:
    torch.manual_seed(9)
    other = GPT(model.config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    found = list(run_checks(other, words))
    assert [check.kind for check in found if check.passed] == ["tokens"]
    told = checks_table(ModelReport("other", "gpt2", checks=found))
    assert told.splitlines()[-1] == f"other: 1 of {len(found)} published values agree"
    assert told.count("FAIL") == len(found) - 1


def test_the_table_lays_published_values_beside() -> None:
    result = TaskResult({"acc": 0.33, "perplexity": 40.0}, {"acc": 0.01, "perplexity": None}, 100, "p", "f" * 64)
    told = table([ModelReport("gpt2", "gpt2", {"lambada": result})])
    assert "0.3300 ± 0.0100" in told
    assert "0.3256 (lm-evaluation-harness lambada_openai)" in told
    assert "35.13 (GPT-2 paper, table 3)" in told


def test_infinite_numbers_are_null_in_json() -> None:
    result = TaskResult({"perplexity": float("inf")}, {"perplexity": None}, 1, "p", "f")
    report = ModelReport("m", None, {"lambada": result})
    assert to_json([report])["results"]["lambada"]["metrics"] == {"perplexity": None}
