"""What is shared, packed and batched is computed as if each sequence stood alone."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import UserError
from gpt2.evaluation import scorer
from gpt2.evaluation.encode import encode_pairs, encode_separately, rolling_queries, strided_queries
from gpt2.evaluation.scorer import Scored, check_queries, score
from gpt2.evaluation.tree import Query, build_tree
from gpt2.generation.engine import LanguageModel
from gpt2.model import GPT
from gpt2.native import build
from gpt2.native.model import NativeGPT
from gpt2.tokenizer import BPETokenizer, ByteTokenizer


def alone(model: GPT, query: Query) -> tuple[float, list[bool]]:
    """The reference: one forward pass for one query."""
    tokens = torch.tensor([query.tokens])
    with torch.inference_mode():
        logprobs = model(tokens[:, :-1])[0].log_softmax(-1)[-query.scored :]
    targets = tokens[0, -query.scored :]
    return float(logprobs.gather(1, targets[:, None]).double().sum()), (logprobs.argmax(-1) == targets).tolist()


def all_scores(model: LanguageModel, groups: list[list[Query]], **options: Any) -> list[list[Scored]]:
    found = dict(pair for batch in score(model, groups, **options) for pair in batch)
    return [found[i] for i in range(len(groups))]


token_lists = st.lists(st.integers(0, 5), min_size=2, max_size=12)


@st.composite
def groups_of_queries(draw: st.DrawFn) -> list[list[Query]]:
    """Small alphabets, so that prefixes are shared, equal queries occur, and one is the prefix of another."""
    groups = draw(st.lists(st.lists(token_lists, min_size=1, max_size=4), min_size=1, max_size=4))
    return [[Query(tokens, draw(st.integers(1, len(tokens) - 1))) for tokens in group] for group in groups]


@settings(deadline=None, max_examples=60)
@given(groups_of_queries(), st.sampled_from([1, 16, 2048]))
def test_every_query_is_scored_as_if_alone(groups: list[list[Query]], budget: int) -> None:
    model = MODEL
    for group, found in zip(groups, all_scores(model, groups, batch_tokens=budget), strict=True):
        for query, scored in zip(group, found, strict=True):
            total, greedy = alone(model, query)
            assert scored.log_likelihood == pytest.approx(total, abs=2e-5)
            assert scored.greedy.tolist() == greedy


def _small() -> GPT:
    from gpt2.model import GPTConfig

    torch.manual_seed(5)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=23))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


MODEL = _small()


def test_a_shared_beginning_is_computed_once() -> None:
    context = [1, 2, 3, 4, 5, 6]
    tree = build_tree([Query([*context, 7, 8], 2), Query([*context, 7, 9], 2), Query([*context, 10], 1)])
    assert len(tree) == 7  # six of the context, and the 7 that two continuations begin with
    assert [path.tolist() for path in tree.paths] == [[5, 6], [5, 6], [5]]
    assert build_tree([Query(context, 2)]).is_chain
    assert not build_tree([Query([1, 2, 3], 1), Query([1, 4, 3], 1)]).is_chain


def test_equal_choices_tie_exactly() -> None:
    (found,) = all_scores(MODEL, [[Query([1, 2, 3], 2), Query([1, 2, 3], 2)]])
    assert found[0].log_likelihood == found[1].log_likelihood


def test_any_number_of_ranks_scores_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    groups = [[Query(rng.integers(0, 23, 9).tolist(), 3) for _ in range(2)] for _ in range(40)]
    whole = all_scores(MODEL, groups, batch_tokens=64)
    for size in (2, 3):
        shared: dict[int, list[Scored]] = {}
        for rank in range(size):
            for batch in score(MODEL, groups, ProcessGroup(rank, size), batch_tokens=64):
                assert not shared.keys() & dict(batch).keys()
                shared |= dict(batch)
        assert [[one.log_likelihood for one in shared[i]] for i in range(40)] == [
            [one.log_likelihood for one in row] for row in whole
        ]


def test_the_order_of_the_rows_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    groups = [[Query(rng.integers(0, 23, int(n)).tolist(), 1)] for n in rng.integers(2, 16, 50)]
    there, back = all_scores(MODEL, groups, batch_tokens=64), all_scores(MODEL, groups[::-1], batch_tokens=64)[::-1]
    for a, b in zip(there, back, strict=True):
        assert a[0].greedy.tolist() == b[0].greedy.tolist()
        assert a[0].log_likelihood == pytest.approx(b[0].log_likelihood, rel=1e-6)


@pytest.mark.slow  # compiles the kernel
def test_a_model_without_tree_attention_gives_the_same() -> None:
    kernel: ctypes.CDLL | None = build.load_library()
    if kernel is None:
        pytest.skip("the kernel cannot be compiled here")
    groups = [[Query([1, 2, 3, 4, 5], 2), Query([1, 2, 6, 4, 5], 3), Query([1, 2, 6], 1)], [Query([3, 4], 1)]]
    ours = all_scores(NativeGPT(MODEL, "float32", kernel), groups)
    for a, b in zip(ours, all_scores(MODEL, groups), strict=True):
        assert [one.log_likelihood for one in a] == pytest.approx([one.log_likelihood for one in b], abs=1e-5)
        assert [one.is_greedy for one in a] == [one.is_greedy for one in b]


def test_training_mode_is_kept_and_has_no_dropout() -> None:
    MODEL.train()
    try:
        found = all_scores(MODEL, [[Query([1, 2, 3], 2)]])
        assert MODEL.training
        assert MODEL.transformer.h[0].training
    finally:
        MODEL.eval()
    assert found[0][0].log_likelihood == pytest.approx(alone(MODEL, Query([1, 2, 3], 2))[0], abs=1e-5)


def test_a_damaged_model_is_an_error() -> None:
    model = _small()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(UserError, match="nan or inf"):
        all_scores(model, [[Query([1, 2, 3], 2)]])


def test_context_and_continuation_are_divided_as_the_harness_does(words: BPETokenizer) -> None:
    whole = words.encode("the dog sleeps")
    (query,) = encode_pairs(words, [("the dog ", "sleeps")], 48)
    assert query.tokens == whole  # the space went to the continuation
    assert query.scored == len(whole) - len(words.encode("the dog"))
    (query,) = encode_pairs(words, [("", "the dog")], 48)
    assert query.tokens == [words.end_of_text, *words.encode("the dog")]
    assert query.scored == len(words.encode("the dog"))
    (query,) = encode_pairs(words, [("a" * 100, " dog")], 8)
    assert len(query.tokens) == 9  # one more than the context: the last is only predicted
    (query,) = encode_separately(words, [("the dog", " sleeps")], 48)
    assert query.tokens == words.encode("the dog") + words.encode(" sleeps")


def test_multi_byte_characters_divided_by_a_context() -> None:
    (query,) = encode_pairs(ByteTokenizer(), [("é", "è")], 16)
    assert query.tokens == list("éè".encode())
    assert query.scored == 2


def test_what_cannot_be_scored_is_one_line(model: GPT, words: BPETokenizer) -> None:
    empty = encode_pairs(words, [("the dog", "")], 48)
    with pytest.raises(UserError, match=r"rows\.jsonl line 3: there are no tokens to score"):
        check_queries(empty, model.config, "rows.jsonl line 3")
    long = encode_pairs(words, [("the", " dog" * 60)], 48)
    with pytest.raises(UserError, match=r"line 4: \d+ tokens to score do not fit the model's context of 48"):
        check_queries(long, model.config, "line 4")


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_rolling_windows_score_every_token_once(count: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    tokens = list(range(100, 100 + count))
    windows = list(rolling_queries(tokens, 7, context, stride))
    assert [t for window in windows for t in window.tokens[len(window.tokens) - window.scored :]] == tokens
    assert all(len(window.tokens) <= context + 1 for window in windows)
    if windows:
        assert windows[0].tokens[0] == 7
    for window in windows[1:]:
        assert (
            window.tokens
            == ([7, *tokens])[window.tokens[0] - 99 if window.tokens[0] != 7 else 0 :][: len(window.tokens)]
        )


@given(st.integers(0, 60), st.integers(2, 12), st.data())
def test_strided_windows_are_those_of_the_guide(count: int, context: int, data: st.DataObject) -> None:
    """The loop of Hugging Face's "perplexity of fixed-length models", written out."""
    stride = data.draw(st.integers(1, context))
    expected, previous_end = [], 0
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        scored = min(end - previous_end, end - begin - 1)
        if scored > 0:
            expected.append((begin, end, scored))
        previous_end = end
        if end == count:
            break
    windows = [(q.tokens[0], q.tokens[-1] + 1, q.scored) for q in strided_queries(list(range(count)), context, stride)]
    assert windows == expected


def test_all_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scorer.HEAD_ROWS, "cpu", 7)
    model, rows = _small(), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(logits.numel() // 23))
    found = all_scores(model, [[Query(list(range(17)), 16)], [Query([1, 2, 3], 1)]])
    assert (max(rows), sum(rows)) == (7, 17)
    assert found[0][0].log_likelihood == pytest.approx(alone(model, Query(list(range(17)), 16))[0], abs=2e-5)
