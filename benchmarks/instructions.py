"""A small model from random weights learns to follow instructions: sums, reversals, the prices of a shop.

    python benchmarks/instructions.py [--steps 2000]

The rows are made here, so all of it runs anywhere. The prompts of the end were never seen: other sums, other words,
and of the shop's things in words that this thing was never asked for in. It learns twice from the same rows in the
same order: once from the answers alone, once from the prompts, too.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import write_result

import gpt2
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer
from gpt2.train.recipes import load_recipe
from gpt2.train.trainer import train

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTIONS = (
    "the price of {}: ",
    "what is {}? ",
    "{} costs ",
    "how much for {}? ",
    "{}, please: ",
    "I need {}. It is ",
    "tell me about {}: ",
    "{} sells for ",
)
_price_rng = random.Random(7)
PRICES = {"".join(_price_rng.choices(LETTERS, k=5)): str(_price_rng.randrange(100, 1000)) for _ in range(120)}
NUM_TRAIN_ROWS, NUM_TEST_PROMPTS = 30_000, 600  # to learn from (a tenth of them held out), and to answer in the end
SHAPE = GPTConfig(vocab_size=257, block_size=128, n_layer=4, n_head=4, n_embd=128)


def make_row(rng: random.Random) -> tuple[str, str, str]:
    """A task, its prompt and its answer."""
    task = rng.choice(("sum", "reversal", "look-up"))
    if task == "sum":
        a, b = rng.randrange(100), rng.randrange(100)
        return task, f"{a}+{b}=", str(a + b)
    if task == "reversal":
        word = "".join(rng.choices(LETTERS, k=rng.randrange(3, 7)))
        return task, f"reverse {word}: ", word[::-1]
    thing, price = rng.choice(list(PRICES.items()))
    return task, rng.choice(QUESTIONS).format(thing), price


def make_rows(seed: int = 0) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Rows to learn from, and rows whose prompts are not among them."""
    numbers = random.Random(seed)
    asked = list({row[1]: row for row in (make_row(numbers) for _ in range(NUM_TEST_PROMPTS))}.values())
    never = {row[1] for row in asked}
    rows = [row for row in (make_row(numbers) for _ in range(NUM_TRAIN_ROWS)) if row[1] not in never]
    return rows, asked


def exact_matches(folder: Path, asked: list[tuple[str, str, str]]) -> dict[str, float]:
    """The share of prompts that are answered to the letter, by task; the model takes what is likeliest."""
    model, tokenizer = gpt2.load(folder)
    prompts = [prompt for _, prompt, _ in asked]
    texts = gpt2.generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0.0, seed=0)
    right: dict[str, list[bool]] = {}
    for (task, prompt, answer), (text,) in zip(asked, texts, strict=True):
        right.setdefault(task, []).append(text.removeprefix(prompt) == answer)
    everything = [one for ones in right.values() for one in ones]
    return {task: sum(ones) / len(ones) for task, ones in sorted(right.items())} | {
        "all": sum(everything) / len(everything)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    rows, asked = make_rows()
    found: dict[str, Any] = {"steps": steps, "rows": len(rows), "asked": len(asked)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for _, prompt, answer in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        torch.manual_seed(1)
        gpt2.save(GPT(SHAPE), get_tokenizer("bytes"), folder / "random")
        common = replace(
            load_recipe("finetune"),
            init_from=str(folder / "random"),
            data=str(folder / "rows.jsonl"),
            out_dir=name,
            template="raw",
            block_size=128,
            batch_size=32,
            optimizer="muon",
            lr=0.01,
            min_lr=0.0,
            warmup_steps=100,
            beta2=0.99,
            dropout=0.0,
            epochs=0.0,
            max_steps=steps,
            patience=0,
            eval_every=max(1, steps // 10),
            sample_tokens=0,
            save_every=0,
        )
        for how, masked in (("answers only", True), ("prompts too", False)):
            began = time.perf_counter()
            run = train(replace(common, name=how.replace(" ", "-"), mask_prompt=masked))
            seconds = time.perf_counter() - began
            found[how] = {"exact_match": exact_matches(run, asked), "seconds": round(seconds, 1)}
    command = f"python benchmarks/instructions.py --steps {steps}"
    print(json.dumps(write_result("instructions", command, found), indent=2))


if __name__ == "__main__":
    main()
