"""gpt2 bench train|generate|serve|chart"""

import sys
from argparse import Namespace

from gpt2.cli import Parser, SubcommandParser
from gpt2.commands.bench_args import (
    add_chart_arguments,
    add_generate_flags,
    add_serve_flags,
    add_train_flags,
    check_generate,
)
from gpt2.commands.generation_args import check_precision
from gpt2.errors import UserError, did_you_mean

BENCHMARKS = {
    "train": "a training step: the speed ladder, and a comparison with peers",
    "generate": "decoding: time to first token and tokens/s, and a comparison with peers",
    "serve": "the server: throughput, time to first token and inter-token latency",
    "chart": "draw the chart of a result again",
}
EXAMPLES = {
    "train": ("gpt2 bench train --device cpu --json train.json", "gpt2 bench train --shape gpt2-medium --rounds 3"),
    "generate": (
        "gpt2 bench generate --model gpt2 --batch-size 1,8 --json generate.json",
        "gpt2 bench generate --variants int8,int4 --max-new-tokens 32",
    ),
    "serve": ("gpt2 bench serve --model gpt2 --clients 1,8", "gpt2 bench serve --dtype bfloat16 --json serve.json"),
    "chart": ("gpt2 bench chart train.json train.png", "gpt2 bench chart generate.json generate.svg"),
}
ADD_FLAGS = {
    "train": add_train_flags,
    "generate": add_generate_flags,
    "serve": add_serve_flags,
    "chart": add_chart_arguments,
}


def main(argv: list[str]) -> int | None:
    """Run `gpt2 bench`: one of its benchmarks, or the usage without one, which is an error."""
    parser = make_parser()
    if not argv or argv[0] == "help":
        parser.print_help(file=None if argv else sys.stderr)
        return None if argv else 2
    if not argv[0].startswith("-") and argv[0] not in BENCHMARKS:
        raise UserError(f"there is no benchmark '{argv[0]}'{did_you_mean(argv[0], BENCHMARKS)}: see gpt2 bench --help")
    args = parser.parse_args(argv)
    if args.benchmark == "train":
        from gpt2.commands import bench_train

        return bench_train.main(args)
    if args.benchmark == "generate":
        check_generate(args)
        from gpt2.commands import bench_generate

        return bench_generate.main(args)
    if args.benchmark == "serve":
        check_precision(args.dtype)
        from gpt2.bench.common import load_benchmark

        return load_benchmark("serve", "gpt2 bench serve").main(args)
    return redraw_chart(args)


def make_parser() -> Parser:
    """The parser of `gpt2 bench`."""
    parser = Parser(
        prog="gpt2 bench",
        description="Measure the speed of training, generation and serving, and compare it with peers. Peers and the "
        "load test of the server are in benchmarks/ of a clone, not in the installed package.",
        examples=(EXAMPLES["train"][0], EXAMPLES["generate"][0]),
    )
    commands = parser.add_subparsers(
        dest="benchmark", required=True, metavar="COMMAND", parser_class=SubcommandParser, prog="gpt2 bench"
    )
    for name, about in BENCHMARKS.items():
        advice = {"--model": "--shape names the model to train"} if name == "train" else {}
        ADD_FLAGS[name](commands.add_parser(name, help=about, examples=EXAMPLES[name], advice=advice))
    return parser


def redraw_chart(args: Namespace) -> None:
    """Run `gpt2 bench chart`."""
    from gpt2.bench import decode_chart, ladder_chart
    from gpt2.bench.common import load_benchmark, read_result

    charts = {"bench train": ladder_chart, "bench generate": decode_chart, "bench serve": None}
    result = read_result(args.result, *charts)
    chart = charts[result["kind"]] or load_benchmark("serving_chart", "this chart")
    chart.draw(result, args.chart)
