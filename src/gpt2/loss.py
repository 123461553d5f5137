"""Next-token loss (mean negative log-likelihood) from hidden states, without ever holding all logits.

With a vocabulary of 50,257 the logits dominate the memory of a small GPT-2: at batch 16 x 1024 the float32 logits
alone are 3.3 GB, and their gradient as much again. Here the head and the cross-entropy run on a few hundred rows at a
time, and the gradient of a chunk is computed in the forward pass, so no logits are computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # targets with this id are ignored, as in torch and transformers
CHUNK_BYTES = 2**27  # logits held at a time, in the dtype of the matrix products
CPU_CACHE_ELEMENTS = 2**21  # logits that the CPU converts to float32 at a time, so that they stay in its cache
VOCAB_PAD_MULTIPLE = 128  # tensor cores need dimensions in multiples of this; 50,257 is odd


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, divisor: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against `targets`, in nats.

    hidden:  (..., C), the output of the last layer norm.
    weight:  (V, C), the output head; for GPT-2 the token embedding.
    targets: (...) int64; positions with -100 are ignored.
    divisor: what the sum of the losses is divided by; None for the number of counted targets. Gradient accumulation
             and data parallelism pass the count of the whole global batch, so that the parts add up to its mean.

    Returns a scalar, float32 (float64 for float64 input). Under autocast the matrix products run in autocast's
    dtype; the softmax and all sums stay in float32. There are no second derivatives.
    """
    hidden, targets = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if divisor is None:
        divisor = (targets != IGNORE_INDEX).sum()
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
        needs_grad = tuple(grad_enabled and need for need in ctx.needs_input_grad[:2])
        loss, ctx.grads = _loss_and_gradients(hidden, weight, targets, divisor, dtype, *needs_grad)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = divisor, dtype, *needs_grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads, ctx.grads = ctx.grads, None  # no reference left, so that autograd need not copy them
        if grads is None:  # a second backward pass with retain_graph=True
            grads = _loss_and_gradients(*ctx.saved_tensors, *ctx.settings)[1]
        (scale,) = grad_outputs
        # In training on a CPU it is always 1; what torch compiles must not depend on a value.
        if torch.compiler.is_compiling() or not (scale.device.type == "cpu" and scale == 1):
            grads = [None if grad is None else grad * scale for grad in grads]
        return *grads, None, None, None, None


def _loss_and_gradients(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (V, C)
    targets: Tensor,  # (N,)
    divisor: Tensor | float,
    dtype: torch.dtype,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and its gradients for `hidden` and `weight` where they are needed."""
    accum_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    vocab_size = weight.size(0)
    head = _pad_vocab(weight, dtype)  # (V', C) with V' a multiple of 128 on a GPU
    total = torch.zeros((), dtype=accum_dtype, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if hidden_needs_grad else None
    grad_head: Tensor | None = None  # (V', C), in `accum_dtype`

    rows_at_a_time = max(1, CHUNK_BYTES // (head.size(0) * head.element_size()))
    for start in range(0, hidden.size(0), rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        h = hidden[rows].to(dtype)  # (n, C)
        logits = h @ head.T  # (n, V')
        counted = targets[rows] != IGNORE_INDEX  # (n,)
        target = targets[rows].where(counted, 0)
        needs_grad = hidden_needs_grad or weight_needs_grad
        losses = _cross_entropy_and_grad(logits, target, vocab_size, accum_dtype, needs_grad)
        total += losses.where(counted, 0).sum()
        grad, counted = logits, counted.unsqueeze(1)  # (n, V'), (n, 1)
        if grad_hidden is not None:
            grad_hidden[rows] = ((grad @ head) / divisor).where(counted, 0)
        if weight_needs_grad:
            grad_head = _add_matmul(grad_head, grad.T, h.where(counted, 0), accum_dtype)
        del logits, grad
    grad_weight = None if grad_head is None else grad_head[:vocab_size].div_(divisor).to(weight.dtype)
    return total / divisor, [grad_hidden, grad_weight]


def _cross_entropy_and_grad(
    logits: Tensor, target: Tensor, vocab_size: int, accum_dtype: torch.dtype, needs_grad: bool
) -> Tensor:
    """The cross-entropy of each row, (n,). With `needs_grad`, `logits` (n, V') are overwritten by its gradient."""
    n, width = logits.shape
    block = max(1, CPU_CACHE_ELEMENTS // width) if logits.device.type == "cpu" else n
    losses = torch.empty(n, dtype=accum_dtype, device=logits.device)
    for start in range(0, n, block):
        rows = slice(start, start + block)
        z, index = logits[rows].to(accum_dtype), target[rows].unsqueeze(1)  # (b, V'), (b, 1)
        if width > vocab_size:
            z[:, vocab_size:] = -torch.inf  # padding rows have no probability
        z = z.log_softmax(1)
        losses[rows] = -z.gather(1, index).squeeze(1)
        if needs_grad:
            logits[rows] = z.exp_().scatter_add_(1, index, z.new_full(index.shape, -1.0))
    return losses


def _pad_vocab(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, on a GPU padded with zero rows to a multiple of 128.

    The cast copies the weight anyway, so padding is free. It exists here only: not in parameters, files or logits.
    """
    missing = -weight.size(0) % VOCAB_PAD_MULTIPLE
    if not weight.is_cuda or not missing:
        return weight.to(dtype)
    padded = weight.new_zeros(weight.size(0) + missing, weight.size(1), dtype=dtype)
    padded[: weight.size(0)] = weight
    return padded


def _add_matmul(total: Tensor | None, a: Tensor, b: Tensor, accum_dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` in `accum_dtype`, which may be wider than the factors' dtype; None is zero."""
    if total is None:
        return (a @ b).to(accum_dtype)
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)
