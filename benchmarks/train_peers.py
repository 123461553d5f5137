"""Our training step compared with peers: same shapes, weights and batches, timed in turns, each in its own process."""

import contextlib
import copy
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from gpt2.bench.common import (
    OURS,
    BenchmarkError,
    InProcessRunner,
    ProgressFn,
    SubprocessRunner,
    Workload,
    adamw,
    backward_and_step,
    no_progress,
    quartiles_ms,
    timed,
)
from gpt2.bench.ladder import LOSS_TOLERANCE
from gpt2.commands.bench_output import format_gib, format_quartiles
from gpt2.errors import ConfigError, UserError, did_you_mean
from gpt2.files import file_sha256
from gpt2.hardware import measure_matmul, peak_memory, reset_peak_memory
from gpt2.model import GPT
from gpt2.planning.costs import flops_per_token
from gpt2.runtime import autocast, can_compile, compile_blocks, configure_malloc
from gpt2.weights import CONV1D_WEIGHTS

PEERS = ("nanogpt", "transformers")
MEMORY_STEPS = 3  # training steps over which peak memory is measured

LossFn = Callable[[Tensor, Tensor], Tensor]  # tokens and targets, (B, T) each -> mean loss
PeerCheckouts = Mapping[str, str | None]  # a peer's name -> the folder of its checkout, None for a package


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to train, and its loss function by mode: "eager" and, where it can be compiled, "compiled"."""

    model: nn.Module
    modes: dict[str, LossFn]
    version: str | None = None


def parse_peers(given: list[str]) -> dict[str, str | None]:
    """Parse ``["nanogpt=PATH", "transformers"]`` into a mapping. Raises UserError for peers that are not available."""
    peers: dict[str, str | None] = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in PEERS:
            raise ConfigError(f"there is no peer '{name}'{did_you_mean(name, PEERS)}: there are {', '.join(PEERS)}")
        if name == "nanogpt":
            if not path:
                raise ConfigError("--peer nanogpt needs a checkout: --peer nanogpt=PATH", field="peer")
            if not (Path(path) / "model.py").is_file():
                raise UserError(f"--peer nanogpt={path} is not a checkout of nanoGPT: it has no model.py")
        elif importlib.util.find_spec(name) is None:
            raise UserError("--peer transformers needs transformers, which is not installed: pip install transformers")
        peers[name] = path or None
    return peers


def build_model(name: str, checkout: str | None, workload: Workload, *, compiled: bool = True) -> BenchmarkModel:
    """A contestant on the workload's device, with the initial weights of our model for the workload's seed.

    compiled: whether to add the mode "compiled", if the device has a compiler.
    """
    torch.manual_seed(workload.seed)
    model = GPT(replace(workload.config, attention="sdpa"))
    device = torch.device(workload.device)
    if name == OURS:
        contestant = BenchmarkModel(model.to(device), {"eager": model.loss})
    elif name == "nanogpt":
        contestant = _build_nanogpt(model, Path(checkout or ""), device)
    else:
        contestant = _build_transformers(model, device)
    if compiled and can_compile(device):
        eager = contestant.modes["eager"]
        contestant.modes["compiled"] = _compiled_loss(model) if name == OURS else torch.compile(eager)
    return contestant


def _compiled_loss(model: GPT) -> LossFn:
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # shares the parameters
    compile_blocks(twin.transformer.h)
    return twin.loss


def _build_nanogpt(ours: GPT, checkout: Path, device: torch.device) -> BenchmarkModel:
    file = checkout / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which its dataclass needs
    spec.loader.exec_module(module)
    c = ours.config
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise UserError(f"{file} is not nanoGPT's: it has no GPT and GPTConfig")
    shape = {name: getattr(c, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    with contextlib.redirect_stdout(sys.stderr):  # it prints its number of parameters
        model = module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=True))
    _copy_weights(model, ours.state_dict(), "nanoGPT")
    model.to(device)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(tokens, targets)[1]

    version = "model.py sha256 " + file_sha256(file)[:12]
    return BenchmarkModel(model, {"eager": loss}, version)


def _build_transformers(ours: GPT, device: torch.device) -> BenchmarkModel:
    import transformers

    c = ours.config
    gpt2_config: Any = transformers.GPT2Config  # its stub lacks the arguments of the base class
    config = gpt2_config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        loss_type="ForCausalLM",
        attn_implementation="sdpa",
    )
    model: Any = transformers.GPT2LMHeadModel(config)
    weights = {name: p.t() if name.endswith(CONV1D_WEIGHTS) else p for name, p in ours.state_dict().items()}
    _copy_weights(model, weights, "transformers")
    model.to(device).train()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens).logits
        return model.loss_function(logits, None, vocab_size=c.vocab_size, shift_labels=targets)

    return BenchmarkModel(model, {"eager": loss}, transformers.__version__)


def _copy_weights(model: nn.Module, weights: Mapping[str, Tensor], peer_name: str) -> None:
    """Copy our initial weights into a peer. All its parameters must be among them; buffers need not be."""
    missing = {name for name, _ in model.named_parameters()} - set(weights)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if missing or unknown:
        names = ", ".join(sorted([*missing, *unknown])[:3])
        raise UserError(f"the parameters of {peer_name} are not GPT-2's as this program knows them: {names}")


class TrainVariant:
    """The training of a contestant: bfloat16 autocast, gradient clipping to 1.0, fused AdamW.

    It must run in its own process, because our variant changes process-wide settings of malloc.
    """

    def __init__(self, name: str, checkout: str | None, workload: Workload) -> None:
        self._device = torch.device(workload.device)
        if name == OURS and self._device.type == "cpu":
            configure_malloc(keep_freed=True)
        torch.set_float32_matmul_precision("high")
        self._benchmark = build_model(name, checkout, workload)
        self._optimizer = adamw(self._benchmark.model, workload.lr, fused=True)
        self._batches = workload.batches()

    def info(self) -> tuple[str | None, list[str]]:
        """Its version and its modes."""
        return self._benchmark.version, list(self._benchmark.modes)

    def step(self, mode: str, batch_index: int) -> tuple[float, float]:
        """Train on one batch in a mode; returns seconds and loss."""
        batch = self._batches[batch_index]

        def training_step() -> Tensor:
            with autocast(self._device, torch.bfloat16):
                loss = self._benchmark.modes[mode](*batch)
            return backward_and_step(loss, self._benchmark.model, self._optimizer)

        seconds, loss = timed(training_step, self._device)
        return seconds, loss.item()

    def measure_peak_memory(self, mode: str) -> int:
        """Peak memory of MEMORY_STEPS steps in bytes, after one step that allocates the optimizer state."""
        for number in range(1 + MEMORY_STEPS):
            if number == 1:
                reset_peak_memory(self._device)
            self.step(mode, number)
        return peak_memory(self._device)


def time_interleaved(
    workload: Workload, peers: PeerCheckouts, runner_class: type[InProcessRunner], progress: ProgressFn
) -> dict[str, Any]:
    """Time every contestant in every mode, in turns, so that other load on the machine affects all alike.

    Returns, by contestant, its version, the raw seconds by mode, and its first loss (from equal weights, on the same
    batch); or the reason why it could not run.
    """
    records: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        variants: list[tuple[str, str, InProcessRunner]] = []
        for name, path in {OURS: None, **peers}.items():
            record = records[name] = {"reason": None, "modes": {}}
            try:
                variant = stack.enter_context(runner_class(TrainVariant, name, path, workload))
                record["version"], modes = variant.call("info")
            except BenchmarkError as failure:
                record["reason"] = str(failure)
                continue
            ready = [mode for mode in modes if _warm_up(record, name, mode, variant, workload, progress)]
            variants += [(name, mode, variant) for mode in ready]
        progress(f"{workload.device}: {workload.steps} rounds of {len(variants)} steps in turns")
        last_progress = time.monotonic()
        for number in range(workload.steps):
            if time.monotonic() - last_progress > 15:
                last_progress = time.monotonic()
                progress(f"{workload.device}: round {number + 1} of {workload.steps}")
            for name, mode, variant in variants:
                seconds, _ = variant.call("step", mode, workload.warmup + number)
                records[name]["modes"][mode]["seconds"].append(seconds)
    return records


def _warm_up(
    record: dict[str, Any], name: str, mode: str, variant: InProcessRunner, workload: Workload, progress: ProgressFn
) -> bool:
    """Run a mode's warm-up steps, and record the contestant's first loss. Returns whether the mode runs."""
    progress(f"{workload.device}: {name}, {mode}: warm-up")
    try:
        losses = [variant.call("step", mode, number)[1] for number in range(workload.warmup)]
    except BenchmarkError as failure:
        record["modes"][mode] = {"reason": str(failure)}
        return False
    record.setdefault("first_loss", losses[0] if math.isfinite(losses[0]) else None)
    record["modes"][mode] = {"seconds": []}
    return True


def compare_with_peers(
    workload: Workload,
    peers: PeerCheckouts,
    runner_class: type[InProcessRunner] = SubprocessRunner,
    progress: ProgressFn = no_progress,
) -> dict[str, Any]:
    """Time all contestants, then measure the peak memory of each in its best mode; see `compute_metrics`.

    If the timing fails, for example because memory runs out, there are no contestants, and `reason` is set.
    """
    try:
        contestants = time_interleaved(workload, peers, runner_class, progress)
    except BenchmarkError as failure:
        return {"contestants": {}, "matmul": None, "reason": str(failure)}
    memory_workload = replace(workload, warmup=1, steps=MEMORY_STEPS)
    for name, record in contestants.items():
        best = best_mode(record["modes"])
        if best is None:
            record["reason"] = record["reason"] or next(mode["reason"] for mode in record["modes"].values())
            continue
        progress(f"{workload.device}: {name}, {best}: peak memory")
        try:
            with runner_class(TrainVariant, name, peers.get(name), memory_workload) as variant:
                record["peak_memory"] = variant.call("measure_peak_memory", best)
        except BenchmarkError as failure:
            record["peak_memory_reason"] = str(failure)
    rate = measure_matmul(torch.device(workload.device), torch.bfloat16, 1.0)
    return compute_metrics({"contestants": contestants, "matmul": rate, "reason": None}, workload)


def best_mode(modes: Mapping[str, dict[str, Any]]) -> str | None:
    """The mode with the lowest median time; None if none could be timed."""
    timed_modes = {name: quartiles_ms(mode["seconds"])["median"] for name, mode in modes.items() if mode.get("seconds")}
    return min(timed_modes, key=timed_modes.__getitem__) if timed_modes else None


def compute_metrics(raw: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """Add metrics to the raw result, for each contestant that ran.

    best: its fastest mode; ms, tokens_per_second and mfu (relative to the matmul rate of this run) are of that mode.
    speed_ratio: its time per step over ours, medians of the best modes.
    memory_ratio: our peak memory over its. wrong: its first loss differs from ours, so it computes something else.
    """
    flops = flops_per_token(workload.config, workload.block_size)
    ran = {}
    for name, record in raw["contestants"].items():
        for mode in record["modes"].values():
            if mode.get("seconds"):
                mode["ms"] = quartiles_ms(mode["seconds"])
        best = best_mode(record["modes"])
        if best is None:
            continue
        ms = record["modes"][best]["ms"]
        speed = workload.tokens / ms["median"] * 1e3
        record |= {"best": best, "ms": ms, "tokens_per_second": speed, "mfu": speed * flops / raw["matmul"]}
        ran[name] = record
    ours = ran.get(OURS)
    for name, record in ran.items():
        if ours is None or name == OURS:
            continue
        record["speed_ratio"] = record["ms"]["median"] / ours["ms"]["median"]
        if "peak_memory" in record and "peak_memory" in ours:
            record["memory_ratio"] = ours["peak_memory"] / record["peak_memory"]
        losses = record["first_loss"], ours["first_loss"]
        record["wrong"] = None in losses or abs(losses[0] - losses[1]) > LOSS_TOLERANCE["bfloat16"]
    return raw


def print_comparison(console: Console, result: dict[str, Any]) -> None:
    """Print a table of all contestants and modes, and the ratios to peers."""
    if result["reason"] is not None:
        console.print(f"the peers could not be timed: {result['reason']}", markup=False)
        return
    console.print(_table(result["contestants"]))
    for line in _ratio_lines(result["contestants"]):
        console.print(line, markup=False)


def _table(contestants: dict[str, dict[str, Any]]) -> Table:
    table = Table("program", "mode", box=None, pad_edge=False)
    for heading in ("ms/step", "quartiles", "tokens/s", "MFU", "peak", "first loss"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, one in contestants.items():
        if "ms" not in one:
            table.add_row(name, *[""] * 7, Text(one["reason"], style="dim"))
            continue
        for mode, record in one["modes"].items():
            if "ms" not in record:
                table.add_row(name, mode, *[""] * 6, Text(record["reason"], style="dim"))
            elif mode != one["best"]:
                table.add_row(name, mode, *format_quartiles(record["ms"]))
            else:
                loss = "not finite" if one["first_loss"] is None else f"{one['first_loss']:.4f}"
                peak = format_gib(one["peak_memory"]) if "peak_memory" in one else "?"
                cells = (f"{one['tokens_per_second']:,.0f}", f"{one['mfu']:.0%}", peak, loss)
                wrong = Text("WRONG: not our loss", style="bold red") if one.get("wrong") else Text("best")
                table.add_row(name, mode, *format_quartiles(record["ms"]), *cells, wrong)
    return table


def _ratio_lines(contestants: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, one in contestants.items():
        if "speed_ratio" in one:
            memory = f", with {one['memory_ratio']:.2f}x its memory" if "memory_ratio" in one else ""
            modes = f"({one['best']}; ours {contestants[OURS]['best']})"
            lines.append(f"{one['speed_ratio']:.2f}x the speed of {name}'s best mode {modes}{memory}")
    return lines
