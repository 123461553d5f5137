"""The engine says what an uncached loop would say."""

import math
from dataclasses import replace

import pytest
import torch

import gpt2
from gpt2.errors import UserError
from gpt2.generation.engine import Engine, GenerationRequest
from gpt2.generation.sampling import Sampling, logits_to_probs, make_generator, sample_from_probs
from gpt2.generation.text import stream
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.transformers_reference import ODD_CONFIGS, random_model, to_transformers

GREEDY = Sampling(temperature=0)
TALKER = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)


def first_tokens(
    model: GPT, prompt: list[int], count: int, sampling: Sampling = GREEDY, num_samples: int = 1, seed: int = 0
) -> list[list[int]]:
    """`count` new tokens of each sample: one list a sample."""
    engine = Engine(model, num_samples, len(prompt) + count)
    asked = [engine.submit(GenerationRequest(prompt, sampling, count, seed, sample)) for sample in range(num_samples)]
    while not engine.idle:
        engine.step()
    for continuation in asked:
        if continuation.error:
            raise continuation.error
    return [continuation.new_tokens for continuation in asked]


@pytest.mark.parametrize(
    "config", [replace(c, block_size=64) for c in ODD_CONFIGS], ids=lambda c: f"{c.n_layer}x{c.n_embd}"
)
def test_fifty_greedy_tokens_equal_transformers(config: GPTConfig) -> None:
    model = random_model(config)
    twin = to_transformers(model)
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
    twin = to_transformers(model)
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
        tokens, own = list(prompt), make_generator(7, sample)
        for _ in range(50):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[:, -1]
            tokens.append(int(sample_from_probs(logits_to_probs(logits, sampling), [own])))
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
