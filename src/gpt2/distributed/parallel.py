"""A model over the ranks of a run, from outside the model: DDP where each holds a whole copy, FSDP2 where it does not.

Gradients are added up, not averaged: each rank's loss is divided by the number of targets in the whole global batch.
They travel once a step, whatever the number of micro-batches, in float32, as do FSDP's parameters, so that any number
of ranks computes what one would.

What FSDP needs of torch is imported where it is used: it takes half a second, and most runs do without.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gpt2.config import TrainConfig
from gpt2.distributed.process_group import ProcessGroup
from gpt2.errors import UserError
from gpt2.model import GPT
from gpt2.weights import model_from_state_dict

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


class DistributedModel:
    """A model as it lies on the ranks, and how a step is done with it.

    kind:  "none" without torchrun, else "ddp" or "fsdp".
    model: the same GPT, whose parameters are whole ones, or of FSDP, DTensors of which each rank has a part.
    """

    def __init__(self, kind: str, model: GPT, ranks: ProcessGroup, device: torch.device) -> None:
        """Lays the model out on the `device` of each rank; rank 0's weights are what all begin with."""
        self.kind, self.model, self.ranks = kind, model, ranks
        self._loss_module: nn.Module = _LossModule(model)
        if kind == "fsdp":
            _apply_fsdp(model, ranks, device)
        model.to(device)
        if kind == "ddp":
            ddp = DistributedDataParallel(
                self._loss_module, process_group=ranks.step_group, gradient_as_bucket_view=True
            )
            ddp.register_comm_hook(ranks.step_group, _all_reduce_sum_hook)
            self._loss_module = ddp

    def loss(self, tokens: Tensor, targets: Tensor, divisor: float, documents: Tensor | None) -> Tensor:
        """`GPT.loss` of this rank's rows; the gradients of all ranks are added up in the backward pass."""
        return self._loss_module(tokens, targets, divisor, documents)

    @contextmanager
    def gradient_accumulation(self, *, last: bool) -> Iterator[None]:
        """A micro-batch, forward and backward; only at the last one of a step do the gradients travel."""
        if isinstance(self._loss_module, DistributedDataParallel) and not last:
            with self._loss_module.no_sync():
                yield
            return
        if self.kind == "fsdp":
            cast("FSDPModule", self.model).set_requires_gradient_sync(last)
        yield

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients down to the norm `most`, if theirs is more; returns theirs, over all ranks' parts."""
        return full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def reshard(self) -> None:
        """Let go of what a forward pass without a backward one has gathered."""
        if self.kind == "fsdp":
            cast("FSDPModule", self.model).reshard()

    def full_model(self) -> GPT:
        """The model as one process would have it: itself, or of FSDP, on rank 0 a copy with all parts gathered.

        All ranks must ask; the others are given what they have.
        """
        if self.kind != "fsdp":
            return self.model
        gathered = {}
        for name, parameter in self.model.named_parameters():
            full = full_tensor(parameter.detach())
            if self.ranks.is_main_process:
                gathered[name] = full
        return model_from_state_dict(self.model.config, gathered) if self.ranks.is_main_process else self.model


class _LossModule(nn.Module):
    """`GPT.loss` as a module's forward pass, which is what DDP can watch."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, divisor: float, documents: Tensor | None) -> Tensor:
        return self.model.loss(tokens, targets, divisor, documents)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may have a part; then all ranks must ask."""
    return cast("Any", tensor).full_tensor() if _is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which every rank has, cut and placed as `other` is."""
    if not _is_dtensor(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor, dtensor = tensor.to(other.device), cast("Any", other)
    return distribute_tensor(tensor, dtensor.device_mesh, dtensor.placements, src_data_rank=None)


def _is_dtensor(tensor: Tensor) -> bool:
    """Is it a DTensor, one of FSDP's?"""
    return hasattr(tensor, "device_mesh")


def pick_parallel_kind(config: TrainConfig, ranks: ProcessGroup, *, fits: bool) -> str:
    """How the ranks share a run: "none", "ddp" or "fsdp"; for `--parallel auto`, ddp where a whole copy `fits`.

    Raises UserError where there is nobody to share with.
    """
    if ranks.is_single_process:
        if config.parallel != "auto":
            raise UserError(
                f"--parallel {config.parallel} is for several processes: torchrun --nproc-per-node=N -m gpt2 ..."
            )
        return "none"
    if config.parallel != "auto":
        return config.parallel
    return "ddp" if fits or ranks.world_size == 1 or config.needs_full_model else "fsdp"


def _all_reduce_sum_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook: the sum of a bucket of gradients over the ranks, where its own would take the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _apply_fsdp(model: GPT, ranks: ProcessGroup, device: torch.device) -> None:
    """Cut the model up: every block is gathered when it is its turn, and all outside the blocks with the whole."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0, group=ranks.control_group)
    mesh = _device_mesh(ranks, device)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _device_mesh(ranks: ProcessGroup, device: torch.device) -> "DeviceMesh":
    """Sharded over the ranks of a host and copied from host to host, where each has the same number; else over all."""
    from torch.distributed.device_mesh import DeviceMesh

    assert ranks.step_group is not None
    local_sizes = ranks.all_gather_object(ranks.local_world_size)
    n = local_sizes[0]
    if n in (1, ranks.world_size) or set(local_sizes) != {n}:
        return DeviceMesh.from_group(ranks.step_group, device.type, mesh_dim_names=("shard",))
    places = torch.arange(ranks.world_size).view(-1, n)  # (hosts, ranks of a host)
    groups = [_group_of_this_rank(rows.tolist(), ranks) for rows in (places.T, places)]
    return DeviceMesh.from_group(groups, device.type, mesh=places, mesh_dim_names=("replicate", "shard"))


def _group_of_this_rank(all_groups: list[list[int]], ranks: ProcessGroup) -> dist.ProcessGroup:
    """Make all of the groups, as every rank must, and give the one that this rank is in."""
    assert ranks.timeout is not None
    made = [(members, dist.new_group(members, timeout=ranks.timeout)) for members in all_groups]
    return next(group for members, group in made if ranks.rank in members and isinstance(group, dist.ProcessGroup))
