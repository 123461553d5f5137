"""Weights in 8 or 4 bits: rounded in small groups, and packed in the order in which the kernel reads them."""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP_SIZES = {"int8": 128, "int4": 32}  # so many neighbours along a row share a scale
BITS = {"int8": 8, "int4": 4}
ROWS_PER_CHUNK = 256  # rows are rounded together: they fit the processor's caches
ROWS_PER_TILE = 16  # stand side by side, one in each lane of a 512-bit register


def quantize(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Round a matrix (out, in): to whole numbers, uint8 (out, groups, group), with zero at 128 or 8, and scales.

    The scales, (out, groups), are bfloat16; the matrix is about ``(numbers - zero) * scale``. A row that is no
    multiple of the group is padded with zeros. For 4 bits, where it matters, each group takes of several scales the
    one that leaves the least squared error.
    """
    parts = [_quantize_chunk(rows, precision) for rows in weight.split(ROWS_PER_CHUNK)]
    return torch.cat([numbers for numbers, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantize_chunk(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    group, zero = GROUP_SIZES[precision], 2 ** (BITS[precision] - 1)
    padded = F.pad(weight.float(), (0, -weight.size(1) % group)).unflatten(1, (-1, group))  # (out, groups, group)
    most = padded.abs().amax(-1)
    if precision == "int8":
        scale = _bfloat16_scale(most / (zero - 1))
        return _round_groups(padded, scale, zero), scale.bfloat16()
    signed = padded.gather(-1, padded.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, least = _bfloat16_scale(-signed / zero), torch.full_like(most, torch.inf)
    for divisor in (8.0, 7.5, 7.0, 6.5):
        scale = _bfloat16_scale(-signed / divisor)  # the largest comes to lie at -8, where there is one step more
        left = ((_round_groups(padded, scale, zero).float() - zero) * scale.unsqueeze(-1) - padded).square().sum(-1)
        best, least = torch.where(left < least, scale, best), torch.minimum(left, least)
    return _round_groups(padded, best, zero), best.bfloat16()


def dequantize(quantized: Tensor, scale: Tensor, precision: str, in_features: int) -> Tensor:
    """The matrix, float32 (out, columns), that `quantize` stands for."""
    zero = 2 ** (BITS[precision] - 1)
    return ((quantized.float() - zero) * scale.float().unsqueeze(-1)).flatten(1)[:, :in_features]


def pack(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) for the kernel: its weights, uint8, and its scales, bfloat16 (out / 16, groups, 16).

    int8: (out / 16, in / 4, 16, 4). int4: the same with half of the steps, each holding two.
    """
    numbers, scale = quantize(weight, precision)
    short = -len(numbers) % ROWS_PER_TILE
    numbers = F.pad(numbers.flatten(1), (0, 0, 0, short)).unflatten(1, (-1, 4)).unflatten(0, (-1, ROWS_PER_TILE))
    numbers = numbers.transpose(1, 2)  # (out / 16, in / 4, 16, 4)
    if precision == "int4":
        numbers = numbers[:, 0::2] | numbers[:, 1::2] << 4
    scales = F.pad(scale, (0, 0, 0, short)).unflatten(0, (-1, ROWS_PER_TILE)).transpose(1, 2)
    return numbers.contiguous(), scales.contiguous()


def _bfloat16_scale(scale: Tensor) -> Tensor:
    """As bfloat16 keeps it, and never 0: a group of zeros may have any."""
    kept = scale.bfloat16().float()
    return torch.where(kept == 0, 1.0, kept)


def _round_groups(groups: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    return (groups / scale.unsqueeze(-1)).round_().add_(zero_point).clamp_(0, 2 * zero_point - 1).to(torch.uint8)
