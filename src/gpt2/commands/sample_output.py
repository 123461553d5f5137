"""Generate and print the texts of `gpt2 sample`. It imports torch."""

import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator

from gpt2.commands.generation_args import load_inference_model, resolve_from_args
from gpt2.commands.sample import BEAM_SEARCH_FLAGS, CONTRASTIVE_TOP_K
from gpt2.errors import ModelFilesError
from gpt2.generation.beam_search import beam_search_texts
from gpt2.generation.contrastive_search import contrastive_stream
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.sampling import Sampling, resolve_seed
from gpt2.generation.speculative import DraftModel, PromptLookup, SpeculativeTextStream, speculate
from gpt2.generation.text import MAX_BATCH_SIZE, TextStream, encode_prompt, stream
from gpt2.progress import print_status
from gpt2.terminal import escape_for_terminal
from gpt2.tokenizer import Tokenizer

LOGPROBS_TABLE_HEADER = "  prob.   token             most likely"


def print_texts(
    model: LanguageModel, tokenizer: Tokenizer | None, prompts: list[str], sampling: Sampling, args: Namespace
) -> None:
    prefixes = [prompt for prompt in prompts for _ in range(args.num_samples)]
    limits = {
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "skip_special_tokens": args.skip_special_tokens,
    }
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
    rates = f"{accepted / max(1, drafted):.0%} of {drafted:,} drafted tokens accepted"
    print_status(f"{rates}, {tokens / max(1, calls):.2f} tokens per call of the model")


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
    seed = resolve_seed(args.seed)
    requests = [
        GenerationRequest(ids, sampling, args.max_new_tokens, seed, sample, tokenizer.end_tokens, args.logprobs)
        for ids in (encode_prompt(tokenizer, prompt) for prompt in prompts)
        for sample in range(args.num_samples)
    ]
    longest = max(len(request.prompt) for request in requests) + args.max_new_tokens
    engine = Engine(model, min(len(requests), MAX_BATCH_SIZE), longest)
    texts = [TextStream(tokenizer, args.stop, min_tokens=sampling.min_new_tokens) for _ in requests]
    running = {engine.submit(request): (i, texts[i]) for i, request in enumerate(requests)}
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
