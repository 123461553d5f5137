"""The speed ladder: what each thing that makes training fast is worth, one added to the other.

Every rung runs in a process of its own, so that its peak memory and compiled code are its own, with the same first
weights and the same batches, so that its losses are those of the first rung. Where they are not, by more than its
arithmetic rounds, the rung is wrong, however fast.
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
    quartiles_ms,
    run_in_subprocess,
    timed,
)
from gpt2.errors import UserError, did_you_mean
from gpt2.hardware import Accelerator, device_name, find_accelerator, measure_matmul, peak_memory, reset_peak_memory
from gpt2.loss import VOCAB_PAD_MULTIPLE
from gpt2.model import GPT
from gpt2.planning.costs import flops_per_token
from gpt2.runtime import autocast, can_compile, compile_blocks, configure_malloc

# How far a loss in nats may be from the float32 one after some updates. A product is rounded by 2^-8 of its size in
# bfloat16 and by 2^-11 in TF32, and AdamW's first steps make as much of a small gradient as of a large one.
LOSS_TOLERANCE = {"float32": 1e-3, "tf32": 4e-3, "bfloat16": 3e-2}


def full_logits_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss as everyone writes it first: all logits, in float32."""
    logits = model(tokens).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def padded_vocab_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The same with a vocabulary that tensor cores like: the head gets rows whose logits are minus infinity."""
    weight = model.lm_head.weight  # (V, C)
    missing = -weight.size(0) % VOCAB_PAD_MULTIPLE
    bias = F.pad(weight.new_zeros(weight.size(0)), (0, missing), value=-torch.inf)  # (V',)
    logits = F.linear(model.hidden_states(tokens), F.pad(weight, (0, 0, 0, missing)), bias).float()  # (B, T, V')
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def chunked_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The model's own loss, which never holds all logits and pads by itself."""
    return model.loss(tokens, targets)


@dataclass(frozen=True)
class StepConfig:
    """How a training step is done. The defaults are the foot of the ladder."""

    matmul_precision: str = "highest"  # of float32 products: "high" is TF32
    dtype: torch.dtype = torch.float32  # of products under autocast
    attention: str = "plain"
    compiled: bool = False  # the blocks
    kernels: dict[str, bool] = field(default_factory=lambda: {"fused": False, "foreach": False})  # of the optimizer
    loss: Callable[[GPT, Tensor, Tensor], Tensor] = full_logits_loss
    keeps_memory: bool = False  # see `manage_freed_memory`

    @property
    def arithmetic(self) -> str:
        """What the matrix products are done in: float32, tf32 or bfloat16."""
        if self.dtype == torch.bfloat16:
            return "bfloat16"
        return "tf32" if self.matmul_precision == "high" else "float32"


def supported_everywhere(device: torch.device) -> str | None:
    """No obstacle."""
    return None


def needs_tf32(device: torch.device) -> str | None:
    """What stands against TF32 on `device`, if anything."""
    has_it = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return None if has_it else "not applicable: TF32 is arithmetic of NVIDIA's GPUs since Ampere"


def needs_bfloat16(device: torch.device) -> str | None:
    """What stands against bfloat16 on `device`, if anything."""
    lacks_it = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "not applicable: this GPU has no bfloat16" if lacks_it else None


def needs_compiler(device: torch.device) -> str | None:
    """What stands against torch.compile on `device`, if anything."""
    return None if can_compile(device) else "torch.compile needs a C++ compiler (CPU) or Triton (GPU): none here"


def needs_glibc_malloc(device: torch.device) -> str | None:
    """What stands against telling the C library to keep memory, for work on `device`, if anything."""
    has_it = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
    return None if has_it else "not applicable: it is for CPUs and the GNU C library; torch keeps a GPU's memory anyway"


@dataclass(frozen=True)
class LadderStep:
    """One step up: what it sets, on top of the rungs below, and what stands against it on a device."""

    name: str
    description: str
    overrides: dict[str, Any] = field(default_factory=dict)
    unsupported_reason: Callable[[torch.device], str | None] = supported_everywhere


LADDER_STEPS = (
    LadderStep("float32", "plain attention, all logits, AdamW one tensor at a time"),
    LadderStep("tf32", "float32 products in TF32", {"matmul_precision": "high"}, needs_tf32),
    LadderStep("bfloat16", "products in bfloat16 by autocast", {"dtype": torch.bfloat16}, needs_bfloat16),
    LadderStep("sdpa", "fused (flash) attention", {"attention": "sdpa"}),
    LadderStep("compile", "torch.compile of the blocks", {"compiled": True}, needs_compiler),
    LadderStep("padded-vocabulary", "50,257 -> 50,304 rows in the head", {"loss": padded_vocab_loss}),
    LadderStep("fused-adamw", "AdamW in one kernel", {"kernels": {"fused": True}}),
    LadderStep("chunked-loss", "head and cross-entropy in chunks, never all logits", {"loss": chunked_loss}),
    LadderStep("kept-memory", "freed memory is kept, not given back", {"keeps_memory": True}, needs_glibc_malloc),
)


def parse_step_names(names: str, steps: Sequence[LadderStep] = LADDER_STEPS) -> list[str]:
    """The rung names in a comma list, or all of them. Raises UserError for a name that is none."""
    known = [rung.name for rung in steps]
    if names == "all":
        return known
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise UserError(f"there is no rung '{name}'{did_you_mean(name, known)}: there are {', '.join(known)}")
    if not chosen:
        raise UserError(f"--rungs names none: there are {', '.join(known)}")
    return chosen


def run_step(config: StepConfig, workload: Workload) -> dict[str, Any]:
    """Do a rung's warm-up and steps: raw seconds, all losses, bytes at the peak, FLOP/s of matmuls in its arithmetic.

    The matmul rate is measured after the steps, for a second, in the same process.
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
        if number == workload.warmup:  # compiled, the optimizer's state is there: from here on it is as it stays
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
    """Climb the ladder; one record a rung, ready for JSON: see `compare`.

    chosen: the rungs to measure, each with all below it; None for all of them.
    rounds: how often the ladder is climbed, for machines that are not quiet; the times of a rung are put together.

    A rung that cannot run is listed with the reason. Those above it go on without it, but for one that had too little
    memory: what comes next may need less.
    """
    device = torch.device(workload.device)
    settings, records, plan = StepConfig(), [], []
    for rung in steps:
        obstacle = rung.unsupported_reason(device)
        trial = settings if obstacle else replace(settings, **rung.overrides)
        keep = True
        if step_names is None or rung.name in step_names:
            record: dict[str, Any] = {"name": rung.name, "about": rung.description, "arithmetic": trial.arithmetic}
            records.append(record | {"reason": obstacle, "runs": []})
            if obstacle is None:
                progress(f"{workload.device}: {rung.name}: {rung.description}")
                keep = _add_run(records[-1], trial, workload, run)
                plan.append((records[-1], trial))
        if keep:
            settings = trial
    for again in range(2, rounds + 1):
        for record, trial in plan:
            if record["reason"] is None:
                progress(f"{workload.device}: {record['name']}, round {again}")
                _add_run(record, trial, workload, run)
    return compute_metrics(records, workload)


def _add_run(record: dict[str, Any], config: StepConfig, workload: Workload, run: RunFn) -> bool:
    """Measure a rung once more. False when it cannot run, and the rungs above had better be without it."""
    try:
        record["runs"].append(run(run_step, config, workload))
    except BenchmarkError as failure:
        record["reason"] = str(failure)
        return failure.out_of_memory
    return True


def compute_metrics(records: list[dict[str, Any]], workload: Workload) -> list[dict[str, Any]]:
    """The records with what follows from their raw runs; a rung that did not run has only its `reason`.

    ms: median and quartiles of a step. tokens_per_second. flops_per_second: of the model, by `flops_per_token`.
    matmul: the rate measured in the rung's arithmetic, the median of all rungs that share it. mfu: the one over the
    other. datasheet, mfu_datasheet: the same with what the maker promises, None where that is not known.
    peak_memory: bytes. loss: after the last step. drift: how far the losses ever were from those of the first rung
    that ran (None: not a number). wrong: farther than `allowed`.
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
        promised = None if known is None else _datasheet_flops(known, arithmetic)
        record |= {
            "ms": ms,
            "tokens_per_second": speed,
            "flops_per_second": speed * flops,
            "matmul": matmul,
            "mfu": speed * flops / matmul,
            "datasheet": promised,
            "mfu_datasheet": None if promised is None else speed * flops / promised,
            "peak_memory": max(one["peak_memory"] for one in runs),
        } | _check_losses(record, ran[0])
    return records


def _check_losses(record: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    losses, expected = record["runs"][0]["losses"], reference["runs"][0]["losses"]
    allowed = max(LOSS_TOLERANCE[record["arithmetic"]], LOSS_TOLERANCE[reference["arithmetic"]])
    whole = all(loss is not None for loss in losses + expected)
    drift = max(abs(a - b) for a, b in zip(losses, expected, strict=True)) if whole else None
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
    """How far the matmul rate moved between rungs of the same arithmetic: 0.2 when the best was 20% above the worst."""
    moved = [0.0]
    for arithmetic in LOSS_TOLERANCE:
        rates = [one["matmul"] for r in records if r["arithmetic"] == arithmetic for one in r["runs"]]
        moved.append(max(rates, default=1.0) / min(rates, default=1.0) - 1)
    return max(moved)
