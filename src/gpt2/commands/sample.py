"""gpt2 sample MODEL --prompt TEXT"""

import math
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gpt2.cli import Parser
from gpt2.commands.generation_args import (
    MODEL_HELP,
    add_model_flags,
    add_sampling_flags,
    encode_bad_words,
    escape_for_terminal,
    load_inference_model,
    resolve_from_args,
    sampling_from_args,
)
from gpt2.errors import ConfigError, ModelFilesError, UserError
from gpt2.generation.beam_search import beam_search_texts
from gpt2.generation.contrastive_search import contrastive_stream
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.sampling import Sampling
from gpt2.generation.speculative import DraftModel, PromptLookup, SpeculativeTextStream, speculate
from gpt2.generation.text import MAX_BATCH_SIZE, MAX_SAMPLES, TextStream, stream
from gpt2.tokenizer import Tokenizer

LOGPROBS_TABLE_HEADER = "  prob.   token             most likely"
CONTRASTIVE_TOP_K = 4  # candidates of contrastive search at each step, without --top-k
EXCLUSIVE_MODES = ("num_beams", "penalty_alpha", "draft", "prompt_lookup", "logprobs")
SINGLE_SAMPLE_MODES = ("penalty_alpha", "draft", "prompt_lookup")
BEAM_SEARCH_FLAGS = ("length_penalty", "num_beam_groups", "diversity_penalty")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def main(argv: list[str]) -> None:
    """Run `gpt2 sample`: generated texts on standard output."""
    parser = Parser(prog="gpt2 sample", description="Generate text from a prompt, on standard output.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_flag(
        "prompt",
        action="append",
        metavar="TEXT",
        help="the text to continue; - reads it from standard input; without one a new text begins; repeatable",
    )
    parser.add_flag("num-samples", type=int, default=1, help="samples per prompt [1]")
    add_sampling_flags(parser, max_new_tokens=200)
    _add_mode_flags(parser)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    _check_flags(args)
    prompts = _read_prompts(args.prompt or [""])
    sampling = sampling_from_args(args)
    model, tokenizer = load_inference_model(args, resolve_from_args(args, args.model))
    sampling = replace(sampling, bad_words=encode_bad_words(tokenizer, args.bad_word))
    _print_texts(model, tokenizer, prompts, sampling, args)


def _add_mode_flags(parser: Parser) -> None:
    """Add the flags of beam search, contrastive search, speculative decoding and log-probabilities."""
    beams_help = "beam search with N beams; prints the best --num-samples texts, best first"
    parser.add_flag("num-beams", type=int, metavar="N", help=beams_help)
    parser.add_flag(
        "length-penalty", type=float, help="of beam search: over 0 favors long texts, under 0 short ones [1]"
    )
    parser.add_flag("num-beam-groups", type=int, metavar="N", help="groups of diverse beam search [1]")
    parser.add_flag(
        "diversity-penalty", type=float, help="subtracted from tokens that another group chose at the same step [0]"
    )
    parser.add_flag(
        "penalty-alpha",
        type=float,
        metavar="A",
        help=f"contrastive search among --top-k [{CONTRASTIVE_TOP_K}] tokens: 0 is greedy, 1 weighs only dissimilarity",
    )
    parser.add_flag(
        "draft", metavar="MODEL", help="speculative decoding with a smaller draft model: same distribution, faster"
    )
    for flag, default, description in (
        ("prompt-lookup", 3, "speculative decoding that drafts what followed the last occurrence of the last N tokens"),
        ("logprobs", 5, "print one line per token instead of the text: its probability, and the N most likely tokens"),
    ):
        parser.add_flag(flag, type=int, nargs="?", const=default, metavar="N", help=f"{description} [{default}]")


def _check_flags(args: Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    modes = _given_flags(args, EXCLUSIVE_MODES)
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]} and {modes[1]} cannot be used together")
    if args.num_beams is None and (unused := _given_flags(args, BEAM_SEARCH_FLAGS)):
        raise ConfigError(f"{unused[0]} needs --num-beams")
    if args.num_samples != 1 and _given_flags(args, SINGLE_SAMPLE_MODES):
        raise ConfigError(f"{modes[0]} generates one text: it cannot be used with --num-samples {args.num_samples}")
    if args.num_beams is not None and not 1 <= args.num_samples <= max(1, args.num_beams):
        raise ConfigError(f"--num-samples must be at least 1 and at most --num-beams, not {args.num_samples}")
    if not 1 <= args.num_samples <= MAX_SAMPLES:
        raise ConfigError(f"num_samples must be at least 1 and at most {MAX_SAMPLES:,}, not {args.num_samples}")
    search = _given_flags(args, ("num_beams", "penalty_alpha"))
    unused = _given_flags(args, (name for name in SAMPLING_FLAGS if name != "top_k" or args.num_beams is not None))
    if search and unused:
        raise ConfigError(f"{search[0]} does not sample: {unused[0]} has no effect")
    for name in ("max_new_tokens", "logprobs"):
        if (getattr(args, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(args, name)}", field=name)


def _given_flags(args: Namespace, names: Iterable[str]) -> list[str]:
    """The flags that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def _print_texts(
    model: LanguageModel, tokenizer: Tokenizer | None, prompts: list[str], sampling: Sampling, args: Namespace
) -> None:
    prefixes = [prompt for prompt in prompts for _ in range(args.num_samples)]
    limits = {"max_new_tokens": args.max_new_tokens, "stop": args.stop}
    if args.num_beams is not None:
        beams = {"num_beams": args.num_beams, "num_return": args.num_samples, "sampling": sampling}
        beams |= {name: getattr(args, name) for name in BEAM_SEARCH_FLAGS if getattr(args, name) is not None}
        found = [beam_search_texts(model, tokenizer, prompt, **limits, **beams) for prompt in prompts]
        _print_in_order([], [text for texts in found for text in texts])
    elif args.penalty_alpha is not None:
        top_k = CONTRASTIVE_TOP_K if args.top_k is None else args.top_k
        contrast = {"top_k": top_k, "penalty_alpha": args.penalty_alpha, "sampling": sampling}
        pieces = (contrastive_stream(model, tokenizer, prompt, **limits, **contrast) for prompt in prompts)
        _print_in_order(((i, piece) for i, text in enumerate(pieces) for piece in text), prefixes)
    elif args.draft is not None or args.prompt_lookup is not None:
        if args.draft is None:
            draft = PromptLookup(args.prompt_lookup)
        else:
            draft = DraftModel(*load_inference_model(args, resolve_from_args(args, args.draft, with_adapter=False)))
        texts = [speculate(model, tokenizer, prompt, draft, sampling, **limits, seed=args.seed) for prompt in prompts]
        _print_in_order(((i, piece) for i, text in enumerate(texts) for piece in text), prefixes)
        _print_acceptance_rate(texts)
    elif args.logprobs is not None:
        lines = _logprob_lines(model, tokenizer, prompts, sampling, args)
        _print_in_order(lines, [LOGPROBS_TABLE_HEADER for _ in prefixes])
    else:
        pieces = stream(model, tokenizer, prompts, sampling, num_samples=args.num_samples, **limits, seed=args.seed)
        _print_in_order(pieces, prefixes)


def _print_acceptance_rate(texts: list[SpeculativeTextStream]) -> None:
    """Print the acceptance rate of speculative decoding on standard error."""
    decoders = [text.decoder for text in texts]
    drafted, accepted, calls = (
        sum(getattr(one, name) for one in decoders) for name in ("drafted", "accepted", "calls")
    )
    tokens = sum(len(one.sequence.new_tokens) for one in decoders)
    if sys.stderr is not None:
        rates = f"{accepted / max(1, drafted):.0%} of {drafted:,} drafted tokens accepted"
        print(f"gpt2: {rates}, {tokens / max(1, calls):.2f} tokens per call of the model", file=sys.stderr)


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


def _print_in_order(pieces: Iterable[tuple[int, str]], prefixes: list[str]) -> None:
    """Stream the first text, and print the others after it with a separator line before each."""
    texts, printed = list(prefixes), 0
    for sample, piece in pieces:
        texts[sample] += piece
        if sample == 0:
            print(escape_for_terminal(texts[0][printed:], sys.stdout), end="", flush=True)
            printed = len(texts[0])
    print(escape_for_terminal(texts[0][printed:], sys.stdout))
    for text in texts[1:]:
        print(f"---\n{escape_for_terminal(text, sys.stdout)}")


def _logprob_lines(
    model: LanguageModel, tokenizer: Tokenizer | None, prompts: list[str], sampling: Sampling, args: Namespace
) -> Iterator[tuple[int, str]]:
    """Yield (sample, line) for each new token; samples are numbered as by `stream`."""
    if tokenizer is None:
        raise ModelFilesError("this model folder has no tokenizer: text needs one")
    end, seed = tokenizer.end_of_text, secrets.randbits(32) if args.seed is None else args.seed
    requests = [
        GenerationRequest(ids, sampling, args.max_new_tokens, seed, sample, (end,), args.logprobs)
        for ids in (tokenizer.encode(prompt, allow_special=True) or [end] for prompt in prompts)
        for sample in range(args.num_samples)
    ]
    longest = max(len(request.prompt) for request in requests) + args.max_new_tokens
    engine = Engine(model, min(len(requests), MAX_BATCH_SIZE), longest)
    running = {engine.submit(request): (i, TextStream(tokenizer, args.stop)) for i, request in enumerate(requests)}
    while not engine.idle:
        for token in engine.step():
            sample, text = running[token.sequence]
            logprobs = [(token.id, token.logprob or 0.0), *token.top_logprobs]
            (word, prob), *best = [(_token_repr(tokenizer, i), f"{math.exp(logprob):.2%}") for i, logprob in logprobs]
            line = f"{prob:>8}  {word:<16}" + "".join(f"  {word} {prob}" for word, prob in best)
            yield sample, f"\n{line.rstrip()}"
            text.push(token.id)
            if text.finish_reason:
                engine.cancel(token.sequence)
    for sequence in running:
        if sequence.error:
            raise sequence.error


def _token_repr(tokenizer: Tokenizer, token: int) -> str:
    """The repr of a token's text; of its bytes if they are not UTF-8; its id if it has no text."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    token_bytes = tokenizer.token_bytes(token)
    try:
        return repr(token_bytes.decode())
    except UnicodeDecodeError:
        return repr(token_bytes)
