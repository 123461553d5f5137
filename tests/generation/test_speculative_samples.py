"""Speculative samples have the distribution of the model, whatever the draft: chi-square tests with fixed seeds."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2.generation import speculative
from gpt2.generation.engine import GenerationRequest, LanguageModel
from gpt2.generation.sampling import History, Sampling, logits_to_probs, make_generator
from gpt2.generation.speculative import Drafter, DraftModel, PromptLookup, accept_or_resample
from gpt2.model import GPTConfig
from tests.helpers.speculative_helpers import TrigramModel, context_sensitive_model, speculative_decode

CONFIG = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)
SMALL_CONFIG = GPTConfig(vocab_size=4, block_size=16, n_layer=1, n_head=1, n_embd=8, tie_word_embeddings=False)


def chi_square_p(counts: Tensor, probs: Tensor) -> float:
    """The p-value of `counts` (n,) under `probs` (n,); rare outcomes are merged."""
    expected = probs.double() * counts.sum()
    assert counts[probs == 0].sum() == 0
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    there = expected > 0
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum()
    freedom = there.sum().double() - 1
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def distribution(model: LanguageModel, request: GenerationRequest) -> Tensor:
    """The exact probability of each continuation of all new tokens: (V ** max_new_tokens,)."""
    size, count, prompt = model.config.vocab_size, request.max_new_tokens, list(request.prompt)
    texts = torch.tensor([prompt + list(new) for new in product(range(size), repeat=count)])
    with torch.no_grad():
        logits = model.lm_head(model.hidden_states(texts, model.make_cache(len(texts))))  # (V ** count, P + count, V)
    total = torch.ones(len(texts), dtype=torch.float64)
    for i in range(len(prompt), texts.size(1)):
        pasts = [History(text[:i].tolist(), len(prompt)) for text in texts]
        probs = logits_to_probs(logits[:, i - 1], request.sampling, pasts)
        total *= probs.double().gather(-1, texts[:, i : i + 1])[:, 0]
    return total


def sampled_p(draft: Drafter, model: LanguageModel, sampling: Sampling, longest: int = 16, runs: int = 400) -> float:
    """The p-value of three new tokens in each of `runs` runs under their exact distribution."""
    request, size = GenerationRequest([0, 1, 2, 0, 1], sampling, 3), model.config.vocab_size
    counts = torch.zeros(size**3)
    for sample in range(runs):
        tokens = speculative_decode(model, draft, replace(request, seed=1, sample_index=sample), longest)
        counts[sum(token * size ** (2 - i) for i, token in enumerate(tokens))] += 1
    return chi_square_p(counts, distribution(model, request))


SETTINGS = {
    "plain": Sampling(),
    "top-k, cold": Sampling(0.7, top_k=3),
    "top-p, hot": Sampling(1.5, top_p=0.9),
    "penalties": Sampling(repetition_penalty=1.4, frequency_penalty=0.5, bad_words=((1, 3),)),
}


@pytest.mark.parametrize(("sampling", "longest"), [("plain", 1), *((name, 16) for name in SETTINGS)])
@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_samples_have_the_distribution_of_the_model(draft: str, sampling: str, longest: int) -> None:
    drafter = DraftModel(TrigramModel(SMALL_CONFIG, 1)) if draft == "model" else PromptLookup()
    assert sampled_p(drafter, TrigramModel(SMALL_CONFIG, 153), SETTINGS[sampling], longest) > 0.01


@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_samples_have_the_distribution_of_gpt2(draft: str) -> None:
    drafter = DraftModel(context_sensitive_model(SMALL_CONFIG, 1)) if draft == "model" else PromptLookup()
    assert sampled_p(drafter, context_sensitive_model(SMALL_CONFIG), Sampling(0.8, top_k=3)) > 0.01


def always_accepted(guess: int, p: Tensor, q: Tensor | None, stream: torch.Generator) -> int:
    return guess


def resampled_from_p(guess: int, p: Tensor, q: Tensor | None, stream: torch.Generator) -> int:
    """Correct, except for the distribution that a rejected token is resampled from."""
    kept = accept_or_resample(guess, p, q, stream)
    return kept if kept == guess else int(torch.multinomial(p, 1, generator=stream))


@pytest.mark.parametrize("wrong", [always_accepted, resampled_from_p])
@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_the_distribution_test_detects_a_wrong_acceptance_rule(
    draft: str, wrong: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative, "accept_or_resample", wrong)
    drafter = DraftModel(TrigramModel(SMALL_CONFIG, 1)) if draft == "model" else PromptLookup()
    assert sampled_p(drafter, TrigramModel(SMALL_CONFIG, 153), Sampling()) < 1e-4


@settings(deadline=None, max_examples=30)
@given(data=st.data(), size=st.integers(2, 6))
def test_accept_or_resample_of_one_token_is_exact(data: st.DataObject, size: int) -> None:
    """The sum over draft tokens of q times the acceptance rule is p, and samples follow the rule."""
    weights = st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any)
    p, q = (torch.tensor(data.draw(weights), dtype=torch.float32) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    rest = (p - q).clamp_min(0)
    keep = torch.minimum(torch.ones(size), p / q.clamp_min(1e-9))
    expected = q * keep + (q * (1 - keep)).sum() * (rest / rest.sum().clamp_min(1e-9))
    assert torch.allclose(expected, p, atol=1e-6)
    own = make_generator(0, 0)
    for guess in range(size):
        if q[guess] == 0:
            continue
        drawn = torch.tensor([accept_or_resample(guess, p, q, own) for _ in range(400)])
        share = (drawn == guess).float().mean()
        assert abs(share - keep[guess]) < 5 * math.sqrt(0.25 / 400)
        assert (rest[drawn[drawn != guess]] > 0).all()


def test_random_numbers_depend_on_the_request_alone() -> None:
    model = context_sensitive_model(CONFIG)
    for draft in (DraftModel(context_sensitive_model(CONFIG, 1)), PromptLookup()):
        request = GenerationRequest([1, 2, 1, 2], Sampling(), 40, seed=3)
        before = torch.get_rng_state()
        once = speculative_decode(model, draft, request)
        torch.rand(7)
        assert speculative_decode(model, draft, request) == once
        assert speculative_decode(model, draft, replace(request, seed=4)) != once
        assert speculative_decode(model, draft, replace(request, sample_index=1)) != once
        torch.set_rng_state(before)
        speculative_decode(model, draft, request)
        assert torch.equal(torch.get_rng_state(), before)
