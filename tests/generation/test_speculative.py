"""Speculative decoding equals plain decoding, whatever the draft."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import NonFiniteLogitsError, UserError
from gpt2.generation.engine import GenerationRequest
from gpt2.generation.sampling import History, Sampling, make_generator
from gpt2.generation.speculative import (
    CachedModel,
    DraftModel,
    PromptLookup,
    SpeculativeDecoder,
    next_draft_length,
    speculate,
)
from gpt2.generation.text import stream
from gpt2.model import GPTConfig
from gpt2.native.build import load_library
from gpt2.native.model import NativeGPT
from gpt2.tokenizer import BPETokenizer, get_tokenizer
from tests.helpers.speculative_helpers import (
    DRAFTERS,
    context_sensitive_model,
    decode_without_draft,
    perturbed_model,
    speculative_decode,
)
from tests.helpers.transformers_reference import ODD_CONFIGS, random_model

GREEDY = Sampling(temperature=0)
CONFIG = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)
SMALL_CONFIG = GPTConfig(vocab_size=4, block_size=16, n_layer=1, n_head=1, n_embd=8, tie_word_embeddings=False)


# Greedy decoding


@pytest.mark.parametrize("draft", DRAFTERS)
@pytest.mark.parametrize("config", ODD_CONFIGS, ids=lambda c: f"{c.n_layer}x{c.n_embd}")
def test_greedy_tokens_equal_plain_decoding_even_beyond_the_context(config: GPTConfig, draft: str) -> None:
    model = context_sensitive_model(config)
    drafter = DRAFTERS[draft](model)
    for prompt, count in (([1, 2, 3], 40), (list(range(config.block_size)), 12)):
        request = GenerationRequest(prompt, GREEDY, count)
        assert speculative_decode(model, drafter, request) == decode_without_draft(model, request)


@settings(deadline=None, max_examples=25)
@given(
    context=st.integers(1, 12),
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=12),
    draft=st.sampled_from(list(DRAFTERS)),
    longest=st.integers(1, 9),
    count=st.integers(0, 25),
    sampling=st.builds(
        Sampling,
        temperature=st.just(0),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.3]),
        no_repeat_ngram_size=st.sampled_from([0, 2, 3]),
        logit_bias=st.sampled_from([{}, {3: 0.5}, {4: -math.inf}]),
        bad_words=st.sampled_from([(), ((1, 2),), ((0,), (5, 5))]),
        min_new_tokens=st.sampled_from([0, 4]),
    ),
    end_tokens=st.sampled_from([(), (3,), (2, 3, 6)]),
)
def test_greedy_tokens_equal_plain_decoding_for_any_settings(
    context: int,
    prompt: list[int],
    draft: str,
    longest: int,
    count: int,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
) -> None:
    model = context_sensitive_model(replace(SMALL_CONFIG, vocab_size=11, block_size=context, n_embd=16))
    request = GenerationRequest(prompt[:context], sampling, count, end_tokens=end_tokens)
    assert speculative_decode(model, DRAFTERS[draft](model), request, longest) == decode_without_draft(model, request)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_cpu_kernel_verifies_drafts_as_it_decodes_single_tokens(precision: str) -> None:
    kernel = load_library()
    if kernel is None:
        pytest.skip("the CPU kernel cannot be compiled here")
    gpt = context_sensitive_model(replace(CONFIG, n_embd=64, block_size=24))
    model = NativeGPT(gpt, precision, kernel)
    for draft in (DraftModel(model), DraftModel(gpt), PromptLookup()):
        request = GenerationRequest([1, 2, 3], GREEDY, 40)
        assert speculative_decode(model, draft, request) == decode_without_draft(model, request)


def test_a_drafter_serves_one_request_after_the_other() -> None:
    model = context_sensitive_model(replace(CONFIG, block_size=12))
    for name in ("nearly", "lookup"):
        draft = DRAFTERS[name](model)
        for prompt in ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9], [5], [1, 2, 3, 4]):
            request = GenerationRequest(prompt, GREEDY, 25)
            assert speculative_decode(model, draft, request) == decode_without_draft(model, request)


# Cached model, drafts and statistics


@settings(deadline=None, max_examples=30)
@given(
    context=st.integers(1, 9),
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=6),
    data=st.data(),
)
def test_cached_model_equals_the_model(context: int, texts: list[list[int]], data: st.DataObject) -> None:
    model = context_sensitive_model(replace(SMALL_CONFIG, block_size=context))
    cached_model = CachedModel(model)
    for text in texts:
        start = 0
        while len(text) - start > context:  # as in the engine: the later half, and the token that did not fit
            start += context + 1 - max(1, context // 2)
        assert cached_model.remaining_context(len(text)) == context - (len(text) - start)
        count = data.draw(st.integers(1, len(text) - start))
        with torch.no_grad():
            expected = model(torch.tensor([text[start:]]))[0, -count:]
            assert torch.allclose(cached_model.logits(text, count), expected, rtol=1e-4, atol=1e-4)


def test_cached_model_computes_only_tokens_after_the_common_prefix() -> None:
    model, read = random_model(CONFIG), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].tolist()[0]))
    cached_model = CachedModel(model)
    cached_model.logits([1, 2, 3], 1)
    cached_model.logits([1, 2, 3, 4, 5], 3)  # the first of the three is cached, but its logits are needed
    cached_model.logits([1, 2, 3, 4, 9], 1)
    cached_model.logits([1, 2, 3, 4, 9], 1)
    assert read == [[1, 2, 3], [3, 4, 5], [9], [9]]


def test_the_model_runs_once_on_each_token_and_draft_token() -> None:
    model, read = context_sensitive_model(CONFIG), []
    decoder = SpeculativeDecoder(model, DRAFTERS["nearly"](model), GenerationRequest([1, 2, 3], Sampling(), 40))
    model.transformer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].size(1)))
    list(decoder)
    assert len(read) == decoder.calls
    assert sum(read) == 3 + (decoder.calls - 1) + decoder.drafted
    assert 0 < decoder.accepted < decoder.drafted


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(), Sampling(0.8, top_k=20), Sampling(frequency_penalty=2)],
    ids=["greedy", "all", "some", "back"],
)
@pytest.mark.parametrize("context", [64, 11])
def test_a_model_that_drafts_for_itself_has_an_acceptance_rate_of_one(sampling: Sampling, context: int) -> None:
    model = context_sensitive_model(replace(CONFIG, block_size=context))
    decoder = SpeculativeDecoder(model, DraftModel(model), GenerationRequest([1, 2, 3], sampling, 50))
    lists = list(decoder)
    assert decoder.acceptance_rate == 1.0
    assert decoder.drafted == 50 - decoder.calls
    assert decoder.tokens_per_call == 50 / len(lists) > (5 if context == 64 else 2)
    assert [len(tokens) for tokens in lists[:2]] == [5, 6 if context == 64 else 4]


def test_statistics_of_a_draft_that_is_always_wrong() -> None:
    model = context_sensitive_model(CONFIG)
    wrong = perturbed_model(model)
    with torch.no_grad():
        wrong.lm_head.weight.mul_(-1)
    decoder = SpeculativeDecoder(model, DraftModel(wrong), GenerationRequest([1, 2, 3], GREEDY, 20))
    assert (decoder.acceptance_rate, decoder.tokens_per_call) == (0.0, 0.0)
    list(decoder)
    assert (decoder.calls, decoder.accepted, decoder.acceptance_rate) == (20, 0, 0.0)
    assert decoder.drafted == 4 + 3 + 2 + 16 * 1
    assert decoder.tokens_per_call == 1.0


def test_next_draft_length() -> None:
    assert [next_draft_length(4, accepted, 16) for accepted in range(5)] == [3, 3, 4, 4, 5]
    assert (next_draft_length(16, 16, 16), next_draft_length(1, 0, 16), next_draft_length(1, 1, 1)) == (16, 1, 1)


def test_prompt_lookup_proposals() -> None:
    def found(tokens: list[int], count: int = 4, ngram: int = 3) -> list[int]:
        return PromptLookup(ngram).propose(History(tokens), count, Sampling(), make_generator(0, 0)).tokens

    assert found([1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5, 6, 1]
    assert found([1, 2, 3, 7, 1, 2, 3, 8, 9, 0, 1, 2, 3], 2) == [8, 9]  # the latest
    assert found([1, 2, 3, 7, 2, 3, 8, 9, 1, 2, 3], 2) == [7, 2]  # the longest
    assert found([1, 2, 3, 7, 2, 3, 8, 9, 1, 2, 3], 2, ngram=2) == [8, 9]
    assert found([5, 6, 7, 6], 2) == [7, 6]  # down to one token
    assert found([1, 2, 1, 2]) == [1, 2, 1, 2]  # a copy continues with its own tokens
    assert found([3, 3]) == [3, 3, 3, 3]
    assert found([1, 2, 3]) == found([1]) == []


def test_settings_that_ban_every_token_after_a_draft_raise_only_when_reached() -> None:
    model = context_sensitive_model(SMALL_CONFIG)
    once_each = Sampling(no_repeat_ngram_size=1)  # at most four tokens
    for draft in (DraftModel(model), DraftModel(context_sensitive_model(SMALL_CONFIG, 1)), PromptLookup()):
        assert sorted(speculative_decode(model, draft, GenerationRequest([2], once_each, 3))) == [0, 1, 3]
        with pytest.raises(UserError, match="rule out every token"):
            speculative_decode(model, draft, GenerationRequest([2], once_each, 4))


def test_an_end_token_finishes_the_sequence_and_later_draft_tokens_are_dropped() -> None:
    model = random_model(CONFIG)
    whole = decode_without_draft(model, GenerationRequest([1, 2, 3], GREEDY, 30))
    end = whole[7]
    decoder = SpeculativeDecoder(model, DraftModel(model), GenerationRequest([1, 2, 3], GREEDY, 30, end_tokens=(end,)))
    tokens = [token for tokens in decoder for token in tokens]
    assert tokens == whole[: whole.index(end) + 1]
    assert decoder.sequence.finish_reason == "stop"
    assert list(decoder) == []


def test_dropout_is_off_for_draft_and_target_and_the_mode_is_restored() -> None:
    without, with_dropout = random_model(CONFIG), random_model(replace(CONFIG, dropout=0.5)).train()
    request = GenerationRequest([1, 2, 3], GREEDY, 30)
    decoder = SpeculativeDecoder(with_dropout, DraftModel(with_dropout), request)
    assert [token for tokens in decoder for token in tokens] == decode_without_draft(without, request)
    assert decoder.acceptance_rate == 1.0
    assert all(module.training for module in with_dropout.modules())


# Text


@pytest.mark.parametrize("name", ["another", "nearly", "lookup"])
def test_greedy_text_is_that_of_stream(name: str) -> None:
    model, tokenizer = random_model(CONFIG), get_tokenizer("bytes")
    draft = DRAFTERS[name](model)
    for prompt, count in (("Hello", 100), ("", 20), ("abcabcabc", 40), ("x" * 64, 5)):
        pieces = [piece for _, piece in stream(model, tokenizer, prompt, GREEDY, max_new_tokens=count)]
        whole = "".join(pieces)
        text = speculate(model, tokenizer, prompt, draft, GREEDY, max_new_tokens=count)
        assert "".join(text) == whole
        assert len(text.decoder.sequence.new_tokens) == count
        middle = whole[len(whole) // 2 :][:2]
        ended = speculate(model, tokenizer, prompt, draft, GREEDY, max_new_tokens=count, stop=[middle])
        assert "".join(ended) == whole[: whole.index(middle)]


def test_a_text_ends_at_the_end_of_text_token() -> None:
    model, tokenizer = random_model(CONFIG), get_tokenizer("bytes")
    sampling = Sampling(logit_bias={256: 1e6}, min_new_tokens=3)  # as early as possible
    for draft in (DraftModel(model), PromptLookup()):
        text = speculate(model, tokenizer, "Hello", draft, sampling, seed=1)
        shown, sequence = "".join(text), text.decoder.sequence
        assert (sequence.finish_reason, len(sequence.new_tokens), sequence.tokens[-1]) == ("stop", 4, 256)
        assert shown == tokenizer.decode(sequence.new_tokens[:3])


def test_a_seed_determines_the_text() -> None:
    model, tokenizer = context_sensitive_model(CONFIG), get_tokenizer("bytes")
    draft = DraftModel(context_sensitive_model(CONFIG, 1))

    def text(seed: int | None, sample: int = 0) -> str:
        pieces = speculate(model, tokenizer, "Hello", draft, max_new_tokens=20, seed=seed, sample_index=sample)
        return "".join(pieces)

    assert text(1) == text(1)
    assert len({text(1), text(2), text(1, 1), text(None), text(None)}) == 5


# Errors


def test_a_draft_of_another_vocabulary_or_tokenizer_is_refused(small_bpe: BPETokenizer) -> None:
    model, tokenizer = random_model(CONFIG), get_tokenizer("bytes")
    larger = DraftModel(random_model(replace(CONFIG, vocab_size=300)), small_bpe)
    with pytest.raises(UserError, match=r"^the draft has a vocabulary of 300 tokens, the model one of 257$"):
        speculate(model, tokenizer, "x", larger)
    with pytest.raises(UserError, match="vocabulary of 300"):
        SpeculativeDecoder(model, larger, GenerationRequest([1]))
    with pytest.raises(
        UserError, match=r"^the draft has another tokenizer than the model: their token ids do not match"
    ):
        speculate(model, tokenizer, "x", DraftModel(random_model(CONFIG), small_bpe))
    assert list(speculate(model, tokenizer, "x", DraftModel(model, tokenizer), max_new_tokens=0)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_of_model_or_draft_raise(value: float) -> None:
    sound, broken = random_model(CONFIG), random_model(CONFIG)
    with torch.no_grad():
        dict(broken.named_parameters())["transformer.h.1.mlp.c_proj.bias"][3] = value
    for sampling in (GREEDY, Sampling(top_k=5)):
        request = GenerationRequest([1, 2, 1], sampling, 5)
        for draft in (DraftModel(sound), PromptLookup()):
            with pytest.raises(NonFiniteLogitsError, match=r"^the model gives nan or inf"):
                speculative_decode(broken, draft, request)
        with pytest.raises(NonFiniteLogitsError, match=r"^the draft model cannot be used: the model gives nan or inf"):
            speculative_decode(sound, DraftModel(broken), request)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest([]), "no tokens"),
        (GenerationRequest([0] * 65), "65 tokens do not fit the model's context of 64"),
        (GenerationRequest([257]), "outside the model's vocabulary of 257"),
        (GenerationRequest([-1]), "outside the model's vocabulary of 257"),
        (GenerationRequest([1], max_new_tokens=-1), "max_new_tokens must be 0 or more"),
        (GenerationRequest([1], Sampling(logit_bias={257: 1})), "logit-bias: token 257"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_: GenerationRequest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpeculativeDecoder(random_model(CONFIG), PromptLookup(), request_)


def test_unsupported_drafts_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1 token to look for, not 0"):
        PromptLookup(0)
    with pytest.raises(UserError, match="a draft has at least 1 token, not 0"):
        SpeculativeDecoder(random_model(CONFIG), PromptLookup(), GenerationRequest([1]), max_draft_length=0)
    with pytest.raises(UserError, match="no tokenizer"):
        speculate(random_model(CONFIG), None, "x", PromptLookup())
    with pytest.raises(UserError, match="stop string"):
        speculate(random_model(CONFIG), get_tokenizer("bytes"), "x", PromptLookup(), stop=[""])
