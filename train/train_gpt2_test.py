"""Train a fresh 124M GPT-2 on one batch until it knows it by heart: the original project's command, as written.

    cd train
    python train_gpt2_test.py --train --data_type super_tiny_shakespear --lr 3e-4 --optimizer adam --epochs 50 \\
        --device cuda

The untrained loss must be near ln(50257) = 10.82. `gpt2 train` is this program's own way to train.
"""

import time
from argparse import ArgumentParser, BooleanOptionalAction

import torch

import gpt2
from gpt2.cli import exit_after
from gpt2.data.sources import open_source
from gpt2.runtime import autocast, compile_blocks, pick_device, synchronize

AUTOCAST = {"f32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}

parser = ArgumentParser(description="Train a fresh 124M GPT-2 on one batch.")
parser.add_argument("--train", default=True, action=BooleanOptionalAction, help="train, or only print the loss")
parser.add_argument(
    "--data_type", default="super_tiny_shakespear", choices=["super_tiny_shakespear", "tiny_shakespear"]
)
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--optimizer", default="adam", choices=OPTIMIZERS)
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--device", default="cuda", help="cpu where there is no such device")
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--token_size", type=int, default=32)
parser.add_argument("--seed", type=int, default=1337)
parser.add_argument("--matmul_precision", default="highest", choices=["highest", "high", "medium"])
parser.add_argument("--autocast_type", default="f32", choices=AUTOCAST)
parser.add_argument("--compile_model", default=False, action=BooleanOptionalAction)
parser.add_argument("--flash_attention", default=False, action=BooleanOptionalAction)


def main() -> None:
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.manual_seed(args.seed)
    model = gpt2.GPT(gpt2.GPTConfig(attention="sdpa" if args.flash_attention else "plain")).to(device)
    if args.compile_model:
        compile_blocks(model.transformer.h)

    (document,) = open_source(args.data_type).documents
    size = args.batch_size * args.token_size
    tokens = gpt2.get_tokenizer("gpt2").encode("".join(document.pieces()))[: size + 1]
    if len(tokens) <= size:
        raise gpt2.UserError(f"{args.data_type} has only {len(tokens)} tokens: {size + 1} are needed for one batch")
    buffer = torch.tensor(tokens, device=device)
    x, y = buffer[:-1].view(args.batch_size, -1), buffer[1:].view(args.batch_size, -1)  # (B, T) each

    with torch.no_grad(), autocast(device, AUTOCAST[args.autocast_type]):
        print(f"untrained loss: {model.loss(x, y).item():.4f}")
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=args.lr)
    for epoch in range(1, args.epochs + 1 if args.train else 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        with autocast(device, AUTOCAST[args.autocast_type]):
            loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        synchronize(device)
        print(
            f"epoch {epoch}, loss: {loss.item():.4f}, time: {(time.perf_counter() - began) * 1000:.0f} ms", flush=True
        )


if __name__ == "__main__":
    exit_after(main)
