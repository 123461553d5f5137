"""The chart of decoding speed: a panel for each batch size, a bar for each variant."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from gpt2.bench.common import OURS
from gpt2.bench.ladder_chart import BLUE, GREY, RED, check_chart_path
from gpt2.errors import UserError
from gpt2.reporting.axes import format_ticks
from gpt2.units import format_significant

PANELS_PER_ROW = 4
ROW_HEIGHT, FAMILY_GAP = 0.27, 0.5  # inches per variant; space between two precision families, in variants
LABEL_SHARE = 0.36  # fraction of an axis for the label beside a bar
LIGHT_BLUE = "#9ecae1"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `gpt2 bench generate`: tokens/s by variant, one panel for each batch size, ours in blue.

    Variants are grouped by precision family. A tick marks the limit: tokens/s if a step took only as long as reading
    weights and KV cache at this machine's bandwidth. It is left out if it is far off.
    Raises UserError without matplotlib, or if nothing was measured.
    """
    check_chart_path(path)
    from matplotlib.figure import Figure

    measured = [{b["batch_size"]: b for b in v["batches"] if "tokens_per_second" in b} for v in result["lanes"]]
    bars = [(variant, batches) for variant, batches in zip(result["lanes"], measured, strict=True) if batches]
    if not bars:
        raise UserError(f"nothing was measured: there is no chart to draw in {path}")
    variants = [variant for variant, _ in bars]
    sizes = [size for size in result["workload"]["batch_sizes"] if any(size in batches for _, batches in bars)]
    positions = _y_positions(variants)
    columns = min(PANELS_PER_ROW, len(sizes))
    rows = -(-len(sizes) // columns)
    height = ROW_HEIGHT * (positions[-1] + 1.5) + 0.5
    figure = Figure(figsize=(max(8.5, 2.1 + 2.9 * columns), rows * height + 1.3), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    figure.suptitle(_title(result), fontsize=11)
    for axes, size in zip(panels.flat, sizes, strict=False):
        drawn = [(y, v, batches[size]) for y, (v, batches) in zip(positions, bars, strict=True) if size in batches]
        _draw_panel(axes, drawn, size)
    for axes in panels.flat[len(sizes) :]:
        axes.set_axis_off()
    panels[0, 0].set_yticks(positions, [f"{v['contestant']} {v['name']}" for v in variants], fontsize=8)
    panels[0, 0].set_ylim(positions[-1] + 0.7, -0.7)
    legend_columns = 3 if columns < 3 else 5
    figure.legend(
        handles=_legend_handles(), loc="outside lower center", ncols=legend_columns, frameon=False, fontsize=8
    )
    figure.savefig(path)


def _y_positions(variants: list[dict[str, Any]]) -> list[float]:
    """The position of each variant on the axis, from 0 downwards."""
    positions = [0.0]
    for before, variant in pairwise(variants):
        positions.append(positions[-1] + 1 + (FAMILY_GAP if before["family"] != variant["family"] else 0))
    return positions


def _draw_panel(axes: Any, bars: list[tuple[float, dict[str, Any], dict[str, Any]]], batch_size: int) -> None:
    longest = max(batch["tokens_per_second"]["high"] for _, _, batch in bars)
    near = [batch["limit"] for _, _, batch in bars if batch["limit"] < 1.5 * longest]
    end_of_axis = (1 + LABEL_SHARE) * max([longest, *near])
    for y, variant, batch in bars:
        rate, limit, width = batch["tokens_per_second"], batch["limit"], 0.42
        axes.barh([y], [rate["median"]], 2 * width, color=RED if batch["wrong"] else _bar_color(variant))
        axes.plot([rate["low"], rate["high"]], [y, y], color="0.2", linewidth=1)
        end = rate["high"]
        if limit in near:
            axes.plot([limit, limit], [y - width, y + width], color="black", linewidth=1.5)
            if end + LABEL_SHARE * end_of_axis > limit:  # the label does not fit before the tick
                end = max(end, limit)
        label = f"{format_significant(rate['median'])} · {batch['of_limit']:.0%}" + (
            " · WRONG" if batch["wrong"] else ""
        )
        axes.annotate(label, (end, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, end_of_axis)
    axes.set_title(f"batch {batch_size:,}", fontsize=10, loc="left")
    axes.set_xlabel("tokens/s", fontsize=8)
    axes.locator_params(axis="x", nbins=4)
    format_ticks(axes.xaxis)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _bar_color(variant: dict[str, Any]) -> str:
    if variant["contestant"] != OURS:
        return GREY
    return LIGHT_BLUE if variant["name"].endswith("-torch") else BLUE


def _legend_handles() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(color=BLUE, label="tokens/s, this program"),
        Patch(color=LIGHT_BLUE, label="this program, torch only"),
        Patch(color=GREY, label="peers"),
        Line2D([], [], color="0.2", linewidth=1, label="quartiles of the rounds"),
        Line2D([], [], color="black", linewidth=0, marker="|", markersize=9, label="bandwidth limit (%: reached)"),
    ]


def _title(result: dict[str, Any]) -> str:
    w = result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} new tokens after {w['prompt_tokens']}"
    where = f"{result['name']}, {result['threads']} threads, {result['bandwidth'] / 1e9:,.1f} GB/s"
    when = f"torch {result['torch']}, {result['date'][:10]}" + (f", {result['commit']}" if result["commit"] else "")
    return f"Decoding with GPT-2: {shape}\n{where}; {when}"
