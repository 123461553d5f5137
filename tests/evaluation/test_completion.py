"""HellaSwag in completion style beside its definition, written out with `transformers`."""

import gzip
import json
from typing import Any

import pytest
import torch

from gpt2.evaluation.choices import prepare_completion
from gpt2.evaluation.formats import hellaswag_completion
from gpt2.evaluation.scorer import score
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import Tokenizer
from tests.evaluation.task_rows import EVAL_DATA
from tests.helpers.transformers_reference import to_transformers

ROWS = [
    {"ctx": "the man went to", "endings": ["the market", "sea", "the dog sleeps", "a question"], "label": 0},
    {"ctx": "the river runs to the", "endings": ["sea is deep", "dog", "fox jumps", "sun the sun"], "label": 2},
]


def reference(reference_model: Any, tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """llm.c's definition: context and " " + ending tokenized apart, summed and mean loss of the ending."""
    context = tokenizer.encode(row["ctx"])
    sums, means = [], []
    for ending in row["endings"]:
        end = tokenizer.encode(" " + ending)
        tokens = torch.tensor([context + end])
        with torch.inference_mode():
            logits = reference_model(tokens).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")[-len(end) :]
        sums.append(float(losses.sum()))
        means.append(float(losses.mean()))
    return sums, means


def compare(model: GPT, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> None:
    reference_model = to_transformers(model)
    made = [hellaswag_completion((f"row {i}", row)) for i, row in enumerate(rows)]
    prepared = prepare_completion(made, tokenizer, model.config)
    found = {i: prepared.record(i, scored) for batch in score(model, prepared.groups) for i, scored in batch}
    for i, row in enumerate(rows):
        sums, means = reference(reference_model, tokenizer, row)
        acc, acc_norm, loss, *ours = found[i]
        assert acc == float(sums.index(min(sums)) == int(row["label"]))
        assert acc_norm == float(means.index(min(means)) == int(row["label"]))
        assert loss == pytest.approx(means[int(row["label"])], abs=1e-5)
        lengths = [len(tokenizer.encode(" " + ending)) for ending in row["endings"]]
        assert [a / n for a, n in zip(ours, lengths, strict=True)] == pytest.approx(means, abs=1e-5)


def test_small_rows(model: GPT, words: Tokenizer) -> None:
    compare(model, words, ROWS)


@pytest.mark.slow
def test_real_rows(gpt2_vocabulary: None) -> None:
    from gpt2.tokenizer import get_tokenizer

    path = EVAL_DATA / "hellaswag" / "hellaswag_val.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    torch.manual_seed(4)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=256)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(50), file, strict=False)]
    compare(model, get_tokenizer("gpt2"), rows)
