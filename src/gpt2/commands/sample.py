"""gpt2 sample MODEL --prompt TEXT"""

import math
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gpt2.cli import Parser
from gpt2.commands.generation_args import (
    add_model_flags,
    add_sampling_flags,
    encode_bad_words,
    escape_for_terminal,
    load_inference_model,
    sampling_from_args,
)
from gpt2.errors import UserError
from gpt2.generation.beam_search import beam_search_texts
from gpt2.generation.contrastive_search import contrastive_stream
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.sampling import Sampling
from gpt2.generation.speculative import DraftModel, PromptLookup, SpeculativeTextStream, speculate
from gpt2.generation.text import MAX_BATCH_SIZE, MAX_SAMPLES, TextStream, stream
from gpt2.tokenizer import Tokenizer

LOGPROBS_TABLE_HEADER = "  chance  token             most likely"
CONTRASTIVE_TOP_K = 4  # candidates that are read at each step, where --top-k does not say how many
EXCLUSIVE_MODES = ("num_beams", "penalty_alpha", "draft", "prompt_lookup", "logprobs")  # of which there can be one
SINGLE_SAMPLE_MODES = ("penalty_alpha", "draft", "prompt_lookup")
BEAM_SEARCH_FLAGS = ("length_penalty", "num_beam_groups", "diversity_penalty")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def main(argv: list[str]) -> None:
    parser = Parser(prog="gpt2 sample", description="Continue a prompt, on standard output.")
    parser.add_argument("model", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    parser.add_flag(
        "prompt",
        action="append",
        metavar="TEXT",
        help="what to continue; - reads it from standard input; empty starts a new text; may be given several times",
    )
    parser.add_flag("num-samples", type=int, default=1, help="how many continuations of each [1]")
    add_sampling_flags(parser, max_new_tokens=200)
    _add_mode_flags(parser)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    _check_flags(args)
    prompts = _read_prompts(args.prompt or [""])
    sampling = sampling_from_args(args)
    model, tokenizer = load_inference_model(args, args.model)
    sampling = replace(sampling, bad_words=encode_bad_words(tokenizer, args.bad_word))
    _print_texts(model, tokenizer, prompts, sampling, args)


def _add_mode_flags(parser: Parser) -> None:
    """Other ways than to draw one token after the other."""
    parser.add_flag(
        "num-beams", type=int, metavar="N", help="beam search: --num-samples of the N likeliest texts, best first"
    )
    parser.add_flag("length-penalty", type=float, help="over 0 the search likes long texts, under 0 short ones [1]")
    parser.add_flag("num-beam-groups", type=int, metavar="N", help="the beams search in so many groups [1]")
    parser.add_flag("diversity-penalty", type=float, help="for a group that says what another has just said [0]")
    parser.add_flag(
        "penalty-alpha",
        type=float,
        metavar="A",
        help=f"contrastive search among --top-k [{CONTRASTIVE_TOP_K}]: 0 the likeliest, 1 what is least like the rest",
    )
    parser.add_flag("draft", metavar="MODEL", help="a smaller model guesses, this one checks: the same chances, sooner")
    parser.add_flag(
        "prompt-lookup",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="the same, guessing what last followed the same N tokens [3]",
    )
    parser.add_flag(
        "logprobs",
        type=int,
        nargs="?",
        const=5,
        metavar="N",
        help="instead of the text, a line for each token: its probability, and the N most likely tokens [5]",
    )


def _check_flags(args: Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    ways = _given_flags(args, EXCLUSIVE_MODES)
    if len(ways) > 1:
        raise UserError(f"{ways[0]} and {ways[1]} do not go together")
    if args.num_beams is None and (lost := _given_flags(args, BEAM_SEARCH_FLAGS)):
        raise UserError(f"{lost[0]} needs --num-beams")
    if args.num_samples != 1 and _given_flags(args, SINGLE_SAMPLE_MODES):
        raise UserError(f"{ways[0]} makes one text: it does not go with --num-samples {args.num_samples}")
    if args.num_beams is not None and not 1 <= args.num_samples <= max(1, args.num_beams):
        raise UserError(f"--num-samples must be at least 1 and at most --num-beams, not {args.num_samples}")
    if not 1 <= args.num_samples <= MAX_SAMPLES:
        raise UserError(f"num_samples must be at least 1 and at most {MAX_SAMPLES:,}, not {args.num_samples}")
    search = _given_flags(args, ("num_beams", "penalty_alpha"))
    idle = _given_flags(args, (name for name in SAMPLING_FLAGS if name != "top_k" or args.num_beams is not None))
    if search and idle:
        raise UserError(f"{search[0]} searches and does not draw: {idle[0]} has no say in it")
    for name in ("max_new_tokens", "logprobs"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(args, name)}")


def _given_flags(args: Namespace, names: Iterable[str]) -> list[str]:
    """Those of the flags that were given, as they are typed."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def _print_texts(
    model: LanguageModel, tokenizer: Tokenizer | None, prompts: list[str], sampling: Sampling, args: Namespace
) -> None:
    beginnings = [prompt for prompt in prompts for _ in range(args.num_samples)]
    ending = {"max_new_tokens": args.max_new_tokens, "stop": args.stop}
    if args.num_beams is not None:
        beams = {"num_beams": args.num_beams, "num_return": args.num_samples, "sampling": sampling}
        beams |= {name: getattr(args, name) for name in BEAM_SEARCH_FLAGS if getattr(args, name) is not None}
        found = [beam_search_texts(model, tokenizer, prompt, **ending, **beams) for prompt in prompts]
        _print_in_order([], [text for texts in found for text in texts])
    elif args.penalty_alpha is not None:
        top_k = CONTRASTIVE_TOP_K if args.top_k is None else args.top_k
        contrast = {"top_k": top_k, "penalty_alpha": args.penalty_alpha, "sampling": sampling}
        pieces = (contrastive_stream(model, tokenizer, prompt, **ending, **contrast) for prompt in prompts)
        _print_in_order(((i, piece) for i, text in enumerate(pieces) for piece in text), beginnings)
    elif args.draft is not None or args.prompt_lookup is not None:
        if args.draft is None:
            draft = PromptLookup(args.prompt_lookup)
        else:
            draft = DraftModel(*load_inference_model(args, args.draft, with_adapter=False))
        texts = [speculate(model, tokenizer, prompt, draft, sampling, **ending, seed=args.seed) for prompt in prompts]
        _print_in_order(((i, piece) for i, text in enumerate(texts) for piece in text), beginnings)
        _print_acceptance_rate(texts)
    elif args.logprobs is not None:
        _print_in_order(
            _logprob_lines(model, tokenizer, prompts, sampling, args), [LOGPROBS_TABLE_HEADER for _ in beginnings]
        )
    else:
        pieces = stream(model, tokenizer, prompts, sampling, num_samples=args.num_samples, **ending, seed=args.seed)
        _print_in_order(pieces, beginnings)


def _print_acceptance_rate(texts: list[SpeculativeTextStream]) -> None:
    """How well it was guessed, on standard error."""
    made = [text.decoder for text in texts]
    drafted, accepted, calls = (sum(getattr(one, name) for one in made) for name in ("drafted", "accepted", "calls"))
    tokens = sum(len(one.sequence.new_tokens) for one in made)
    if sys.stderr is not None:
        rates = f"{accepted / max(1, drafted):.0%} of {drafted:,} drafted tokens accepted"
        print(f"gpt2: {rates}, {tokens / max(1, calls):.2f} tokens a call of the model", file=sys.stderr)


def _read_prompts(texts: list[str]) -> list[str]:
    """The prompts themselves, or for "-" what stands on standard input."""
    if texts.count("-") > 1:
        raise UserError("standard input can be only one of the prompts: give --prompt - once")
    try:
        return [_read_stdin() if text == "-" else text.encode().decode() for text in texts]
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def _read_stdin() -> str:
    return sys.stdin.buffer.read().decode() if sys.stdin is not None else ""


def _print_in_order(pieces: Iterable[tuple[int, str]], prefixes: list[str]) -> None:
    """Show the first text as it grows and the others after it, with a line between them."""
    texts, printed = list(prefixes), 0
    for sample, piece in pieces:
        texts[sample] += piece
        if sample == 0:
            print(escape_for_terminal(texts[0][printed:], sys.stdout), end="", flush=True)
            printed = len(texts[0])
    for sample, text in enumerate(texts):
        print(
            escape_for_terminal(text[printed:], sys.stdout)
            if sample == 0
            else f"---\n{escape_for_terminal(text, sys.stdout)}"
        )


def _logprob_lines(
    model: LanguageModel, tokenizer: Tokenizer | None, prompts: list[str], sampling: Sampling, args: Namespace
) -> Iterator[tuple[int, str]]:
    """(sample, line) for each token, counted as `stream` does."""
    if tokenizer is None:
        raise UserError("this model folder has no tokenizer: text needs one")
    end, seed = tokenizer.end_of_text, secrets.randbits(32) if args.seed is None else args.seed
    requests = [
        GenerationRequest(ids, sampling, args.max_new_tokens, seed, sample, (end,), args.logprobs)
        for ids in (tokenizer.encode(prompt, allow_special=True) or [end] for prompt in prompts)
        for sample in range(args.num_samples)
    ]
    longest = max(len(request.prompt) for request in requests) + args.max_new_tokens
    engine = Engine(model, min(len(requests), MAX_BATCH_SIZE), longest)
    asked = {engine.submit(request): (i, TextStream(tokenizer, args.stop)) for i, request in enumerate(requests)}
    while not engine.idle:
        for token in engine.step():
            sample, text = asked[token.sequence]
            chances = [(token.id, token.logprob or 0.0), *token.top_logprobs]
            (word, chance), *best = [(_token_repr(tokenizer, i), f"{math.exp(logprob):.2%}") for i, logprob in chances]
            line = f"{chance:>8}  {word:<16}" + "".join(f"  {word} {chance}" for word, chance in best)
            yield sample, f"\n{line.rstrip()}"
            text.push(token.id)
            if text.finish_reason:
                engine.cancel(token.sequence)
    for continuation in asked:
        if continuation.error:
            raise continuation.error


def _token_repr(tokenizer: Tokenizer, token: int) -> str:
    """A token as Python would write it: a piece of a character as its bytes, an id without text as its number."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    spelling = tokenizer.token_bytes(token)
    try:
        return repr(spelling.decode())
    except UnicodeDecodeError:
        return repr(spelling)
