"""gpt2 eval MODEL [MODEL ...] [--tasks NAMES] [--data FILE]"""

from gpt2.cli import Parser, positive_int
from gpt2.commands.generation_args import add_model_flags
from gpt2.commands.json_output import add_json_flag


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    from gpt2.commands.eval_run import run

    return run(args)


def make_parser() -> Parser:
    """The parser of `gpt2 eval`."""
    parser = Parser(
        prog="gpt2 eval",
        description="Evaluate models on tasks and texts. Each result names the protocol that it follows.",
        epilog="Under torchrun the ranks share the rows. gpt2 eval --list shows all tasks.",
        examples=("gpt2 eval runs/quickstart", "gpt2 eval gpt2 gpt2-medium --tasks lambada,hellaswag --limit 500"),
        stray="use --tasks {} or --data {}",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    parser.add_flag(
        "tasks", metavar="NAMES", help="tasks and sets of tasks, separated by commas [hellaswag,lambada,wikitext2]"
    )
    parser.add_flag("limit", type=positive_int, metavar="INT", help="only the first N rows of each task")
    parser.add_flag(
        "data", action="append", default=[], metavar="FILE", help="loss, perplexity, bits per byte of a text"
    )
    parser.add_flag(
        "stride",
        type=positive_int,
        metavar="INT",
        help="tokens that each window over a long text scores after the first window [the model's context]",
    )
    parser.add_flag(
        "task-file",
        action="append",
        default=[],
        metavar="FILE",
        help="rows {query, choices, gold} or {context_options, continuation, gold}",
    )
    parser.add_flag(
        "task-data",
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="local file with the data of a task, instead of the download",
    )
    parser.add_flag("lm-eval", metavar="NAMES", help="tasks of lm-evaluation-harness (pip install 'plain-gpt2[eval]')")
    add_json_flag(parser, "the results")
    parser.add_flag("list", action="store_true", help="name all tasks with rows, size and protocol")
    add_model_flags(parser)
    return parser
