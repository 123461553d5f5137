"""Multiple choice: which of several texts the model finds most likely."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from gpt2.evaluation.encode import Pair, encode_pairs, encode_separately
from gpt2.evaluation.measures import Measured, Prepared, Record, means
from gpt2.evaluation.scorer import Scored, check_queries
from gpt2.evaluation.tree import Query
from gpt2.model import GPTConfig
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choices:
    """One row: K pairs of context and continuation, of which `gold` is right.

    contexts, continuations: K texts each; a continuation begins with its delimiter.
    sizes: by how much each log-likelihood is divided for acc_norm: characters of the choice, as the harness counts.
    where: the name of the row, for messages.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    sizes: tuple[int, ...]
    where: str


def prepare_choices(
    rows: Sequence[Choices], tokenizer: Tokenizer, config: GPTConfig, *, normalized: bool = True
) -> Prepared:
    """acc, and with `normalized` acc_norm, as lm-evaluation-harness 0.4 computes them for multiple choice."""

    def record(index: int, scored: list[Scored]) -> Record:
        row, totals = rows[index], np.array([one.log_likelihood for one in scored])
        best, best_normalized = int(np.argmax(totals)), int(np.argmax(totals / np.maximum(row.sizes, 1)))
        return (float(best == row.gold), float(best_normalized == row.gold), *totals)

    def summarize(records: Mapping[int, Record]) -> Measured:
        return _means(records, ("acc", "acc_norm")[: 2 if normalized else 1])

    return _prepared(rows, encode_pairs, tokenizer, config, record, summarize)


def prepare_completion(rows: Sequence[Choices], tokenizer: Tokenizer, config: GPTConfig) -> Prepared:
    """As llm.c and build-nanogpt score HellaSwag: the smallest loss over the tokens of an ending.

    Context and ending are tokenized apart. acc takes the smallest sum, acc_norm the smallest mean; loss is the mean
    of the right endings' mean losses, in nats.
    """

    def record(index: int, scored: list[Scored]) -> Record:
        gold, sums = rows[index].gold, np.array([-one.log_likelihood for one in scored])
        mean_losses = sums / [len(one.logprobs) for one in scored]
        best, best_mean = int(np.argmin(sums)), int(np.argmin(mean_losses))
        return (float(best == gold), float(best_mean == gold), float(mean_losses[gold]), *sums)

    def summarize(records: Mapping[int, Record]) -> Measured:
        return _means(records, ("acc", "acc_norm", "loss"))

    return _prepared(rows, encode_separately, tokenizer, config, record, summarize)


def _means(records: Mapping[int, Record], names: Sequence[str]) -> Measured:
    """The means of the first numbers of all records."""
    return means({name: [one[i] for one in records.values()] for i, name in enumerate(names)})


def _prepared(
    rows: Sequence[Choices],
    encode: Callable[[Tokenizer, Sequence[Pair], int], list[Query]],
    tokenizer: Tokenizer,
    config: GPTConfig,
    record: Callable[[int, list[Scored]], Record],
    summarize: Callable[[Mapping[int, Record]], Measured],
) -> Prepared:
    """The rows as groups of queries. Raises DataError for a row that does not fit the model's context."""
    pairs = [pair for row in rows for pair in zip(row.contexts, row.continuations, strict=True)]
    queries = iter(encode(tokenizer, pairs, config.block_size))
    groups = [[next(queries) for _ in row.contexts] for row in rows]
    for row, group in zip(rows, groups, strict=True):
        check_queries(group, config, row.where)
    content = [{name: value for name, value in asdict(row).items() if name != "where"} for row in rows]
    return Prepared(groups, record, summarize, len(rows), content)
