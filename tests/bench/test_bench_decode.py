"""What a decoding step reads from memory, and the perplexity of a text."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gpt2.bench.decode import DecodeWorkload, GPT2Decoder, bytes_per_step, perplexity, weight_bytes
from gpt2.model import GPT, GPTConfig
from gpt2.native.quantization import pack

TINY = GPTConfig(vocab_size=3001, n_layer=2, n_head=2, n_embd=64)
WORK = DecodeWorkload("cpu", TINY, prompt_tokens=6, new_tokens=9, batch_sizes=(1, 3), rounds=2, seed=0, pause=0)


def test_bytes_read_by_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(vocab_size=304, n_layer=2, n_head=2, n_embd=128)
    linears = {name: m.weight for name, m in GPT(config).named_modules() if isinstance(m, nn.Linear)}
    assert weight_bytes(config, 32) == sum(4 * weight.numel() for weight in linears.values())
    for precision in ("int8", "int4"):
        packed = (pack(w, "int8" if name == "lm_head" else precision) for name, w in linears.items())
        total = sum(part.numel() * part.element_size() for both in packed for part in both)
        monkeypatch.setattr(
            "gpt2.bench.decode.prepare_for_inference", lambda m, _: SimpleNamespace(make_cache=m.make_cache)
        )
        assert GPT2Decoder(replace(WORK, config=config), precision, False).weight_bytes == total
    positions = WORK.prompt_tokens + 9 / 2
    cache = GPT(TINY).make_cache(3, 1000).data
    assert bytes_per_step(WORK, 5000, 4, 3, 9) == pytest.approx(5000 + cache.nbytes * positions / 1000)


def test_perplexity_equals_exp_of_the_loss() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, block_size=32, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    tokens = torch.randint(97, (75,), generator=torch.Generator().manual_seed(1))
    found = perplexity(model, tokens.tolist())
    assert model.training
    windows = [tokens[None, start : start + 33] for start in (0, 32, 64)]
    losses = [model.eval().loss(window[:, :-1], window[:, 1:]).item() for window in windows]
    mean = (32 * losses[0] + 32 * losses[1] + 10 * losses[2]) / 74
    assert found == pytest.approx(math.exp(mean), rel=1e-5)
