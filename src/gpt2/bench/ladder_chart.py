"""The chart of the speed ladder and of the comparison with peers in training."""

from pathlib import Path
from typing import Any

from gpt2.bench.common import OURS
from gpt2.errors import ConfigError, UserError, missing_extra
from gpt2.reporting.axes import format_ticks
from gpt2.units import format_ratio, format_significant

FORMATS = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREY, RED = "#1f77b4", "#ff7f0e", "0.55", "#d62728"

# ms per step of the original project on one A40 at this shape
A40_STEP_MS = {"float32": 1250, "tf32": 870, "bfloat16": 675}
A40_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "batch_size": 16, "block_size": 1024}


def check_chart_path(path: Path) -> None:
    """Raise UserError if no chart could be written to `path`: no matplotlib, or another file type."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "the chart") from error
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a chart is one of {', '.join(FORMATS)}", field="chart")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `gpt2 bench train`: ms per training step by ladder step and device, and a panel of the peers.

    With two devices the axis is logarithmic. For a CUDA device with the original project's shape, its times are shown
    too. Raises UserError without matplotlib, or if nothing was measured.
    """
    check_chart_path(path)
    from matplotlib.figure import Figure

    ladders = [device for device in result["devices"] if any("ms" in step for step in device["rungs"])]
    comparisons = [device for device in result["devices"] if _peers_by_step_time(device)]
    if not ladders and not comparisons:
        raise UserError(f"nothing was measured: there is no chart to draw in {path}")
    step_names = _step_names(ladders)
    heights = [len(step_names) * (0.34 + 0.22 * len(ladders))] if ladders else []
    heights += [0.45 * len(_peers_by_step_time(device)) + 0.2 for device in comparisons]
    figure = Figure(figsize=(9.5, sum(heights) + 0.9 * len(heights) + 0.5), dpi=120, layout="constrained")
    panels = list(figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0])
    figure.suptitle(_title(result), fontsize=11)
    if ladders:
        _draw_ladder(panels.pop(0), ladders, step_names)
    for device, axes in zip(comparisons, panels, strict=True):
        _draw_peers(axes, device)
    figure.savefig(path)


def _draw_ladder(axes: Any, ladders: list[dict[str, Any]], step_names: list[str]) -> None:
    thickness = 0.8 / len(ladders)
    times = [step["ms"] for device in ladders for step in device["rungs"] if "ms" in step]
    longest, shortest = max(ms["high"] for ms in times), min(ms["low"] for ms in times)
    for number, device in enumerate(ladders):
        offset = (number - (len(ladders) - 1) / 2) * thickness
        color = (BLUE, ORANGE, GREY)[number % 3]
        for step in device["rungs"]:
            _draw_step(axes, step, step_names.index(step["name"]) + offset, thickness, color)
        axes.barh([-9], [0], color=color, label=f"{device['name']} ({device['device']})")  # for the legend only
        if _has_a40_shape(device):
            for name, ms in A40_STEP_MS.items():
                if name in step_names:
                    y = step_names.index(name) + offset
                    axes.plot([ms, ms], [y - thickness / 2, y + thickness / 2], color="black", linewidth=2)
                    _label(axes, ms, y, f"{ms:,} ms")
            axes.plot([], [], color="black", linewidth=2, label="the original project, on an A40")
            longest = max(longest, *A40_STEP_MS.values())
    axes.set_yticks(range(len(step_names)), step_names)
    axes.set_ylim(len(step_names) - 0.45, -0.55)
    axes.set_xlabel("ms per training step (lower is faster); the line shows the quartiles", fontsize=9)
    if len(ladders) > 1:
        axes.set_xscale("log")
        axes.set_xlim(shortest / 2, longest * (longest / shortest) ** 0.6 * 2)
    else:
        axes.set_xlim(0, longest * 1.6)
    format_ticks(axes.xaxis)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_step(axes: Any, step: dict[str, Any], y: float, thickness: float, color: str) -> None:
    if "ms" not in step:
        text = step["reason"] if len(step["reason"]) < 80 else step["reason"][:77] + "..."
        axes.annotate(f" {text}", (0, y), xycoords=("axes fraction", "data"), va="center", color=GREY, fontsize=8)
        return
    ms = step["ms"]
    _bar(axes, ms, y, thickness * 0.92, RED if step["wrong"] else color)
    speed = f"{format_significant(step['tokens_per_second'])} tok/s"
    label = f"{format_significant(ms['median'])} ms · {speed} · MFU {step['mfu']:.0%}"
    if step["wrong"]:
        label += " · WRONG LOSS"
    _label(axes, ms["high"], y, label)


def _draw_peers(axes: Any, device: dict[str, Any]) -> None:
    contestants = _peers_by_step_time(device)
    for y, (name, record) in enumerate(contestants):
        _bar(axes, record["ms"], y, 0.7, BLUE if name == OURS else GREY)
        label = f"{format_significant(record['ms']['median'])} ms · MFU {record['mfu']:.0%}"
        if "speed_ratio" in record:
            label += f" · {format_ratio(record['speed_ratio'])}x our time"
        if "memory_ratio" in record:
            label += f" · {format_ratio(1 / record['memory_ratio'])}x our memory"
        _label(axes, record["ms"]["high"], y, label)
    labels = [f"{name}\n({record['best']})" for name, record in contestants]
    axes.set_yticks(range(len(contestants)), labels, fontsize=9)
    axes.set_ylim(len(contestants) - 0.4, -0.6)
    axes.set_xlim(0, 1.8 * max(record["ms"]["high"] for _, record in contestants))
    axes.set_xlabel(f"ms per training step on {device['name']}, bfloat16, best mode of each", fontsize=9)
    format_ticks(axes.xaxis)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes: Any, ms: dict[str, float], y: float, thickness: float, color: str) -> None:
    """Draw the median as a bar, and the quartiles as a line on it."""
    axes.barh([y], [ms["median"]], thickness, color=color)
    axes.plot([ms["low"], ms["high"]], [y, y], color="0.2", linewidth=1)


def _label(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _title(result: dict[str, Any]) -> str:
    w = result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['batch_size']} x {w['block_size']:,} tokens"
    commit = f", {result['commit']}" if result["commit"] else ""
    return f"Training GPT-2: {shape}\ntorch {result['torch']}, {result['date'][:10]}{commit}"


def _step_names(ladders: list[dict[str, Any]]) -> list[str]:
    """All steps in the order of the ladder; a device may have only some of them."""
    return list(dict.fromkeys(step["name"] for device in ladders for step in device["rungs"]))


def _peers_by_step_time(device: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    peers = device.get("peers") or {"contestants": {}}
    ran = [(name, record) for name, record in peers["contestants"].items() if "ms" in record]
    return sorted(ran, key=lambda item: item[1]["ms"]["median"])


def _has_a40_shape(device: dict[str, Any]) -> bool:
    return device["device"].startswith("cuda") and all(device["workload"].get(k) == v for k, v in A40_SHAPE.items())
