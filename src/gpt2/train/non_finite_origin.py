"""Which module went bad first: a batch is computed once more, with every module watched."""

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
    """All that one update is computed from, next to the weights, and what came of it."""

    step: int
    """The number of the update, counted from 1."""
    batch: Batch = field(repr=False)
    """On the CPU."""
    micro_batch_size: int
    """Rows of a micro-batch."""
    divisor: float
    """What the sum of the losses is divided by."""
    dtype: torch.dtype
    """Of matrix products."""
    lr: float
    """The learning rate that the update would have used."""
    rng_state: dict[str, Tensor] = field(repr=False)
    """`runtime.random_state` from before the first micro-batch."""
    loss: float = math.nan
    grad_norm: float = math.nan
    activation_checkpointing: bool = False
    """Are the model's activations computed twice (`runtime.recompute_blocks`)? It changes no number."""


@dataclass(frozen=True)
class NonFiniteOrigin:
    """The first thing that went bad when a batch was computed again."""

    kind: str
    """weight, output, loss, backward (a gradient on its way through a module), gradient (a parameter's), norm;
    nothing when all was finite the second time, unknown when there was no memory for a second time."""
    name: str = ""
    """The module or the parameter, by its full name; empty where there is none to name."""
    value: str = ""
    """nan or inf; empty for nothing."""
    rows: tuple[int, ...] = ()
    """The rows of the batch, from 0, in which it is bad; empty where rows cannot be told apart."""
    position: int | None = None
    """In an output, the first bad position of the first of those rows."""
    largest: float | None = None
    """The largest magnitude that a module was given when it made something bad of it; None where no module did."""
    loss: float = math.nan
    grad_norm: float = math.nan
    """What the second computation gave."""
    bad_gradients: tuple[str, ...] = ()
    """The parameters whose gradient is not finite."""

    def __str__(self) -> str:
        given = "" if self.largest is None else f" up to {self.largest:.1e}"
        inside = {
            "weight": f"the weights themselves: {self.name} is {self.value}",
            "output": f"the output of {self.name} is {self.value}{given and f', of inputs{given}'}",
            "loss": f"the loss is {self.value}, of a finite output of the last layer",
            "backward": f"the gradient behind {self.name or 'the loss'} is {self.value}"
            f"{given and f', of gradients{given}'}",
            "gradient": f"the gradient of {self.name} is {self.value}",
            "norm": f"all gradients are finite, but their norm is {self.value} (the largest is that of {self.name})",
            "nothing": "nothing: computed again, all is finite",
            "unknown": "unknown, for want of memory to compute it again",
        }
        return inside[self.kind]


def find_non_finite_origin(model: GPT, inputs: StepInputs) -> NonFiniteOrigin:
    """Compute the batch again, without torch.compile, and name the first thing that is not finite.

    Bad weights come before all else. Then, in the order of the computation: the first module whose output is bad
    while its inputs are not (the innermost, for a module's parts are done before it is), the loss, and on the way
    back the first module that is given a finite gradient and passes on, or leaves in its parameters, one that is not.

    The random state is that of the attempt, so dropout drops what it dropped (torch.compile draws otherwise: what it
    computed is computed again but for dropout and rounding). Afterwards the weights, the mode and torch's random
    state are what they were; gradients are None.
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
    """Is all finite when the batch is computed in float32? None where it was, or where there is no memory to try."""
    if inputs.dtype == torch.float32:
        return None
    try:
        return find_non_finite_origin(model, replace(inputs, dtype=torch.float32)).kind == "nothing"
    except torch.OutOfMemoryError:
        return None


def _forward_backward(model: GPT, inputs: StepInputs, watcher: "_NonFiniteWatcher") -> Tensor:
    """Loss and gradients of the batch, as `trainer.update` computes them; the gradients stay in the parameters."""
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
    """Something that is bad though all before it was good; see Culprit for what the fields mean."""

    value: str
    largest: float | None
    rows: tuple[int, ...] = ()
    position: int | None = None


class _NonFiniteWatcher:
    """Looks on while a model computes, and notes what is bad though all before it was good, in order."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, str], _NonFiniteEvent] = {}  # by kind and name
        self._first_row, self._in_forward, self._hidden_states = 0, True, torch.empty(0)

    @property
    def first_event(self) -> tuple[str, str] | None:
        """The kind and name of the first event. A module stands for its parameter: the two go bad together."""
        first = next(iter(self.events), None)
        if first is not None and first[0] == "gradient":
            module = ("backward", first[1].rpartition(".")[0])
            return module if module in self.events else first
        return first

    @contextmanager
    def hooks_attached(self, model: GPT) -> Iterator[None]:
        """Every module and parameter is watched inside, none afterwards."""
        handles = [model.transformer.register_forward_hook(self._after_last_layer)]
        try:
            for name, module in model.named_modules():
                handles.append(module.register_forward_hook(partial(self._after_forward, name)))
                if not isinstance(module, nn.Embedding) and module is not model.transformer:  # these are given integers
                    handles.append(module.register_full_backward_hook(partial(self._after_backward, name)))
            for name, p in model.named_parameters():
                if p.requires_grad:
                    handles.append(p.register_post_accumulate_grad_hook(partial(self._after_gradient, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start_micro_batch(self, first_row: int) -> None:
        """A micro-batch begins, with this row of the batch."""
        self._first_row, self._in_forward = first_row, True

    def check_loss(self, model: GPT, targets: Tensor, loss: Tensor) -> None:
        """The forward pass is done; the hidden states were seen on their way to the loss."""
        self._in_forward = False
        if _is_finite(self._hidden_states) and not _is_finite(loss):
            with torch.no_grad():
                pairs = zip(self._hidden_states.split(1), targets.split(1), strict=True)
                losses = [next_token_loss(h, model.lm_head.weight, t, 1.0) for h, t in pairs]
            self._record("loss", "", loss, mask=~torch.stack(losses).isfinite().unsqueeze(1))

    def _record(
        self, kind: str, name: str, bad: Tensor, inputs: tuple[Any, ...] = (), mask: Tensor | None = None
    ) -> None:
        """Write down that `bad` was made of `given`; in a later micro-batch the rows of a known event.

        `places` is True where it is bad, (B, T); left out, it is looked up in a tensor of (B, T, C).
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
        """The hook of a module, with the gradients of its inputs and outputs."""
        if _is_finite(*outputs) and not _is_finite(*inputs):
            self._record("backward", name, next(x for x in inputs if not _is_finite(x)), outputs)

    def _after_gradient(self, name: str, p: Tensor) -> None:
        if p.grad is not None and not _is_finite(p.grad):
            self._record("gradient", name, p.grad)


@contextmanager
def _forked_rng(state: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    """torch's random state is `state` inside, and afterwards what it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_rng_state(state, device)
        yield


def _is_finite(*values: Any) -> bool:
    """Are all floating-point tensors among `values` finite? A few extra bytes of memory are all it takes."""
    return all(math.isfinite(end) for end in _min_max(values))


def _max_abs(values: tuple[Any, ...]) -> float | None:
    """The largest magnitude in the floating-point tensors among `values`; None when there are none."""
    return max(map(abs, _min_max(values)), default=None)


def _min_max(values: tuple[Any, ...]) -> list[float]:
    """The least and the largest number of each floating-point tensor among `values`; a NaN is both."""
    tensors = [x.detach() for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    return [end for x in tensors for end in torch.stack(x.aminmax()).tolist()]


def _nan_or_inf(bad: Tensor) -> str:
    return "nan" if bad.detach().isnan().any() else "inf"
