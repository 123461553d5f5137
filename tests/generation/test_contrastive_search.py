"""Contrastive search equals the equation of its paper."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gpt2.generation.contrastive_search import contrastive_search
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT
from tests.helpers.search_helpers import greedy_decode, model_pair


def reference_contrastive_search(model: GPT, prompt: list[int], k: int, alpha: float, length: int) -> list[int]:
    """Equation 5 of Su et al. 2022, without a KV cache, once for each candidate."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            likely = model(torch.tensor([text]))[0, -1].softmax(-1).topk(k)
            read = model.hidden_states(torch.tensor([[*text, token] for token in likely.indices.tolist()]))
            values = []
            for p, hidden in zip(likely.values.tolist(), read, strict=True):
                similarities = [float(F.cosine_similarity(hidden[-1], state, dim=0)) for state in hidden[:-1]]
                values.append((1 - alpha) * p - alpha * max(similarities))
            text.append(int(likely.indices[values.index(max(values))]))
    return text[len(prompt) :]


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("k", [2, 5])
def test_contrastive_search_equals_the_equation_of_the_paper(k: int, alpha: float) -> None:
    for which, prompt in ((0, [3]), (1, [7, 7, 8])):
        model, _ = model_pair(which, 1)
        found = list(contrastive_search(model, prompt, top_k=k, penalty_alpha=alpha, max_new_tokens=12))
        assert found == reference_contrastive_search(model, prompt, k, alpha, 12)


def test_hidden_states_equal_the_last_ones_of_transformers() -> None:
    model, reference = model_pair(0, 0)
    tokens = torch.tensor([[1, 2, 3, 4]])
    last = reference(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.hidden_states(tokens), last)


@pytest.mark.parametrize("rules", [{"top_k": 1, "penalty_alpha": 0.6}, {"top_k": 5, "penalty_alpha": 0.0}])
def test_contrastive_search_without_alternatives_or_penalty_is_greedy(rules: dict[str, Any]) -> None:
    model, _ = model_pair(0, 1)
    assert list(contrastive_search(model, [5, 6], max_new_tokens=20, **rules)) == greedy_decode(model, [5, 6], 20)
    bans = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5}
    found = contrastive_search(model, [5, 6], max_new_tokens=20, sampling=Sampling(temperature=0, **bans), **rules)
    assert list(found) == greedy_decode(model, [5, 6], 20, **bans)


def test_contrastive_search_ends_with_an_end_token_and_never_chooses_a_banned_one() -> None:
    model, _ = model_pair(0, 1)
    rules: dict[str, Any] = {"top_k": 5, "penalty_alpha": 0.9, "max_new_tokens": 20}
    free = list(contrastive_search(model, [5], **rules))
    end = free.index(free[7])
    assert list(contrastive_search(model, [5], **rules, end_tokens=[free[7]])) == free[: end + 1]
    all_but_two = Sampling(temperature=0, bad_words=[(token,) for token in range(2, 31)])
    assert set(contrastive_search(model, [5], **rules, sampling=all_but_two)) <= {0, 1}
