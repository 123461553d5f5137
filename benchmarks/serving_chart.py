"""The chart of the server's load test."""

from pathlib import Path
from typing import Any

from gpt2.bench.ladder_chart import BLUE, GREY, check_chart_path
from gpt2.reporting.axes import format_ticks
from gpt2.units import format_ratio


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `gpt2 bench serve` over the number of clients: throughput, and both latencies.

    Throughput is labelled with its ratio to the engine's own, the 99th percentile of the inter-token latency with its
    ratio to the median. Raises UserError without matplotlib.
    """
    check_chart_path(path)
    from matplotlib.figure import Figure

    rows = result["clients"]
    clients = [row["clients"] for row in rows]
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    figure.suptitle(_title(result), fontsize=11)
    rates, first, between = figure.subplots(1, 3)
    _line(rates, clients, [row["engine_tokens_per_second"] for row in rows], GREY, "the engine alone")
    _line(rates, clients, [row["tokens_per_second"] for row in rows], BLUE, "the server (%: of the engine alone)")
    for axes, name in ((first, "first_token_ms"), (between, "between_tokens_ms")):
        axes.set_yscale("log")
        note = " (×: of the median)" if axes is between else ""
        _line(axes, clients, [row[name]["p99"] for row in rows], GREY, f"99th percentile{note}")
        _line(axes, clients, [row[name]["median"] for row in rows], BLUE, "median")
    for number, row in enumerate(rows):
        side = "left" if number == 0 < len(rows) - 1 else "center"  # the first point is near the axis
        _annotate(rates, row["clients"], row["tokens_per_second"], f"{row['of_engine']:.0%}", (4, -12), side)
        if ratio := row["between_tokens_p99_of_median"]:
            text = f"{format_ratio(ratio)}×"
            _annotate(between, row["clients"], row["between_tokens_ms"]["p99"], text, (-4, 7), side)
    _format_axes(rates, "tokens/s, all clients", clients)
    _format_axes(first, "time to first token, ms", clients)
    _format_axes(between, "inter-token latency, ms", clients)
    figure.savefig(path)


def _line(axes: Any, clients: list[int], values: list[float], color: str, label: str) -> None:
    axes.plot(clients, values, color=color, marker="o", markersize=5, label=label)


def _annotate(axes: Any, x: float, y: float, text: str, offset: tuple[float, float], side: str) -> None:
    """Write text at an offset, in points, from a point of the chart. side: which of the text's is there."""
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=8)


def _format_axes(axes: Any, title: str, clients: list[int]) -> None:
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, high * (high / low) ** 0.25)  # space for the legend
    else:
        axes.set_ylim(0, 1.3 * high)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [f"{count:,}" for count in clients])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_xlabel("concurrent clients", fontsize=9)
    format_ticks(axes.yaxis)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def _title(result: dict[str, Any]) -> str:
    w = result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} new tokens after {w['prompt_tokens']}"
    where = f"{result['name']}, {result['threads']} threads; torch {result['torch']}, {result['date'][:10]}"
    commit = f", {result['commit']}" if result["commit"] else ""
    return f"Serving GPT-2: {shape}, {result['precision']}\n{where}{commit}"
