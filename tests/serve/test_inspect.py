"""Inspection equals what the model computes: compared with `transformers` and with the plain model."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt2.errors import RequestError
from gpt2.generation.filters import History
from gpt2.generation.sampling import Sampling, logits_to_probs
from gpt2.model import GPT, GPTConfig
from gpt2.serve.inspect import (
    NextTokenCandidates,
    attention_weights,
    logit_lens,
    next_logits,
    perplexity,
    score_tokens,
    token_offsets,
    top_candidates,
)
from gpt2.tokenizer import ByteTokenizer
from tests.helpers.transformers_reference import ODD_CONFIGS, random_batch, random_model, to_transformers

CONFIG = GPTConfig(vocab_size=257, block_size=24, n_layer=3, n_head=4, n_embd=32)
TOKENIZER = ByteTokenizer()
TEXT = list(b"a text of tokens")


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


def candidates(model: GPT, sampling: Sampling, top: int = 5, target: int | None = None) -> NextTokenCandidates:
    history = History(TEXT, 4, (256,))
    return top_candidates(next_logits(model, TEXT), TOKENIZER, sampling, history, top, target)


def run_transformers(model: GPT, tokens: Any, **outputs: bool) -> Any:
    reference = to_transformers(model)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        return reference(tokens, **outputs)


@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_attention_weights_equal_transformers(config: GPTConfig) -> None:
    model = random_model(config)
    tokens, _ = random_batch(config, rows=1)
    theirs = run_transformers(model, tokens, output_attentions=True).attentions
    for position in (0, 3, config.block_size - 1):
        ours = attention_weights(model, tokens[0].tolist(), position)
        expected = torch.stack([layer[0, :, position, : position + 1] for layer in theirs])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_logit_lens_equals_transformers(config: GPTConfig) -> None:
    model, tokenizer = random_model(config), ByteTokenizer()
    tokens, _ = random_batch(config, rows=1)
    theirs = run_transformers(model, tokens, output_hidden_states=True).hidden_states
    ours = logit_lens(model, tokenizer, tokens[0].tolist(), 5, top=3, target_token=7)
    assert [layer.layer for layer in ours] == list(range(config.n_layer + 1))
    for layer, hidden in zip(ours, theirs, strict=True):
        normed = (
            hidden if layer.layer == config.n_layer else model.transformer.ln_f(hidden)
        )  # the last one has the final norm already
        probs = model.lm_head(normed[0, 5]).softmax(-1)
        assert [token.id for token in layer.tokens] == probs.topk(3).indices.tolist()
        assert layer.tokens[0].probability == pytest.approx(probs.max().item(), rel=1e-4)
        assert layer.asked == pytest.approx(probs[7].item(), rel=1e-4)


def test_the_last_layer_of_the_lens_is_the_prediction_of_the_model(model: GPT) -> None:
    last = logit_lens(model, TOKENIZER, TEXT, len(TEXT) - 1, top=5)[-1]
    expected = candidates(model, Sampling()).tokens
    assert [(token.id, token.text) for token in last.tokens] == [(token.id, token.text) for token in expected]
    assert [token.probability for token in last.tokens] == pytest.approx([token.raw for token in expected], rel=1e-5)


def test_perplexity_equals_transformers(model: GPT) -> None:
    tokens = torch.tensor([TEXT])
    with torch.inference_mode():
        loss = to_transformers(model)(tokens, labels=tokens).loss.item()
    scored = score_tokens(model, TOKENIZER, TEXT)
    assert [token.id for token in scored] == TEXT[1:]
    assert perplexity(scored) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 23, 24, 25, 36, 37, 80])
def test_a_long_text_is_scored_in_windows(model: GPT, length: int) -> None:
    text = torch.randint(257, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    half = CONFIG.block_size // 2
    scored = score_tokens(model, TOKENIZER, text)
    assert [token.id for token in scored] == text[1:]
    for i, token in enumerate(scored):  # text[i + 1], scored in the first window that contains it
        begin = 0 if i < CONFIG.block_size else half * math.ceil((i + 1 - CONFIG.block_size) / half)
        with torch.inference_mode():
            logprobs = model(torch.tensor([text[begin : i + 1]]))[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(logprobs[text[i + 1]].item(), abs=1e-4)
        assert token.rank == int((logprobs > logprobs[text[i + 1]]).sum()) + 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5, top_k=3),
        Sampling(temperature=0),
        Sampling(top_p=0.3, repetition_penalty=1.5, frequency_penalty=0.5),
        Sampling(min_p=0.9, logit_bias={65: 30}),
        Sampling(typical_p=0.5, epsilon_cutoff=0.003),
    ],
)
def test_candidates_have_the_probabilities_of_the_sampler(model: GPT, sampling: Sampling) -> None:
    logits = next_logits(model, TEXT)
    probs = logits_to_probs(logits, sampling, [History(TEXT, 4, (256,))])[0]
    result = candidates(model, sampling, top=300, target=65)
    assert {token.id for token in result.tokens} == set(range(257))
    assert [token.probability for token in result.tokens] == sorted((float(p) for p in probs), reverse=True)
    assert result.kept == int((probs > 0).sum())
    for token in result.tokens:
        assert token.probability == float(probs[token.id])
        assert token.raw == pytest.approx(logits.softmax(-1)[0, token.id].item(), rel=1e-6)
    entropy = -sum(p * math.log2(p) for p in probs.tolist() if p > 0)
    assert result.entropy == pytest.approx(entropy, abs=1e-4)
    assert result.asked in result.tokens
    assert result.rank == int((logits > logits[0, 65]).sum()) + 1


def test_tokens_that_are_ruled_out_come_last(model: GPT) -> None:
    result = candidates(model, Sampling(top_k=2), top=6)
    assert [token.probability > 0 for token in result.tokens] == [True, True, False, False, False, False]
    assert len({token.id for token in result.tokens}) == 6
    ruled_out = [token.raw for token in result.tokens[2:]]
    assert ruled_out == sorted(ruled_out, reverse=True)


def test_next_logits_use_the_end_of_a_text_longer_than_the_context(model: GPT) -> None:
    long = [*range(30), *TEXT]
    assert torch.equal(next_logits(model, long), next_logits(model, long[-CONFIG.block_size :]))


def test_dropout_is_off_during_inspection_and_restored_afterwards() -> None:
    model = random_model(replace(CONFIG, dropout=0.5)).train()
    assert torch.equal(next_logits(model, TEXT), next_logits(model, TEXT))
    assert torch.equal(attention_weights(model, TEXT, 5), attention_weights(model, TEXT, 5))
    assert all(module.training for module in model.modules())


def test_a_part_of_a_character_begins_where_the_character_begins() -> None:
    assert token_offsets(TOKENIZER, list("a€b".encode())) == [0, 1, 1, 1, 2]
    assert token_offsets(TOKENIZER, [97, 300, 98]) == [0, 1, 1]


def test_an_id_outside_the_tokenizer_is_shown_as_a_number() -> None:
    wide = random_model(replace(CONFIG, vocab_size=300))
    lens = logit_lens(wide, TOKENIZER, TEXT, 0, top=300)[0]
    assert {token.id: token.text for token in lens.tokens}[299] == "<299>"


def test_invalid_tokens_and_positions_raise(model: GPT) -> None:
    with pytest.raises(RequestError, match="the text has no tokens"):
        next_logits(model, [])
    with pytest.raises(RequestError, match="outside the model's vocabulary of 257"):
        score_tokens(model, TOKENIZER, [257])
    with pytest.raises(RequestError, match="no position 16 in a text of 16 tokens"):
        attention_weights(model, TEXT, 16)
    with pytest.raises(RequestError, match="position 24 is beyond the model's context of 24"):
        logit_lens(model, TOKENIZER, [0] * 30, 24, top=1)
