"""The model folder: what transformers writes we read, what we write it reads, and what is broken is named."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gpt2
from gpt2 import weights
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.fake_hub import load_from_hub, serve_hub
from tests.helpers.transformers_reference import ODD_CONFIGS, as_conv1d, random_batch, random_model, to_transformers

SMALL = ODD_CONFIGS[0]
BYTES = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)


def hf_folder(model: GPT, folder: Path, **kwargs: Any) -> Path:
    """A folder as transformers itself writes it."""
    to_transformers(model).save_pretrained(folder, **kwargs)
    return folder


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load_with_transformers(folder: Path) -> Any:
    """Our folder in transformers, with not one key missing, left over or of another shape."""
    from transformers import GPT2LMHeadModel

    loaded: Any = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    twin, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return twin.eval()


def assert_same_model(got: GPT, expected: GPT) -> None:
    tokens, _ = random_batch(expected.config)
    assert not got.training
    with torch.no_grad():
        assert torch.equal(got(tokens), expected(tokens))


@pytest.mark.parametrize("config", ODD_CONFIGS, ids=lambda c: f"{c.n_layer}x{c.n_embd}/{c.n_head}")
def test_reads_what_transformers_writes_and_back(config: GPTConfig, tmp_path: Path) -> None:
    model = random_model(config)
    loaded, tokenizer = gpt2.load(hf_folder(model, tmp_path / "theirs"))
    assert loaded.config == config
    assert tokenizer is None
    assert_same_model(loaded, model)

    gpt2.save(loaded, None, tmp_path / "ours")
    twin = load_with_transformers(tmp_path / "ours")
    tokens, _ = random_batch(config)
    torch.testing.assert_close(twin.eval()(tokens).logits, model(tokens), rtol=0, atol=1e-5)


def test_the_saved_folder_serves_transformers_whole(tmp_path: Path) -> None:
    """Model, tokenizer and generation settings: AutoModel, AutoTokenizer and generate() agree with us."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = random_model(BYTES), get_tokenizer("bytes")
    gpt2.save(model, tokenizer, tmp_path)
    twin: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, I'm a language model — été 🙂"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == twin.generation_config.eos_token_id == 256
    prompt = theirs("Hello", return_tensors="pt")
    continued = twin.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0]
    ours = gpt2.generate(model, tokenizer, "Hello", max_new_tokens=20, temperature=0)[0]
    assert theirs.decode(continued, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ours
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == 64  # llama.cpp's converter reads it


def _drop_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _add_stale_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"h.0.attn.bias": torch.ones(1, 1, 17, 17).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}


def _add_tied_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize(
    "change",
    [_drop_prefix, _add_tied_head, lambda t: _add_stale_buffers(_drop_prefix(t))],
    ids=["unprefixed", "explicit tied head", "openai-community/gpt2"],
)
def test_every_form_of_names(change: Any, tmp_path: Path) -> None:
    model = random_model(SMALL)
    edit_tensors(hf_folder(model, tmp_path), change)
    assert_same_model(gpt2.load(tmp_path)[0], model)


def test_a_head_of_its_own_is_kept_as_transformers_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(replace(SMALL, tie_word_embeddings=False))
    edit_config(hf_folder(model, tmp_path), tie_word_embeddings=True)
    loaded, _ = gpt2.load(tmp_path)
    assert "not tied" in caplog.text
    assert_same_model(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_files_and_of_models(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(SMALL)
    gpt2.save(model, None, tmp_path, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == name
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    as_is, widened = gpt2.load(tmp_path, dtype=None)[0], gpt2.load(tmp_path)[0]
    assert {p.dtype for p in as_is.parameters()} == {dtype}
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    for ours, original in zip(widened.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, original.to(dtype).float())


def test_shards_with_an_index_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SMALL)
    theirs = hf_folder(model, tmp_path / "theirs", max_shard_size="20KB")
    assert (theirs / "model.safetensors.index.json").is_file()
    assert_same_model(gpt2.load(theirs)[0], model)

    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    gpt2.save(model, None, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    assert_same_model(gpt2.load(tmp_path / "ours")[0], model)
    load_with_transformers(tmp_path / "ours")

    (theirs / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(UserError, match=r"index\.json is broken"):
        gpt2.load(theirs)
    next((tmp_path / "ours").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-.* is named in model\.safetensors\.index\.json and missing"):
        gpt2.load(tmp_path / "ours")


def test_saving_again_leaves_no_stale_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = random_model(SMALL), random_model(SMALL, seed=5)
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    gpt2.save(model, None, tmp_path / "m")
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 10**9)
    gpt2.save(other, None, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same_model(gpt2.load(tmp_path / "m")[0], other)


def test_saving_without_a_tokenizer_leaves_no_older_one(tmp_path: Path) -> None:
    gpt2.save(random_model(BYTES), get_tokenizer("bytes"), tmp_path / "m")
    gpt2.save(random_model(BYTES), None, tmp_path / "m")
    assert gpt2.load(tmp_path / "m")[1] is None


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    model = random_model(SMALL)
    gpt2.save(model, None, tmp_path / "run" / "model")
    assert_same_model(gpt2.load(tmp_path / "run")[0], model)


def test_a_folder_without_tokenizer_files_has_gpt2s_when_the_vocabulary_is(
    gpt2_vocabulary: None, tmp_path: Path
) -> None:
    model = GPT(GPTConfig(vocab_size=50257, block_size=8, n_layer=1, n_head=1, n_embd=8))
    _, tokenizer = gpt2.load(gpt2.save(model, None, tmp_path))
    assert tokenizer is not None
    assert tokenizer.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"not safetensors"), "is no whole safetensors file"),
        (lambda d: os.truncate(d / "model.safetensors", 3000), "is no whole safetensors file"),
        (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: edit_config(d, model_type="llama"), "does not describe a GPT-2"),
        (lambda d: edit_config(d, n_layer="two"), "n_layer is missing or no integer that a size can be"),
        (lambda d: edit_config(d, n_layer=2), "the weights lack transformer.h.1."),
        (lambda d: edit_config(d, n_layer=4000), "the weights lack transformer.h.3999."),
        (lambda d: edit_config(d, n_layer=10**9), "1,000,000,000 layers of 40 channels are more than any machine"),
        (lambda d: edit_config(d, n_layer=10**30), "n_layer is missing or no integer that a size can be"),
        (lambda d: edit_config(d, n_inner=-1), "n_inner is missing or no integer that a size can be"),
        (lambda d: edit_config(d, n_embd=10**9, n_head=1), "1,000,000,000 channels are more than any machine"),
        (lambda d: edit_config(d, n_embd=10**5, n_head=1), "(101, 40) in the weights, (101, 100000) by config"),
        (lambda d: edit_config(d, activation_function=[]), "activation_function cannot be []"),
        (lambda d: edit_config(d, layer_norm_epsilon="x"), "layer_norm_epsilon cannot be 'x'"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
        (
            lambda d: edit_tensors(d, lambda t: t | {"transformer.ln_f.bias": torch.zeros(40, dtype=torch.int64)}),
            "transformer.ln_f.bias is torch.int64, which is not read here",
        ),
        (lambda d: edit_config(d, n_embd=45), "(101, 40) in the weights, (101, 45) by config.json"),
        (lambda d: edit_config(d, n_positions=18), "wpe.weight is (17, 40) in the weights, (18, 40)"),
        (lambda d: edit_config(d, activation_function="prelu"), "activation_function 'prelu' is not one of"),
        (lambda d: edit_config(d, scale_attn_weights="no"), "scale_attn_weights cannot be 'no'"),
        (
            lambda d: edit_tensors(d, lambda t: t | {"transformer.h.7.ln_1.bias": torch.zeros(40)}),
            "the weights hold transformer.h.7.ln_1.bias, which config.json does not call for",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_broken_folder_is_named_in_one_line(spoil: Any, message: str, tmp_path: Path) -> None:
    folder = hf_folder(random_model(SMALL), tmp_path / "model-folder")
    spoil(folder)
    with pytest.raises(UserError) as error:
        gpt2.load(folder)
    assert message in str(error.value)
    assert "model-folder" in str(error.value) or "activation" in message
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the model folder"):
        gpt2.save(random_model(SMALL), None, tmp_path / "file" / "model")


@pytest.mark.parametrize("ref", ["./nowhere", "/nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(ref: str) -> None:
    with pytest.raises(UserError, match="there is no model folder"):
        gpt2.load(ref)


def test_the_hub_through_the_real_client(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    model = random_model(BYTES)
    gpt2.save(model, get_tokenizer("bytes"), repo)
    edit_tensors(repo, lambda t: _add_stale_buffers(_drop_prefix(t)))
    for other in ("tf_model.h5", "rust_model.ot", "pytorch_model.bin", "onnx/decoder_model.onnx", "onnx/config.json"):
        (repo / other).parent.mkdir(exist_ok=True)
        (repo / other).write_bytes(b"gigabytes")
    expected = f"{model(torch.arange(9)[None]).sum().item()} bytes\n"

    with serve_hub({"openai-community/gpt2": repo}) as (address, fetched):
        done = load_from_hub("gpt2", tmp_path, HF_ENDPOINT=address)
        assert done.stdout == expected, done.stderr
        assert "model.safetensors" in fetched
        assert not [f for f in fetched if f.startswith(("tf_", "rust_", "pytorch_", "onnx"))]
        missing = load_from_hub("owner/nothing", tmp_path, HF_ENDPOINT=address)
        assert missing.returncode == 2
        assert "there is no such repository, or it is private" in missing.stderr

    gone = load_from_hub("gpt2", tmp_path, HF_ENDPOINT=address)  # the cache, with the server gone
    assert gone.stdout == expected, gone.stderr
    offline = load_from_hub("gpt2", tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline.stdout == expected, offline.stderr


@pytest.mark.parametrize(
    ("ref", "env", "message"),
    [
        ("gpt2", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "(no connection): download config.json, model.safetensors"),
        ("gpt2-xl", {"HF_HUB_OFFLINE": "1"}, "'openai-community/gpt2-xl' is no folder here and could not be"),
        ("runs/typo", {"HF_HUB_OFFLINE": "1"}, "(HF_HUB_OFFLINE is set)"),
        ("not a name", {"HF_HUB_OFFLINE": "1"}, "neither a folder nor a name the hub could have"),
    ],
)
def test_a_hub_that_cannot_be_reached(ref: str, env: dict[str, str], message: str, tmp_path: Path) -> None:
    done = load_from_hub(ref, tmp_path, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_layout_in_memory_is_linears(tmp_path: Path) -> None:
    model = random_model(SMALL)
    stored = load_file(hf_folder(model, tmp_path) / "model.safetensors")
    c_attn = dict(model.named_parameters())["transformer.h.0.attn.c_attn.weight"]
    assert c_attn.shape == (120, 40)
    assert torch.equal(
        as_conv1d("transformer.h.0.attn.c_attn.weight", c_attn), stored["transformer.h.0.attn.c_attn.weight"]
    )


def test_what_a_killed_save_left_is_swept_away(tmp_path: Path) -> None:
    left = tmp_path / ".m.0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    gpt2.save(random_model(SMALL), None, tmp_path / "m")
    assert [path.name for path in tmp_path.glob("*m*")] == ["m"]


def test_home_is_written_out_and_an_unknown_one_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_model(SMALL)
    assert gpt2.save(model, None, "~/m") == tmp_path / "m"
    assert_same_model(gpt2.load("~/m")[0], model)
    for use in (lambda: gpt2.load("~nobody-of-this-name/m"), lambda: gpt2.save(model, None, "~nobody-of-this-name/m")):
        with pytest.raises(UserError, match=r"^~nobody-of-this-name/m cannot be found: "):
            use()


def test_saving_into_the_folder_one_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    gpt2.save(random_model(SMALL), None, ".")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda", 0)])
def test_a_missing_explicit_device_is_an_error(device: Any, tmp_path: Path) -> None:
    gpt2.save(random_model(SMALL), None, tmp_path)
    assert gpt2.load(tmp_path, device="auto")[0].device.type == "cpu"
    with pytest.raises(UserError, match="device on this machine: use --device cpu"):
        gpt2.load(tmp_path, device=device)


@pytest.mark.parametrize("device", ["tpu", "", "cuda:", "cuda:x", "cuda:-1", "cuda:²", "cpu:0:0", "cuda:" + "9" * 5000])
def test_what_is_no_device_is_one_line(device: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not one of auto, cpu, cuda"):
        gpt2.load(tmp_path, device=device)


def test_an_index_nested_without_end_is_one_line(tmp_path: Path) -> None:
    folder = hf_folder(random_model(SMALL), tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"index\.json is broken"):
        gpt2.load(folder)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_all_files_of_a_folder_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        gpt2.save(random_model(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=4)), None, tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_three_rates_of_dropout_are_kept_and_used(tmp_path: Path) -> None:
    gpt2.save(random_model(ODD_CONFIGS[0]), None, tmp_path)
    edit_config(tmp_path, resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    model, _ = gpt2.load(tmp_path)
    assert (model.config.dropout, model.config.embd_dropout, model.config.attn_dropout) == (0.1, 0.2, 0.3)
    used = {type(module).__name__: module.dropout for module in model.modules() if hasattr(module, "dropout")}
    assert used == {"Transformer": 0.2, "Attention": 0.1, "MLP": 0.1}
    assert {module.attn_dropout for module in model.modules() if hasattr(module, "attn_dropout")} == {0.3}
    gpt2.save(model, None, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [written[f"{name}_pdrop"] for name in ("resid", "embd", "attn")] == [0.1, 0.2, 0.3]
