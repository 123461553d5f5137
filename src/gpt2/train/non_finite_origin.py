"""The module of origin of a non-finite value: the batch is recomputed with hooks on every module."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpt2.data.loader import Batch
from gpt2.loss import next_token_loss
from gpt2.model import GPT
from gpt2.runtime import autocast, set_rng_state


@dataclass(frozen=True)
class StepInputs:
    """Everything that one update is computed from besides the weights, and its loss and gradient norm."""

    step: int
    """The number of the update, counted from 1."""
    batch: Batch = field(repr=False)
    """On the CPU."""
    micro_batch_size: int
    """Rows of a micro-batch."""
    divisor: float
    """Number of targets in the global batch."""
    dtype: torch.dtype
    """Of matrix products."""
    lr: float
    """The learning rate that the update would have used."""
    rng_state: dict[str, Tensor] = field(repr=False)
    """`runtime.get_rng_state` before the first micro-batch."""
    loss: float = math.nan
    grad_norm: float = math.nan
    activation_checkpointing: bool = False
    """Whether `runtime.apply_activation_checkpointing` was used; it changes no value."""


@dataclass(frozen=True)
class NonFiniteOrigin:
    """The first non-finite value when a batch is recomputed."""

    kind: str
    """weight, output, loss, backward (gradient of a module's input), gradient (of a parameter), norm;
    nothing if all values are finite when recomputed, unknown if there was no memory to recompute."""
    name: str = ""
    """The full name of the module or parameter; may be empty."""
    value: str = ""
    """nan or inf; empty for nothing."""
    rows: tuple[int, ...] = ()
    """The rows of the batch with non-finite values; empty where they are unknown."""
    position: int | None = None
    """In an output, the first non-finite position of the first of those rows."""
    largest: float | None = None
    """The largest magnitude among the module's inputs; None where no module is at fault."""
    loss: float = math.nan
    grad_norm: float = math.nan
    """Loss and gradient norm when recomputed."""
    bad_gradients: tuple[str, ...] = ()
    """The parameters whose gradient is not finite."""

    def __str__(self) -> str:
        given = "" if self.largest is None else f" up to {self.largest:.1e}"
        inside = {
            "weight": f"the weights themselves: {self.name} is {self.value}",
            "output": f"the output of {self.name} is {self.value}{given and f', of inputs{given}'}",
            "loss": f"the loss is {self.value}, of a finite output of the last layer",
            "backward": f"the input gradient of {self.name or 'the loss'} is {self.value}"
            f"{given and f', of gradients{given}'}",
            "gradient": f"the gradient of {self.name} is {self.value}",
            "norm": f"all gradients are finite, but their norm is {self.value} (the largest is that of {self.name})",
            "nothing": "nothing: recomputed, all values are finite",
            "unknown": "unknown, as there is not enough memory to recompute it",
        }
        return inside[self.kind]


def find_non_finite_origin(model: GPT, inputs: StepInputs) -> NonFiniteOrigin:
    """Recompute the batch, without torch.compile, and return the first non-finite value.

    Non-finite weights come first. Then, in the order of computation: the first (innermost) module whose output is
    non-finite while its inputs are finite, the loss, and in the backward pass the first module that gets a finite
    gradient and returns, or accumulates in its parameters, a non-finite one.

    The random state is that of the step, so dropout is the same (with torch.compile, dropout and rounding differ).
    Afterwards the weights, the mode and torch's random state are as before; gradients are None.
    """
    bad_weight = next((pair for pair in model.named_parameters() if not _is_finite(pair[1])), None)
    watch, mode = _NonFiniteWatcher(), model.training
    model.train()
    model.zero_grad(set_to_none=True)
    try:
        with (
            watch.hooks_attached(model),
            _forked_rng(inputs.rng_state, model.device),
            torch.compiler.set_stance("force_eager"),
        ):
            loss = _forward_backward(model, inputs, watch)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        bad = tuple(name for name, grad in gradients.items() if not _is_finite(grad))
        event = None
        if bad_weight is not None:
            kind, name, value = "weight", bad_weight[0], _nan_or_inf(bad_weight[1])
        elif watch.first_event is not None:
            (kind, name), event = watch.first_event, watch.events[watch.first_event]
            value = event.value
        elif not _is_finite(loss):
            kind, name, value = "loss", "", _nan_or_inf(loss)
        elif not _is_finite(norm):
            kind, name, value = "norm", max(gradients, key=lambda n: gradients[n].abs().max()), _nan_or_inf(norm)
        else:
            kind, name, value = "nothing", "", ""
        rows, position, largest = (event.rows, event.position, event.largest) if event else ((), None, None)
        return NonFiniteOrigin(kind, name, value, rows, position, largest, loss.item(), norm.item(), bad)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(mode)


def is_finite_in_float32(model: GPT, inputs: StepInputs) -> bool | None:
    """Return whether all values are finite in float32; None if the step was in float32 or memory is insufficient."""
    if inputs.dtype == torch.float32:
        return None
    try:
        return find_non_finite_origin(model, replace(inputs, dtype=torch.float32)).kind == "nothing"
    except torch.OutOfMemoryError:
        return None


def _forward_backward(model: GPT, inputs: StepInputs, watcher: "_NonFiniteWatcher") -> Tensor:
    """Loss and gradients of the batch, computed as in `trainer.update`; gradients are accumulated in the parameters."""
    total = torch.zeros((), device=model.device)
    for number, part in enumerate(inputs.batch.split(inputs.micro_batch_size)):
        part = part.to(model.device)
        watcher.start_micro_batch(number * inputs.micro_batch_size)
        with autocast(model.device, inputs.dtype):
            loss = model.loss(part.tokens, part.targets, inputs.divisor, part.documents)
            watcher.check_loss(model, part.targets, loss)
        loss.backward()
        total += loss.detach()
    return total


@dataclass
class _NonFiniteEvent:
    """A non-finite result of finite inputs; see NonFiniteOrigin for the fields."""

    value: str
    largest: float | None
    rows: tuple[int, ...] = ()
    position: int | None = None


class _NonFiniteWatcher:
    """Records, in order, where a model computes non-finite results from finite inputs."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, str], _NonFiniteEvent] = {}  # by kind and name
        self._first_row, self._in_forward, self._hidden_states = 0, True, torch.empty(0)

    @property
    def first_event(self) -> tuple[str, str] | None:
        """The kind and name of the first event; a module takes precedence over its parameter."""
        first = next(iter(self.events), None)
        if first is not None and first[0] == "gradient":
            module = ("backward", first[1].rpartition(".")[0])
            return module if module in self.events else first
        return first

    @contextmanager
    def hooks_attached(self, model: GPT) -> Iterator[None]:
        """Attach hooks to all modules and parameters inside the block."""
        handles = [model.transformer.register_forward_hook(self._after_last_layer)]
        try:
            for name, module in model.named_modules():
                handles.append(module.register_forward_hook(partial(self._after_forward, name)))
                if (
                    not isinstance(module, nn.Embedding) and module is not model.transformer
                ):  # their inputs are integers
                    handles.append(module.register_full_backward_hook(partial(self._after_backward, name)))
            for name, p in model.named_parameters():
                if p.requires_grad:
                    handles.append(p.register_post_accumulate_grad_hook(partial(self._after_gradient, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start_micro_batch(self, first_row: int) -> None:
        """Start a micro-batch whose first row is this row of the batch."""
        self._first_row, self._in_forward = first_row, True

    def check_loss(self, model: GPT, targets: Tensor, loss: Tensor) -> None:
        """End the forward pass: check the loss against the recorded hidden states."""
        self._in_forward = False
        if _is_finite(self._hidden_states) and not _is_finite(loss):
            with torch.no_grad():
                pairs = zip(self._hidden_states.split(1), targets.split(1), strict=True)
                losses = [next_token_loss(h, model.lm_head.weight, t, 1.0) for h, t in pairs]
            self._record("loss", "", loss, mask=~torch.stack(losses).isfinite().unsqueeze(1))

    def _record(
        self, kind: str, name: str, bad: Tensor, inputs: tuple[Any, ...] = (), mask: Tensor | None = None
    ) -> None:
        """Record that `bad` was computed from `inputs`; for a known event, add the rows of a later micro-batch.

        mask: (B, T), True where `bad` is non-finite; by default computed from `bad` of shape (B, T, C).
        """
        event = self.events.setdefault((kind, name), _NonFiniteEvent(_nan_or_inf(bad), _max_abs(inputs)))
        if mask is None and bad.dim() == 3:
            mask = (~bad.detach().isfinite()).any(2)
        if mask is not None:
            rows = mask.any(1).nonzero().flatten().tolist()
            if kind == "output" and not event.rows:
                event.position = int(mask[rows[0]].int().argmax())
            event.rows += tuple(self._first_row + row for row in rows)

    def _after_forward(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._in_forward and not _is_finite(output) and _is_finite(*inputs):
            self._record("output", name, output, inputs)

    def _after_last_layer(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._in_forward:
            self._hidden_states = output.detach()
            output.register_hook(self._after_loss_backward)

    def _after_loss_backward(self, grad: Tensor) -> None:
        if not _is_finite(grad):
            self._record("backward", "", grad)

    def _after_backward(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Backward hook of a module, with the gradients of its inputs and outputs."""
        if _is_finite(*outputs) and not _is_finite(*inputs):
            self._record("backward", name, next(x for x in inputs if not _is_finite(x)), outputs)

    def _after_gradient(self, name: str, p: Tensor) -> None:
        if p.grad is not None and not _is_finite(p.grad):
            self._record("gradient", name, p.grad)


@contextmanager
def _forked_rng(state: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """Set torch's random state to `state` inside the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_rng_state(state, device)
        yield


def _is_finite(*values: Any) -> bool:
    """Return whether all floating-point tensors among `values` are finite; needs almost no extra memory."""
    return all(math.isfinite(end) for end in _min_max(values))


def _max_abs(values: tuple[Any, ...]) -> float | None:
    """The largest magnitude in the floating-point tensors among `values`; None when there are none."""
    return max(map(abs, _min_max(values)), default=None)


def _min_max(values: tuple[Any, ...]) -> list[float]:
    """The minimum and maximum of each floating-point tensor among `values`; NaN if it contains one."""
    tensors = [x.detach() for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    return [end for x in tensors for end in torch.stack(x.aminmax()).tolist()]


def _nan_or_inf(bad: Tensor) -> str:
    return "nan" if bad.detach().isnan().any() else "inf"
