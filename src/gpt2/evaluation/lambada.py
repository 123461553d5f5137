"""LAMBADA: the last word of a passage (Paperno et al. 2016)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt2.errors import DataError
from gpt2.evaluation.encode import encode_pairs
from gpt2.evaluation.measures import Measured, Prepared, Record, exp_of, mean_and_stderr, means
from gpt2.evaluation.scorer import Scored, check_queries
from gpt2.model import GPTConfig
from gpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Passage:
    """A text whose last word, after its last space, is to be predicted; `where` names its row in the file."""

    text: str
    where: str


def prepare_lambada(rows: Sequence[Passage], tokenizer: Tokenizer, config: GPTConfig) -> Prepared:
    """acc, acc_last_token and perplexity.

    acc:            all tokens of the last word are the most likely ones (lm-evaluation-harness, lambada_openai).
    acc_last_token: the last token is, given all before it, those of the last word included (what OpenAI's script
                    counted, according to lm-evaluation-harness issue 350 and openai/gpt-2 issue 131).
    perplexity:     exp of the mean loss of the last word, in nats a word (harness).
    """
    pairs = []
    for row in rows:
        context, space, word = row.text.rpartition(" ")
        if not space or not word or not context.strip():
            raise DataError(
                f"{row.where}: the text has no last word: at least two words separated by a space are required"
            )
        pairs.append((context, f" {word}"))
    groups = [[query] for query in encode_pairs(tokenizer, pairs, config.block_size)]
    for row, group in zip(rows, groups, strict=True):
        check_queries(group, config, row.where)

    def record(index: int, scored: list[Scored]) -> Record:
        (one,) = scored
        return float(one.is_greedy), float(one.greedy[-1]), one.log_likelihood

    def summarize(records: Mapping[int, Record]) -> Measured:
        columns = list(zip(*records.values(), strict=True))
        found = means({"acc": columns[0], "acc_last_token": columns[1]})
        mean, stderr = mean_and_stderr(columns[2])
        found.metrics["perplexity"], found.stderr["perplexity"] = exp_of(-mean, stderr)
        return found

    return Prepared(groups, record, summarize, len(rows), [row.text for row in rows])
