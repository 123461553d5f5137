"""The speed ladder: the effect of each training optimization, added one after the other.

Each ladder step runs in its own process, with its own peak memory and compiled code, from the same initial weights and
on the same batches. So its losses must equal those of the first step within the rounding of its arithmetic; if they do
not, the step is flagged as wrong.
"""

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2.bench.common import (
    BenchmarkError,
    ProgressFn,
    RunFn,
    Workload,
    adamw,
    backward_and_step,
    no_progress,
    parse_names,
    quartiles_ms,
    run_in_subprocess,
    timed,
)
from gpt2.hardware import Accelerator, device_name, find_accelerator, measure_matmul, peak_memory, reset_peak_memory
from gpt2.loss import VOCAB_PAD_MULTIPLE
from gpt2.model import GPT
from gpt2.planning.costs import flops_per_token
from gpt2.runtime import autocast, can_compile, compile_blocks, configure_malloc

# Largest allowed difference, in nats, from the float32 loss after a few updates. Products are rounded to a relative
# precision of 2^-8 in bfloat16 and 2^-11 in TF32, and AdamW's first updates do not depend on the gradient's size.
LOSS_TOLERANCE = {"float32": 1e-3, "tf32": 4e-3, "bfloat16": 3e-2}


def full_logits_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The plain loss: cross-entropy of all logits, in float32."""
    logits = model(tokens).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def padded_vocab_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The same with the vocabulary padded to a multiple that suits tensor cores, with logits of minus infinity."""
    weight = model.lm_head.weight  # (V, C)
    missing = -weight.size(0) % VOCAB_PAD_MULTIPLE
    bias = F.pad(weight.new_zeros(weight.size(0)), (0, missing), value=-torch.inf)  # (V',)
    logits = F.linear(model.hidden_states(tokens), F.pad(weight, (0, 0, 0, missing)), bias).float()  # (B, T, V')
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def chunked_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The model's own loss, which never holds all logits, and pads the vocabulary."""
    return model.loss(tokens, targets)


@dataclass(frozen=True)
class StepConfig:
    """The settings of a training step. The defaults are those of the first ladder step."""

    matmul_precision: str = "highest"  # of float32 matmuls: "high" is TF32
    dtype: torch.dtype = torch.float32  # of matmuls under autocast
    attention: str = "plain"
    compiled: bool = False  # the blocks
    kernels: dict[str, bool] = field(default_factory=lambda: {"fused": False, "foreach": False})  # of the optimizer
    loss: Callable[[GPT, Tensor, Tensor], Tensor] = full_logits_loss
    keeps_memory: bool = False  # see `configure_malloc`

    @property
    def arithmetic(self) -> str:
        """The arithmetic of matmuls: float32, tf32 or bfloat16."""
        if self.dtype == torch.bfloat16:
            return "bfloat16"
        return "tf32" if self.matmul_precision == "high" else "float32"


def supported_everywhere(device: torch.device) -> str | None:
    """Return None: the step runs on every device."""
    return None


def needs_tf32(device: torch.device) -> str | None:
    """Return why TF32 cannot be used on `device`, or None."""
    has_it = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return None if has_it else "not applicable: TF32 needs an NVIDIA GPU since Ampere"


def needs_bfloat16(device: torch.device) -> str | None:
    """Return why bfloat16 cannot be used on `device`, or None."""
    lacks_it = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "not applicable: this GPU has no bfloat16" if lacks_it else None


def needs_compiler(device: torch.device) -> str | None:
    """Return why torch.compile cannot be used on `device`, or None."""
    return None if can_compile(device) else "torch.compile needs a C++ compiler (CPU) or Triton (GPU): not found"


def needs_glibc_malloc(device: torch.device) -> str | None:
    """Return why malloc cannot be configured to keep freed memory for work on `device`, or None."""
    has_it = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
    return None if has_it else "not applicable: it needs a CPU and glibc; on a GPU torch keeps freed memory anyway"


@dataclass(frozen=True)
class LadderStep:
    """One step of the ladder: its settings, on top of those of the steps before it."""

    name: str
    description: str
    overrides: dict[str, Any] = field(default_factory=dict)
    unsupported_reason: Callable[[torch.device], str | None] = supported_everywhere


LADDER_STEPS = (
    LadderStep("float32", "plain attention, all logits, AdamW one tensor at a time"),
    LadderStep("tf32", "float32 matmuls in TF32", {"matmul_precision": "high"}, needs_tf32),
    LadderStep("bfloat16", "matmuls in bfloat16 by autocast", {"dtype": torch.bfloat16}, needs_bfloat16),
    LadderStep("sdpa", "fused (flash) attention", {"attention": "sdpa"}),
    LadderStep("compile", "torch.compile of the blocks", {"compiled": True}, needs_compiler),
    LadderStep(
        "padded-vocabulary",
        f"rows of the head padded to a multiple of {VOCAB_PAD_MULTIPLE}",
        {"loss": padded_vocab_loss},
    ),
    LadderStep("fused-adamw", "AdamW in one kernel", {"kernels": {"fused": True}}),
    LadderStep("chunked-loss", "head and cross-entropy in chunks, never all logits", {"loss": chunked_loss}),
    LadderStep("kept-memory", "malloc keeps freed memory", {"keeps_memory": True}, needs_glibc_malloc),
)


def parse_step_names(names: str, steps: Sequence[LadderStep] = LADDER_STEPS) -> list[str]:
    """The ladder steps in a comma-separated list, or all for "all". Raises UserError for an unknown name."""
    return parse_names("ladder step", "--ladder-steps", names, [step.name for step in steps])


def run_step(config: StepConfig, workload: Workload) -> dict[str, Any]:
    """Measure one ladder step: raw seconds, all losses, peak memory in bytes, and FLOP/s of matmuls in its arithmetic.

    The matmul rate is measured for one second after the training steps, in the same process.
    """
    device = torch.device(workload.device)
    torch.set_float32_matmul_precision(config.matmul_precision)
    if config.keeps_memory:
        configure_malloc(keep_freed=True)
    torch.manual_seed(workload.seed)
    model = GPT(replace(workload.config, attention=config.attention)).to(device)
    if config.compiled:
        compile_blocks(model.transformer.h)
    optimizer = adamw(model, workload.lr, **config.kernels)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with autocast(device, config.dtype):
            loss = config.loss(model, tokens, targets)
        return backward_and_step(loss, model, optimizer)

    seconds, losses = [], []
    for number, batch in enumerate(workload.batches()):
        if number == workload.warmup:  # by now the model is compiled and the optimizer state exists
            reset_peak_memory(device)
        took, loss = timed(lambda batch=batch: step(*batch), device)
        seconds.append(took)
        losses.append(loss.item() if loss.isfinite() else None)  # JSON has no NaN
    peak = peak_memory(device)
    rate = measure_matmul(device, config.dtype, 1.0)
    return {
        "seconds": seconds[workload.warmup :],
        "warmup_seconds": seconds[: workload.warmup],
        "losses": losses,
        "peak_memory": peak,
        "matmul": rate,
    }


def run_ladder(
    workload: Workload,
    step_names: Sequence[str] | None = None,
    rounds: int = 1,
    *,
    steps: Sequence[LadderStep] = LADDER_STEPS,
    run: RunFn = run_in_subprocess,
    progress: ProgressFn = no_progress,
) -> list[dict[str, Any]]:
    """Measure the ladder; returns one record per step, ready for JSON: see `compute_metrics`.

    step_names: the steps to measure, each on top of all before it; None for all.
    rounds:     how often the ladder is measured, for noisy machines; the times of all rounds are merged.

    A step that cannot run is listed with the reason, and the following steps leave it out. Only a step that ran out of
    memory stays included, because the following steps may need less.
    """
    device = torch.device(workload.device)
    config, records, measured = StepConfig(), [], []
    for step in steps:
        reason = step.unsupported_reason(device)
        candidate = config if reason else replace(config, **step.overrides)
        keep = True
        if step_names is None or step.name in step_names:
            record: dict[str, Any] = {"name": step.name, "about": step.description, "arithmetic": candidate.arithmetic}
            records.append(record | {"reason": reason, "runs": []})
            if reason is None:
                progress(f"{workload.device}: {step.name}: {step.description}")
                keep = _add_run(records[-1], candidate, workload, run)
                measured.append((records[-1], candidate))
        if keep:
            config = candidate
    for round_number in range(2, rounds + 1):
        for record, candidate in measured:
            if record["reason"] is None:
                progress(f"{workload.device}: {record['name']}, round {round_number}")
                _add_run(record, candidate, workload, run)
    return compute_metrics(records, workload)


def _add_run(record: dict[str, Any], config: StepConfig, workload: Workload, run: RunFn) -> bool:
    """Measure a step once more. Returns whether the following steps should include it."""
    try:
        record["runs"].append(run(run_step, config, workload))
    except BenchmarkError as failure:
        record["reason"] = str(failure)
        return failure.out_of_memory
    return True


def compute_metrics(records: list[dict[str, Any]], workload: Workload) -> list[dict[str, Any]]:
    """Add metrics to the records with raw runs; a step that did not run has only its `reason`.

    ms: median and quartiles of a training step. tokens_per_second. flops_per_second: model FLOP/s by `flops_per_token`.
    matmul: the measured matmul rate, the median over all steps of the same arithmetic. mfu: flops_per_second / matmul.
    datasheet, mfu_datasheet: the same with the datasheet's rate, None if it is unknown.
    peak_memory: bytes. loss: after the last step. drift: the largest difference from the losses of the first step that
    ran (None if not finite). wrong: drift is larger than `allowed`.
    """
    device = torch.device(workload.device)
    known = find_accelerator(device_name(device))
    flops = flops_per_token(workload.config, workload.block_size)
    ran = [record for record in records if record["runs"]]
    for record in ran:
        runs, arithmetic = record["runs"], record["arithmetic"]
        ms = quartiles_ms([seconds for one in runs for seconds in one["seconds"]])
        speed = workload.tokens / ms["median"] * 1e3
        rates = [one["matmul"] for other in ran if other["arithmetic"] == arithmetic for one in other["runs"]]
        matmul = statistics.median(rates)
        datasheet = None if known is None else _datasheet_flops(known, arithmetic)
        record |= {
            "ms": ms,
            "tokens_per_second": speed,
            "flops_per_second": speed * flops,
            "matmul": matmul,
            "mfu": speed * flops / matmul,
            "datasheet": datasheet,
            "mfu_datasheet": None if datasheet is None else speed * flops / datasheet,
            "peak_memory": max(one["peak_memory"] for one in runs),
        } | _check_losses(record, ran[0])
    return records


def _check_losses(record: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    losses, expected = record["runs"][0]["losses"], reference["runs"][0]["losses"]
    allowed = max(LOSS_TOLERANCE[record["arithmetic"]], LOSS_TOLERANCE[reference["arithmetic"]])
    finite = all(loss is not None for loss in losses + expected)
    drift = max(abs(a - b) for a, b in zip(losses, expected, strict=True)) if finite else None
    return {
        "loss": losses[-1],
        "compared_with": reference["name"],
        "drift": drift,
        "allowed": allowed,
        "wrong": drift is None or drift > allowed,
    }


def _datasheet_flops(known: Accelerator, arithmetic: str) -> float:
    return {"bfloat16": known.bf16, "tf32": known.tf32, "float32": known.fp32}[arithmetic]


def matmul_rate_variation(records: Sequence[dict[str, Any]]) -> float:
    """The largest variation of the matmul rate within one arithmetic: 0.2 if the best is 20% above the worst."""
    variations = [0.0]
    for arithmetic in LOSS_TOLERANCE:
        rates = [run["matmul"] for r in records if r["arithmetic"] == arithmetic for run in r["runs"]]
        variations.append(max(rates, default=1.0) / min(rates, default=1.0) - 1)
    return max(variations)
