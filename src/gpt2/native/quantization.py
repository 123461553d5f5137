"""Group-wise quantization of weights to 8 or 4 bits, and the packed layout that the kernel reads."""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP_SIZES = {"int8": 128, "int4": 32}  # consecutive weights of a row that share a scale
BITS = {"int8": 8, "int4": 4}
ROWS_PER_CHUNK = 256  # rows that are quantized at a time: they fit the processor's cache
ROWS_PER_TILE = 16  # one row in each lane of a 512-bit register


def quantize(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (out, in): uint8 (out, groups, group) with its zero point at 128 or 8, and bfloat16 scales.

    The scales are (out, groups); the matrix is about ``(quantized - zero_point) * scale``. Rows are padded with zeros
    to a multiple of the group size. For 4 bits each group uses the one of several scales with the least squared error.
    """
    parts = [_quantize_chunk(rows, precision) for rows in weight.split(ROWS_PER_CHUNK)]
    return torch.cat([quantized for quantized, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantize_chunk(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    group, zero_point = GROUP_SIZES[precision], 2 ** (BITS[precision] - 1)
    padded = F.pad(weight.float(), (0, -weight.size(1) % group)).unflatten(1, (-1, group))  # (out, groups, group)
    max_abs = padded.abs().amax(-1)
    if precision == "int8":
        scale = _bfloat16_scale(max_abs / (zero_point - 1))
        return _round_groups(padded, scale, zero_point), scale.bfloat16()
    signed = padded.gather(-1, padded.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_scale, least_error = _bfloat16_scale(-signed / zero_point), torch.full_like(max_abs, torch.inf)
    for divisor in (8.0, 7.5, 7.0, 6.5):
        scale = _bfloat16_scale(-signed / divisor)  # the largest value is quantized to -8: that side has one more step
        dequantized = (_round_groups(padded, scale, zero_point).float() - zero_point) * scale.unsqueeze(-1)
        error = (dequantized - padded).square().sum(-1)
        best_scale = torch.where(error < least_error, scale, best_scale)
        least_error = torch.minimum(error, least_error)
    return _round_groups(padded, best_scale, zero_point), best_scale.bfloat16()


def dequantize(quantized: Tensor, scale: Tensor, precision: str, in_features: int) -> Tensor:
    """The inverse of `quantize`, up to rounding: a float32 matrix (out, in_features)."""
    zero_point = 2 ** (BITS[precision] - 1)
    return ((quantized.float() - zero_point) * scale.float().unsqueeze(-1)).flatten(1)[:, :in_features]


def pack(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Quantize and pack a matrix (out, in) for the kernel: uint8 weights, and bfloat16 scales (out / 16, groups, 16).

    int8: (out / 16, in / 4, 16, 4). int4: (out / 16, in / 8, 16, 4), two weights per byte.
    """
    weights, scale = quantize(weight, precision)
    padding = (0, 0, 0, -len(weights) % ROWS_PER_TILE)
    weights = F.pad(weights.flatten(1), padding).unflatten(1, (-1, 4)).unflatten(0, (-1, ROWS_PER_TILE))
    weights = weights.transpose(1, 2)  # (out / 16, in / 4, 16, 4)
    if precision == "int4":
        weights = weights[:, 0::2] | weights[:, 1::2] << 4
    scales = F.pad(scale, padding).unflatten(0, (-1, ROWS_PER_TILE)).transpose(1, 2)
    return weights.contiguous(), scales.contiguous()


def _bfloat16_scale(scale: Tensor) -> Tensor:
    """`scale` rounded to bfloat16, and 1 instead of 0 (a group of zeros)."""
    rounded = scale.bfloat16().float()
    return torch.where(rounded == 0, 1.0, rounded)


def _round_groups(groups: Tensor, scale: Tensor, zero_point: int) -> Tensor:
    return (groups / scale.unsqueeze(-1)).round_().add_(zero_point).clamp_(0, 2 * zero_point - 1).to(torch.uint8)
