"""Time and peak memory of loading a model of a given shape in each format, one process each.

    python benchmarks/load_formats.py --shape gpt2-xl --work FOLDER [--formats hf,gguf-f16,...] [--dtype float32]

Peak memory is the process's high-water mark less its memory before `gpt2.load`, over the bytes of the weights in the
target dtype: the goal is at most 1.15. Files are written first and removed afterwards; the page cache is warm, so disk
speed is not measured. Writes results/load_formats.json. Writing flax and openai takes several times the memory.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from machine import write_result
from safetensors.torch import load_file

import gpt2
from gpt2.formats import gguf_writer, llmc, nanogpt
from gpt2.model import GPT, OPENAI_CONFIGS

sys.path.insert(0, str(Path(__file__).parents[1]))

CHILD = """
import resource, sys, time
import torch, gpt2, gpt2.weights
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
begin = time.perf_counter()
model, _ = gpt2.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - begin
held = sum(p.numel() * p.element_size() for p in model.parameters())
print(seconds, (peak() - before) / held, held)
"""


def hf(model: GPT, out: Path) -> Path:
    return gpt2.save(model, None, out / "hf")


def pickled(model: GPT, out: Path) -> Path:
    folder = gpt2.save(model, None, out / "bin", max_shard_size="100GB")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def flax(model: GPT, out: Path) -> Path:
    from tests.formats.test_huggingface import flax_bytes, flax_tree

    folder = gpt2.save(model, None, out / "flax")
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    (folder / "flax_model.msgpack").write_bytes(flax_bytes(flax_tree(model)))
    return folder


def openai(model: GPT, out: Path) -> Path:
    from tests.formats.test_other_formats import bundle, hparams, openai_variables

    (out / "openai").mkdir()
    hparams(out / "openai", model.config)
    bundle(out / "openai", openai_variables(model))
    return out / "openai"


def file_of(name: str, write: Callable[[GPT, Path], None]) -> Callable[[GPT, Path], Path]:
    def written(model: GPT, out: Path) -> Path:
        write(model, out / name)
        return out / name

    return written


FORMATS: dict[str, Callable[[GPT, Path], Path]] = {
    "hf": hf,
    "pytorch_model.bin": pickled,
    "nanogpt": file_of("ckpt.pt", lambda model, path: nanogpt.write(model, path, torch.float32)),
    "llmc": file_of("m.bin", lambda model, path: llmc.write(model, path, torch.float32)),
    "llmc-bfloat16": file_of("h.bin", lambda model, path: llmc.write(model, path, torch.bfloat16)),
    "gguf-f16": file_of("f16.gguf", lambda model, path: gguf_writer.write(model, None, path, "f16")),
    "gguf-q8_0": file_of("q8.gguf", lambda model, path: gguf_writer.write(model, None, path, "q8_0")),
    "flax": flax,
    "openai": openai,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-xl", choices=OPENAI_CONFIGS)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the files")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--name", default="load_formats", help="of the file in results/")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.formats.split(","):
        with torch.device("meta"):
            model = GPT(replace(OPENAI_CONFIGS[args.shape], vocab_size=50256))  # one less: no tokenizer is looked for
        model = model.to_empty(device="cpu")
        model.tie_weights()
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        path = FORMATS[name](model, args.work)
        del model
        command = [sys.executable, "-c", CHILD, str(path), args.dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, ratio, held = map(float, done.stdout.split())
        row = {"format": name, "seconds": round(seconds, 2), "peak_over_weights": round(ratio, 3)}
        rows.append(row | {"weights_gb": round(held / 1e9, 2)})
        print(json.dumps(rows[-1]), flush=True)
        subprocess.run(["rm", "-r", str(path)], check=True)
        command_line = f"python benchmarks/load_formats.py --shape {args.shape} --formats {args.formats}"
        write_result(args.name, command_line, {"shape": args.shape, "dtype": args.dtype, "formats": rows})


if __name__ == "__main__":
    main()
