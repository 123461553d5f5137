"""Model folders as other programs leave them: names, heads, dtypes, pickles, Flax, configs, tokenizers."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

import gpt2
from gpt2.errors import UserError
from gpt2.model import ACTIVATIONS, GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer, train_bpe, with_special_tokens
from tests.helpers.fake_hub import load_from_hub, serve_hub
from tests.helpers.transformers_reference import random_batch, random_model, to_transformers

SMALL = GPTConfig(vocab_size=101, block_size=17, n_layer=2, n_head=5, n_embd=40)


def folder_of(model: GPT, folder: Path, **kwargs: Any) -> Path:
    """A folder as transformers itself writes it."""
    to_transformers(model).save_pretrained(folder, **kwargs)
    return folder


def edit_config(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))


def assert_same(got: GPT, expected: GPT, atol: float = 0.0) -> None:
    tokens, _ = random_batch(expected.config)
    with torch.no_grad():
        torch.testing.assert_close(got(tokens), expected(tokens), rtol=0, atol=atol)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_save_model_of_safetensors_keeps_the_head_and_drops_the_embedding(tmp_path: Path) -> None:
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path)
    save_model(to_transformers(model), str(folder / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(folder / "model.safetensors")
    assert_same(gpt2.load(folder)[0], model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path)
    write(folder, {prefix + name: t for name, t in load_file(folder / "model.safetensors").items()})
    assert_same(gpt2.load(folder)[0], model)


def test_other_heads_are_left_out_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path)
    extra = {"score.weight": torch.ones(2, 40), "v_head.summary.weight": torch.ones(1, 40)}
    extra |= {"multiple_choice_head.summary.bias": torch.ones(1), "lm_head.bias": torch.zeros(101)}
    write(folder, load_file(folder / "model.safetensors") | extra)
    assert_same(gpt2.load(folder)[0], model)
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in extra)


def test_real_classes_with_other_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder of GPT2ForSequenceClassification holds the same language model."""
    from transformers import GPT2ForSequenceClassification

    model = random_model(SMALL)
    twin = to_transformers(model)
    classifier: Any = GPT2ForSequenceClassification(twin.config)
    classifier.transformer.load_state_dict(twin.transformer.state_dict())
    classifier.save_pretrained(tmp_path)
    assert_same(gpt2.load(tmp_path)[0], model)
    assert "score.weight" in caplog.text


def test_buffers_are_not_weights(tmp_path: Path) -> None:
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path)
    buffers = {"transformer.h.0.crossattention.bias": torch.ones(1, 1, 17, 17, dtype=torch.uint8)}
    buffers |= {"transformer.position_ids": torch.arange(17), "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    write(folder, load_file(folder / "model.safetensors") | buffers)
    assert_same(gpt2.load(folder)[0], model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(SMALL).to(dtype)
    folder = folder_of(random_model(SMALL), tmp_path)
    write(folder, {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()})
    assert_same(gpt2.load(folder)[0], model.float())
    as_is = gpt2.load(folder, dtype=None)[0].lm_head.weight.dtype
    assert as_is == (torch.float32 if dtype == torch.float64 else dtype)


def test_config_with_the_names_of_other_models(tmp_path: Path) -> None:
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path)
    old = ("n_embd", "n_layer", "n_head", "n_positions", "n_ctx")
    edit_config(folder, old, hidden_size=40, num_hidden_layers=2, num_attention_heads=5, max_position_embeddings=17)
    assert_same(gpt2.load(folder)[0], model)


def test_config_without_n_head_has_transformers_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(replace(SMALL, n_head=12, n_embd=48))
    folder = folder_of(model, tmp_path)
    edit_config(folder, ("n_head",))
    assert_same(gpt2.load(folder)[0], model)
    assert "does not have n_head: 12 is assumed" in caplog.text


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_pytorch_model_bin_and_its_shards(shard: str | None, tmp_path: Path) -> None:
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path, **({"max_shard_size": shard} if shard else {}))
    index: dict[str, str] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        index |= dict.fromkeys(load_file(path), name)
        path.unlink()
    if shard:
        (folder / "model.safetensors.index.json").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(gpt2.load(folder)[0], model)
    assert_same(gpt2.load(next(folder.glob("pytorch_model*.bin")) if not shard else folder)[0], model)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_model_bin_from_the_hub(sharded: bool, tmp_path: Path) -> None:
    model = random_model(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16))
    folder = gpt2.save(model, get_tokenizer("bytes"), tmp_path / "repo")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        files = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
        for file in sorted(set(files.values())):
            torch.save({name: tensors[name] for name in files if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    with serve_hub({"owner/model": folder}) as (address, fetched):
        done = load_from_hub("owner/model", tmp_path, HF_ENDPOINT=address)
    assert done.stdout == f"{model(torch.arange(9)[None]).sum().item()} bytes\n", done.stderr
    assert len([name for name in fetched if name.endswith(".bin")]) == (2 if sharded else 1)


def test_pytorch_model_bin_of_before_zip(tmp_path: Path) -> None:
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path)
    torch.save(to_transformers(model).state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert_same(gpt2.load(folder)[0], model)  # lm_head and wte are one tensor there


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = folder_of(random_model(SMALL), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save({"x": _Runs()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="holds more than weights, which is not read") as error:
            gpt2.load(folder)
        assert "\n" not in str(error.value)
    assert not Path("ran").exists()


def test_a_tensor_larger_than_its_file(tmp_path: Path) -> None:
    """Strides of zero make a small storage a tensor of any size."""
    folder = folder_of(random_model(SMALL), tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": torch.zeros(1).expand(10**6, 10**6)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="larger than the numbers it is made of"):
        gpt2.load(folder)


def flax_bytes(tree: Any) -> bytes:
    """MessagePack as flax.serialization writes it."""
    if isinstance(tree, dict):
        return struct.pack(">BH", 0xDE, len(tree)) + b"".join(flax_bytes(k) + flax_bytes(v) for k, v in tree.items())
    if isinstance(tree, str):
        return bytes([0xD9, len(tree.encode())]) + tree.encode()
    sizes = b"".join(struct.pack(">BI", 0xCE, n) for n in tree.shape)
    content = tree.contiguous().view(torch.uint8).numpy().tobytes()
    array = bytes([0x93, 0x90 + tree.dim()]) + sizes + flax_bytes(str(tree.dtype).removeprefix("torch."))
    array += struct.pack(">BI", 0xC6, len(content)) + content
    return struct.pack(">BIB", 0xC9, len(array), 1) + array


def flax_tree(model: GPT) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        *parents, last = name.split(".")
        last = last if last == "bias" else "embedding" if parents[-1] in ("wte", "wpe") else "kernel"
        last = "scale" if last == "kernel" and parents[-1].startswith("ln_") else last
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = parameter.detach()
    return tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flax(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(SMALL).to(dtype)
    folder = folder_of(random_model(SMALL), tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(flax_bytes(flax_tree(model)))
    assert_same(gpt2.load(folder)[0], model.float())


def test_flax_by_its_own_writer(tmp_path: Path) -> None:
    serialization = pytest.importorskip("flax.serialization")
    model = random_model(SMALL)
    folder = folder_of(model, tmp_path)
    (folder / "model.safetensors").unlink()

    def arrays(tree: Any) -> Any:
        return {k: arrays(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.numpy()

    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(arrays(flax_tree(model))))
    assert_same(gpt2.load(folder)[0], model)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_equal_transformers(activation: str, tmp_path: Path) -> None:
    model = random_model(SMALL)
    twin = to_transformers(model)
    twin.config.activation_function = activation
    twin.save_pretrained(tmp_path)
    check_against_transformers(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"n_inner": 50},
        {"layer_norm_epsilon": 1e-3},
    ],
    ids=lambda s: "+".join(s),
)
def test_settings_equal_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(replace(SMALL, n_layer=3, n_inner=settings.get("n_inner")))
    with torch.no_grad():  # so that the scores matter
        for name, parameter in model.named_parameters():
            if name.endswith("c_attn.weight"):
                parameter *= 8
    twin = to_transformers(model)
    twin.config.update(settings)
    twin.save_pretrained(tmp_path / "theirs")
    check_against_transformers(tmp_path / "theirs")
    gpt2.save(*gpt2.load(tmp_path / "theirs"), tmp_path / "ours")
    check_against_transformers(tmp_path / "ours")


def check_against_transformers(folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    theirs: Any = GPT2LMHeadModel.from_pretrained(folder)
    ours = gpt2.load(folder)[0]
    tokens, _ = random_batch(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs.eval()(tokens).logits, rtol=0, atol=2e-5)
        cache = ours.make_cache(len(tokens))
        steps = [ours(tokens[:, :3], cache)[:, -1], *(ours(tokens[:, t : t + 1], cache)[:, -1] for t in range(3, 9))]
        torch.testing.assert_close(torch.stack(steps, 1), ours(tokens)[:, 2:9], rtol=0, atol=2e-5)


def test_three_dropouts(tmp_path: Path) -> None:
    folder = folder_of(random_model(SMALL), tmp_path / "theirs")
    edit_config(folder, resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    model = gpt2.load(folder)[0]
    assert (model.config.dropout, model.config.embd_dropout, model.config.attn_dropout) == (0.1, 0.2, 0.3)
    assert (model.transformer.dropout, model.transformer.h[0].get_submodule("attn").attn_dropout) == (0.2, 0.3)
    gpt2.save(model, None, tmp_path / "ours")
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert [raw[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")] == [0.1, 0.2, 0.3]


def test_messages_have_the_names_of_the_file(tmp_path: Path) -> None:
    folder = folder_of(random_model(SMALL), tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    write(folder, {name: t for name, t in tensors.items() if name != "h.1.ln_2.bias"})
    with pytest.raises(UserError, match=r"the weights lack h\.1\.ln_2\.bias"):
        gpt2.load(folder)
    write(folder, tensors | {"h.1.ln_2.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r": h\.1\.ln_2\.bias is \(3,\) in the weights"):
        gpt2.load(folder)


def test_an_adapter_that_was_not_merged(tmp_path: Path) -> None:
    folder = folder_of(random_model(SMALL), tmp_path)
    extra = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight": torch.zeros(2, 40)}
    write(folder, load_file(folder / "model.safetensors") | extra)
    with pytest.raises(UserError, match="merge it with PEFT"):
        gpt2.load(folder)


WORDS = ["the cat sat on the mat and the dog sat on the log " * 20]


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for tokenizer in (train_bpe(WORDS, 280), get_tokenizer("bytes")):
        folder = tmp_path / tokenizer.name
        model = random_model(replace(SMALL, vocab_size=tokenizer.vocab_size))
        gpt2.save(model, with_special_tokens(tokenizer, ["[PAD]"]), folder)
        own = gpt2.load(folder)[1]
        assert own is not None
        assert own.vocab_size == tokenizer.vocab_size
        assert max(own.encode("the [PAD] cat", allow_special=True)) < tokenizer.vocab_size
        assert own.encode("the cat") == tokenizer.encode("the cat")
        assert "no embedding for [PAD] of its tokenizer" in caplog.text


def test_a_tokenizer_with_fewer_ids_than_the_model(tmp_path: Path) -> None:
    gpt2.save(random_model(replace(SMALL, vocab_size=320)), get_tokenizer("bytes"), tmp_path)
    assert gpt2.load(tmp_path)[1] is not None


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_beside_vocab_json(file: str, tmp_path: Path) -> None:
    tokenizer = train_bpe(WORDS, 280)
    size = tokenizer.vocab_size
    gpt2.save(random_model(replace(SMALL, vocab_size=size + 1)), tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    added: Any = {"<|pad|>": size}
    if file == "tokenizer_config.json":
        added = {"added_tokens_decoder": {str(size): {"content": "<|pad|>", "special": True}}}
    (tmp_path / file).write_text(json.dumps(added))
    own = gpt2.load(tmp_path)[1]
    assert own is not None
    assert own.encode("the<|pad|>", allow_special=True)[-1] == size
    assert own.encode("the cat") == tokenizer.encode("the cat")
