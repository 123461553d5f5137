"""gpt2 bench train|generate|serve|chart"""

import sys
from pathlib import Path

from gpt2.cli import Parser
from gpt2.commands.bench_args import parse_generate, parse_serve, parse_train
from gpt2.errors import UserError, did_you_mean

USAGE = """usage: gpt2 bench WHAT ...

  train     a training step: the speed ladder, and a comparison with peers
  generate  decoding: time to first token and tokens/s, and a comparison with peers
  serve     the server: throughput, time to first token and inter-token latency
  chart     draw the chart of a result again: gpt2 bench chart FILE.json OUT.png

Peers and the load test of the server are in benchmarks/ of a clone, not in the installed package.

gpt2 bench WHAT --help lists the flags."""


def main(argv: list[str]) -> int | None:
    """Run `gpt2 bench`: one of its benchmarks, or the usage without one, which is an error."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, file=None if argv else sys.stderr)
        return None if argv else 2
    if argv[0] not in BENCHMARKS:
        raise UserError(f"there is no benchmark '{argv[0]}'{did_you_mean(argv[0], BENCHMARKS)}: see gpt2 bench --help")
    return BENCHMARKS[argv[0]](argv[1:])


def _run_train(argv: list[str]) -> int:
    args = parse_train(argv)
    from gpt2.commands import bench_train

    return bench_train.main(args)


def _run_generate(argv: list[str]) -> int:
    args = parse_generate(argv)
    from gpt2.commands import bench_generate

    return bench_generate.main(args)


def _run_serve(argv: list[str]) -> int:
    args = parse_serve(argv)
    from gpt2.bench.common import load_benchmark

    return load_benchmark("serve", "gpt2 bench serve").main(args)


def redraw_chart(argv: list[str]) -> None:
    """Run `gpt2 bench chart`."""
    parser = Parser(prog="gpt2 bench chart", description="Draw the chart of a result that --json wrote.")
    parser.add_argument("result", type=Path, metavar="FILE.json")
    parser.add_argument("chart", type=Path, metavar="OUT.png")
    args = parser.parse_args(argv)
    from gpt2.bench import decode_chart, ladder_chart
    from gpt2.bench.common import load_benchmark, read_result

    charts = {"bench train": ladder_chart, "bench generate": decode_chart, "bench serve": None}
    result = read_result(args.result, *charts)
    chart = charts[result["kind"]] or load_benchmark("serving_chart", "this chart")
    chart.draw(result, args.chart)


BENCHMARKS = {"train": _run_train, "generate": _run_generate, "serve": _run_serve, "chart": redraw_chart}
