"""Overfit a 124M GPT-2 with random weights on one batch: the original project's command, unchanged.

    cd train
    python train_gpt2_test.py --train --data_type super_tiny_shakespear --lr 3e-4 --optimizer adam --epochs 50 \\
        --device cuda

The untrained loss must be near ln(50257) = 10.82. This program's own command is `gpt2 train`.
"""

import time
from argparse import BooleanOptionalAction

import torch

import gpt2
from gpt2.cli import Parser, positive_int, run_and_exit
from gpt2.data.sources import builtin_texts
from gpt2.errors import ConfigError, DataError
from gpt2.runtime import autocast, compile_blocks, pick_device, seed_everything, synchronize

AUTOCAST = {"f32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}

parser = Parser(description="Train a 124M GPT-2 with random weights on one batch.")
parser.add_flag("train", default=True, action=BooleanOptionalAction, help="train, or only print the loss")
parser.add_flag("data-type", default="super_tiny_shakespear", choices=["super_tiny_shakespear", "tiny_shakespear"])
parser.add_flag("lr", type=float, default=3e-4)
parser.add_flag("optimizer", default="adam", choices=OPTIMIZERS)
parser.add_flag("epochs", type=positive_int, default=50)
parser.add_flag("device", default="cuda", help="falls back to the CPU")
parser.add_flag("batch-size", type=positive_int, default=4)
parser.add_flag("token-size", type=positive_int, default=32)
parser.add_flag("seed", type=int, default=1337)
parser.add_flag("matmul-precision", default="highest", choices=["highest", "high", "medium"])
parser.add_flag("autocast-type", default="f32", choices=AUTOCAST)
parser.add_flag("compile-model", default=False, action=BooleanOptionalAction)
parser.add_flag("flash-attention", default=False, action=BooleanOptionalAction)


def main() -> None:
    args = parser.parse_args()
    if not 0 < args.lr < float("inf"):
        raise ConfigError(f"--lr must be over 0, not {args.lr:g}", field="lr")
    config = gpt2.GPTConfig(attention="sdpa" if args.flash_attention else "plain")
    if args.token_size > config.block_size:
        raise ConfigError(f"--token-size {args.token_size:,} is more than the context of {config.block_size:,}")
    device = pick_device(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    seed_everything(args.seed)
    model = gpt2.GPT(config).to(device)
    if args.compile_model:
        compile_blocks(model.transformer.h)

    (document,) = builtin_texts(args.data_type).documents
    size = args.batch_size * args.token_size
    tokens = gpt2.get_tokenizer("gpt2").encode("".join(document.iter_chunks()))[: size + 1]
    if len(tokens) <= size:
        raise DataError(f"{args.data_type} has only {len(tokens)} tokens: {size + 1} are needed for one batch")
    buffer = torch.tensor(tokens, device=device)
    x, y = buffer[:-1].view(args.batch_size, -1), buffer[1:].view(args.batch_size, -1)  # (B, T) each

    with torch.no_grad(), autocast(device, AUTOCAST[args.autocast_type]):
        print(f"untrained loss: {model.loss(x, y).item():.4f}")
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    for epoch in range(1, args.epochs + 1 if args.train else 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        with autocast(device, AUTOCAST[args.autocast_type]):
            loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        synchronize(device)
        ms = (time.perf_counter() - start) * 1000
        print(f"epoch {epoch}, loss: {loss.item():.4f}, time: {ms:.0f} ms", flush=True)


if __name__ == "__main__":
    run_and_exit(main)
