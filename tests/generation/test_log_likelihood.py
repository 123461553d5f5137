"""`token_log_likelihoods` equals the log-softmax of the plain model, whatever the window and the chunk."""

from dataclasses import replace

import pytest
import torch

from gpt2.errors import NonFiniteLogitsError
from gpt2.generation import log_likelihood
from gpt2.generation.log_likelihood import token_log_likelihoods
from gpt2.model import GPT, GPTConfig
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16)
TOKENS = torch.randint(61, (45,), generator=torch.Generator().manual_seed(0)).tolist()


def windowed_logits(model: GPT, tokens: list[int], stride: int) -> torch.Tensor:
    """(N, V): the logits before each token but the first, in the first window that has it as a target."""
    rows: list[torch.Tensor] = []
    start = 0
    with torch.no_grad():
        while len(rows) < len(tokens) - 1:
            logits = model(torch.tensor([tokens[start : start + 16]]))[0]
            rows += list(logits[len(rows) - start : len(tokens) - 1 - start])
            start += stride
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("stride", [None, 1, 8, 16])
@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 45])
def test_scores_equal_the_log_softmax_of_windows(
    length: int, stride: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_likelihood, "LOGITS_CHUNK", chunk)
    model, tokens = random_model(CONFIG), TOKENS[:length]
    scores = token_log_likelihoods(model, tokens, stride=stride, num_top=3)
    expected = windowed_logits(model, tokens, stride or 16).log_softmax(-1)
    targets = torch.tensor(tokens[1:])[:, None]
    torch.testing.assert_close(scores.logprobs, expected.gather(1, targets)[:, 0])
    assert torch.equal(scores.ranks, (expected > expected.gather(1, targets)).sum(1) + 1)
    torch.testing.assert_close(scores.top_logprobs, expected.topk(3).values)
    assert torch.equal(scores.top_ids, expected.topk(3).indices)


def test_rank_one_is_the_greedy_token_and_dropout_is_off() -> None:
    model = random_model(replace(CONFIG, dropout=0.5)).train()
    tokens = [3]
    for _ in range(10):
        with torch.no_grad():
            tokens.append(int(model.eval()(torch.tensor([tokens]))[0, -1].argmax()))
    model.train()
    assert token_log_likelihoods(model, tokens).ranks.tolist() == [1] * 10
    assert model.training


def test_all_logits_are_never_held() -> None:
    model, sizes = random_model(replace(CONFIG, block_size=300)), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel() // 61))
    token_log_likelihoods(model, TOKENS * 6)
    assert max(sizes) == log_likelihood.LOGITS_CHUNK
    assert sum(sizes) == 45 * 6 - 1


def test_non_finite_logits_and_unsupported_arguments_raise() -> None:
    model = random_model(CONFIG)
    for tokens, stride in (([1], None), ([], None), ([1, 2], 0), ([1, 2], 17)):
        with pytest.raises(ValueError, match="cannot score"):
            token_log_likelihoods(model, tokens, stride=stride)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteLogitsError):
        token_log_likelihoods(model, TOKENS)
