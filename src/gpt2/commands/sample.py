"""gpt2 sample MODEL --prompt TEXT"""

import sys
from typing import Any

from gpt2.cli import Parser
from gpt2.errors import UserError
from gpt2.generation.engine import stream
from gpt2.generation.sampling import Sampling
from gpt2.runtime import parse_dtype, pick_device
from gpt2.weights import load


def main(argv: list[str]) -> None:
    parser = Parser(prog="gpt2 sample", description="Continue a prompt, on standard output.")
    parser.add_argument("model", metavar="MODEL", help="a run folder, a model folder, or a hub name")
    parser.flag("prompt", default="", help="what to continue; - reads it from standard input; empty starts a new text")
    parser.flag("num-samples", type=int, default=1, help="how many continuations [1]")
    parser.flag("max-new-tokens", type=int, default=200, help="length of each at most [200]")
    parser.flag("temperature", type=float, default=1.0, help="0 takes the most likely token, always [1]")
    parser.flag("top-k", type=int, default=50, help="choose among the k most likely; 0 for all [50]")
    parser.flag("top-p", type=float, default=1.0, help="choose among the most likely that sum to p [1]")
    parser.flag("seed", type=int, default=None, help="the same seed, the same text")
    parser.flag("device", default="auto", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.flag("dtype", default="float32", help="float32, bfloat16 or float16 [float32]")
    args = parser.parse_args(argv)
    prompt = _read_prompt(args.prompt)

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    dtype = parse_dtype(args.dtype)
    model, tokenizer = load(args.model, device=pick_device(args.device), dtype=dtype)
    pieces = stream(
        model,
        tokenizer,
        prompt,
        sampling,
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    _print_in_order(pieces, prompt, args.num_samples)


def _read_prompt(text: str) -> str:
    """The prompt itself, or for "-" what stands on standard input."""
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode() if sys.stdin is not None else ""
        return text.encode().decode()
    except UnicodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def _print_in_order(pieces: Any, prompt: str, num_samples: int) -> None:
    """Show the first sample as it grows and the others after it, with a line between them."""
    texts, shown = {0: prompt}, 0
    for sample, piece in pieces:
        texts[sample] = texts.get(sample, prompt) + piece
        if sample == 0:
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
    print(texts[0][shown:])
    for sample in range(1, num_samples):
        print(f"---\n{texts.get(sample, prompt)}")
