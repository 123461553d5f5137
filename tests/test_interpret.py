"""`gpt2.trace` and its siblings: against `transformers`, against definitions, and against TransformerLens (slow)."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gpt2
from gpt2.errors import RequestError
from gpt2.interpret import activation_names, head_scores
from gpt2.model import GPT, GPTConfig
from tests.helpers.known_heads import previous_token_model
from tests.helpers.transformers_reference import random_model, to_transformers

CONFIG = GPTConfig(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32)
TOKENS = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(3))
REFERENCE = Path(__file__).parent / "helpers" / "transformer_lens_reference.py"


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


def hooks_of(model: GPT) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_trace_equals_transformers(model: GPT) -> None:
    found = gpt2.trace(model, TOKENS)
    reference = to_transformers(model)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = reference(TOKENS, output_attentions=True, output_hidden_states=True)
    assert list(found.activations) == activation_names(model)
    torch.testing.assert_close(found.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    for i in range(CONFIG.n_layer):
        block: Any = model.transformer.h[i]
        torch.testing.assert_close(found[f"blocks.{i}.attn.hook_pattern"], theirs.attentions[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"blocks.{i}.hook_resid_pre"], theirs.hidden_states[i], rtol=1e-4, atol=1e-5)
        results = found[f"blocks.{i}.attn.hook_result"].sum(2) + block.attn.c_proj.bias
        torch.testing.assert_close(results, found[f"blocks.{i}.hook_attn_out"], rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_after_a_call(model: GPT) -> None:
    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    before = model(TOKENS)
    gpt2.trace(model, TOKENS, ["blocks.1.hook_resid_mid"])
    with pytest.raises(ZeroDivisionError):
        gpt2.patch(model, TOKENS, {"blocks.1.attn.hook_z": fail})
    assert hooks_of(model) == 0
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize(
    "name", [n for n in activation_names(random_model(CONFIG)) if not n.endswith(("scores", "result"))]
)
def test_every_activation_can_be_patched(model: GPT, name: str) -> None:
    """With its own value nothing changes; with that of another text, the logits of both runs meet where they must."""
    own, other = gpt2.trace(model, TOKENS), gpt2.trace(model, TOKENS.flip(1))
    torch.testing.assert_close(gpt2.patch(model, TOKENS, {name: own[name]}), own.logits, rtol=1e-4, atol=1e-5)
    patched = gpt2.patch(model, TOKENS, {name: other[name]})
    if name == "hook_pos_embed":
        torch.testing.assert_close(patched, own.logits, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.equal(patched, own.logits)
    if name == "hook_embed" or "resid" in name:
        torch.testing.assert_close(patched, other.logits, rtol=1e-4, atol=1e-5)


def test_ablation(model: GPT) -> None:
    heads, mlps = [(0, 1), (2, 3), (2, 0)], [1]
    got = gpt2.ablate(model, TOKENS, heads, mlps)
    same: Any = random_model(CONFIG)
    D = CONFIG.n_embd // CONFIG.n_head
    for layer, head in heads:
        same.transformer.h[layer].attn.c_proj.weight.data[:, head * D : (head + 1) * D] = 0
    for layer in mlps:
        same.transformer.h[layer].mlp.c_proj.weight.data.zero_()
        same.transformer.h[layer].mlp.c_proj.bias.data.zero_()
    torch.testing.assert_close(got, same(TOKENS), rtol=1e-4, atol=1e-5)
    means = {"blocks.0.attn.hook_z": mean_of_head(1)}
    expected = gpt2.patch(model, TOKENS, means)
    torch.testing.assert_close(gpt2.ablate(model, TOKENS, [(0, 1)], mode="mean"), expected)


def mean_of_head(head: int) -> Callable[[Tensor], Tensor]:
    def replace(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, head] = z[:, :, head].mean((0, 1))
        return z

    return replace


@pytest.mark.parametrize("alternative", [None, 7])
def test_attributions_sum_to_the_logit(model: GPT, alternative: int | None) -> None:
    row = TOKENS[:1]
    got = gpt2.logit_attribution(model, row, 5, alternative, position=6)
    logits = model(row)[0, 6]
    expected = float(logits[5] - (0 if alternative is None else logits[alternative]))
    parts = got.heads.sum() + got.attn_bias.sum() + got.mlps.sum() + got.embed + got.pos_embed + got.bias
    assert got.heads.shape == (3, 4)
    assert float(parts) == pytest.approx(expected, abs=1e-4)
    assert got.total == pytest.approx(expected, abs=1e-4)


def test_mistakes_are_named(model: GPT) -> None:
    with pytest.raises(RequestError, match=r"no activation 'blocks.0.hook_resid' .*did you mean 'blocks.0.hook_resid_"):
        gpt2.trace(model, TOKENS, ["blocks.0.hook_resid"])
    with pytest.raises(
        RequestError, match=r"hook_mlp_out has the shape \(2, 11, 32\), and its replacement \(1, 11, 32\)"
    ):
        gpt2.patch(model, TOKENS, {"blocks.0.hook_mlp_out": torch.zeros(1, 11, 32)})
    with pytest.raises(RequestError, match=r"no activation 'blocks.0.attn.hook_result'"):
        gpt2.patch(model, TOKENS, {"blocks.0.attn.hook_result": torch.zeros(1)})
    with pytest.raises(RequestError, match="no head 4 in layer 0"):
        gpt2.ablate(model, TOKENS, [(0, 4)])
    with pytest.raises(RequestError, match="mode must be 'zero' or 'mean'"):
        gpt2.ablate(model, TOKENS, [(0, 0)], mode="median")
    with pytest.raises(RequestError, match="token 61 is not in the model's vocabulary of 61"):
        gpt2.logit_attribution(model, TOKENS[:1], 61)


@pytest.mark.slow
def test_equal_to_transformer_lens(model: GPT, tmp_path: Path) -> None:
    """$GPT2_TRANSFORMER_LENS is a Python that has transformer_lens, whose requirements exclude ours."""
    python = os.environ.get("GPT2_TRANSFORMER_LENS")
    if not python:
        pytest.skip("GPT2_TRANSFORMER_LENS is not set")
    gpt2.save(model, None, tmp_path)
    subprocess.run([python, str(REFERENCE), str(tmp_path)], check=True, timeout=300)
    theirs = torch.load(tmp_path / "reference.pt", weights_only=True)
    ours = gpt2.trace(model, TOKENS)
    for name, value in theirs["activations"].items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert len(theirs["activations"]) > 12 * CONFIG.n_layer
    torch.testing.assert_close(ours.logits, theirs["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gpt2.ablate(model, TOKENS, [(1, 2)]), theirs["ablated"], rtol=1e-5, atol=1e-5)
    other = gpt2.trace(model, TOKENS.flip(1), ["blocks.1.hook_resid_pre"])
    patched = gpt2.patch(model, TOKENS, {"blocks.1.hook_resid_pre": other["blocks.1.hook_resid_pre"]})
    torch.testing.assert_close(patched, theirs["patched"], rtol=1e-5, atol=1e-5)
    got = gpt2.logit_attribution(model, TOKENS[:1], 5, 7)
    torch.testing.assert_close(got.heads.flatten(), theirs["heads"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.mlps, theirs["mlps"], rtol=1e-5, atol=1e-5)


def test_head_scores_are_means_of_diagonals(model: GPT) -> None:
    got = head_scores(model, length=50, rows=2, seed=7)  # 12 tokens fit the context twice
    once = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(7))
    run = gpt2.trace(model, torch.cat([once, once], 1))
    for layer in range(CONFIG.n_layer):
        pattern = run[f"blocks.{layer}.attn.hook_pattern"]
        for name, offset in (("previous", 1), ("duplicate", 12), ("induction", 11)):
            rows = [pattern[:, :, t, t - offset] for t in range(12, 24)]
            expected = torch.stack(rows).mean((0, 1))
            torch.testing.assert_close(getattr(got, name)[layer], expected, rtol=1e-4, atol=1e-6)


def test_the_scores_find_a_head_that_looks_at_the_previous_token() -> None:
    model = previous_token_model(50, 32)
    scores = head_scores(model)
    assert float(scores.previous[0, 0]) > 0.99
    assert float(scores.duplicate[0, 0]) < 0.01
    with pytest.raises(RequestError, match="a context of at least 4 tokens, not 3"):
        head_scores(random_model(GPTConfig(vocab_size=5, block_size=3, n_layer=1, n_head=1, n_embd=4)))


def test_the_last_logits_alone(model: GPT) -> None:
    vector = torch.ones(CONFIG.n_embd)
    change = {"blocks.1.hook_resid_pre": lambda x: x + vector}
    last = gpt2.patch(model, TOKENS, change, last_only=True)
    torch.testing.assert_close(last, gpt2.patch(model, TOKENS, change)[:, -1:])
    torch.testing.assert_close(
        gpt2.ablate(model, TOKENS, [(0, 1)], last_only=True), gpt2.ablate(model, TOKENS, [(0, 1)])[:, -1:]
    )


def test_a_run_is_resumed_from_a_layer(model: GPT) -> None:
    before = gpt2.trace(model, TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    got = gpt2.ablate(model, TOKENS, [(1, 2)], [2], resume=(1, before))
    torch.testing.assert_close(got, gpt2.ablate(model, TOKENS, [(1, 2)], [2]))
