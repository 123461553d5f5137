"""Muon, batched and distributed: each matrix's update is computed whole, by one rank.

The method: Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The scale of the
update: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2. In one process on a GPU it computes what
``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` does, up to rounding; that has no batches and no ranks.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's post
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-7
BATCH_ELEMENTS = 2**22  # of the matrices that a rank computes at once: small ones are batched, large ones are not


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration: each matrix with its singular values moved towards 1. (N, A, B) -> (N, A, B)

    In bfloat16 on a GPU, where that is fast and Muon's authors show it to be enough. In float32 elsewhere: on a CPU
    it is faster than bfloat16 at the sizes of GPT-2, and one rank computes what any other number of ranks computes.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)  # now no singular value is over 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(Optimizer):
    """Muon for matrices, with decoupled weight decay and Nesterov momentum.

    The learning rate is scaled by ``0.2 * sqrt(max(A, B))``, which gives updates the RMS of AdamW's: one --lr fits
    both. Over several ranks, with whole gradients (DDP) or shards of them (FSDP2), each rank orthogonalizes its share
    of the matrices of each shape, round robin, and the ranks exchange the updates.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """group: with DDP, the ranks that share the work. With FSDP2 it follows from the parameters."""
        self._group = group
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update. Parameters without a gradient are left as they are. `closure` is not supported."""
        assert closure is None
        for settings in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device], list[nn.Parameter]] = {}
            for parameter in settings["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for parameters in by_shape.values():
                group = self._ranks_of(parameters[0])
                size = batch_length(*parameters[0].shape) * (1 if group is None else group.size())
                for first in range(0, len(parameters), size):
                    self._update(parameters[first : first + size], group, settings)

    def _ranks_of(self, parameter: nn.Parameter) -> dist.ProcessGroup | None:
        """The ranks that share the work on `parameter`: those that hold its shards, or those of DDP."""
        mesh: Any = getattr(parameter, "device_mesh", None)
        return self._group if mesh is None else mesh.get_group(mesh.ndim - 1)

    def _update(
        self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None, settings: dict[str, Any]
    ) -> None:
        """Update matrices of one shape (A, B)."""
        lr, momentum, nesterov = settings["lr"], settings["momentum"], []
        for parameter in parameters:
            gradient, state = cast("Tensor", parameter.grad), self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            gradient, buffer = _local(gradient), _local(state["momentum_buffer"])
            nesterov.append(gradient.lerp(buffer.lerp_(gradient, 1 - momentum), momentum))
        directions = torch.stack(nesterov)  # (N, A, B), with FSDP2 (N, a, B)
        if group is None or group.size() == 1:
            updates = orthogonalize(directions)
        elif _is_dtensor(parameters[0]):
            updates = _orthogonalize_sharded(directions, group, parameters[0].shape[0])
        else:
            updates = _orthogonalize_replicated(directions, group)
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for parameter, update in zip(parameters, updates, strict=True):
            _local(parameter).mul_(1 - lr * settings["weight_decay"]).add_(update, alpha=-lr * scale)


def batch_length(rows: int, columns: int) -> int:
    """The number of matrices of this shape that a rank computes at once."""
    return max(1, BATCH_ELEMENTS // (rows * columns))


def _orthogonalize_replicated(matrices: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(N, A, B), the same on each rank -> (N, A, B): rank r computes the matrices r, r + world size, ..."""
    world, count = group.size(), len(matrices)
    each = math.ceil(count / world)
    own = torch.zeros_like(matrices[:1]).expand(each, -1, -1).clone()
    mine = matrices[group.rank() :: world]
    if len(mine):
        own[: len(mine)] = orthogonalize(mine)
    shared = own.new_empty((world, *own.shape))
    dist.all_gather(list(shared), own, group=group)
    return shared.transpose(0, 1).flatten(0, 1)[:count]


def _orthogonalize_sharded(shards: Tensor, group: dist.ProcessGroup, num_rows: int) -> Tensor:
    """This rank's rows of N matrices, (N, a, B) -> (N, a, B).

    Rank r receives all rows of the matrices r, r + world size, ..., computes them whole, and sends the rows back.

    num_rows: rows of a whole matrix; FSDP2 gives each rank ceil(num_rows / world size) of them, the last ones fewer.
    """
    world, rank, (count, _, width) = group.size(), group.rank(), shards.shape
    each = math.ceil(num_rows / world)
    rows = [min(each, max(0, num_rows - r * each)) for r in range(world)]  # of each rank
    owned = [len(range(r, count, world)) for r in range(world)]  # matrices of each rank
    sizes_out = [owned[r] * rows[rank] * width for r in range(world)]
    sizes_in = [owned[rank] * rows[r] * width for r in range(world)]
    order = [number for r in range(world) for number in range(r, count, world)]  # by owner

    sent, received = shards[order].flatten(), shards.new_empty(sum(sizes_in))
    dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=group)
    parts = [part.view(owned[rank], -1, width) for part in received.split(sizes_in)] if owned[rank] else []
    whole = orthogonalize(torch.cat(parts, dim=1)) if parts else shards.new_empty((0, num_rows, width))
    back = [part.flatten() for part in whole.to(shards.dtype).split(rows, dim=1)]
    dist.all_to_all_single(sent, torch.cat(back), sizes_out, sizes_in, group=group)
    updates = torch.empty_like(shards)
    updates[order] = sent.view_as(shards)
    return updates


def _local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds; another tensor itself."""
    return cast("Any", tensor).to_local() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, as FSDP2's parameters are."""
    return hasattr(tensor, "device_mesh")
