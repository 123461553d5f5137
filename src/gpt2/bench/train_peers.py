"""Our training step beside those of others: same shapes, weights and batches, in turns, each in its own process."""

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
from torch import Tensor, nn

from gpt2.bench.common import (
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
from gpt2.errors import UserError, did_you_mean
from gpt2.files import file_sha256
from gpt2.hardware import measure_matmul, peak_memory, reset_peak_memory
from gpt2.model import GPT
from gpt2.planning.costs import flops_per_token
from gpt2.runtime import autocast, can_compile, compile_blocks, configure_malloc
from gpt2.weights import CONV1D_WEIGHTS

OURS = "gpt2"  # this program's name among the contestants
PEERS = ("nanogpt", "transformers")
MEMORY_STEPS = 3  # how many steps the peak memory is looked for in

LossFn = Callable[[Tensor, Tensor], Tensor]  # tokens and targets, (B, T) each -> mean loss
PeerCheckouts = Mapping[str, str | None]  # a peer's name -> its checkout, if it is one


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to be trained, and its loss in each mode: "eager" and, where it can be, "compiled"."""

    model: nn.Module
    modes: dict[str, LossFn]
    version: str | None = None


def parse_peers(given: list[str]) -> dict[str, str | None]:
    """``["nanogpt=PATH", "transformers"]`` as a mapping. Raises UserError for what cannot be compared with here."""
    peers: dict[str, str | None] = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in PEERS:
            raise UserError(f"there is no peer '{name}'{did_you_mean(name, PEERS)}: there are {', '.join(PEERS)}")
        if name == "nanogpt":
            if not path:
                raise UserError("--peer nanogpt needs a checkout: --peer nanogpt=PATH")
            if not (Path(path) / "model.py").is_file():
                raise UserError(f"--peer nanogpt={path}: that is no checkout of nanoGPT, it has no model.py")
        elif importlib.util.find_spec(name) is None:
            raise UserError("--peer transformers needs transformers, which is not installed: pip install transformers")
        peers[name] = path or None
    return peers


def build_model(name: str, checkout: str | None, workload: Workload) -> BenchmarkModel:
    """One contestant on the workload's device, with the weights that this program draws from the workload's seed."""
    torch.manual_seed(workload.seed)
    model = GPT(replace(workload.config, attention="sdpa"))
    device = torch.device(workload.device)
    if name == OURS:
        contestant = _build_ours(model.to(device))
    elif name == "nanogpt":
        contestant = _build_nanogpt(model, Path(checkout or ""), device)
    else:
        contestant = _build_transformers(model, device)
    if not can_compile(device):
        contestant.modes.pop("compiled")
    return contestant


def _build_ours(model: GPT) -> BenchmarkModel:
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the same weights, run another way
    compile_blocks(twin.transformer.h)
    return BenchmarkModel(model, {"eager": model.loss, "compiled": twin.loss})


def _build_nanogpt(ours: GPT, checkout: Path, device: torch.device) -> BenchmarkModel:
    file = checkout / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    c = ours.config
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise UserError(f"{file} is not nanoGPT's: it has no GPT and GPTConfig")
    shape = {name: getattr(c, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    with contextlib.redirect_stdout(sys.stderr):  # it tells how many parameters it has
        model = module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=True))
    _copy_weights(model, ours.state_dict(), "nanoGPT")
    model.to(device)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(tokens, targets)[1]

    version = "model.py sha256 " + file_sha256(file)[:12]
    return BenchmarkModel(model, {"eager": loss, "compiled": torch.compile(loss)}, version)


def _build_transformers(ours: GPT, device: torch.device) -> BenchmarkModel:
    import transformers

    c = ours.config
    gpt2_config: Any = transformers.GPT2Config  # its stub knows only the fields, not the rest it takes
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

    return BenchmarkModel(model, {"eager": loss, "compiled": torch.compile(loss)}, transformers.__version__)


def _copy_weights(model: nn.Module, weights: Mapping[str, Tensor], peer_name: str) -> None:
    """Give a peer our first weights. Every parameter of its must be among them; buffers may be its own."""
    missing = {name for name, _ in model.named_parameters()} - set(weights)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if missing or unknown:
        names = ", ".join(sorted([*missing, *unknown])[:3])
        raise UserError(f"the parameters of {peer_name} are not GPT-2's as this program knows them: {names}")


class TrainVariant:
    """A contestant in training: bfloat16 autocast, gradients clipped to 1.0, fused AdamW.

    It is meant to run in a process of its own, where our trainer's settings for the process help no one else.
    """

    def __init__(self, name: str, checkout: str | None, workload: Workload) -> None:
        self._device = torch.device(workload.device)
        if name == OURS and self._device.type == "cpu":
            configure_malloc(keep_freed=True)
        torch.set_float32_matmul_precision("high")
        self._contestant = build_model(name, checkout, workload)
        self._optimizer = adamw(self._contestant.model, workload.lr, fused=True)
        self._batches = workload.batches()

    def info(self) -> tuple[str | None, list[str]]:
        """Its version and its modes."""
        return self._contestant.version, list(self._contestant.modes)

    def step(self, mode: str, batch_index: int) -> tuple[float, float]:
        """Learn from batch `number` in a mode; the seconds it took, and the loss."""
        batch = self._batches[batch_index]

        def work() -> Tensor:
            with autocast(self._device, torch.bfloat16):
                loss = self._contestant.modes[mode](*batch)
            return backward_and_step(loss, self._contestant.model, self._optimizer)

        seconds, loss = timed(work, self._device)
        return seconds, loss.item()

    def measure_peak_memory(self, mode: str) -> int:
        """Bytes at the peak of three steps, after one that builds all that stays."""
        for number in range(1 + MEMORY_STEPS):
            if number == 1:
                reset_peak_memory(self._device)
            self.step(mode, number)
        return peak_memory(self._device)


def time_interleaved(
    workload: Workload, peers: PeerCheckouts, runner_class: type[InProcessRunner], progress: ProgressFn
) -> dict[str, Any]:
    """Time every contestant in every mode, in turns, so that whatever else the machine does hits all alike.

    Returns, by contestant, its version, the raw seconds by mode, and its first loss (from equal weights, on the same
    batch); or the reason why it could not run.
    """
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        lanes: list[tuple[str, str, InProcessRunner]] = []
        for name, path in {OURS: None, **peers}.items():
            found[name] = {"reason": None, "modes": {}}
            try:
                lane = stack.enter_context(runner_class(TrainVariant, name, path, workload))
                found[name]["version"], modes = lane.call("info")
            except BenchmarkError as failure:
                found[name]["reason"] = str(failure)
                continue
            lanes += [
                (name, mode, lane) for mode in modes if _warm_up(found[name], name, mode, lane, workload, progress)
            ]
        progress(f"{workload.device}: {workload.steps} rounds of {len(lanes)} steps in turns")
        said = time.monotonic()
        for number in range(workload.steps):
            if time.monotonic() - said > 15:
                said = time.monotonic()
                progress(f"{workload.device}: round {number + 1} of {workload.steps}")
            for name, mode, lane in lanes:
                seconds, _ = lane.call("step", mode, workload.warmup + number)
                found[name]["modes"][mode]["seconds"].append(seconds)
    return found


def _warm_up(
    record: dict[str, Any], name: str, mode: str, variant: InProcessRunner, workload: Workload, progress: ProgressFn
) -> bool:
    """Do a mode's warm-up steps, and note the contestant's first loss; whether it runs at all."""
    progress(f"{workload.device}: {name}, {mode}: warm-up")
    try:
        first = [variant.call("step", mode, number)[1] for number in range(workload.warmup)]
    except BenchmarkError as failure:
        record["modes"][mode] = {"reason": str(failure)}
        return False
    record.setdefault("first_loss", first[0] if math.isfinite(first[0]) else None)
    record["modes"][mode] = {"seconds": []}
    return True


def compare_with_peers(
    workload: Workload,
    peers: PeerCheckouts,
    runner_class: type[InProcessRunner] = SubprocessRunner,
    progress: ProgressFn = no_progress,
) -> dict[str, Any]:
    """The race, and the peak memory of each in its best mode, each alone in a process of its own. See `rank`.

    A race that broke off, for want of memory say, has no contestants, and the `reason`.
    """
    try:
        contestants = time_interleaved(workload, peers, runner_class, progress)
    except BenchmarkError as failure:
        return {"contestants": {}, "matmul": None, "reason": str(failure)}
    for name, one in contestants.items():
        best = best_mode(one["modes"])
        if best is None:
            one["reason"] = one["reason"] or next(mode["reason"] for mode in one["modes"].values())
            continue
        progress(f"{workload.device}: {name}, {best}: peak memory")
        try:
            alone = replace(workload, warmup=1, steps=MEMORY_STEPS)
            with runner_class(TrainVariant, name, peers.get(name), alone) as lane:
                one["peak_memory"] = lane.call("measure_peak_memory", best)
        except BenchmarkError as failure:
            one["peak_memory_reason"] = str(failure)
    rate = measure_matmul(torch.device(workload.device), torch.bfloat16, 1.0)
    return compute_metrics({"contestants": contestants, "matmul": rate, "reason": None}, workload)


def best_mode(modes: Mapping[str, dict[str, Any]]) -> str | None:
    """The mode with the lowest median time; None when none could be timed."""
    timed_modes = {name: quartiles_ms(mode["seconds"])["median"] for name, mode in modes.items() if mode.get("seconds")}
    return min(timed_modes, key=timed_modes.__getitem__) if timed_modes else None


def compute_metrics(raw: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """The raw result with what follows from it, for each contestant that ran.

    best: its faster mode; ms, tokens_per_second and mfu (against the matmul rate of this run) are of that.
    speed_ratio: how many times as long its step takes as ours, medians of the best modes.
    memory_ratio: our peak memory over its. wrong: its first loss is not ours, so it computes something else.
    """
    contestants = raw["contestants"]
    flops = flops_per_token(workload.config, workload.block_size)
    ran = {name: one for name, one in contestants.items() if best_mode(one["modes"]) is not None}
    for one in ran.values():
        for mode in one["modes"].values():
            if mode.get("seconds"):
                mode["ms"] = quartiles_ms(mode["seconds"])
        best = best_mode(one["modes"])
        assert best is not None
        speed = workload.tokens / one["modes"][best]["ms"]["median"] * 1e3
        one |= {"best": best, "ms": one["modes"][best]["ms"], "tokens_per_second": speed}
        one["mfu"] = speed * flops / raw["matmul"]
    ours = ran.get(OURS)
    for name, one in ran.items():
        if ours is None or name == OURS:
            continue
        one["speed_ratio"] = one["ms"]["median"] / ours["ms"]["median"]
        if "peak_memory" in one and "peak_memory" in ours:
            one["memory_ratio"] = ours["peak_memory"] / one["peak_memory"]
        losses = one["first_loss"], ours["first_loss"]
        one["wrong"] = None in losses or abs(losses[0] - losses[1]) > LOSS_TOLERANCE["bfloat16"]
    return raw
