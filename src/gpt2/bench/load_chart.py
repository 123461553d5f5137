"""What clients get from the server, as a picture."""

from pathlib import Path
from typing import Any

from gpt2.bench.chart import BLUE, GREY, check_can_draw


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `gpt2 bench serve` over the number of clients: throughput, and both latencies.

    Raises UserError without matplotlib.
    """
    check_can_draw(path)
    from matplotlib.figure import Figure

    rows = result["clients"]
    clients = [row["clients"] for row in rows]
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    rates, first, between = figure.subplots(1, 3)
    w = result["workload"]
    shape = f"{w['n_layer']} layers of {w['n_embd']}, {w['new_tokens']} tokens after {w['prompt_tokens']}"
    where = f"{result['name']}, {result['threads']} threads, torch {result['torch']}, {result['date'][:10]}"
    commit = f", {result['commit']}" if result["commit"] else ""
    figure.suptitle(f"Serving GPT-2: {shape}, {result['precision']}\n{where}{commit}", fontsize=11)
    rates.plot(
        clients, [row["engine_tokens_per_second"] for row in rows], color=GREY, marker="o", label="the engine alone"
    )
    rates.plot(clients, [row["tokens_per_second"] for row in rows], color=BLUE, marker="o", label="through the server")
    for axes, name in ((first, "first_token_ms"), (between, "between_tokens_ms")):
        axes.plot(clients, [row[name]["p99"] for row in rows], color=GREY, marker="o", label="99th percentile")
        axes.plot(clients, [row[name]["median"] for row in rows], color=BLUE, marker="o", label="median")
    for axes, title in ((rates, "tokens/s"), (first, "first token, ms"), (between, "between tokens, ms")):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [str(count) for count in clients])
        axes.minorticks_off()
        axes.set_xlabel("clients", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
