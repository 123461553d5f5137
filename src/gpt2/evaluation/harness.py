"""Adapter for lm-evaluation-harness: runs any of its tasks with our models.

gpt2 eval MODEL --lm-eval piqa,arc_easy
python -m gpt2.evaluation.harness --model gpt2-native --model_args model=MODEL --tasks piqa,arc_easy
"""

import sys
from collections.abc import Iterable
from typing import Any

from gpt2.errors import ConfigError, DataError, ModelFilesError, missing_extra
from gpt2.evaluation.encode import encode_pairs, rolling_queries
from gpt2.evaluation.evaluate import TaskResult
from gpt2.evaluation.prepare import fingerprint_of
from gpt2.evaluation.scorer import Scored, check_queries, score
from gpt2.evaluation.tree import Query
from gpt2.generation.engine import LanguageModel
from gpt2.tokenizer import Tokenizer

try:
    from lm_eval import __version__, simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
except ImportError:  # without the extra this module can be imported, and `_require_harness` raises
    __version__, simple_evaluate, LM = "", None, object

_Base: Any = LM
MAX_NEW_TOKENS = 256  # the default of the harness's hf model


class HarnessModel(_Base):
    """A `LM` of the harness: loglikelihood, loglikelihood_rolling, generate_until.

    model: a loaded model, with its tokenizer, or a MODEL for `gpt2.load`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        device: str = "cpu",
        batch_size: Any = None,
        max_batch_size: Any = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise ConfigError(f"model_args has no {next(iter(others))}: there are model and device", field="model_args")
        if isinstance(model, str):
            from gpt2.weights import load

            model, tokenizer = load(model, device=device)
        if tokenizer is None:
            raise ModelFilesError("this model folder has no tokenizer, which an evaluation requires")
        self.model: LanguageModel = model
        self.tokenizer = tokenizer

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives the continuation) of each (context, continuation).

        Consecutive requests of one document are scored together, so that their common prefix is computed once.
        """
        config = self.model.config
        queries = encode_pairs(self.tokenizer, [request.args for request in requests], config.block_size)
        groups: list[list[Query]] = []
        document: Any = None
        for i, (request, query) in enumerate(zip(requests, queries, strict=True)):
            check_queries([query], config, f"request {i}")
            place = (getattr(request, "task_name", None), getattr(request, "doc_id", None))
            if groups and place == document and None not in place:
                groups[-1].append(query)
            else:
                groups.append([query])
            document = place
        return [(one.log_likelihood, one.is_greedy) for group in self._score(groups) for one in group]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, every token once, the first after <|endoftext|>."""
        texts = [request.args[0] for request in requests]
        prefix, context = self.tokenizer.end_of_text, self.model.config.block_size
        windows = [list(rolling_queries(ids, prefix, context)) for ids in self.tokenizer.encode_batch(texts)]
        scored = iter(self._score([[query] for some in windows for query in some]))
        return [sum(next(scored)[0].log_likelihood for _ in some) for some in windows]

    def _score(self, groups: list[list[Query]]) -> list[list[Scored]]:
        found = dict(pair for batch in score(self.model, groups) for pair in batch)
        return [found[i] for i in range(len(groups))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to one of its stop strings."""
        return [self._generate(context, dict(settings)) for context, settings in (one.args for one in requests)]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        from gpt2.generation.text import generate

        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        count = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        size = self.model.config.block_size
        if count >= size:
            raise DataError(f"{count} new tokens do not fit the model's context of {size}")
        ids = self.tokenizer.encode(context)
        kept = context if len(ids) <= size - count else self.tokenizer.decode(ids[-(size - count) :])
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": float(settings.get("top_p") or 1.0)}
        sampling["top_k"] = int(settings.get("top_k") or 0)
        ends = [end for end in until if end]
        made: Any = self.model
        (text,) = generate(made, self.tokenizer, kept, max_new_tokens=count, stop=ends, seed=0, **sampling)
        return text[len(kept) :]


def _require_harness() -> None:
    """Raises UserError if lm-evaluation-harness is not installed."""
    if simple_evaluate is None:
        raise missing_extra("lm-eval", "eval", "lm-evaluation-harness")


def run_harness(
    names: list[str], model: LanguageModel, tokenizer: Tokenizer, limit: int | None
) -> dict[str, TaskResult]:
    """Tasks of the harness by its own names, run through our engine. Raises ConfigError for an unknown name."""
    _require_harness()
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(f"lm-evaluation-harness {__version__} has no task '{name}'", field="lm_eval")
    assert simple_evaluate is not None
    found: Any = simple_evaluate(
        HarnessModel(model, tokenizer), tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=1000
    )
    return {f"lm-eval:{task}": _result(task, found) for task in found["results"]}


def _result(task: str, found: dict[str, Any]) -> TaskResult:
    """A result of the harness as a TaskResult."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float | None] = {}
    for key, value in found["results"][task].items():
        name, _, rule = str(key).partition(",")
        if not isinstance(value, int | float) or isinstance(value, bool) or not rule:
            continue
        label = name if rule == "none" else f"{name},{rule}"
        if name.endswith("_stderr"):
            stderr[label.replace("_stderr", "", 1)] = float(value)
        else:
            metrics[label] = float(value)
    rows = (found.get("n-samples") or {}).get(task, {}).get("effective", 0)
    version = (found.get("versions") or {}).get(task)
    hashes = [sample.get("doc_hash") for sample in (found.get("samples") or {}).get(task, [])]
    protocol = f"lm-evaluation-harness {__version__}: {task}, version {version}"
    stderr = {name: stderr.get(name) for name in metrics}
    return TaskResult(metrics, stderr, rows, protocol, fingerprint_of(hashes))


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line of the harness, with the model `gpt2-native` registered."""
    _require_harness()
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

    register_model("gpt2-native")(HarnessModel)
    if arguments is not None:
        sys.argv[1:] = list(arguments)
    cli_evaluate()


if __name__ == "__main__":
    main()
