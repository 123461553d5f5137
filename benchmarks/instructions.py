"""Instruction tuning of a small model from random weights: sums, reversals, and prices.

    python benchmarks/instructions.py [--steps 2000]

The rows are generated here. The test prompts do not occur in training: other sums, other words, and other phrasings of
the question about a thing. Trains twice on the same rows in the same order: with the loss on the answers alone, and on
the prompts too. Writes results/instructions.json.
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
NUM_TRAIN_ROWS, NUM_TEST_PROMPTS = 30_000, 600  # a tenth of the training rows is held out for validation
SHAPE = GPTConfig(vocab_size=257, block_size=128, n_layer=4, n_head=4, n_embd=128)


def make_prices() -> list[tuple[str, str]]:
    """120 things and their prices."""
    rng = random.Random(7)
    return list({"".join(rng.choices(LETTERS, k=5)): str(rng.randrange(100, 1000)) for _ in range(120)}.items())


def make_row(rng: random.Random, prices: list[tuple[str, str]]) -> tuple[str, str, str]:
    """A random row: task, prompt, answer."""
    task = rng.choice(("sum", "reversal", "look-up"))
    if task == "sum":
        a, b = rng.randrange(100), rng.randrange(100)
        return task, f"{a}+{b}=", str(a + b)
    if task == "reversal":
        word = "".join(rng.choices(LETTERS, k=rng.randrange(3, 7)))
        return task, f"reverse {word}: ", word[::-1]
    thing, price = rng.choice(prices)
    return task, rng.choice(QUESTIONS).format(thing), price


def make_rows(seed: int = 0) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Training rows, and test rows whose prompts are not among them."""
    rng, prices = random.Random(seed), make_prices()
    test_rows = list({row[1]: row for row in (make_row(rng, prices) for _ in range(NUM_TEST_PROMPTS))}.values())
    test_prompts = {row[1] for row in test_rows}
    rows = [row for row in (make_row(rng, prices) for _ in range(NUM_TRAIN_ROWS)) if row[1] not in test_prompts]
    return rows, test_rows


def exact_matches(folder: Path, test_rows: list[tuple[str, str, str]]) -> dict[str, float]:
    """The exact-match accuracy of greedy decoding, by task."""
    model, tokenizer = gpt2.load(folder)
    prompts = [prompt for _, prompt, _ in test_rows]
    texts = gpt2.generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0.0, seed=0)
    correct: dict[str, list[bool]] = {}
    for (task, prompt, answer), (text,) in zip(test_rows, texts, strict=True):
        correct.setdefault(task, []).append(text.removeprefix(prompt) == answer)
    groups = dict(sorted(correct.items())) | {"all": [value for values in correct.values() for value in values]}
    return {task: sum(values) / len(values) for task, values in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    rows, test_rows = make_rows()
    found: dict[str, Any] = {"steps": steps, "rows": len(rows), "asked": len(test_rows)}
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
        for variant, masked in (("answers only", True), ("prompts too", False)):
            start = time.perf_counter()
            run = train(replace(common, name=variant.replace(" ", "-"), mask_prompt=masked))
            seconds = time.perf_counter() - start
            found[variant] = {"exact_match": exact_matches(run, test_rows), "seconds": round(seconds, 1)}
    command = f"python benchmarks/instructions.py --steps {steps}"
    print(json.dumps(write_result("instructions", command, found), indent=2))


if __name__ == "__main__":
    main()
