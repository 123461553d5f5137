"""The chunked loss equals the plain one, and never holds all logits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2 import loss as loss_module
from gpt2.loss import IGNORE_INDEX, next_token_loss


def inputs(n: int = 37, c: int = 12, v: int = 53, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, c, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, c, dtype=dtype, requires_grad=True)
    targets = torch.randint(v, (n,))
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE_INDEX)


@pytest.mark.parametrize("rows_at_a_time", [1, 5, 37, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_float64(
    monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", rows_at_a_time * 53 * dtype.itemsize)
    hidden, weight, targets = inputs()
    expected = plain(hidden, weight, targets)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    got = next_token_loss(h, w, targets)
    assert got.dtype == dtype
    assert abs(got.double() - expected) < tolerance * 10
    for ours, theirs in zip(torch.autograd.grad(got * 3, (h, w)), expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs * 3, rtol=0, atol=tolerance * 10)


def test_gradcheck() -> None:
    hidden, weight, targets = inputs(n=6, c=3, v=7)
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, targets), (hidden, weight))


def test_divisor_makes_parts_add_up_to_the_whole() -> None:
    hidden, weight, targets = inputs()
    whole = torch.autograd.grad(next_token_loss(hidden, weight, targets), weight)[0]
    count = float((targets != IGNORE_INDEX).sum())
    parts = [next_token_loss(hidden[s], weight, targets[s], count) for s in (slice(0, 9), slice(9, 37))]
    torch.testing.assert_close(torch.autograd.grad(parts[0] + parts[1], weight)[0], whole)


def test_any_leading_shape_and_gradients_only_where_needed() -> None:
    hidden, weight, targets = inputs(n=36)
    flat = next_token_loss(hidden, weight, targets)
    assert torch.equal(next_token_loss(hidden.view(4, 9, 12), weight, targets.view(4, 9)), flat)
    frozen = next_token_loss(hidden, weight.detach(), targets)
    assert torch.autograd.grad(frozen, hidden)[0].shape == hidden.shape
    with torch.no_grad():
        assert not next_token_loss(hidden, weight, targets).requires_grad


def test_under_autocast_only_the_matrix_products_are_rounded() -> None:
    hidden, weight, targets = inputs(n=200, c=64, v=300, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_token_loss(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert abs(loss - plain(hidden, weight, targets)) / loss < 0.01
    grad = torch.autograd.grad(loss, weight)[0]
    reference = torch.autograd.grad(plain(hidden, weight, targets), weight)[0]
    assert grad.dtype == torch.float32
    assert F.cosine_similarity(grad.flatten(), reference.flatten(), 0) > 0.99


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    hidden, weight, targets = inputs()
    loss = next_token_loss(hidden, weight, targets) * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_all_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    n, c, v = 4096, 8, 1000
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 100 * v * 4)
    hidden, weight, targets = inputs(n, c, v, torch.float32)
    with LargestTensor() as ours:
        next_token_loss(hidden, weight, targets).backward()
    assert ours.elements <= 100 * v
    with LargestTensor() as theirs:
        plain(hidden, weight, targets).backward()
    assert theirs.elements == n * v  # the instrument works


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_padded_vocabulary_of_a_gpu_does_not_show() -> None:
    hidden, weight, targets = inputs(v=131, dtype=torch.float32)
    h, w = (t.detach().cuda().requires_grad_() for t in (hidden, weight))
    loss = next_token_loss(h, w, targets.cuda())
    torch.testing.assert_close(loss.cpu(), plain(hidden, weight, targets), rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(loss, w)[0].shape == (131, 12)


def test_padding_rows_take_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU path on a CPU: the padded head gives the loss and gradients of the plain one."""

    def padded_anywhere(weight: Tensor, dtype: torch.dtype) -> Tensor:
        rows = weight.new_zeros(-weight.size(0) % loss_module.VOCAB_PAD_MULTIPLE, weight.size(1))
        return torch.cat((weight, rows)).to(dtype)

    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(next_token_loss(hidden, weight, targets), (hidden, weight))
    monkeypatch.setattr(loss_module, "_pad_vocab", padded_anywhere)
    loss = next_token_loss(hidden, weight, targets)
    torch.testing.assert_close(loss, plain(hidden, weight, targets))
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), expected)
