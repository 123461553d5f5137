"""Train a small model on a folder of texts, and sample from it: python examples/train_on_a_folder.py FOLDER"""

import subprocess
import sys

import gpt2


def main(folder: str, out_dir: str = "runs", steps: str = "300") -> None:
    """Run `gpt2 train` as a program, then load the run folder in this process."""
    shape = ["--n-layer", "2", "--n-head", "4", "--n-embd", "128", "--block-size", "64", "--batch-size", "16"]
    length = ["--max-steps", steps, "--warmup-steps", "10", "--lr", "3e-3"]
    names = ["--data", folder, "--tokenizer", "bpe:512", "--name", "folder", "--out-dir", out_dir]
    subprocess.run([sys.executable, "-m", "gpt2", "train", *names, *shape, *length], check=True)
    model, tokenizer = gpt2.load(f"{out_dir}/folder")
    print(gpt2.generate(model, tokenizer, "The", max_new_tokens=40, temperature=0.8, seed=1)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
