"""Speculative decoding compared with plain decoding: with a draft model, and with prompt lookup.

    python benchmarks/speculation.py gpt2-large gpt2 input.txt

Continues passages of the text with each method in turn, at temperature 0 and 1. Writes results/speculation_DEVICE.json.
Times include prefill; a ratio is plain decoding's median time over that of the method.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import write_result

from gpt2.bench.common import timed
from gpt2.errors import UserError
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.generation.speculative import Drafter, DraftModel, PromptLookup, SpeculativeDecoder
from gpt2.runtime import pick_device
from gpt2.tokenizer import Tokenizer
from gpt2.weights import load

TEMPERATURES = (0.0, 1.0)


def passages(path: Path, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """`count` passages of `length` tokens, evenly spaced over the text."""
    tokens = tokenizer.encode(path.read_text(encoding="utf-8"))
    if len(tokens) < count * length:
        raise UserError(f"{path} has {len(tokens):,} tokens: too few for {count} passages of {length}")
    return [tokens[at : at + length] for at in range(0, len(tokens), len(tokens) // count)[:count]]


def decode(
    model: LanguageModel, draft: Drafter | None, request: GenerationRequest
) -> tuple[list[int], SpeculativeDecoder | None]:
    """The new tokens, and with a draft the decoder, which holds the counts."""
    if draft is not None:
        decoder = SpeculativeDecoder(model, draft, request)
        return [token for tokens in decoder for token in tokens], decoder
    engine = Engine(model, 1, len(request.prompt) + request.max_new_tokens)
    sequence = engine.submit(request)
    while not engine.idle:
        engine.step()
    if sequence.error:
        raise sequence.error
    return sequence.new_tokens, None


def compare(
    model: LanguageModel,
    drafts: dict[str, Callable[[], Drafter | None]],
    prompts: list[list[int]],
    sampling: Sampling,
    count: int,
) -> dict[str, Any]:
    """Decode each prompt with each method; the first is plain decoding."""
    seconds: dict[str, list[float]] = {name: [] for name in drafts}
    sums = {name: {"drafted": 0, "accepted": 0, "calls": 0, "equal": 0} for name in drafts}
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first round is a warm-up
        request, outputs = GenerationRequest(prompt, sampling, count, seed=number), {}
        for name, make_draft in drafts.items():
            elapsed, (outputs[name], decoder) = timed(partial(decode, model, make_draft(), request), model.device)
            if number > 0:
                seconds[name].append(elapsed)
                sums[name]["equal"] += outputs[name] == outputs["plain"]
                for key in ("drafted", "accepted", "calls") if decoder else ():
                    sums[name][key] += getattr(decoder, key)
    found = {}
    for name, tally in sums.items():
        median = statistics.median(seconds[name])
        found[name] = {
            "tokens_per_second": round(count / median, 2),
            "ratio": round(statistics.median(seconds["plain"]) / median, 3),
        }
        if tally["calls"]:
            found[name]["acceptance_rate"] = round(tally["accepted"] / max(1, tally["drafted"]), 3)
            found[name]["tokens_per_call"] = round(len(prompts) * count / tally["calls"], 2)
            if sampling.greedy:
                found[name]["texts_equal_to_plain"] = f"{tally['equal']} of {len(prompts)}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Speculative decoding compared with plain decoding.")
    parser.add_argument("model", metavar="MODEL", help="the target model: a folder or a hub name")
    parser.add_argument("draft", metavar="DRAFT", help="a smaller model with the same vocabulary")
    parser.add_argument("text", metavar="TEXT", type=Path, help="a text file, from which the prompts are taken")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--passage-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    device = pick_device(args.device)
    plain, tokenizer = load(args.model, device=device)
    plain_draft, small_tokenizer = load(args.draft, device=device)
    model, small = prepare_for_inference(plain, args.dtype), prepare_for_inference(plain_draft, args.dtype)
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer, which is required to encode the text")
    DraftModel(small, small_tokenizer).check(model.config.vocab_size, tokenizer)
    prompts = passages(args.text, tokenizer, args.passages, args.passage_tokens)
    drafts = {"plain": lambda: None, "model": lambda: DraftModel(small), "prompt_lookup": PromptLookup}
    found = {
        "device": str(device),
        "dtype": args.dtype,
        "parameters": {"model": plain.num_parameters(), "draft": plain_draft.num_parameters()},
        "passages": args.passages,
        "passage_tokens": args.passage_tokens,
        "new_tokens": args.new_tokens,
        "temperatures": {},
    }
    for temperature in TEMPERATURES:
        compared = compare(model, drafts, prompts, Sampling(temperature), args.new_tokens)
        found["temperatures"][f"{temperature:g}"] = compared
    result = write_result(
        f"speculation_{device.type}", shlex.join(["python", "benchmarks/speculation.py", *sys.argv[1:]]), found
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
