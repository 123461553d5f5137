"""Decoding speed as a picture: a panel for each batch size, a bar for each lane."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from gpt2.bench.decode import OURS
from gpt2.bench.ladder_chart import BLUE, GREY, RED, check_chart_path
from gpt2.errors import UserError

PANELS_PER_ROW = 4  # panels side by side
ROW_HEIGHT, FAMILY_GAP = 0.27, 0.5  # inches for a lane, lanes' worth of space between two families
LABEL_SHARE = 0.36  # of an axis, for what is written beside a bar
LIGHT_BLUE = "#9ecae1"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `gpt2 bench generate`: tokens/s by lane, one panel for each batch size, ours in blue.

    Lanes stand in families of like precision. A tick is where the lane would be if a step took no longer than reading
    weights and cache at this machine's bandwidth; it is left out where it is far off.
    Raises UserError without matplotlib, or when nothing was measured.
    """
    check_chart_path(path)
    from matplotlib.figure import Figure

    lanes = [lane for lane in result["lanes"] if any(_was_measured(batch) for batch in lane["batches"])]
    if not lanes:
        raise UserError(f"nothing was measured: there is no chart to draw in {path}")
    found = [{batch["batch_size"]: batch for batch in lane["batches"] if _was_measured(batch)} for lane in lanes]
    sizes = [size for size in result["workload"]["batch_sizes"] if any(size in batches for batches in found)]
    places = _y_positions(lanes)
    columns = min(PANELS_PER_ROW, len(sizes))
    rows = -(-len(sizes) // columns)
    height = ROW_HEIGHT * (places[-1] + 1.5) + 0.5
    figure = Figure(figsize=(max(8.5, 2.1 + 2.9 * columns), rows * height + 1.3), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    figure.suptitle(_title(result), fontsize=11)
    for axes, size in zip(panels.flat, sizes, strict=False):
        batches = [(place, lane, by_size.get(size)) for place, lane, by_size in zip(places, lanes, found, strict=True)]
        _draw_panel(axes, batches, size)
    for axes in panels.flat[len(sizes) :]:
        axes.set_axis_off()
    panels[0, 0].set_yticks(places, [f"{lane['contestant']} {lane['name']}" for lane in lanes], fontsize=8)
    panels[0, 0].set_ylim(places[-1] + 0.7, -0.7)
    figure.legend(
        handles=_legend_handles(), loc="outside lower center", ncols=3 if columns < 3 else 5, frameon=False, fontsize=8
    )
    figure.savefig(path)


def _was_measured(batch: dict[str, Any]) -> bool:
    return "tokens_per_second" in batch


def _y_positions(variants: list[dict[str, Any]]) -> list[float]:
    """Where each lane stands on the axis, from 0 downwards."""
    places = [0.0]
    for before, lane in pairwise(variants):
        places.append(places[-1] + 1 + (FAMILY_GAP if before["family"] != lane["family"] else 0))
    return places


def _draw_panel(axes: Any, batches: list[tuple[float, dict[str, Any], dict[str, Any] | None]], batch_size: int) -> None:
    drawn = [(place, lane, batch) for place, lane, batch in batches if batch is not None]
    longest = max(batch["tokens_per_second"]["high"] for _, _, batch in drawn)
    near = [batch["limit"] for _, _, batch in drawn if batch["limit"] < 1.5 * longest]
    end_of_axis = (1 + LABEL_SHARE) * max([longest, *near])
    for place, lane, batch in drawn:
        rate, limit, width = batch["tokens_per_second"], batch["limit"], 0.42
        axes.barh([place], [rate["median"]], 2 * width, color=RED if batch["wrong"] else _bar_colour(lane))
        axes.plot([rate["low"], rate["high"]], [place, place], color="0.2", linewidth=1)
        end = rate["high"]
        if limit in near:
            axes.plot([limit, limit], [place - width, place + width], color="black", linewidth=1.5)
            if end + LABEL_SHARE * end_of_axis > limit:  # there is no room before it
                end = max(end, limit)
        label = f"{_format_rate(rate['median'])} · {batch['of_limit']:.0%}" + (" · WRONG" if batch["wrong"] else "")
        axes.annotate(label, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, end_of_axis)
    axes.set_title(f"batch {batch_size:,}", fontsize=10, loc="left")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _bar_colour(variant: dict[str, Any]) -> str:
    if variant["contestant"] != OURS:
        return GREY
    return LIGHT_BLUE if variant["name"].endswith("-torch") else BLUE


def _legend_handles() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(color=BLUE, label="tokens/s, this program"),
        Patch(color=LIGHT_BLUE, label="the same, by torch alone"),
        Patch(color=GREY, label="others"),
        Line2D([], [], color="0.2", linewidth=1, label="middle half of the rounds"),
        Line2D([], [], color="black", linewidth=0, marker="|", markersize=9, label="the bandwidth limit (%: reached)"),
    ]


def _format_rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _title(result: dict[str, Any]) -> str:
    w = result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} tokens after {w['prompt_tokens']}"
    where = f"{result['name']}, {result['threads']} threads, {result['bandwidth'] / 1e9:,.1f} GB/s"
    when = f"torch {result['torch']}, {result['date'][:10]}" + (f", {result['commit']}" if result["commit"] else "")
    return f"Writing with GPT-2: {shape}\n{where}; {when}"
