"""Data parallelism, applied from outside the model: DDP (a whole copy on each rank) or FSDP2 (sharded parameters).

Gradients are summed, not averaged: each rank's loss is divided by the number of targets in the global batch. They are
all-reduced once per step, whatever the number of micro-batches, in float32, as are FSDP's parameters. So any number of
ranks computes the same step.

FSDP is imported where it is used, because the import takes half a second.
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
from gpt2.errors import ConfigError
from gpt2.model import GPT
from gpt2.weights import model_from_state_dict

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


class DistributedModel:
    """A model distributed over the ranks, and the operations of a training step on it.

    kind:  "none" without torchrun, else "ddp" or "fsdp".
    model: the GPT; with FSDP its parameters are DTensors, of which each rank holds a shard.
    """

    def __init__(self, kind: str, model: GPT, ranks: ProcessGroup, device: torch.device) -> None:
        """Move the model to the `device` of each rank, all with the weights of rank 0."""
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
        """`GPT.loss` of this rank's rows; the backward pass sums the gradients over the ranks."""
        return self._loss_module(tokens, targets, divisor, documents)

    @contextmanager
    def gradient_accumulation(self, *, last: bool) -> Iterator[None]:
        """For forward and backward of one micro-batch: gradients are all-reduced only in the `last` of a step."""
        if isinstance(self._loss_module, DistributedDataParallel) and not last:
            with self._loss_module.no_sync():
                yield
            return
        if self.kind == "fsdp":
            cast("FSDPModule", self.model).set_requires_gradient_sync(last)
        yield

    def clip_grad_norm(self, max_norm: float, loss_scale: float = 1.0) -> Tensor:
        """Clip the gradients to `max_norm`; returns their norm before, over all parameters and ranks.

        loss_scale: what the loss was multiplied by; the gradients are divided by it first.
        """
        for parameter in self.model.parameters() if loss_scale != 1.0 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / loss_scale)
        return full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def reshard(self) -> None:
        """Free the parameters that FSDP gathered in a forward pass without a backward pass."""
        if self.kind == "fsdp":
            cast("FSDPModule", self.model).reshard()

    def full_model(self, *, on_all_ranks: bool = False) -> GPT:
        """The whole model: with FSDP, a copy with all parameters gathered. All ranks must call this.

        on_all_ranks: with FSDP, copy to every rank, in 4 bytes per parameter on each; otherwise to rank 0 only, and the
            other ranks get their sharded model.
        """
        is_copied = on_all_ranks or self.ranks.is_main_process
        if self.kind != "fsdp":
            return self.model
        gathered = {}
        for name, parameter in self.model.named_parameters():
            full = full_tensor(parameter.detach())
            if is_copied:
                gathered[name] = full
        return model_from_state_dict(self.model.config, gathered) if is_copied else self.model


class _LossModule(nn.Module):
    """`GPT.loss` as the forward pass of a module, which DDP needs."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, divisor: float, documents: Tensor | None) -> Tensor:
        return self.model.loss(tokens, targets, divisor, documents)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of which this rank may hold a shard; all ranks must call this for a DTensor."""
    return cast("Any", tensor).full_tensor() if _is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a whole tensor, which every rank has, as `other` is."""
    if not _is_dtensor(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor, dtensor = tensor.to(other.device), cast("Any", other)
    return distribute_tensor(tensor, dtensor.device_mesh, dtensor.placements, src_data_rank=None)


def _is_dtensor(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, as FSDP's parameters are."""
    return hasattr(tensor, "device_mesh")


def pick_parallel_kind(config: TrainConfig, ranks: ProcessGroup, *, fits: bool) -> str:
    """The kind of parallelism: "none", "ddp" or "fsdp". `--parallel auto` is ddp where the whole model `fits`.

    Raises ConfigError when one is requested without torchrun.
    """
    if ranks.is_single_process:
        if config.parallel != "auto":
            how = "torchrun --nproc-per-node=N -m gpt2 ..."
            raise ConfigError(f"--parallel {config.parallel} needs several processes: {how}", field="parallel")
        return "none"
    if config.parallel != "auto":
        return config.parallel
    return "ddp" if fits or ranks.world_size == 1 or config.needs_full_model else "fsdp"


def _all_reduce_sum_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: all-reduce a bucket of gradients with a sum, where DDP's default is the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _apply_fsdp(model: GPT, ranks: ProcessGroup, device: torch.device) -> None:
    """Shard the model: each block is gathered when it is needed, everything outside the blocks together."""
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
    """Shard within a host and replicate over hosts, if all hosts have equally many ranks; else shard over all ranks."""
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
    """Create all groups, which every rank must do, and return the one with this rank."""
    assert ranks.timeout is not None
    made = [(members, dist.new_group(members, timeout=ranks.timeout)) for members in all_groups]
    return next(group for members, group in made if ranks.rank in members and isinstance(group, dist.ProcessGroup))
