"""Accuracy of `gpt2.planning.scaling`: predicted and measured steps over links of known bandwidth.

    python benchmarks/gloo_check.py [--rates 50 200 1000] [--ranks 2] [--only NAME ...]

Each rank is a process with one thread in its own network namespace; a bridge joins them, and `tc` limits what each may
send, in Mbit/s. Requires Linux, root, `ip` and `tc`. The ranks first measure the link (all-reduces and all-gathers of
several sizes: latency, bytes/s, CPU time), then computing alone for each shape. The step is predicted from these, and
compared with real steps with DDP and FSDP2. Writes results/gloo_check.json. Run it on an idle machine with one core per
rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import write_result
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpt2.config import TrainConfig
from gpt2.model import GPT, GPTConfig
from gpt2.optimizers import build_optimizers
from gpt2.planning.cluster import Cluster, Link
from gpt2.planning.costs import StepSetup
from gpt2.planning.scaling import predict_step, split_step_work

ROWS, LENGTH = 4, 128
SHAPES = {
    "4 x 128": GPTConfig(vocab_size=1024, block_size=LENGTH, n_layer=4, n_head=4, n_embd=128),
    "8 x 192": GPTConfig(vocab_size=1024, block_size=LENGTH, n_layer=8, n_head=4, n_embd=192),
    "6 x 256": GPTConfig(vocab_size=8192, block_size=LENGTH, n_layer=6, n_head=4, n_embd=256),
}
BUCKET_MIB = 1  # not 25, so that these small models have as many buckets as large ones
SIZES = (2**20, 2**21, 2**22)  # bytes of the all-reduces that measure the link
WARM_UP, STEPS = 3, 8
TX_BYTES_FILE = Path("/sys/class/net/wire/statistics/tx_bytes")  # in the rank's network namespace


class LossModule(nn.Module):
    """The loss as a module's forward pass, which DDP and FSDP require."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens, tokens, float(tokens.numel()))


def median_seconds(fn: Callable[[], object], repeats: int) -> float:
    """Median seconds of `fn` on the slowest rank, after warm-up; all ranks start together."""
    seconds = []
    for number in range(WARM_UP + repeats):
        dist.barrier()
        start = time.perf_counter()
        fn()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def measure_link() -> dict[str, float]:
    """Latency of an all-reduce, bytes/s, the CPU's share of the time, and the relative bandwidth of all-gather."""
    ranks, all_reduces, all_gathers, cpu_shares = dist.get_world_size(), [], [], []
    latency = median_seconds(lambda: dist.all_reduce(torch.ones(1)), 20)
    for size in SIZES:
        buffer, shard = torch.ones(size // 4), torch.ones(size // 4 // ranks)
        sent = (ranks - 1) / ranks * size
        all_gathers.append((sent, median_seconds(lambda to=buffer, of=shard: dist.all_gather_into_tensor(to, of), 5)))
        cpu, start = time.process_time(), time.perf_counter()
        all_reduces.append((2 * sent, median_seconds(lambda buffer=buffer: dist.all_reduce(buffer), 5)))
        cpu_shares.append((time.process_time() - cpu) / (time.perf_counter() - start))
    byte, gathered_byte = slope(all_reduces), slope(all_gathers)
    rate = min(1.0, byte / gathered_byte) if gathered_byte > 0 else 1.0
    busy = min(1.0, statistics.median(cpu_shares))
    return {"start": latency, "bandwidth": 1 / byte, "busy": busy, "gather_rate": rate}


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of the least-squares line through the points."""
    mean_x, mean_y = (statistics.mean(values) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measure_shape(shape: GPTConfig) -> dict[str, Any]:
    """Seconds of one rank's passes and update without communication, and of steps with DDP and with FSDP2."""
    config, tokens = TrainConfig(), torch.randint(shape.vocab_size, (ROWS, LENGTH))

    def steps(model: nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
        optimizers = build_optimizers(model, config)

        def passes() -> None:
            model(tokens).backward()

        def update() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return passes, update

    def step(model: nn.Module) -> dict[str, float]:
        passes, update = steps(model)
        passes()  # in the first step DDP sends some more bytes, and rebuilds its buckets
        update()
        before = TX_BYTES_FILE.read_text()
        seconds = median_seconds(lambda: (passes(), update()), STEPS)
        return {"seconds": seconds, "sent": (int(TX_BYTES_FILE.read_text()) - int(before)) / (WARM_UP + STEPS)}

    passes, update = steps(LossModule(GPT(shape)))
    alone = median_seconds(passes, STEPS), median_seconds(lambda: (passes(), update()), STEPS)
    found: dict[str, Any] = {}
    ddp = DistributedDataParallel(LossModule(GPT(shape)), bucket_cap_mb=BUCKET_MIB, gradient_as_bucket_view=True)
    found["ddp"] = step(ddp)
    sharded = LossModule(GPT(shape))
    for block in sharded.model.transformer.h:
        fully_shard(block)
    fully_shard(sharded)
    found["fsdp"] = step(sharded)
    again = median_seconds(passes, STEPS), median_seconds(lambda: (passes(), update()), STEPS)  # the speed may drift
    passes_seconds, step_seconds = ((before + after) / 2 for before, after in zip(alone, again, strict=True))
    return {**found, "passes": min(passes_seconds, step_seconds), "update": max(0.0, step_seconds - passes_seconds)}


def rank_main(names: list[str], out: Path) -> None:
    """The measurements of one rank; rank 0 writes the results to `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"link": measure_link(), "shapes": {name: measure_shape(SHAPES[name]) for name in names}}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


def _run_command(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def network_hosts(count: int, mbit: float) -> Iterator[list[str]]:
    """Network namespaces gloo-check-0, ..., joined by a bridge; each may send `mbit` Mbit/s."""
    names, switch = [f"gloo-check-{i}" for i in range(count)], "gloo-check-switch"
    created: list[str] = []
    try:
        for name in (switch, *names):
            _run_command("ip", "netns", "add", name)
            created.append(name)
        _run_command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run_command("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            port = f"port{number}"
            _run_command("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "wire", "netns", name)
            _run_command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run_command("ip", "-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "wire")
            for device in ("wire", "lo"):
                _run_command("ip", "-n", name, "link", "set", device, "up")
            limit = ("rate", f"{mbit}mbit", "burst", "128kb", "latency", "20ms")
            _run_command("tc", "-n", name, "qdisc", "add", "dev", "wire", "root", "tbf", *limit)
        yield names
    finally:
        for name in created:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def measure(ranks: int, mbit: float, names: list[str], folder: Path) -> dict[str, Any]:
    """Run the ranks, each in its own network namespace, and return their results."""
    out = folder / "found.json"
    out.unlink(missing_ok=True)
    with network_hosts(ranks, mbit) as hosts:
        address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "wire"}
        # hide warnings about missing host names, and about the renaming of all_gather_into_tensor in torch 2.13
        address |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore::FutureWarning"}
        running = []
        for rank, host in enumerate(hosts):
            env = {**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
            words = [sys.executable, __file__, "--rank-to", str(out), "--only", *names]
            running.append(subprocess.Popen(["ip", "netns", "exec", host, *words], env=env))
        try:
            codes = [process.wait(timeout=600) for process in running]
        finally:
            for process in running:
                process.kill()
    if any(codes):
        sys.exit(f"a rank failed: exit codes {codes}")
    return json.loads(out.read_text())


def compare(found: dict[str, Any], ranks: int, mbit: float) -> list[dict[str, Any]]:
    """Predictions from the link and from computing alone, and the measured steps."""
    link = Link(found["link"]["bandwidth"], found["link"]["start"])
    measured_link = {name: found["link"][name] for name in ("busy", "gather_rate")}
    cluster = Cluster(ranks, 1, link, link, gloo=True, **measured_link)
    rows = []
    for name, measured in found["shapes"].items():
        setup = StepSetup(rows=ROWS, length=LENGTH)
        work = split_step_work(SHAPES[name], setup, measured["passes"], measured["update"])
        for parallel in ("ddp", "fsdp"):
            predicted = predict_step(work, cluster, parallel, BUCKET_MIB * 2**20)
            rows.append(
                {
                    "shape": name,
                    "ranks": ranks,
                    "mbit": mbit,
                    "parallel": parallel,
                    "compute": predicted.compute,
                    "communication": predicted.communication,
                    "predicted": predicted.seconds,
                    "seen": measured[parallel]["seconds"],
                    "error": predicted.seconds / measured[parallel]["seconds"] - 1,
                    "sent_predicted": predicted.sent_between,
                    "sent_seen": measured[parallel]["sent"],
                }
            )
    return rows


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['shape']:10} {row['ranks']:5} {row['mbit']:6g} {row['parallel']:5}"
        f" {1000 * row['compute']:9.1f} {1000 * row['communication']:9.1f} {1000 * row['predicted']:9.1f}"
        f" {1000 * row['seen']:9.1f} {row['error']:+7.1%}"
        f" {row['sent_predicted'] / 2**20:9.2f} {row['sent_seen'] / 2**20:9.2f}",
        flush=True,
    )


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, for docs/scaling.md."""
    lines = [
        "| model | ranks | link | | computing | communication | predicted | measured | error "
        "| MiB sent, predicted / measured |",
        "| --- | ---: | ---: | --- |" + " ---: |" * 6,
    ]
    for row in rows:
        ms = " | ".join(f"{1000 * row[key]:,.0f} ms" for key in ("compute", "communication", "predicted", "seen"))
        sent = f"{row['sent_predicted'] / 2**20:.2f} / {row['sent_seen'] / 2**20:.2f}"
        setting = f"{row['ranks']} | {row['mbit']:g} Mbit/s | {row['parallel'].upper()}"
        lines.append(f"| {row['shape']} | {setting} | {ms} | {row['error']:+.0%} | {sent} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[50, 200, 1000], help="Mbit/s")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_to is not None:
        rank_main(args.only, args.rank_to)
        return
    rows, links = [], []
    print("per step: ms of computing alone and of communication alone; ms and MiB sent, predicted and measured")
    titles = [f"{title:>9}" for title in ("compute", "comm.", "predicted", "measured")]
    print(f"{'shape':10} {'ranks':>5} {'Mbit/s':>6} {'':5}", *titles, f"{'error':>7} {'MiB pred.':>9} {'measured':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            for mbit in args.rates:
                found = measure(ranks, mbit, args.only, Path(folder))
                links.append({"ranks": ranks, "mbit": mbit, **found["link"]})
                for row in compare(found, ranks, mbit):
                    rows.append(row)
                    print_row(row)
    errors = {way: [abs(row["error"]) for row in rows if row["parallel"] == way] for way in ("ddp", "fsdp")}
    summary = {way: {"median": statistics.median(each), "worst": max(each)} for way, each in errors.items()}
    for way, each in summary.items():
        print(f"{way}: median error {each['median']:.1%}, largest {each['worst']:.1%}")
    print(f"\n{markdown_table(rows)}")
    command = "python benchmarks/gloo_check.py --rates " + " ".join(f"{rate:g}" for rate in args.rates)
    command += " --ranks " + " ".join(map(str, args.ranks))
    write_result("gloo_check", command, {"links": links, "errors": summary, "steps": rows})


if __name__ == "__main__":
    main()
