"""LoRA by hand: add adapters, train them, save them in PEFT's format: python examples/lora.py MODEL TEXT OUT"""

import sys
from pathlib import Path

import torch

import gpt2
from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, save_adapter, trainable_parameters


def main(ref: str, text_file: str, out: str, steps: str = "30") -> None:
    """Print the loss before and after. `gpt2 sample MODEL --adapter OUT` uses the result."""
    torch.manual_seed(0)
    model, tokenizer = gpt2.load(ref)
    if tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    fingerprint = base_fingerprint(model)
    config = LoRAConfig(rank=4, alpha=8.0)
    add_adapter(model, config)
    tokens = torch.tensor(tokenizer.encode(Path(text_file).read_text(encoding="utf-8")))
    length = min(model.config.block_size, len(tokens) - 1)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=3e-3)
    losses = []
    for _ in range(int(steps)):
        starts = torch.randint(len(tokens) - length, (8,)).tolist()
        rows = torch.stack([tokens[i : i + length + 1] for i in starts])
        loss = model.loss(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    save_adapter(out, config, adapter_state_dict(model), ref, fingerprint)


if __name__ == "__main__":
    main(*sys.argv[1:])
