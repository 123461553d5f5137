"""Values published for OpenAI's four models: benchmark scores, and checks of the weights."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import torch

from gpt2.errors import ConfigError
from gpt2.evaluation.encode import encode_separately, rolling_queries
from gpt2.evaluation.scorer import score
from gpt2.evaluation.tree import Query
from gpt2.generation.engine import LanguageModel, eval_mode
from gpt2.model import OPENAI_CONFIGS, GPTConfig
from gpt2.tokenizer import Tokenizer


@cache
def published() -> dict[str, list[dict[str, Any]]]:
    """The data file of this package: "scores" by task and metric, and "checks" of single values."""
    return json.loads(resources.files("gpt2.evaluation").joinpath("published.json").read_text(encoding="utf-8"))


def openai_size(config: GPTConfig) -> str | None:
    """The name of OpenAI's model of this shape, or None."""
    plain = replace(
        config, dropout=0.0, attention="sdpa", n_inner=None if config.n_inner == 4 * config.n_embd else config.n_inner
    )
    return next((name for name, shape in OPENAI_CONFIGS.items() if plain == shape), None)


def published_scores(size: str | None, task: str, metric: str, stride: int | None = None) -> list[tuple[float, str]]:
    """(value, protocol) of the published values for one of OpenAI's models; empty for other models.

    stride: of the windows; values with another stride are excluded.
    """
    return [
        (entry["values"][size], entry["protocol"])
        for entry in published()["scores"]
        if (entry["task"], entry["metric"]) == (task, metric)
        and size in entry["values"]
        and entry.get("stride", stride or 1024) == (stride or 1024)
    ]


def reference_scores(tasks: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """By (task, metric): the values of OpenAI's models in one protocol, by the name of the model.

    Of several protocols the last in the data file is taken, which is the one that the task follows.
    """
    return {
        (entry["task"], entry["metric"]): entry["values"]
        for entry in published()["scores"]
        if entry["task"] in tasks and entry.get("stride", 1024) == 1024
    }


@dataclass(frozen=True)
class Check:
    """One published value and the value of this model.

    difference: the largest absolute difference of numbers; None for tokens and texts, which must be equal.
    """

    name: str
    kind: str
    expected: Any
    got: Any
    difference: float | None
    tolerance: float | None
    passed: bool
    source: str


def run_checks(model: LanguageModel, tokenizer: Tokenizer) -> Iterator[Check]:
    """Check every published value for a model of this shape.

    Raises ConfigError if the model has none of OpenAI's four shapes.
    """
    size = openai_size(model.config)
    if size is None:
        sizes = ", ".join(OPENAI_CONFIGS)
        raise ConfigError(f"published values exist for {sizes}: this model has another shape", field="tasks")
    for check in published()["checks"]:
        if check["model"] == size:
            yield _run(check, model, tokenizer)


def _run(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> Check:
    kind, expected, tolerance = check["kind"], check["expected"], check.get("tolerance")
    got = _KINDS[kind](check, model, tokenizer)
    difference = None
    if kind == "logits":
        difference = max(abs(expected[i] - got[i]) for i in expected)
    elif tolerance is not None:
        difference = abs(expected - got)
    passed = expected == got if difference is None else difference <= tolerance
    return Check(check["name"], kind, expected, got, difference, tolerance, passed, check["source"])


def _ids(check: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    return check["tokens"] if "tokens" in check else tokenizer.encode(check["text"])


@torch.inference_mode()
def _logits_of(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> torch.Tensor:
    """Logits (T, V) at every position."""
    with eval_mode(model):
        tokens = torch.tensor([_ids(check, tokenizer)], device=model.device)
        return model.lm_head(model.hidden_states(tokens))[0].float().cpu()


def _tokens(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(check["text"])


def _logits(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> dict[str, float]:
    last = _logits_of(check, model, tokenizer)[-1]
    return {i: float(last[int(i)]) for i in check["expected"]}


def _argmax(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> list[int]:
    return _logits_of(check, model, tokenizer).argmax(-1).tolist()


def _loss(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> float:
    """The mean over all rows of -log p(label) at the position before it."""
    losses = []
    for tokens, labels in zip(check["tokens"], check["labels"], strict=True):
        logits = _logits_of({"tokens": tokens}, model, tokenizer)[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none"))
    return float(torch.cat(losses).mean())


def _total(queries: list[Query], model: LanguageModel) -> float:
    return sum(one[0].log_likelihood for batch in score(model, [[query] for query in queries]) for _, one in batch)


def _loglikelihood(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> float:
    pair = (check["context"], check["continuation"])
    return _total(encode_separately(tokenizer, [pair], model.config.block_size), model)


def _rolling(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> float:
    """Minus the log-likelihood of a text after <|endoftext|>, or the mean over its tokens."""
    ids = tokenizer.encode(check["text"])
    windows = list(rolling_queries(ids, tokenizer.end_of_text, check.get("context", model.config.block_size)))
    total = -_total(windows, model)
    return total / len(ids) if check.get("mean") else total


@torch.inference_mode()
def _greedy(check: Mapping[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> list[int] | str:
    """The greedy continuation, with as many tokens as are expected."""
    ids, expected = _ids(check, tokenizer), check["expected"]
    count = len(tokenizer.encode(expected)) if isinstance(expected, str) else len(expected)
    cache = model.make_cache(1, len(ids) + count)
    new: list[int] = []
    with eval_mode(model):
        tokens = ids
        for _ in range(count):
            hidden = model.hidden_states(torch.tensor([tokens], device=model.device), cache)
            tokens = [int(model.lm_head(hidden[:, -1]).argmax(-1))]
            new += tokens
    return tokenizer.decode(new) if isinstance(expected, str) else new


_KINDS = {
    "tokens": _tokens,
    "logits": _logits,
    "argmax": _argmax,
    "loss": _loss,
    "loglikelihood": _loglikelihood,
    "rolling": _rolling,
    "greedy": _greedy,
}
