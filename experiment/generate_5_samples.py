"""Generate five samples after "Hello, I'm a language model,": the original project's command, unchanged.

    cd experiment
    python generate_5_samples.py --hf_weight --no-train

Sampling is the original's: one `multinomial` per token over the top 50 probabilities of the whole batch. This program's
own command is `gpt2 sample gpt2 --prompt "Hello, I'm a language model," --num-samples 5`.
"""

from argparse import BooleanOptionalAction

import torch

import gpt2
from gpt2.cli import Parser, positive_int, run_and_exit
from gpt2.errors import NonFiniteLogitsError
from gpt2.runtime import pick_device, seed_everything

parser = Parser(description="Generate samples after a prefix.")
parser.add_flag("model-type", default="gpt2", help="a hub name or a model folder")
parser.add_flag("hf-weight", default=True, action=BooleanOptionalAction, help="OpenAI's weights, or random ones")
parser.add_flag("train", default=True, action=BooleanOptionalAction, help="training mode, with random weights")
parser.add_flag("prefix", default="Hello, I'm a language model,")
parser.add_flag("num-return-sequences", type=positive_int, default=5)
parser.add_flag("max-length", type=positive_int, default=30, help="tokens in total, including the prefix")
parser.add_flag("seed", type=int, default=1337)
parser.add_flag("device", default="cuda", help="falls back to the CPU")


@torch.no_grad()
def main() -> None:
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.hf_weight and not args.train:
        model, tokenizer = gpt2.load(args.model_type, device=device)
    else:
        model, tokenizer = gpt2.GPT(gpt2.GPTConfig()).to(device), gpt2.get_tokenizer("gpt2")
    if tokenizer is None:
        raise gpt2.UserError(f"{args.model_type} has no tokenizer")
    model.train(args.train)
    prefix = tokenizer.encode(args.prefix) or [tokenizer.end_of_text]
    tokens = torch.tensor([prefix] * args.num_return_sequences, device=device)
    seed_everything(args.seed)
    while tokens.size(1) < args.max_length:
        probs, candidates = model(tokens)[:, -1].softmax(-1).topk(min(50, model.config.vocab_size))  # (B, 50) each
        if not probs.isfinite().all():
            raise NonFiniteLogitsError("the model computes nan or inf: its weights are damaged")
        tokens = torch.cat((tokens, candidates.gather(-1, torch.multinomial(probs, 1))), 1)
    for row in tokens[:, : args.max_length].tolist():
        print(">> ", tokenizer.decode(row))


if __name__ == "__main__":
    run_and_exit(main)
