"""Optimizers against plain loops of torch's own, and the learning rate schedules."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt2.config import TrainConfig
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.muon import Muon
from gpt2.optimizers import build_optimizers, learning_rate


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32))


def five_steps(model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        tokens, targets = torch.randint(61, (2, 4, 16), generator=generator)
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = tiny_model()
    muon, adamw = build_optimizers(model, TrainConfig(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert hidden == {f"transformer.h.{layer}.{kind}.weight" for layer in (0, 1) for kind in kinds}
    assert hidden | rest == set(names.values())
    assert not hidden & rest


def test_muon_equals_the_paper() -> None:
    """Momentum, Nesterov, an orthogonal step of AdamW's size: five updates against the formulas written out."""
    config = TrainConfig(optimizer="muon", lr=1e-2, weight_decay=0.1)
    model, twin = tiny_model(), tiny_model()
    five_steps(model, build_optimizers(model, config))

    matrices = [p for name, p in twin.named_parameters() if ".h." in name and p.dim() == 2]
    others = [p for name, p in twin.named_parameters() if not (".h." in name and p.dim() == 2)]
    groups = [
        {"params": [p for p in others if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    five_steps(twin, [PlainMuon(matrices, 1e-2, 0.1), torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))])
    for (name, ours), theirs, start in zip(
        model.named_parameters(), twin.parameters(), tiny_model().parameters(), strict=True
    ):
        if ours.dim() == 2:  # AdamW makes full steps from the gradients of key biases, which are rounding errors
            torch.testing.assert_close(ours - start, theirs - start, rtol=1e-3, atol=1e-5)
        moved, expected = (ours - start).detach().flatten(), (theirs - start).detach().flatten()
        assert F.cosine_similarity(moved, expected, 0) > 0.998, name
        assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.01), name


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_muon_equals_torch_up_to_its_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(3, *shape, generator=generator), torch.randn(4, 3, *shape, generator=generator)
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    one = Muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in gradients:
        for parameters, optimizer in ((ours, one), (theirs, other)):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, its, before in zip(ours, theirs, start, strict=True):
        assert F.cosine_similarity((mine - before).flatten(), (its - before).flatten(), 0) > 0.999
        torch.testing.assert_close(mine, its, rtol=0, atol=0.02)


def test_matrices_in_several_batches_are_updated_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def updated() -> list[nn.Parameter]:
        model = tiny_model()
        five_steps(model, build_optimizers(model, TrainConfig(optimizer="muon", lr=1e-2)))
        return list(model.parameters())

    together = updated()
    monkeypatch.setattr("gpt2.muon.BATCH_ELEMENTS", 1)
    for one, other in zip(updated(), together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


class PlainMuon(torch.optim.Optimizer):
    """Jordan et al. 2024 with the scaling of Liu et al. 2025, as plainly as it can be written."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                momentum = self.state[p].setdefault("m", torch.zeros_like(p))
                momentum.mul_(0.95).add_(p.grad, alpha=0.05)
                x = 0.05 * p.grad + 0.95 * momentum
                x = x / x.norm()
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(x, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_weight_decay_is_for_matrices_only(optimizer: str) -> None:
    model = tiny_model()
    decayed = {
        id(p): group["weight_decay"]
        for one in build_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.1))
        for group in one.param_groups
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert decayed[id(p)] == (0.1 if p.dim() == 2 else 0.0), name


def test_warmup_stable_decay() -> None:
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110, schedule="wsd")
    rates = [learning_rate(step, config) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10:88] == [1.0] * 78  # a fifth of 110 steps falls
    assert rates[88] == pytest.approx(1 - 0.8 / 22)
    assert rates[-1] == pytest.approx(0.2)
    falling = [learning_rate(step, replace(config, decay_steps=40)) for step in (70, 90, 110)]
    assert falling == pytest.approx([1.0, 0.6, 0.2])
    with pytest.raises(UserError, match="--decay-steps"):
        replace(config, decay_steps=101).check()


def test_schedules() -> None:
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110)
    rate = {
        name: [learning_rate(s, replace(config, schedule=name)) for s in range(1, 111)]
        for name in ("cosine", "linear", "constant")
    }
    for name, rates in rate.items():
        assert rates[:10] == pytest.approx([s / 10 for s in range(1, 11)]), name
        assert rates[9] == max(rates) == 1.0
    assert rate["cosine"][59] == pytest.approx(0.6)  # half way
    assert rate["cosine"][34] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate["cosine"][-1] == rate["linear"][-1] == pytest.approx(0.2)
    assert rate["linear"][59] == pytest.approx(0.6)
    assert rate["constant"][-1] == 1.0
    assert learning_rate(110, replace(config, min_lr=None)) == pytest.approx(0.1)
