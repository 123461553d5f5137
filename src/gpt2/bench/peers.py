"""Our training step beside those of others: same shapes, same first weights, same batches, one process, in turns."""

import contextlib
import copy
import hashlib
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

from gpt2.bench.ladder import TOLERANCE
from gpt2.bench.timing import (
    Batch,
    Failed,
    Run,
    Say,
    Workload,
    adamw,
    in_fresh_process,
    in_this_process,
    milliseconds,
    silent,
    timed,
    update,
)
from gpt2.costs import flops_per_token
from gpt2.errors import UserError, did_you_mean
from gpt2.hardware import measure_matmul, peak_memory, reset_peak_memory
from gpt2.model import GPT
from gpt2.runtime import autocast, can_compile, compile_blocks
from gpt2.weights import TRANSPOSED

OURS = "gpt2"  # this program's name among the contestants
PEERS = ("nanogpt", "transformers")
MEMORY_STEPS = 3  # how many steps the peak memory is looked for in

Loss = Callable[[Tensor, Tensor], Tensor]  # tokens and targets, (B, T) each -> mean loss
Peers = Mapping[str, str | None]  # a peer's name -> its checkout, if it is one


@dataclass(frozen=True)
class Contestant:
    """A model to be trained, and its loss in each mode: "eager" and, where it can be, "compiled"."""

    model: nn.Module
    modes: dict[str, Loss]
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


def build(name: str, path: str | None, workload: Workload) -> Contestant:
    """One contestant on the workload's device, with the weights that this program draws from the workload's seed."""
    torch.manual_seed(workload.seed)
    model = GPT(replace(workload.config, attention="sdpa"))
    device = torch.device(workload.device)
    if name == OURS:
        contestant = _ours(model.to(device))
    elif name == "nanogpt":
        contestant = _nanogpt(model, Path(path or ""), device)
    else:
        contestant = _transformers(model, device)
    if not can_compile(device):
        contestant.modes.pop("compiled")
    return contestant


def _ours(model: GPT) -> Contestant:
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the same weights, run another way
    compile_blocks(twin.transformer.h)
    return Contestant(model, {"eager": model.loss, "compiled": twin.loss})


def _nanogpt(ours: GPT, path: Path, device: torch.device) -> Contestant:
    file = path / "model.py"
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

    version = "model.py sha256 " + hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return Contestant(model, {"eager": loss, "compiled": torch.compile(loss)}, version)


def _transformers(ours: GPT, device: torch.device) -> Contestant:
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
    weights = {name: p.t() if name.endswith(TRANSPOSED) else p for name, p in ours.state_dict().items()}
    _copy_weights(model, weights, "transformers")
    model.to(device).train()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens).logits
        return model.loss_function(logits, None, vocab_size=c.vocab_size, shift_labels=targets)

    return Contestant(model, {"eager": loss, "compiled": torch.compile(loss)}, transformers.__version__)


def _copy_weights(model: nn.Module, weights: Mapping[str, Tensor], who: str) -> None:
    """Give a peer our first weights. Every parameter of its must be among them; buffers may be its own."""
    missing = {name for name, _ in model.named_parameters()} - set(weights)
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if missing or unknown:
        names = ", ".join(sorted([*missing, *unknown])[:3])
        raise UserError(f"the parameters of {who} are not GPT-2's as this program knows them: {names}")


def _stepper(contestant: Contestant, workload: Workload) -> Callable[[str, Batch], Tensor]:
    """A function that does one training step in a mode on a batch: bfloat16 autocast, clipping, fused AdamW."""
    device = torch.device(workload.device)
    optimizer = adamw(contestant.model, workload.lr, fused=True)

    def step(mode: str, batch: Batch) -> Tensor:
        with autocast(device, torch.bfloat16):
            loss = contestant.modes[mode](*batch)
        return update(loss, contestant.model, optimizer)

    return step


def race(workload: Workload, peers: Peers, say: Say) -> dict[str, Any]:
    """Time every contestant in every mode, in turns, so that whatever else the machine does hits all alike.

    Returns the raw seconds by contestant and mode, the first loss of each (from equal weights, on the same batch), and
    FLOP/s of bfloat16 matmuls measured at the end.
    """
    device = torch.device(workload.device)
    torch.set_float32_matmul_precision("high")
    batches = workload.batches()
    found: dict[str, dict[str, Any]] = {}
    lanes: list[tuple[str, str, Callable[[str, Batch], Tensor]]] = []
    for name, path in {OURS: None, **peers}.items():
        found[name] = {"reason": None, "modes": {}}
        try:
            contestant = in_this_process(build, name, path, workload)
        except Failed as failure:
            found[name]["reason"] = str(failure)
            continue
        found[name]["version"] = contestant.version
        step = _stepper(contestant, workload)
        for mode in contestant.modes:
            say(f"{workload.device}: {name}, {mode}: warm-up")
            try:
                first = [in_this_process(step, mode, batch).item() for batch in batches[: workload.warmup]]
            except Failed as failure:
                found[name]["modes"][mode] = {"reason": str(failure)}
                continue
            found[name].setdefault("first_loss", first[0] if math.isfinite(first[0]) else None)
            found[name]["modes"][mode] = {"seconds": []}
            lanes.append((name, mode, step))
    say(f"{workload.device}: {workload.steps} rounds of {len(lanes)} steps in turns")
    said = time.monotonic()
    for number, batch in enumerate(batches[workload.warmup :]):
        if time.monotonic() - said > 15:
            said = time.monotonic()
            say(f"{workload.device}: round {number + 1} of {workload.steps}")
        for name, mode, step in lanes:
            took, _ = timed(lambda step=step, mode=mode, batch=batch: step(mode, batch), device)
            found[name]["modes"][mode]["seconds"].append(took)
    return {"contestants": found, "matmul": measure_matmul(device, torch.bfloat16, 1.0), "reason": None}


def peak_of(workload: Workload, name: str, path: str | None, mode: str) -> int:
    """Bytes at the peak of a contestant's training, alone: three steps, after one that builds all that stays."""
    device = torch.device(workload.device)
    torch.set_float32_matmul_precision("high")
    step = _stepper(build(name, path, workload), workload)
    for number, batch in enumerate(replace(workload, warmup=1, steps=MEMORY_STEPS).batches()):
        if number == 1:
            reset_peak_memory(device)
        step(mode, batch).item()
    return peak_memory(device)


def compete(workload: Workload, peers: Peers, run: Run = in_fresh_process, say: Say = silent) -> dict[str, Any]:
    """The race, and the peak memory of each in its best mode, each in a process of its own. See `rank`.

    A race that broke off, for want of memory say, has no contestants, and the `reason`.
    """
    try:
        raw = run(race, workload, peers, say)
    except Failed as failure:
        return {"contestants": {}, "matmul": None, "reason": str(failure)}
    for name, one in raw["contestants"].items():
        best = best_mode(one["modes"])
        if best is None:
            one["reason"] = one["reason"] or next(mode["reason"] for mode in one["modes"].values())
            continue
        say(f"{workload.device}: {name}, {best}: peak memory")
        try:
            one["peak_memory"] = run(peak_of, workload, name, peers.get(name), best)
        except Failed as failure:
            one["peak_memory_reason"] = str(failure)
    return rank(raw, workload)


def best_mode(modes: Mapping[str, dict[str, Any]]) -> str | None:
    """The mode with the lowest median time; None when none could be timed."""
    timed_modes = {name: milliseconds(mode["seconds"])["median"] for name, mode in modes.items() if mode.get("seconds")}
    return min(timed_modes, key=timed_modes.__getitem__) if timed_modes else None


def rank(raw: dict[str, Any], workload: Workload) -> dict[str, Any]:
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
                mode["ms"] = milliseconds(mode["seconds"])
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
        one["wrong"] = None in losses or abs(losses[0] - losses[1]) > TOLERANCE["bfloat16"]
    return raw
