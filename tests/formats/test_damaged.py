"""A damaged file is one line, in any format: cut short at ten places, or with random bytes changed."""

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gpt2
from gpt2.errors import UserError
from gpt2.model import GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.formats.test_huggingface import flax_bytes, flax_tree
from tests.formats.test_other_formats import bundle, hparams, llmc_bytes, nanogpt_args, nanogpt_state, openai_variables
from tests.helpers.transformers_reference import random_model, to_transformers

CONFIG = GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=2, n_embd=8)
MODEL = random_model(CONFIG)


def safetensors(folder: Path) -> None:
    gpt2.save(MODEL, get_tokenizer("bytes"), folder)


def sharded(folder: Path) -> None:
    gpt2.save(MODEL, None, folder, max_shard_size=4000)


def pickled(folder: Path, zipped: bool = True) -> None:
    to_transformers(MODEL).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def legacy(folder: Path) -> None:
    pickled(folder, zipped=False)


def flax(folder: Path) -> None:
    to_transformers(MODEL).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(flax_bytes(flax_tree(MODEL)))


def nanogpt(folder: Path) -> None:
    folder.mkdir()
    torch.save({"model": nanogpt_state(MODEL), "model_args": nanogpt_args(CONFIG)}, folder / "ckpt.pt")


def openai(folder: Path) -> None:
    folder.mkdir()
    hparams(folder, CONFIG)
    bundle(folder, openai_variables(MODEL))


def llmc(folder: Path) -> None:
    folder.mkdir()
    (folder / "m.bin").write_bytes(llmc_bytes(MODEL, 3))


def gguf(folder: Path, dtype: str = "float16") -> None:
    pytest.importorskip("gguf")
    from gpt2.formats import gguf_writer

    folder.mkdir()
    model = random_model(GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=2, n_embd=32))
    gguf_writer.write(model, get_tokenizer("bytes"), folder / "m.gguf", dtype)


def gguf_f16(folder: Path) -> None:
    gguf(folder, "f16")


def gguf_q4(folder: Path) -> None:
    gguf(folder, "q4_0")


CASES: list[tuple[Callable[[Path], None], str]] = [
    (safetensors, "model.safetensors"),
    (safetensors, "config.json"),
    (safetensors, "tokenizer.json"),
    (sharded, "model.safetensors.index.json"),
    (pickled, "pytorch_model.bin"),
    (legacy, "pytorch_model.bin"),
    (flax, "flax_model.msgpack"),
    (nanogpt, "ckpt.pt"),
    (openai, "model.ckpt.index"),
    (openai, "model.ckpt.data-00000-of-00001"),
    (openai, "hparams.json"),
    (llmc, "m.bin"),
    (gguf_f16, "m.gguf"),
    (gguf_q4, "m.gguf"),
]


def survives(folder: Path, name: str) -> bool:
    """Whether the model loads; what is raised must be a UserError of one line that names the file or its folder."""
    ref = folder / name if name.endswith((".bin", ".gguf")) and name.startswith("m.") else folder
    message = refusal(ref)
    assert message is None or ("\n" not in message and str(folder) in message)
    return message is None


def refusal(ref: Path) -> str | None:
    try:
        gpt2.load(ref)
    except UserError as error:
        return str(error)
    return None


FLIPS = [20, pytest.param(200, marks=pytest.mark.slow)]


@pytest.mark.parametrize("flips", FLIPS)
@pytest.mark.parametrize(("make", "name"), CASES, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_damage_is_one_line(make: Callable[[Path], None], name: str, flips: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make(folder)
    path = folder / name
    whole = path.read_bytes()
    assert survives(folder, name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        assert not survives(folder, name), f"cut to {tenth} tenths"
    draw = random.Random(f"{name} {flips}")
    refused = 0
    for _ in range(flips):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4, 16))):
            reach = len(whole) if draw.random() < 0.3 else min(len(whole), 3000)  # mostly where the structure is
            damaged[draw.randrange(reach)] = draw.randrange(256)
        path.write_bytes(damaged)
        refused += not survives(folder, name)
    assert refused or name in ("m.bin", "model.ckpt.data-00000-of-00001")  # which are nearly all numbers
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB: the file is not a hundredth
    shutil.rmtree(folder)


def test_a_shape_that_no_file_could_fill(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    safetensors(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 2**26, "n_embd": 1024}))
    with pytest.raises(UserError, match="in the weights"):
        gpt2.load(folder)
