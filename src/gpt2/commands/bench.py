"""gpt2 bench train|generate|serve|chart"""

from pathlib import Path

from gpt2.bench import decode_chart, ladder_chart, serving_chart
from gpt2.bench.common import read_result
from gpt2.cli import Parser
from gpt2.commands import bench_generate, bench_serve, bench_train
from gpt2.errors import UserError, did_you_mean

CHARTS = {
    bench_train.KIND: ladder_chart.draw,
    bench_generate.KIND: decode_chart.draw,
    bench_serve.KIND: serving_chart.draw,
}
USAGE = """usage: gpt2 bench WHAT ...

  train     a training step: the speed ladder, and a comparison with peers
  generate  decoding: time to first token and tokens/s, and a comparison with peers
  serve     the server: throughput, time to first token and inter-token latency
  chart     draw the chart of a result again: gpt2 bench chart FILE.json OUT.png

gpt2 bench WHAT --help lists the flags."""


def main(argv: list[str]) -> int | None:
    """Run `gpt2 bench`: one of its benchmarks, or the usage without one."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return None
    if argv[0] not in BENCHMARKS:
        raise UserError(f"there is no benchmark '{argv[0]}'{did_you_mean(argv[0], BENCHMARKS)}: see gpt2 bench --help")
    return BENCHMARKS[argv[0]](argv[1:])


def redraw_chart(argv: list[str]) -> None:
    """Run `gpt2 bench chart`."""
    parser = Parser(prog="gpt2 bench chart", description="Draw the chart of a result that --json wrote.")
    parser.add_argument("result", type=Path, metavar="FILE.json")
    parser.add_argument("chart", type=Path, metavar="OUT.png")
    args = parser.parse_args(argv)
    result = read_result(args.result, *CHARTS)
    CHARTS[result["kind"]](result, args.chart)


BENCHMARKS = {
    "train": bench_train.main,
    "generate": bench_generate.main,
    "serve": bench_serve.main,
    "chart": redraw_chart,
}
