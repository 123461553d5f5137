"""The model equals `transformers`, and its initialization is that of the paper."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from tests.helpers.transformers_reference import (
    ODD_CONFIGS,
    as_conv1d,
    random_batch,
    random_model,
    relative_error,
    to_transformers,
)


@pytest.mark.parametrize("config", ODD_CONFIGS, ids=lambda c: f"{c.n_layer}x{c.n_embd}/{c.n_head}")
@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_logits_loss_and_gradients_equal_transformers(config: GPTConfig, attention: str) -> None:
    model = random_model(replace(config, attention=attention))
    assert_equal_to_transformers(model, *random_batch(config))


def test_full_size_equals_transformers() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    assert model.num_parameters() == 124_439_808
    assert_equal_to_transformers(model, *random_batch(model.config, rows=1, length=48))


def assert_equal_to_transformers(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> None:
    """Logits, loss and every gradient equal those of transformers with the same weights."""
    reference = to_transformers(model)
    logits, theirs = model(tokens), reference(tokens).logits
    assert logits.shape == (*tokens.shape, model.config.vocab_size)
    assert (logits - theirs).abs().max() < 1e-4

    loss, their_loss = model.loss(tokens, targets), F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    assert abs(loss - their_loss) < 1e-5
    loss.backward()
    their_loss.backward()
    their_gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_error(as_conv1d(name, parameter.grad), their_gradients[name]) < 1e-4, name


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("cuts", [[1] * 17, [5, 4, 1, 7], [16, 1], [1, 16]])
def test_cached_logits_equal_uncached(cuts: list[int], attention: str) -> None:
    model = random_model(replace(ODD_CONFIGS[0], attention=attention))
    tokens, _ = random_batch(model.config)
    cache = model.make_cache(3)
    with torch.no_grad():
        whole = model(tokens)
        parts = torch.cat([model(part, cache) for part in tokens.split(cuts, 1)], 1)
    assert cache.length == 17
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_a_repeated_cache_is_independent() -> None:
    model = random_model(ODD_CONFIGS[0])
    tokens, _ = random_batch(model.config, rows=2)
    with torch.no_grad():
        cache = model.make_cache(2)
        model(tokens[:, :10], cache)
        several = cache.repeat(2)
        got = model(tokens[:, 10:].repeat_interleave(2, 0), several)
        assert cache.length == 10
        torch.testing.assert_close(got, model(tokens).repeat_interleave(2, 0)[:, 10:], rtol=0, atol=1e-5)


def test_attention_is_causal() -> None:
    model = random_model(ODD_CONFIGS[1])
    tokens, _ = random_batch(model.config)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % model.config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_initialization_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5000, block_size=256, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / std - 1) < 0.02, name
            assert abs(p.mean().item()) < std / 50, name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_scaled_initialization_keeps_the_residual_stream_independent_of_depth() -> None:
    def growth(n_layer: int, scaled: bool) -> float:
        """The standard deviation of what all blocks together add to the residual stream."""
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=n_layer, n_head=4, n_embd=128))
        if not scaled:
            for name, p in model.named_parameters():
                if name.endswith("c_proj.weight"):
                    torch.nn.init.normal_(p, std=0.02)
        tokens, _ = random_batch(model.config, rows=8)
        stream = {}
        model.transformer.h[0].register_forward_pre_hook(lambda _, args: stream.update(first=args[0]))
        model.transformer.ln_f.register_forward_pre_hook(lambda _, args: stream.update(last=args[0]))
        with torch.no_grad():
            model(tokens)
        return (stream["last"] - stream["first"]).std().item()

    # each of 2n additions has variance v: the sum's deviation is sqrt(2n v), or sqrt(v) after 1/sqrt(2n)
    assert growth(32, scaled=True) / growth(2, scaled=True) == pytest.approx(1, abs=0.15)
    assert growth(32, scaled=False) / growth(2, scaled=False) == pytest.approx(math.sqrt(16), rel=0.3)


def test_the_loss_of_an_untrained_124m_on_shakespeare_is_ln_vocab(gpt2_vocabulary: None, shakespeare_file) -> None:
    from gpt2.tokenizer import get_tokenizer

    tokens = torch.tensor(get_tokenizer("gpt2").encode(shakespeare_file.read_text()[:1000])[:129])
    torch.manual_seed(1337)
    with torch.no_grad():
        loss = GPT(GPTConfig()).loss(tokens[:-1].view(4, 32), tokens[1:].view(4, 32))
    assert loss.item() == pytest.approx(math.log(50257), abs=0.15)


def test_dropout_acts_in_training_only() -> None:
    model = random_model(replace(ODD_CONFIGS[0], dropout=0.5))
    tokens, _ = random_batch(model.config)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_too_many_tokens_are_refused_with_and_without_a_cache() -> None:
    model = random_model(ODD_CONFIGS[0])
    with pytest.raises(UserError, match=r"18 tokens do not fit the model's context of 17"):
        model(torch.zeros(1, 18, dtype=torch.long))
    cache = model.make_cache(1)
    model(torch.zeros(1, 17, dtype=torch.long), cache)
    with pytest.raises(UserError, match="18 tokens"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd (10) must be a multiple of n_head (3)"),
        ({"n_layer": 0}, "n_layer must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), not 1.0"),
        ({"activation_function": "gelu_nwe"}, "did you mean 'gelu_new'?"),
        ({"attention": "flash"}, "attention 'flash' is not one of sdpa, plain"),
    ],
)
def test_unsupported_config_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        GPTConfig(**values)
    assert message in str(error.value)


def test_compiled_blocks_give_the_same_loss_and_gradients() -> None:
    from gpt2.runtime import can_compile, compile_blocks

    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler for torch.compile")
    config = GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)
    model, compiled = random_model(config), random_model(config)
    compile_blocks(compiled.transformer.h)
    tokens, targets = random_batch(config)
    loss, other = model.loss(tokens, targets), compiled.loss(tokens, targets)
    loss.backward()
    other.backward()
    assert abs(loss - other) < 1e-5
    assert list(compiled.state_dict()) == list(model.state_dict())
    for ours, theirs in zip(model.parameters(), compiled.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 1e-4
