"""Next-token loss from hidden states, without ever holding all logits.

A vocabulary of 50,257 is where a small GPT-2 spends its memory: at batch 16 x 1024 the float32 logits alone
are 3.3 GB, and their gradient as much again. Here the head and the cross-entropy are done a few hundred rows at a
time, and the gradient of a chunk is taken while its logits are still at hand, so they are never computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target with this id is not counted, as in torch and transformers
CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MiB in float32
PAD_TO = 128  # tensor cores want dimensions in multiples of this; 50,257 is odd


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against `targets`, in nats.

    hidden:  (..., C) what the last layer norm gives.
    weight:  (V, C) the output head; for GPT-2 the token embedding.
    targets: (...) int64; positions with -100 are not counted.
    divisor: what the sum of the losses is divided by; None for the number of counted targets. Gradient accumulation
             and data parallelism pass the count of the whole global batch, so that the parts add up to its mean.

    Returns a scalar, float32 (float64 for float64 input). Under autocast the matrix products run in autocast's
    dtype; the softmax and all sums stay in float32. Gradients can be taken once, not twice.
    """
    hidden, targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if divisor is None:
        divisor = (targets != IGNORE).sum()
    with torch.autocast(device, enabled=False):
        loss = _ChunkedCrossEntropy.apply(hidden, weight, targets, divisor, dtype, torch.is_grad_enabled())
    assert isinstance(loss, Tensor)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, C)
        weight: Tensor,  # (V, C)
        targets: Tensor,  # (N,)
        divisor: Tensor | float,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        want_hidden, want_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        vocab_size = weight.size(0)
        head = _padded(weight, dtype)  # (V', C) with V' a multiple of 128 on a GPU
        total = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = torch.zeros_like(head, dtype=exact) if want_weight else None

        rows_at_a_time = max(1, CHUNK_ELEMENTS // head.size(0))
        for start in range(0, hidden.size(0), rows_at_a_time):
            rows = slice(start, start + rows_at_a_time)
            h = hidden[rows].to(dtype)  # (n, C)
            logits = (h @ head.T).to(exact)  # (n, V')
            logits[:, vocab_size:] = -torch.inf  # the padding is in no one's vocabulary
            counted = targets[rows] != IGNORE  # (n,)
            target = targets[rows].where(counted, 0).unsqueeze(1)  # (n, 1)
            log_norm = logits.logsumexp(1)  # (n,)
            total += ((log_norm - logits.gather(1, target).squeeze(1)) * counted).sum()
            if not (want_hidden or want_weight):
                continue
            # d loss / d logits = softmax - one_hot, and nothing in rows that are not counted
            log_norm = log_norm.where(counted, torch.inf)
            grad = logits.sub_(log_norm.unsqueeze(1)).exp_()  # (n, V')
            grad.scatter_add_(1, target, -counted.unsqueeze(1).to(exact))
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad @ head) / divisor
            if grad_head is not None:
                _add_product(grad_head, grad.T, h)

        if grad_head is not None:
            grad_head = grad_head[:vocab_size].div_(divisor).to(weight.dtype)
        ctx.grads = grad_hidden, grad_head
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = grad_outputs
        grad_hidden, grad_weight = (None if grad is None else grad * scale for grad in ctx.grads)
        return grad_hidden, grad_weight, None, None, None, None


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, on a GPU with zero rows up to a multiple of 128: the one place where padding exists.

    A cast has to copy the weight anyway, so the padding is free, and no parameter, file or logit ever shows it.
    """
    missing = -weight.size(0) % PAD_TO
    if not weight.is_cuda or not missing:
        return weight.to(dtype)
    padded = weight.new_zeros(weight.size(0) + missing, weight.size(1), dtype=dtype)
    padded[: weight.size(0)] = weight
    return padded


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, where the sum may be kept in a wider dtype than the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
