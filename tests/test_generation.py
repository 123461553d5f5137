"""Sampling is a pure function of logits and a stream; the engine says what an uncached loop would say."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ODD_CONFIGS, random_model, transformers_twin

import gpt2
from gpt2.errors import UserError
from gpt2.generation.engine import continuations, stream
from gpt2.generation.sampling import Sampling, draw, keep_top_k, keep_top_p, probabilities, random_stream
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer

GREEDY = Sampling(temperature=0)
NO_TOKENS: Any = torch.empty(0, dtype=torch.long)
TALKER = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)


def first_tokens(
    model: GPT, prompt: list[int], count: int, sampling: Sampling = GREEDY, **kwargs: int
) -> list[list[int]]:
    """`count` new tokens of each sample: one list a sample."""
    options = {"num_samples": 1, "seed": 0} | kwargs
    columns = list(continuations(model, prompt, sampling, max_new_tokens=count, **options))
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    "config", [replace(c, block_size=64) for c in ODD_CONFIGS], ids=lambda c: f"{c.n_layer}x{c.n_embd}"
)
def test_fifty_greedy_tokens_equal_transformers(config: GPTConfig) -> None:
    model = random_model(config)
    twin = transformers_twin(model)
    prompt = [1, 2, 3]
    theirs = twin.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3),
        max_new_tokens=50,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert first_tokens(model, prompt, 50)[0] == theirs[0, 3:].tolist()


def test_fifty_greedy_tokens_at_full_size_equal_transformers() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    twin = transformers_twin(model)
    prompt = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    theirs = twin.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 8), max_new_tokens=50, do_sample=False, eos_token_id=None
    )
    assert first_tokens(model, prompt, 50)[0] == theirs[0, 8:].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.8)])
def test_cached_equals_uncached_token_for_token(sampling: Sampling) -> None:
    model, prompt = random_model(TALKER), [72, 101, 108]
    got = first_tokens(model, prompt, 50, sampling, num_samples=2, seed=7)
    for sample in range(2):
        tokens, own = list(prompt), random_stream(7, sample)
        for _ in range(50):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[:, -1]
            tokens.append(int(draw(probabilities(logits, sampling), [own])))
        assert got[sample] == tokens[3:]


def test_a_sample_does_not_depend_on_the_samples_beside_it() -> None:
    model = random_model(TALKER)
    many = first_tokens(model, [1], 30, Sampling(), num_samples=5, seed=3)
    assert first_tokens(model, [1], 30, Sampling(), num_samples=2, seed=3) == many[:2]
    assert len({tuple(row) for row in many}) == 5
    assert first_tokens(model, [1], 30, Sampling(), num_samples=1, seed=4)[0] not in many


def test_beyond_the_context_the_later_half_is_read_again() -> None:
    model = random_model(replace(TALKER, block_size=10))
    prompt = [5, 6, 7]
    got = first_tokens(model, prompt, 40)[0]
    assert len(got) == 40
    tokens, window = list(prompt), list(prompt)
    for _ in range(40):
        with torch.no_grad():
            new = int(model(torch.tensor([window]))[0, -1].argmax())
        tokens.append(new)
        window = [*window, new] if len(window) < 10 else tokens[-5:]
    assert got == tokens[3:]


def test_a_context_of_one() -> None:
    assert len(first_tokens(random_model(replace(TALKER, block_size=1)), [5], 4)[0]) == 4


logits_rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(lambda row: torch.tensor([row]))


@settings(deadline=None)
@given(logits_rows, st.integers(1, 50))
def test_top_k_equals_transformers(logits: torch.Tensor, k: int) -> None:
    from transformers import TopKLogitsWarper

    ours = keep_top_k(logits, k) if k < logits.size(-1) else logits
    assert torch.equal(ours, TopKLogitsWarper(k)(NO_TOKENS, logits))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.floats(0.05, 0.99))
def test_top_p_equals_transformers(seed: int, size: int, p: float) -> None:
    from transformers import TopPLogitsWarper

    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    shares = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    if (shares - p).abs().min() < 1e-5:
        return  # a tie within rounding may go either way
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(NO_TOKENS, logits))


def test_top_p_keeps_one_token_when_one_is_enough() -> None:
    logits = torch.tensor([[0.9, 0.05, 0.05]]).log()
    assert keep_top_p(logits, 0.5).isfinite().tolist() == [[True, False, False]]
    assert keep_top_p(logits, 1e-9).isfinite().sum() == 1


def test_temperature() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert probabilities(logits, Sampling(0)).tolist() == [[0, 1, 0]]
    assert torch.equal(probabilities(logits, Sampling(0.5)), (logits * 2).softmax(-1))
    assert probabilities(logits, Sampling(1e-4)).argmax() == 1
    assert probabilities(logits, Sampling(1e4))[0] == pytest.approx([1 / 3] * 3, abs=1e-3)


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-21])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, -torch.inf, 2.999999], [-4e4, 2.0, 2.0, 1.0]])
    assert torch.equal(probabilities(logits, Sampling(temperature)), probabilities(logits, GREEDY))
    cold = Sampling(temperature, top_k=2, top_p=0.5)
    assert torch.equal(probabilities(logits, cold), probabilities(logits, GREEDY))


def test_cold_temperatures_are_distributions() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [3e4, 3e4, -3e4]])
    for temperature in (1e-19, 1e-10, 1e-6):
        probs = probabilities(logits, Sampling(temperature))
        assert probs.tolist() == [[0, 1, 0], [0.5, 0.5, 0]]


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    own = random_stream(1, 0)
    counts = Counter(int(draw(probs, [own])) for _ in range(4000))
    assert counts[1] == 0
    chi_square = sum((counts[i] - 4000 * p) ** 2 / (4000 * p) for i, p in ((0, 0.5), (2, 0.3), (3, 0.2)))
    assert chi_square < 13.8  # 2 degrees of freedom: one seed in a thousand is worse


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**63), st.integers(0, 5))
def test_a_token_without_probability_is_never_drawn(seed: int, alive: int) -> None:
    probs = torch.zeros(1, 6)
    probs[0, alive] = 1e-30
    assert int(draw(probs, [random_stream(seed, 0)])) == alive


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": math.nan}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top-k must be 0"),
        ({"top_p": 0.0}, "top-p must be over 0"),
        ({"top_p": 1.1}, "top-p must be over 0 and at most 1"),
    ],
)
def test_impossible_settings(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)


def test_generate_returns_prompt_and_continuation_and_is_reproducible() -> None:
    model, tokenizer = random_model(TALKER), get_tokenizer("bytes")
    texts = gpt2.generate(model, tokenizer, "Hello", num_samples=3, max_new_tokens=20, top_k=50, seed=42)
    assert len(texts) == 3
    assert all(text.startswith("Hello") and len(text) > 5 for text in texts)
    assert texts == gpt2.generate(model, tokenizer, "Hello", num_samples=3, max_new_tokens=20, top_k=50, seed=42)
    assert texts != gpt2.generate(model, tokenizer, "Hello", num_samples=3, max_new_tokens=20, top_k=50, seed=43)
    assert gpt2.generate(model, tokenizer, "Hello", max_new_tokens=0) == ["Hello"]


def always(token: int, size: int = 260) -> GPT:
    """A model that is sure of one token."""
    model = random_model(replace(TALKER, vocab_size=size, tie_word_embeddings=False))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 10.0
    return model


def test_end_of_text_ends_a_sample_and_is_not_shown() -> None:
    tokenizer = get_tokenizer("bytes")
    assert gpt2.generate(always(256), tokenizer, "Hi", max_new_tokens=50) == ["Hi"]
    assert gpt2.generate(always(258), tokenizer, "Hi", max_new_tokens=50) == ["Hi"]  # an id without text ends it too
    assert gpt2.generate(always(65), tokenizer, "Hi", max_new_tokens=3) == ["HiAAA"]


def test_streams_give_whole_characters_only() -> None:
    tokenizer = get_tokenizer("bytes")
    pieces = list(stream(always("é".encode()[0]), tokenizer, "x", GREEDY, max_new_tokens=3))
    assert "".join(text for _, text in pieces) == "\N{REPLACEMENT CHARACTER}" * 3


def test_an_empty_prompt_begins_a_text() -> None:
    model, tokenizer = random_model(TALKER), get_tokenizer("bytes")
    started = gpt2.generate(model, tokenizer, "", max_new_tokens=10, seed=1)[0]
    assert started == gpt2.generate(model, tokenizer, "<|endoftext|>", max_new_tokens=10, seed=1)[0][13:]


def test_a_prompt_longer_than_the_context_and_a_model_without_words() -> None:
    model, tokenizer = random_model(TALKER), get_tokenizer("bytes")
    with pytest.raises(UserError, match="65 tokens do not fit the model's context of 64"):
        gpt2.generate(model, tokenizer, "x" * 65)
    with pytest.raises(UserError, match="no tokenizer"):
        gpt2.generate(model, None, "x")
    with pytest.raises(UserError, match="num_samples"):
        gpt2.generate(model, tokenizer, "x", num_samples=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=5, top_p=0.9)], ids=["greedy", "all", "some"])
def test_a_model_that_gives_nan_is_called_broken(sampling: Sampling, value: float) -> None:
    model = random_model(TALKER)
    with torch.no_grad():
        dict(model.named_parameters())["transformer.h.1.mlp.c_proj.bias"][3] = value
    with pytest.raises(UserError, match="the model gives nan or inf: its weights are damaged"):
        first_tokens(model, [1, 2], 5, sampling)


def test_a_token_that_is_ruled_out_is_no_damage() -> None:
    model = always(65)
    with torch.no_grad():
        model.lm_head.weight[7] = -torch.inf
    assert first_tokens(model, [1, 2], 3) == [[65, 65, 65]]


def test_dropout_is_off_while_text_is_made_and_the_mode_stays() -> None:
    model = random_model(replace(TALKER, dropout=0.5))
    tokenizer = get_tokenizer("bytes")
    quiet = gpt2.generate(model, tokenizer, "Hello", max_new_tokens=70, seed=1)
    model.train()
    model.transformer.h[0].eval()  # frozen by its owner
    modes = [module.training for module in model.modules()]
    assert gpt2.generate(model, tokenizer, "Hello", max_new_tokens=70, seed=1) == quiet
    unfinished = stream(model, tokenizer, "Hello", max_new_tokens=70, seed=1)
    next(unfinished)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(UserError, match="do not fit"):
        gpt2.generate(model, tokenizer, "x" * 65)
    assert [module.training for module in model.modules()] == modes
