"""The flags of the benchmarks. Nothing here imports torch, so that --help answers at once."""

from argparse import Namespace
from pathlib import Path

from gpt2.cli import FlagRule, Parser, given_flags, reject_unused_flags
from gpt2.commands.generation_args import DEVICE_HELP, PRECISIONS
from gpt2.commands.json_output import add_json_flag

SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "vocab_size")
SHAPES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # the names of `model.OPENAI_CONFIGS`
OUR_VARIANTS = ("float32", "bfloat16", "int8", "int4", "float32-torch", "bfloat16-torch")  # those of `bench.decode`
PEERS = ("transformers", "ctranslate2", "llamacpp", "nanogpt")  # those of `bench.decode_peers`
RULES = (FlagRule(("text_tokens",), lambda args: args.text is not None, "{} needs --text"),)


def add_train_flags(parser: Parser) -> None:
    """Add the flags of `gpt2 bench train`."""
    parser.description = (
        "The speed ladder: a training step from plain float32 upwards, one optimization added at a time. "
        "Each ladder step runs in its own process; one that changes the loss beyond rounding is flagged (exit code 1)."
    )
    parser.add_flag("device", default="auto", metavar="LIST", help="such as cuda, or cpu,cuda [the best available]")
    parser.add_flag("shape", default="gpt2", metavar="NAME", help=f"the shape: {', '.join(SHAPES)} [gpt2]")
    for name in SHAPE_FIELDS:
        parser.add_flag(name.replace("_", "-"), type=int, metavar="INT", help="instead of that shape's")
    parser.add_flag("batch-size", type=int, metavar="INT", help="sequences per step [16; 4 if one device is a CPU]")
    block_help = "tokens per sequence [1024; 256 if one device is a CPU]"
    parser.add_flag("block-size", type=int, metavar="INT", help=block_help)
    parser.add_flag("steps", type=int, metavar="INT", help="timed steps [20; 5 on a CPU]")
    parser.add_flag("warmup", type=int, default=3, metavar="INT", help="warm-up steps before them [3]")
    parser.add_flag("rounds", type=int, default=1, metavar="INT", help="how often the ladder is measured [1]")
    ladder_help = "ladder steps to measure, each on top of all before it [all]"
    parser.add_flag("ladder-steps", default="all", metavar="LIST", help=ladder_help)
    peer_help = "nanogpt=PATH or transformers; repeatable"
    parser.add_flag("peer", action="append", default=[], metavar="PEER", help=peer_help)
    parser.add_flag("peers-only", action="store_true", help="skip the ladder")
    add_output_flags(parser)


def add_generate_flags(parser: Parser) -> None:
    """Add the flags of `gpt2 bench generate`."""
    parser.description = (
        "Decoding speed: time to first token, tokens/s after it, and the fraction of the memory-bandwidth "
        "limit. Each variant runs in its own process, and all are timed in turns. A float32 variant whose tokens are "
        f"not the plain model's is flagged (exit code 1). Our variants: {', '.join(OUR_VARIANTS)}."
    )
    add_decode_flags(parser)
    parser.add_flag("variants", default="all", metavar="LIST", help="which of our variants [all]")
    names = ", ".join("nanogpt=PATH" if name == "nanogpt" else name for name in PEERS)
    parser.add_flag("peer", action="append", default=[], metavar="PEER", help=f"{names}; repeatable")
    parser.add_flag("batch-size", default="1,8,32,128", metavar="LIST", help="sequences per batch [1,8,32,128]")
    parser.add_flag("text", type=Path, metavar="FILE", help="also measure perplexity on FILE; needs --model")
    parser.add_flag("text-tokens", type=int, metavar="INT", help="first tokens of that file [8192]")
    add_output_flags(parser)


def check_generate(args: Namespace) -> None:
    """Raise ConfigError for flags without effect, and fill in --text-tokens."""
    reject_unused_flags(given_flags(args), args, RULES)
    args.text_tokens = 8192 if args.text_tokens is None else args.text_tokens


def add_serve_flags(parser: Parser) -> None:
    """Add the flags of `gpt2 bench serve`."""
    parser.description = (
        "Throughput, time to first token and inter-token latency of `gpt2 serve`, beside the engine's own "
        "throughput in the same run. Server and clients run in separate processes on this machine."
    )
    add_decode_flags(parser)
    parser.add_flag("dtype", default="float32", metavar="NAME", help=f"{', '.join(PRECISIONS)} [float32]")
    parser.add_flag("clients", default="1,8,32,128", metavar="LIST", help="concurrent clients [1,8,32,128]")
    add_output_flags(parser)


def add_chart_arguments(parser: Parser) -> None:
    """Add the arguments of `gpt2 bench chart`."""
    parser.description = "Draw the chart of a result that --json wrote."
    parser.add_argument("result", type=Path, metavar="FILE", help="the result")
    parser.add_argument("chart", type=Path, metavar="CHART", help="the chart to write: .png, .svg or .pdf")


def add_output_flags(parser: Parser) -> None:
    """Add --json and --chart."""
    add_json_flag(parser, "all measurements, with the raw times,")
    parser.add_flag("chart", type=Path, metavar="FILE", help="draw a chart: .png, .svg or .pdf")


def add_decode_flags(parser: Parser) -> None:
    """Add the flags of a `DecodeWorkload`, but for its batch sizes."""
    parser.add_flag("device", default="auto", metavar="NAME", help=DEVICE_HELP)
    parser.add_flag("model", metavar="MODEL", help="a run folder, a model folder, or a hub name [random weights]")
    parser.add_flag("shape", metavar="NAME", help=f"shape of random weights: {', '.join(SHAPES)} [gpt2]")
    for name in SHAPE_FIELDS:
        parser.add_flag(name.replace("_", "-"), type=int, metavar="INT", help="instead of that shape's")
    parser.add_flag("prompt-tokens", type=int, default=64, metavar="INT", help="tokens in each prompt [64]")
    parser.add_flag("max-new-tokens", type=int, default=64, metavar="INT", help="new tokens per sequence [64]")
    parser.add_flag("rounds", type=int, default=3, metavar="INT", help="how often everything is timed [3]")
