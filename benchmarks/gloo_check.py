"""Does `gpt2.planning.scaling` tell the truth? Predicted steps against real ones, over links of a known speed.

    python benchmarks/gloo_check.py [--rates 50 200 1000] [--ranks 2] [--only NAME ...]

Every rank is a process with one thread in a network namespace of its own, joined by a bridge; `tc` limits what each may
send, in Mbit/s. So it wants Linux, root, `ip` and `tc`. First the ranks measure the link (all-reduces and gathers of
some sizes: seconds to begin, bytes/s, and the CPU's part of it), then for each shape its computing alone, all at once
and with nothing sent. From these alone the step is predicted, and then real steps by DDP and by FSDP2 are timed. It
goes to benchmarks/results/gloo_check.json; run it on a machine that does nothing else, with a core for every rank.
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
BUCKET_MIB = 1  # instead of 25: these models are a hundredth of those that DDP's default was made for
SIZES = (2**20, 2**21, 2**22)  # bytes of the all-reduces that the link is measured with
WARM_UP, STEPS = 3, 8
TX_BYTES_FILE = Path("/sys/class/net/wire/statistics/tx_bytes")  # of the host that a rank is in


class LossModule(nn.Module):
    """The loss as a module's forward pass, which is what DDP and FSDP watch."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens, tokens, float(tokens.numel()))


def median_seconds(fn: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work`, which all ranks begin together, after some to warm up; the slowest rank's."""
    seconds = []
    for number in range(WARM_UP + repeats):
        dist.barrier()
        began = time.perf_counter()
        fn()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def measure_link() -> dict[str, float]:
    """Seconds to begin an all-reduce, bytes/s of what is sent, the CPU's share of the time, and gathering's pace."""
    ranks, sums, gathers, used = dist.get_world_size(), [], [], []
    tiny = median_seconds(lambda: dist.all_reduce(torch.ones(1)), 20)
    for size in SIZES:
        buffer, shard = torch.ones(size // 4), torch.ones(size // 4 // ranks)
        once = (ranks - 1) / ranks * size
        gathers.append((once, median_seconds(lambda to=buffer, of=shard: dist.all_gather_into_tensor(to, of), 5)))
        cpu, began = time.process_time(), time.perf_counter()
        sums.append((2 * once, median_seconds(lambda buffer=buffer: dist.all_reduce(buffer), 5)))
        used.append((time.process_time() - cpu) / (time.perf_counter() - began))
    byte, gathered_byte = slope(sums), slope(gathers)
    rate = min(1.0, byte / gathered_byte) if gathered_byte > 0 else 1.0
    return {"start": tiny, "bandwidth": 1 / byte, "busy": min(1.0, statistics.median(used)), "gather_rate": rate}


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line through the points, by least squares."""
    mean_x, mean_y = (statistics.mean(values) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measure_shape(shape: GPTConfig) -> dict[str, Any]:
    """Seconds of one rank's passes and update alone, and of whole steps with DDP and with FSDP2."""
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
        passes()  # DDP sends some bytes once, and puts its buckets in order
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
    again = (
        median_seconds(passes, STEPS),
        median_seconds(lambda: (passes(), update()), STEPS),
    )  # a machine's pace may change
    alone, whole = ((before + after) / 2 for before, after in zip(alone, again, strict=True))
    return {**found, "passes": min(alone, whole), "update": max(0.0, whole - alone)}


def rank_main(names: list[str], out: Path) -> None:
    """What each rank does; the first writes what was found."""
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
    """Network namespaces called gloo-check-0, ..., joined by a bridge, each of which may send `mbit` Mbit/s."""
    names, switch = [f"gloo-check-{i}" for i in range(count)], "gloo-check-switch"
    made: list[str] = []
    try:
        for name in (switch, *names):
            _run_command("ip", "netns", "add", name)
            made.append(name)
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
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def measure(ranks: int, mbit: float, names: list[str], folder: Path) -> dict[str, Any]:
    """Run the ranks, each in a host of its own, and read what they found."""
    out = folder / "found.json"
    out.unlink(missing_ok=True)
    with network_hosts(ranks, mbit) as places:
        address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29555", "GLOO_SOCKET_IFNAME": "wire"}
        # of names that hosts in a namespace do not have, and of all_gather_into_tensor, which has another in torch 2.13
        address |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore::FutureWarning"}
        running = []
        for rank, place in enumerate(places):
            env = {**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
            words = [sys.executable, __file__, "--rank-to", str(out), "--only", *names]
            running.append(subprocess.Popen(["ip", "netns", "exec", place, *words], env=env))
        try:
            codes = [process.wait(timeout=600) for process in running]
        finally:
            for process in running:
                process.kill()
    if any(codes):
        sys.exit(f"a rank ended with {codes}")
    return json.loads(out.read_text())


def compare(found: dict[str, Any], ranks: int, mbit: float) -> list[dict[str, Any]]:
    """What was predicted from a link and from computing alone, beside what was seen."""
    link = Link(found["link"]["bandwidth"], found["link"]["start"])
    of_gloo = {name: found["link"][name] for name in ("busy", "gather_rate")}
    cluster = Cluster(ranks, 1, link, link, gloo=True, **of_gloo)
    rows = []
    for name, seen in found["shapes"].items():
        work = split_step_work(SHAPES[name], StepSetup(rows=ROWS, length=LENGTH), seen["passes"], seen["update"])
        for parallel in ("ddp", "fsdp"):
            said = predict_step(work, cluster, parallel, BUCKET_MIB * 2**20)
            rows.append(
                {
                    "shape": name,
                    "ranks": ranks,
                    "mbit": mbit,
                    "parallel": parallel,
                    "compute": said.compute,
                    "communication": said.communication,
                    "predicted": said.seconds,
                    "seen": seen[parallel]["seconds"],
                    "error": said.seconds / seen[parallel]["seconds"] - 1,
                    "sent_predicted": said.sent_between,
                    "sent_seen": seen[parallel]["sent"],
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
    """The same in Markdown, for docs/scaling.md."""
    lines = [
        "| model | ranks | link | | computing | sending | predicted | measured | error | MiB sent, predicted / seen |",
        "| --- | ---: | ---: | --- |" + " ---: |" * 6,
    ]
    for row in rows:
        ms = " | ".join(f"{1000 * row[key]:,.0f} ms" for key in ("compute", "communication", "predicted", "seen"))
        sent = f"{row['sent_predicted'] / 2**20:.2f} / {row['sent_seen'] / 2**20:.2f}"
        where = f"{row['ranks']} | {row['mbit']:g} Mbit/s | {row['parallel'].upper()}"
        lines.append(f"| {row['shape']} | {where} | {ms} | {row['error']:+.0%} | {sent} |")
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
    print("of a step: ms of computing alone and of sending alone; ms and MiB sent, predicted and seen")
    titles = [f"{title:>9}" for title in ("alone", "sending", "said", "seen")]
    print(f"{'shape':10} {'ranks':>5} {'Mbit/s':>6} {'':5}", *titles, f"{'error':>7} {'MiB said':>9} {'seen':>9}")
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
        print(f"{way}: error {each['median']:.1%} in the median, {each['worst']:.1%} at most")
    print(f"\n{markdown_table(rows)}")
    command = "python benchmarks/gloo_check.py --rates " + " ".join(f"{rate:g}" for rate in args.rates)
    command += " --ranks " + " ".join(map(str, args.ranks))
    write_result("gloo_check", command, {"links": links, "errors": summary, "steps": rows})


if __name__ == "__main__":
    main()
