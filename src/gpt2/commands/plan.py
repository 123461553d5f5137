"""gpt2 plan [RECIPE|FILE] [--flags of train] [--on DEVICE] [--nodes N] [--gpus M] [--tokens 10B] ..."""

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gpt2.cli import Parser, parse_count
from gpt2.commands.json_output import add_json_flag, prints_json, write_json
from gpt2.commands.train import RECIPE_HELP, add_training_flags, merge_flags
from gpt2.config import TrainConfig
from gpt2.train.recipes import RECIPES
from gpt2.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from gpt2.planning.plan import Plan

PLANNED_FIELDS = (  # the settings that memory, time or cost depend on
    *("tokenizer", "init_from", "n_layer", "n_head", "n_embd", "block_size", "freeze"),
    *("lora_rank", "lora_targets", "batch_size", "micro_batch_size", "activation_checkpointing", "max_steps"),
    *("optimizer", "device", "dtype", "matmul_precision", "compile", "parallel"),
)


def main(argv: list[str]) -> int:
    """Run `gpt2 plan`: a table, or JSON, on standard output. Returns 1 if the run does not fit in memory."""
    given = vars(make_parser().parse_args(argv))
    from rich.console import Console

    from gpt2.planning.plan import plan

    recipe, file = given.pop("recipe"), given.pop("json")
    target = {name: given.pop(name) for name in ("on", "nodes", "network", "tokens", "price_per_hour")}
    result = plan(devices=given.pop("gpus"), config=_plan_config(recipe, given), **target)
    write_json(file, result.as_dict())
    if not prints_json(file):
        print_plan(result, Console())
    return 0 if result.fits else 1


def make_parser() -> Parser:
    """The parser of `gpt2 plan`."""
    parser = Parser(
        prog="gpt2 plan",
        description="Estimate what a training run needs: memory by part, time and cost. Writes no file, and reads no "
        "data.",
        epilog=f"recipes: {', '.join(RECIPES)}; by default quickstart. All other flags of gpt2 train are "
        "accepted too; they do not change the plan.",
        examples=(
            "gpt2 plan shakespeare",
            "gpt2 plan gpt2-124m --on h100 --gpus 8 --tokens 10B --price-per-hour 24",
        ),
    )
    parser.add_argument("recipe", nargs="?", default="quickstart", metavar="RECIPE|FILE", help=RECIPE_HELP)
    parser.add_flag(
        "on",
        default="here",
        metavar="DEVICE",
        help="here, measured; or a GPU such as h100, estimated [here]",
    )
    parser.add_flag(
        "gpus", type=parse_count, default=1, metavar="INT", help="GPUs per machine; they share the batch [1]"
    )
    parser.add_flag("nodes", type=parse_count, default=1, metavar="INT", help="machines [1]")
    network_help = "bandwidth between machines, in Gbit/s each [typical for the GPU]"
    parser.add_flag("network", type=_parse_gbit, metavar="GBIT", help=network_help)
    parser.add_flag(
        "tokens", type=parse_count, metavar="COUNT", help="budget such as 500M or 10B [that of --max-steps]"
    )
    parser.add_flag("price-per-hour", type=_parse_price, metavar="PRICE", help="of all machines, in any currency")
    add_json_flag(parser, "the plan")
    hidden = [field.name for field in fields(TrainConfig) if field.name not in PLANNED_FIELDS]
    add_training_flags(parser, hidden=hidden)
    return parser


def _plan_config(recipe: str, flags: dict[str, Any]) -> TrainConfig:
    """The config of `gpt2 train`, without looking for an existing run folder."""
    if flags.get("resume") in ("never", "auto"):
        del flags["resume"]
    return merge_flags(recipe, {"name": "plan", **flags}).check()


def _parse_gbit(text: str) -> float:
    """Parse Gbit/s, and return bytes/s."""
    try:
        gbit = float(text)
    except ValueError:
        gbit = 0.0
    if not 0 < gbit < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a bandwidth over 0, such as 100 for 100 Gbit/s")
    return gbit * 1e9 / 8


def _parse_price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a price")
    return price


def print_plan(result: "Plan", console: "Console") -> None:
    """Print the plan as a table with a name, a value and a remark in each line."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    sections = [("Model", _model_rows(result)), ("Memory", _memory_rows(result)), ("Time", _time_rows(result))]
    if result.ways:  # of parallelism
        sections.append((f"Parallel: {result.parallel}", _parallel_rows(result)))
    for title, rows in sections:
        table.add_row(f"[bold]{title}[/bold]", "", "")
        for name, value, remark in rows:
            table.add_row(f"  {name}", value, remark)
    console.print(table)
    if not result.fits:
        console.print(f"[bold]The run does not fit in the memory of {result.device}.[/bold]")


def _model_rows(result: "Plan") -> list[tuple[str, str, str]]:
    accumulation = result.batch_size // result.devices // result.micro_batch_size
    split = f"{accumulation} micro-batches of {result.micro_batch_size}" if accumulation > 1 else "one micro-batch"
    per_device = f"on each of {result.devices} devices " if result.devices > 1 else ""
    full = result.trainable == result.parameters
    trainable = [("trainable", f"{result.trainable:,}", f"{result.trainable / result.parameters:.2%} of them")]
    weights = "6 per matrix weight" if full else "4 per frozen matrix weight, 6 per trainable one"
    return [
        ("parameters", f"{result.parameters:,}", f"with a vocabulary of {result.vocab_size:,}"),
        *([] if full else trainable),
        ("tokens per step", f"{result.tokens_per_step:,}", f"{result.batch_size:,} sequences, {per_device}{split}"),
        ("steps", f"{result.steps:,}", f"{format_count(result.tokens)} tokens"),
        ("FLOPs per token", f"{result.flops_per_token:.3g}", f"{weights}, 12 * layers * width * context"),
        ("FLOPs per step", f"{result.flops_per_step:.3g}", ""),
        ("FLOPs of the run", f"{result.flops:.3g}", ""),
    ]


MEMORY_REMARKS = {
    "program": "Python and torch, measured",
    "weights": "float32",
    "gradients": "float32, of trainable parameters",
    "optimizer": "its state of each trainable parameter",
    "gathered": "parameters all-gathered from other devices",
    "casts": "matrices in the compute dtype",
    "activations": "kept for the backward pass",
    "logits": "one chunk, and the gradient of the head",
    "working": "temporary buffers of one operation",
    "allocator": "heap fragmentation, an estimate",
    "snapshot": "host memory, while a checkpoint is written",
}


def _memory_rows(result: "Plan") -> list[tuple[str, str, str]]:
    from gpt2.planning.target import MAX_MEMORY_FRACTION

    rows = [(name, format_bytes(size), MEMORY_REMARKS[name]) for name, size in result.memory.parts().items() if size]
    share = result.memory.peak / result.device_memory
    verdict = "fits" if result.fits else f"does not fit: {MAX_MEMORY_FRACTION:.0%} is usable"
    rows.append(("a step", format_bytes(result.memory.step), "upper bound: the parts do not all peak at once"))
    if result.memory.peak > result.memory.step:
        rows.append(("the run", format_bytes(result.memory.peak), "upper bound, with checkpoints"))
    rows.append(("device", format_bytes(result.device_memory), f"{result.device}: {share:.0%} used, {verdict}"))
    if result.suggestion is None:
        remark = "not even one sequence fits, with activation checkpointing or without: a smaller model, or more memory"
        rows.append(("suggestion", "none", remark))
    else:
        flags = f"--micro-batch-size {result.suggestion['micro_batch_size']}"
        whole = result.suggestion["micro_batch_size"] * result.devices >= result.batch_size
        remark = "the whole batch of a device" if whole else "a larger one does not fit"
        if result.suggestion["activation_checkpointing"]:
            remark += ", with --activation-checkpointing"
        rows.append(("micro-batch", flags, remark))
    return rows


def _time_rows(result: "Plan") -> list[tuple[str, str, str]]:
    from gpt2.planning.scaling import ASSUMED_MFU

    if result.measured:
        source = "from passes of some layers, timed on this machine"
        of_rate = f"of the {result.matmul_rate / 1e12:.3g} TFLOP/s that matmuls reach on this machine"
    else:
        source = f"an estimate: passes at {ASSUMED_MFU:.0%} MFU, and the update"
        each = " each" if result.devices > 1 else ""
        of_rate = f"of the datasheet's {result.matmul_rate / 1e12:.4g} TFLOP/s{each}, over the whole step"
    if result.ways:
        source += f"; with {result.parallel}, see below"
    compiled = ", compiled" if result.compile else ""
    rows = [
        ("per step", _format_seconds(result.seconds_per_step), source),
        ("tokens per second", f"{result.tokens_per_second:,.0f}", f"in {result.dtype}{compiled}"),
        ("utilization", f"{result.utilization:.0%}", of_rate),
        ("the run", _format_seconds(result.seconds), "training steps only: no validation, samples or checkpoints"),
    ]
    if result.disk is not None:
        rows.append(("disk", format_bytes(result.disk), "token shards, made first (gpt2 data list says how long)"))
    if result.cost is not None:
        rows.append(("cost", f"{result.cost:,.2f}", "at the price given for all machines"))
    return rows


def _parallel_rows(result: "Plan") -> list[tuple[str, str, str]]:
    """Memory, time and traffic of DDP and FSDP2, per device."""
    rows = []
    for name, way in result.ways.items():
        step = way.step
        sent = [f"{format_bytes(step.sent_inside)} inside its machine"] if step.sent_inside else []
        if step.sent_between:
            sent.append(f"{format_bytes(step.sent_between)} to others")
        share = f"{way.memory.peak / result.device_memory:.0%} of the device's"
        exposed = f"{_format_seconds(step.exposed)} not overlapped with computation"
        rows += [
            (f"{name}: memory", format_bytes(way.memory.peak), share if way.fits else f"{share}: does not fit"),
            (f"{name}: a step", _format_seconds(step.seconds), f"{step.efficiency:.0%} of it computation"),
            (f"{name}: communication", _format_seconds(step.communication), exposed),
            (f"{name}: sent", format_bytes(step.sent_inside + step.sent_between), ", ".join(sent)),
        ]
    if result.nodes > 1:
        rows.append(("network", f"{result.network * 8 / 1e9:,.4g} Gbit/s", "of each machine (--network)"))
    return rows


def _format_seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else format_duration(seconds)
