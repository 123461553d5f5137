"""nanoGPT, build-nanogpt, OpenAI's TensorFlow checkpoint, llm.c and GGUF are read with equal logits."""

import json
import os
import pickle
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt2
from gpt2.errors import UserError
from gpt2.formats.names import CONV1D_WEIGHTS
from gpt2.model import GPT, GPTConfig
from gpt2.weights import find_model_folder, read_config
from tests.helpers.transformers_reference import random_batch, random_model

SMALL = GPTConfig(vocab_size=101, block_size=17, n_layer=2, n_head=5, n_embd=40)


def assert_same(got: GPT, expected: GPT, atol: float = 0.0) -> None:
    vocab = min(got.config.vocab_size, expected.config.vocab_size)
    tokens = random_batch(replace(expected.config, vocab_size=vocab))[0]
    with torch.no_grad():
        torch.testing.assert_close(got(tokens)[..., :vocab], expected(tokens)[..., :vocab], rtol=0, atol=atol)


def nanogpt_state(model: GPT, prefix: str = "") -> dict[str, Tensor]:
    state = {prefix + name: p.detach() for name, p in model.named_parameters()}
    return state | {f"{prefix}lm_head.weight": model.transformer.wte.weight.detach()}


def nanogpt_args(c: GPTConfig, **others: Any) -> dict[str, Any]:
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    return {name: getattr(c, name) for name in names} | {"bias": True, "dropout": 0.0} | others


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_nanogpt(prefix: str, tmp_path: Path) -> None:
    model = random_model(replace(SMALL, activation_function="gelu"))
    checkpoint = {"model": nanogpt_state(model, prefix), "model_args": nanogpt_args(SMALL), "iter_num": 7}
    checkpoint["optimizer"] = torch.optim.AdamW(model.parameters()).state_dict()
    checkpoint["config"] = {"dataset": "x"}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert_same(gpt2.load(tmp_path / "ckpt.pt")[0], model)
    assert_same(gpt2.load(tmp_path)[0], model)  # nanoGPT's out_dir
    assert read_config(find_model_folder(tmp_path)) == model.config


def test_nanogpt_without_biases(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, activation_function="gelu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    state = {name: t for name, t in nanogpt_state(model).items() if not name.endswith("bias")}
    torch.save({"model": state, "model_args": nanogpt_args(SMALL, bias=False)}, tmp_path / "ckpt.pt")
    assert_same(gpt2.load(tmp_path)[0], model)


def test_nanogpt_with_a_padded_vocabulary(gpt2_vocabulary: None, tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=50304, block_size=8, n_layer=1, n_head=1, n_embd=4, activation_function="gelu")
    model = random_model(config)
    torch.save({"model": nanogpt_state(model), "model_args": nanogpt_args(config)}, tmp_path / "ckpt.pt")
    loaded, tokenizer = gpt2.load(tmp_path)
    assert loaded.config.vocab_size == 50257
    assert_same(loaded, model)
    assert tokenizer is not None
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_build_nanogpt_has_a_dataclass_in_its_pickle(tmp_path: Path) -> None:
    @dataclass
    class GPTConfig:  # as train_gpt2.py has it
        block_size: int = 17
        vocab_size: int = 101
        n_layer: int = 2
        n_head: int = 5
        n_embd: int = 40

    GPTConfig.__module__, GPTConfig.__qualname__ = "__main__", "GPTConfig"
    model = random_model(SMALL)
    import __main__

    __main__.GPTConfig = GPTConfig  # pyright: ignore[reportAttributeAccessIssue]
    try:
        torch.save({"model": nanogpt_state(model), "config": GPTConfig(), "step": 5}, tmp_path / "model_00005.pt")
    finally:
        del __main__.GPTConfig  # pyright: ignore[reportAttributeAccessIssue]
    assert_same(gpt2.load(tmp_path / "model_00005.pt")[0], model)


def test_characters_of_meta_pkl(tmp_path: Path) -> None:
    characters = sorted("\n !abcdefgh,é")
    config = replace(SMALL, vocab_size=len(characters), activation_function="gelu")
    model = random_model(config)
    torch.save({"model": nanogpt_state(model), "model_args": nanogpt_args(config)}, tmp_path / "ckpt.pt")
    table = dict(enumerate(characters))
    meta = {"vocab_size": len(characters), "itos": table, "stoi": {each: i for i, each in table.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    loaded, tokenizer = gpt2.load(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode("a bad\ncafé")
    assert ids == [characters.index(each) for each in "a bad\ncafé"]
    assert tokenizer.decode(ids) == "a bad\ncafé"
    with pytest.raises(UserError, match="vocabulary of 13 characters lacks 'z'"):
        tokenizer.encode("zoo")

    gpt2.save(loaded, tokenizer, tmp_path / "hf")
    again = gpt2.load(tmp_path / "hf")[1]
    assert again is not None
    assert (again.encode("a bad\ncafé"), again.fingerprint) == (ids, tokenizer.fingerprint)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("a bad\ncafé")["input_ids"] == ids
    assert theirs.decode(ids) == "a bad\ncafé"
    assert len(gpt2.generate(loaded, tokenizer, "abc", max_new_tokens=5)[0]) > 0


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_meta_pkl_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(SMALL, activation_function="gelu")
    torch.save({"model": nanogpt_state(random_model(config)), "model_args": nanogpt_args(config)}, "ckpt.pt")
    Path("meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "x": _Runs()}))
    with pytest.raises(UserError, match="no vocabulary of characters needs"):
        gpt2.load("./")
    assert not Path("ran").exists()


def bundle(folder: Path, tensors: dict[str, np.ndarray], stem: str = "model.ckpt") -> None:
    """A TensorFlow checkpoint: the tensors one after another, and a LevelDB table of where they are."""

    def varint(value: int) -> bytes:
        low, high = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(high) if high else bytes([low])

    def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
        body = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
        return body + struct.pack("<II", 0, 1)

    data, entries = b"", [(b"", b"\x08\x01")]
    for name, array in sorted(tensors.items()):
        dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in array.shape))
        entry = b"\x08\x01" + b"\x12" + varint(len(dims)) + dims
        entry += b"\x20" + varint(len(data)) + b"\x28" + varint(array.nbytes) + b"\x35" + bytes(4)
        entries.append((name.encode(), entry))
        data += array.tobytes()
    content = block(entries)
    handle = varint(0) + varint(len(content))
    content += bytes(5)
    at = len(content)
    index = block([(b"z", handle)])
    meta = varint(0) + varint(0)
    footer = (meta + varint(at) + varint(len(index))).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (folder / f"{stem}.index").write_bytes(content + index + bytes(5) + footer)
    (folder / f"{stem}.data-00000-of-00001").write_bytes(data)


def openai_variables(model: GPT) -> dict[str, np.ndarray]:
    variables = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach()
        array = array.t()[None] if name.endswith(CONV1D_WEIGHTS) else array
        *modules, kind = name.removeprefix("transformer.").split(".")
        if modules[0] == "h":
            modules[:2] = [f"h{modules[1]}"]
        if kind == "bias" or modules[-1] not in ("wte", "wpe"):
            modules.append("b" if kind == "bias" else "g" if "ln_" in modules[-1] else "w")
        variables["/".join(["model", *modules])] = array.contiguous().numpy()
    return variables


def hparams(folder: Path, c: GPTConfig) -> None:
    sizes = {"n_vocab": c.vocab_size, "n_ctx": c.block_size, "n_embd": c.n_embd}
    (folder / "hparams.json").write_text(json.dumps(sizes | {"n_head": c.n_head, "n_layer": c.n_layer}))


def test_openais_download(tmp_path: Path) -> None:
    model = random_model(SMALL)
    hparams(tmp_path, SMALL)
    bundle(
        tmp_path,
        openai_variables(model) | {"beta1_power": np.ones(1, np.float32), "model/wte/Adam": np.ones(1, np.float32)},
    )
    assert_same(gpt2.load(tmp_path)[0], model)
    assert read_config(find_model_folder(tmp_path)) == SMALL


def test_openais_tokenizer_files(gpt2_vocabulary: None, tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=50257, block_size=8, n_layer=1, n_head=1, n_embd=4)
    hparams(tmp_path, config)
    bundle(tmp_path, openai_variables(random_model(config)))
    own = gpt2.get_tokenizer("gpt2")
    own.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    tokenizer = gpt2.load(tmp_path)[1]
    assert tokenizer is not None
    assert (tokenizer.name, tokenizer.fingerprint) == ("gpt2", own.fingerprint)


def test_gpt_2_simples_latest_checkpoint(tmp_path: Path) -> None:
    old, new = random_model(SMALL), random_model(SMALL, seed=3)
    hparams(tmp_path, SMALL)
    bundle(tmp_path, openai_variables(old), "model-500")
    bundle(tmp_path, openai_variables(new), "model-1000")
    with pytest.raises(UserError, match="several checkpoints"):
        gpt2.load(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model-1000"\n')
    assert_same(gpt2.load(tmp_path)[0], new)


def test_tensorflows_own_checkpoint(tmp_path: Path) -> None:
    """The same by TensorFlow, where it is installed."""
    tf = pytest.importorskip("tensorflow")
    model = random_model(SMALL)
    hparams(tmp_path, SMALL)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in openai_variables(model).items():
            tf.compat.v1.get_variable(name, initializer=array)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), write_meta_graph=False)
    assert_same(gpt2.load(tmp_path)[0], model)


def llmc_bytes(model: GPT, version: int) -> bytes:
    """What llm.c's train_gpt2.py writes."""
    c, dtype = model.config, torch.float32 if version == 3 else torch.bfloat16
    padded = (c.vocab_size + 127) // 128 * 128
    header = np.zeros(256, np.int32)
    header[:8] = (20240326, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded)
    parameters = dict(model.named_parameters())
    wte = torch.zeros(padded, c.n_embd)
    wte[: c.vocab_size] = parameters["transformer.wte.weight"]
    tensors = [wte, parameters["transformer.wpe.weight"]]
    kinds = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in (f"{name}.{part}" for name in kinds for part in ("weight", "bias")):
        tensors += [parameters[f"transformer.h.{i}.{kind}"] for i in range(c.n_layer)]
    tensors += [parameters["transformer.ln_f.weight"], parameters["transformer.ln_f.bias"]]
    flat = [t.detach().to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]
    return header.tobytes() + b"".join(flat)


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(version: int, tmp_path: Path) -> None:
    model = random_model(SMALL)
    (tmp_path / "m.bin").write_bytes(llmc_bytes(model, version))
    expected = model if version == 3 else model.bfloat16().float()
    assert_same(gpt2.load(tmp_path / "m.bin")[0], expected)
    (tmp_path / "m.bin").write_bytes(llmc_bytes(model, version)[:-1])
    with pytest.raises(UserError, match="other than its header says"):
        gpt2.load(tmp_path / "m.bin")


def test_a_gguf_file_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = random_model(SMALL)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.add_context_length(17)
    writer.add_embedding_length(40)
    writer.add_block_count(2)
    writer.add_feed_forward_length(160)
    writer.add_head_count(5)
    writer.add_layer_norm_eps(1e-5)
    tensor_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    for name, parameter in model.named_parameters():
        writer.add_tensor(tensor_map.get_name(name, (".weight", ".bias")), parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded, tokenizer = gpt2.load(tmp_path / "m.gguf")
    assert tokenizer is None
    assert loaded.config == SMALL
    assert_same(loaded, model)
    assert_same(gpt2.load(tmp_path)[0], model)


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.gguf", "notes.txt"])
def test_a_file_of_no_known_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError) as error:
        gpt2.load(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
