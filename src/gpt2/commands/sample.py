"""gpt2 sample MODEL [PROMPT] [--prompt TEXT]"""

import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterable
from dataclasses import replace

from gpt2.cli import FlagRule, Parser, given_flags, reject_unused_flags
from gpt2.commands.generation_args import (
    MODEL_HELP,
    add_model_flags,
    add_sampling_flags,
    encode_bad_words,
    load_inference_model,
    resolve_from_args,
    sampling_from_args,
)
from gpt2.errors import ConfigError, UserError

MAX_SAMPLES = 10_000  # of one prompt: that of `generation.text`, which imports torch
CONTRASTIVE_TOP_K = 4  # candidates of contrastive search at each step, without --top-k
EXCLUSIVE_MODES = ("num_beams", "penalty_alpha", "draft", "prompt_lookup", "logprobs")
SINGLE_SAMPLE_MODES = ("penalty_alpha", "draft", "prompt_lookup")
BEAM_SEARCH_FLAGS = ("length_penalty", "num_beam_groups", "diversity_penalty")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
RULES = (
    FlagRule(BEAM_SEARCH_FLAGS, lambda args: args.num_beams is not None, "{} needs --num-beams"),
    FlagRule(SAMPLING_FLAGS, lambda args: args.num_beams is None, "--num-beams does not sample: {} has no effect"),
    FlagRule(
        tuple(name for name in SAMPLING_FLAGS if name != "top_k"),
        lambda args: args.penalty_alpha is None,
        "--penalty-alpha does not sample: {} has no effect",
    ),
)


def main(argv: list[str]) -> None:
    """Run `gpt2 sample`: generated texts on standard output."""
    args = make_parser().parse_intermixed_args(argv)
    _check_flags(args)
    prompts = _read_prompts([*([] if args.text is None else [args.text]), *(args.prompt or [])] or [""])
    from gpt2.commands.sample_output import print_texts

    sampling = sampling_from_args(args)
    model, tokenizer = load_inference_model(args, resolve_from_args(args, args.model))
    sampling = replace(sampling, bad_words=encode_bad_words(tokenizer, args.bad_word))
    print_texts(model, tokenizer, prompts, sampling, args)


def make_parser() -> Parser:
    """The parser of `gpt2 sample`."""
    parser = Parser(
        prog="gpt2 sample",
        description="Generate text from a prompt, on standard output.",
        examples=(
            'gpt2 sample runs/quickstart "The with statement" --temperature 0.7',
            'gpt2 sample gpt2 --prompt "It is" --prompt "It was" --num-samples 3 --seed 1',
        ),
        stray="quote the prompt, or use --prompt '{}'",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="the text to continue, as --prompt")
    parser.add_flag(
        "prompt",
        action="append",
        metavar="TEXT",
        help="the text to continue; - reads it from standard input; without one a new text begins; repeatable",
    )
    parser.add_flag("num-samples", type=int, default=1, help="samples per prompt [1]")
    add_sampling_flags(parser)
    parser.add_flag(
        "skip-special-tokens",
        action=BooleanOptionalAction,
        default=True,
        help="leave special tokens such as <|im_start|> out of the texts [true]",
    )
    _add_mode_flags(parser)
    add_model_flags(parser)
    return parser


def _add_mode_flags(parser: Parser) -> None:
    """Add the flags of beam search, contrastive search, speculative decoding and log-probabilities."""
    beams_help = "beam search with N beams; prints the best --num-samples texts, best first"
    parser.section("other ways to generate")
    parser.add_flag("num-beams", type=int, metavar="INT", help=beams_help)
    parser.add_flag(
        "length-penalty", type=float, help="of beam search: over 0 favors long texts, under 0 short ones [1]"
    )
    parser.add_flag("num-beam-groups", type=int, metavar="INT", help="groups of diverse beam search [1]")
    parser.add_flag(
        "diversity-penalty", type=float, help="subtracted from tokens that another group chose at the same step [0]"
    )
    parser.add_flag(
        "penalty-alpha",
        type=float,
        metavar="FLOAT",
        help=f"contrastive search among --top-k [{CONTRASTIVE_TOP_K}] tokens: 0 is greedy, 1 weighs only dissimilarity",
    )
    parser.add_flag(
        "draft", metavar="MODEL", help="speculative decoding with a smaller draft model: same distribution, faster"
    )
    for flag, default, description in (
        ("prompt-lookup", 3, "speculative decoding that drafts what followed the last occurrence of the last N tokens"),
        ("logprobs", 5, "print one line per token instead of the text: its probability, and the N most likely tokens"),
    ):
        parser.add_flag(flag, type=int, nargs="?", const=default, metavar="INT", help=f"{description} [{default}]")


def _check_flags(args: Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    modes = _given_flags(args, EXCLUSIVE_MODES)
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]} and {modes[1]} cannot be used together")
    reject_unused_flags(given_flags(args), args, RULES)
    if args.num_samples != 1 and _given_flags(args, SINGLE_SAMPLE_MODES):
        raise ConfigError(f"{modes[0]} generates one text: it cannot be used with --num-samples {args.num_samples}")
    if args.num_beams is not None and not 1 <= args.num_samples <= max(1, args.num_beams):
        raise ConfigError(f"--num-samples must be at least 1 and at most --num-beams, not {args.num_samples}")
    if not 1 <= args.num_samples <= MAX_SAMPLES:
        raise ConfigError(f"num_samples must be at least 1 and at most {MAX_SAMPLES:,}, not {args.num_samples}")
    for name in ("max_new_tokens", "logprobs"):
        if (getattr(args, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(args, name)}", field=name)


def _given_flags(args: Namespace, names: Iterable[str]) -> list[str]:
    """The flags that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def _read_prompts(texts: list[str]) -> list[str]:
    """Return the prompts, with "-" replaced by what is on standard input."""
    if texts.count("-") > 1:
        raise UserError("only one prompt can be read from standard input: give --prompt - once")
    try:
        return [_read_stdin() if text == "-" else text.encode().decode() for text in texts]
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def _read_stdin() -> str:
    return sys.stdin.buffer.read().decode() if sys.stdin is not None else ""
