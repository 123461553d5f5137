"""Generation through the engine equals a loop without a KV cache."""

import math
from dataclasses import replace

import pytest
import torch

import gpt2
from gpt2.errors import NonFiniteLogitsError, RequestError, UserError
from gpt2.generation.engine import Engine, GenerationRequest
from gpt2.generation.sampling import Sampling, logits_to_probs, make_generator, sample_from_probs
from gpt2.generation.text import stream
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.transformers_reference import ODD_CONFIGS, random_model, to_transformers

GREEDY = Sampling(temperature=0)
CONFIG = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)


def first_tokens(
    model: GPT, prompt: list[int], count: int, sampling: Sampling = GREEDY, num_samples: int = 1, seed: int = 0
) -> list[list[int]]:
    """`count` new tokens of each sample: one list per sample."""
    engine = Engine(model, num_samples, len(prompt) + count)
    sequences = [
        engine.submit(GenerationRequest(prompt, sampling, count, seed, sample)) for sample in range(num_samples)
    ]
    while not engine.idle:
        engine.step()
    for sequence in sequences:
        if sequence.error:
            raise sequence.error
    return [sequence.new_tokens for sequence in sequences]


@pytest.mark.parametrize(
    "config", [replace(c, block_size=64) for c in ODD_CONFIGS], ids=lambda c: f"{c.n_layer}x{c.n_embd}"
)
def test_fifty_greedy_tokens_equal_transformers(config: GPTConfig) -> None:
    model = random_model(config)
    reference = to_transformers(model)
    prompt = [1, 2, 3]
    theirs = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3),
        max_new_tokens=50,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert first_tokens(model, prompt, 50)[0] == theirs[0, 3:].tolist()


@pytest.mark.slow  # test_model compares the logits at full size, and the test above the tokens
def test_fifty_greedy_tokens_at_full_size_equal_transformers() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    reference = to_transformers(model)
    prompt = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    theirs = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 8), max_new_tokens=50, do_sample=False, eos_token_id=None
    )
    assert first_tokens(model, prompt, 50)[0] == theirs[0, 8:].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(0.7, top_k=20), Sampling(1.3, top_p=0.8)])
def test_cached_equals_uncached_token_for_token(sampling: Sampling) -> None:
    model, prompt = random_model(CONFIG), [72, 101, 108]
    tokens_of_samples = first_tokens(model, prompt, 50, sampling, num_samples=2, seed=7)
    for sample in range(2):
        tokens, generator = list(prompt), make_generator(7, sample)
        for _ in range(50):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[:, -1]
            tokens.append(int(sample_from_probs(logits_to_probs(logits, sampling), [generator])))
        assert tokens_of_samples[sample] == tokens[3:]


def test_samples_are_batch_invariant() -> None:
    model = random_model(CONFIG)
    many = first_tokens(model, [1], 30, Sampling(), num_samples=5, seed=3)
    assert first_tokens(model, [1], 30, Sampling(), num_samples=2, seed=3) == many[:2]
    assert len({tuple(row) for row in many}) == 5
    assert first_tokens(model, [1], 30, Sampling(), num_samples=1, seed=4)[0] not in many


def test_when_the_context_is_full_its_later_half_is_prefilled_again() -> None:
    model = random_model(replace(CONFIG, block_size=10))
    prompt = [5, 6, 7]
    tokens_of_samples = first_tokens(model, prompt, 40)[0]
    assert len(tokens_of_samples) == 40
    tokens, window = list(prompt), list(prompt)
    for _ in range(40):
        with torch.no_grad():
            new = int(model(torch.tensor([window]))[0, -1].argmax())
        tokens.append(new)
        window = [*window, new] if len(window) < 10 else tokens[-5:]
    assert tokens_of_samples == tokens[3:]


def test_a_context_of_one_token() -> None:
    assert len(first_tokens(random_model(replace(CONFIG, block_size=1)), [5], 4)[0]) == 4


def test_generate_returns_prompt_and_continuation_and_is_reproducible() -> None:
    model, tokenizer = random_model(CONFIG), get_tokenizer("bytes")
    texts = gpt2.generate(model, tokenizer, "Hello", num_samples=3, max_new_tokens=20, top_k=50, seed=42)
    assert len(texts) == 3
    assert all(text.startswith("Hello") and len(text) > 5 for text in texts)
    assert texts == gpt2.generate(model, tokenizer, "Hello", num_samples=3, max_new_tokens=20, top_k=50, seed=42)
    assert texts != gpt2.generate(model, tokenizer, "Hello", num_samples=3, max_new_tokens=20, top_k=50, seed=43)
    assert gpt2.generate(model, tokenizer, "Hello", max_new_tokens=0) == ["Hello"]


def constant_model(token: int, size: int = 260) -> GPT:
    """A model that gives one token almost all probability."""
    model = random_model(replace(CONFIG, vocab_size=size, tie_word_embeddings=False))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 10.0
    return model


def test_end_of_text_ends_a_sample_and_is_not_shown() -> None:
    tokenizer = get_tokenizer("bytes")
    assert gpt2.generate(constant_model(256), tokenizer, "Hi", max_new_tokens=50) == ["Hi"]
    assert gpt2.generate(constant_model(258), tokenizer, "Hi", max_new_tokens=50) == [
        "Hi"
    ]  # an id beyond the tokenizer ends it too
    assert gpt2.generate(constant_model(65), tokenizer, "Hi", max_new_tokens=3) == ["HiAAA"]


def test_streams_yield_whole_characters_only() -> None:
    tokenizer = get_tokenizer("bytes")
    pieces = list(stream(constant_model("é".encode()[0]), tokenizer, "x", GREEDY, max_new_tokens=3))
    assert "".join(text for _, text in pieces) == "\N{REPLACEMENT CHARACTER}" * 3


def test_an_empty_prompt_is_the_end_of_text_token() -> None:
    model, tokenizer = random_model(CONFIG), get_tokenizer("bytes")
    started = gpt2.generate(model, tokenizer, "", max_new_tokens=10, seed=1)[0]
    assert started == gpt2.generate(model, tokenizer, "<|endoftext|>", max_new_tokens=10, seed=1)[0][13:]


def test_prompts_that_are_too_long_and_models_without_a_tokenizer_are_refused() -> None:
    model, tokenizer = random_model(CONFIG), get_tokenizer("bytes")
    with pytest.raises(RequestError, match="65 tokens do not fit the model's context of 64") as error:
        gpt2.generate(model, tokenizer, "x" * 65)
    assert (error.value.field, error.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(UserError, match="no tokenizer"):
        gpt2.generate(model, None, "x")
    with pytest.raises(UserError, match="num_samples"):
        gpt2.generate(model, tokenizer, "x", num_samples=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=5, top_p=0.9)], ids=["greedy", "all", "some"])
def test_non_finite_logits_raise(sampling: Sampling, value: float) -> None:
    model = random_model(CONFIG)
    with torch.no_grad():
        dict(model.named_parameters())["transformer.h.1.mlp.c_proj.bias"][3] = value
    with pytest.raises(NonFiniteLogitsError, match="the model gives nan or inf: its weights are damaged"):
        first_tokens(model, [1, 2], 5, sampling)


def test_single_logits_of_minus_infinity_are_no_error() -> None:
    model = constant_model(65)
    with torch.no_grad():
        model.lm_head.weight[7] = -torch.inf
    assert first_tokens(model, [1, 2], 3) == [[65, 65, 65]]


def test_dropout_is_off_during_generation_and_the_mode_is_restored() -> None:
    model = random_model(replace(CONFIG, dropout=0.5))
    tokenizer = get_tokenizer("bytes")
    expected = gpt2.generate(model, tokenizer, "Hello", max_new_tokens=70, seed=1)
    model.train()
    model.transformer.h[0].eval()  # as users do for frozen layers
    modes = [module.training for module in model.modules()]
    assert gpt2.generate(model, tokenizer, "Hello", max_new_tokens=70, seed=1) == expected
    unfinished = stream(model, tokenizer, "Hello", max_new_tokens=70, seed=1)
    next(unfinished)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(UserError, match="do not fit"):
        gpt2.generate(model, tokenizer, "x" * 65)
    assert [module.training for module in model.modules()] == modes


def test_accelerated_is_a_deprecated_alias_of_prepare_for_inference() -> None:
    with pytest.warns(DeprecationWarning, match="gpt2.accelerated is now gpt2.prepare_for_inference"):
        assert gpt2.accelerated is gpt2.prepare_for_inference
    assert "accelerated" not in dir(gpt2)
