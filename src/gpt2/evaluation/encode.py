"""Text to queries, as lm-evaluation-harness 0.4.13 does it for decoder-only models."""

from collections.abc import Iterator, Sequence

from gpt2.evaluation.tree import Query
from gpt2.tokenizer import Tokenizer

Pair = tuple[str, str]
"""A context and its continuation."""


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], context: int) -> list[Query]:
    """Each context and continuation as a query for a model with a context of so many tokens.

    Whitespace at the end of the context moves to the continuation; both are tokenized together and split where the
    context's own tokens end; an empty context becomes <|endoftext|>; what is too long loses tokens on the left.
    A continuation without tokens of its own gives a query that scores nothing: see `check_queries`.
    """
    moved = [_move_spaces(*pair) for pair in pairs]
    texts = list(dict.fromkeys([text for before, after in moved for text in (before, before + after)]))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    queries = []
    for (before, after), (given, _) in zip(moved, pairs, strict=True):
        start = ids[before] if given else [tokenizer.end_of_text]
        rest = ids[before + after][len(start) if given else 0 :]
        if not start:  # a context of nothing but spaces
            start = [tokenizer.end_of_text]
        queries.append(Query((start + rest)[-(context + 1) :], len(rest)))
    return queries


def encode_separately(tokenizer: Tokenizer, pairs: Sequence[Pair], context: int) -> list[Query]:
    """The same with context and continuation tokenized apart, as llm.c and build-nanogpt do."""
    befores, afters = (tokenizer.encode_batch([pair[i] for pair in pairs]) for i in (0, 1))
    return [
        Query(((before or [tokenizer.end_of_text]) + after)[-(context + 1) :], len(after))
        for before, after in zip(befores, afters, strict=True)
    ]


def rolling_queries(tokens: Sequence[int], prefix: int, context: int, stride: int | None = None) -> Iterator[Query]:
    """Windows over a document in which every token is scored exactly once, the first one after `prefix`.

    context: tokens that the model sees. stride: how many tokens a window scores after the first window, which scores
    `context`; None for `context`, which is what the harness does. No tokens, no windows.
    """
    stride = context if stride is None else stride
    whole = [prefix, *tokens]
    done = 0
    while done < len(tokens):
        new = min(stride if done else context, len(tokens) - done)
        done += new
        seen = max(0, done - context) if done > context else 0
        yield Query(whole[seen : done + 1], new)


def strided_queries(tokens: Sequence[int], context: int, stride: int) -> Iterator[Query]:
    """Windows as in Hugging Face's "perplexity of fixed-length models".

    A window begins every `stride` tokens and scores those that no window before it has scored; its first token is
    never scored, as nothing precedes it.
    """
    done = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        scored = min(end - done, end - begin - 1)
        if scored > 0:
            yield Query(tokens[begin:end], scored)
        done = end
        if end == len(tokens):
            break


def _move_spaces(context: str, continuation: str) -> Pair:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
