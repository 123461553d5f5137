"""Every format that is written: run by the program it is for, round trips, refusals, and what a failure leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gpt2
from gpt2.cli import main
from gpt2.config import TrainConfig
from gpt2.conversion import (
    TARGETS,
    Job,
    Target,
    check_output,
    check_replaceable,
    convert,
    target_of,
    without_scales,
)
from gpt2.errors import UserError
from gpt2.formats.parity import Parity
from gpt2.model import GPT, GPTConfig
from gpt2.resolve import resolve_model
from gpt2.templates import get_template
from gpt2.tokenizer import Tokenizer, get_tokenizer, train_bpe, with_added_tokens, with_special_tokens
from gpt2.train.setup import load_model_and_data
from tests.helpers.transformers_reference import random_batch, random_model

CONFIG = GPTConfig(vocab_size=257, block_size=96, n_layer=2, n_head=2, n_embd=64)
PACKAGES = {"gguf": "gguf", "onnx": "onnx", "ctranslate2": "ctranslate2"}
WORDS = ["the cat sat on the mat, and the dog's log is 12 or 345 años old — naïve 🙂\n" * 30]
READ_AND_WRITTEN = ("hf", "gguf", "llmc", "nanogpt")


def need(name: str, dtype: str = "float32") -> Target:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    if (name, dtype) == ("onnx", "int8"):
        pytest.importorskip("onnxruntime")
    return TARGETS[name]


def run_convert(
    model: GPT, name: str, folder: Path, dtype: str = "float32", tokenizer: Tokenizer | None = None
) -> tuple[Path, Parity]:
    target = need(name, dtype)
    out = folder / (target.file or name)
    return out, convert(target, Job(model, tokenizer, None, dtype), out)


def every_format_and_dtype() -> list[Any]:
    """torch.export takes three seconds: one dtype of it is enough for most runs of the tests."""
    slow = {("torch", "float16"): pytest.mark.slow, ("torch", "bfloat16"): pytest.mark.slow}
    pairs = [(target.name, dtype) for target in TARGETS.values() for dtype in target.tolerances]
    return [pytest.param(*pair, marks=slow.get(pair, ())) for pair in pairs]


@pytest.mark.parametrize(("name", "dtype"), every_format_and_dtype())
def test_every_format_and_dtype(name: str, dtype: str, tmp_path: Path) -> None:
    model = random_model(CONFIG)
    before = [p.clone() for p in model.parameters()]
    _, parity = run_convert(model, name, tmp_path, dtype, get_tokenizer("bytes"))
    assert parity.passed
    assert parity.tokens == 150
    if TARGETS[name].tolerances[dtype] <= 1e-3:
        assert parity.same == 150
    assert [path.name for path in tmp_path.iterdir()] == [TARGETS[name].file or name]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, tie_word_embeddings=False),
        replace(CONFIG, activation_function="quick_gelu", layer_norm_epsilon=1e-3),
        replace(CONFIG, activation_function="gelu", n_inner=100, scale_attn_by_inverse_layer_idx=True),
        replace(CONFIG, activation_function="relu", scale_attn_weights=False),
        replace(CONFIG, activation_function="silu", vocab_size=99, block_size=9, n_head=4),
    ],
    ids=["untied", "quick_gelu", "inner", "unscaled", "short"],
)
@pytest.mark.parametrize("name", ["hf", "onnx", "ctranslate2", pytest.param("torch", marks=pytest.mark.slow)])
def test_other_shapes(name: str, config: GPTConfig, tmp_path: Path) -> None:
    assert run_convert(random_model(config), name, tmp_path)[1].passed


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, tie_word_embeddings=False),
        replace(CONFIG, n_inner=96, layer_norm_epsilon=1e-3),
        replace(CONFIG, scale_attn_by_inverse_layer_idx=True),
    ],
    ids=["untied", "inner", "scaled"],
)
def test_llama_cpp_has_these_too(config: GPTConfig, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    _, parity = run_convert(random_model(config), "gguf", tmp_path, tokenizer=get_tokenizer("bytes"))
    assert parity.program == "llama.cpp"


@pytest.mark.parametrize("second", READ_AND_WRITTEN)
@pytest.mark.parametrize("first", READ_AND_WRITTEN)
def test_round_trips(first: str, second: str, tmp_path: Path) -> None:
    """Through two formats in float32 the weights are the very same."""
    model = random_model(CONFIG)
    once, _ = run_convert(model, first, tmp_path)
    loaded = gpt2.load(once)[0]
    assert loaded.config == model.config
    (tmp_path / "2").mkdir()
    twice, _ = run_convert(loaded, second, tmp_path / "2")
    for ours, theirs in zip(gpt2.load(twice)[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def tokenizers() -> dict[str, Tokenizer]:
    bpe = train_bpe(WORDS, 300)
    return {
        "bytes": get_tokenizer("bytes"),
        "bpe": bpe,
        "special": with_special_tokens(bpe, ["<|user|>", "<|pad|>"]),
        "symbols": with_added_tokens(bpe, ["TOKEN"]),
    }


@pytest.mark.parametrize("kind", ["bytes", "bpe", "special", "symbols"])
def test_gguf_holds_the_tokenizer(kind: str, tmp_path: Path) -> None:
    """Read back it is the same, and llama.cpp cuts text as we do."""
    tokenizer = tokenizers()[kind]
    model = random_model(replace(CONFIG, vocab_size=tokenizer.vocab_size + 3))  # with padding
    out, _ = run_convert(model, "gguf", tmp_path, tokenizer=tokenizer)
    own = gpt2.load(out)[1]
    assert own is not None
    text = "The cat's TOKEN, 345 años — naïve 🙂  \n\n x"
    assert own.encode(text) == tokenizer.encode(text)
    assert own.end_of_text == tokenizer.end_of_text
    assert {name: i for name, i in own.special_tokens.items() if "PAD" not in name} == tokenizer.special_tokens
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(out), 96, 1, 0
    params.warmup, params.fit_params, params.verbosity = False, False, -1
    server = xllamacpp.Server(params)
    for prompt in (text, text[4:] + text[:9], "one  two\n"):
        answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "temperature": 0.0})
        assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt))
        ids = server.handle_completions({"prompt": tokenizer.encode(prompt), "n_predict": 1, "temperature": 0.0})
        assert answer["choices"][0]["text"] == ids["choices"][0]["text"]


def test_gguf_holds_the_chat_template(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    template = get_template("chatml")
    target = TARGETS["gguf"]
    out = tmp_path / "m.gguf"
    convert(target, Job(random_model(CONFIG), get_tokenizer("bytes"), template, "float32"), out)
    field = gguf.GGUFReader(out).fields["tokenizer.chat_template"]
    assert field.contents() == template.source


def test_onnx_graphs_with_any_batch_length_and_past(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = random_model(CONFIG)
    folder, _ = run_convert(model, "onnx", tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "model.onnx_data", "model_with_past.onnx"]
    whole = onnxruntime.InferenceSession(folder / "model.onnx")
    cached = onnxruntime.InferenceSession(folder / "model_with_past.onnx")
    for rows, length in ((1, 1), (3, 7), (2, 96)):
        tokens, _ = random_batch(CONFIG, rows, length)
        expected = model(tokens).detach().numpy()
        np.testing.assert_allclose(whole.run(["logits"], {"input_ids": tokens.numpy()})[0], expected, atol=1e-5)
        past = {each.name: np.zeros((rows, 2, 0, 32), np.float32) for each in cached.get_inputs()[1:]}
        for t in range(min(length, 4)):
            logits, *present = cached.run(None, {"input_ids": tokens[:, t : t + 1].numpy(), **past})
            past = dict(zip(past, present, strict=True))
            np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)


def test_a_torch_program_runs_any_batch_and_length(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    out, _ = run_convert(model, "torch", tmp_path)
    program = torch.export.load(out).module()
    for rows, length in ((1, 1), (3, 7), (2, 96)):
        tokens, _ = random_batch(CONFIG, rows, length)
        torch.testing.assert_close(program(tokens), model(tokens), rtol=0, atol=1e-5)


def test_without_scales_is_the_same_function() -> None:
    model = random_model(replace(CONFIG, n_layer=3, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False))
    plain = without_scales(model)
    assert plain.config == replace(CONFIG, n_layer=3)
    tokens, _ = random_batch(CONFIG)
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gguf", {"activation_function": "relu"}, "only the tanh approximation of GELU, not relu"),
        ("llmc", {"activation_function": "gelu"}, "only the tanh approximation of GELU, not gelu"),
        ("llmc", {"n_inner": 100}, "only an MLP of 4"),
        ("llmc", {"tie_word_embeddings": False}, "llm.c ties the head"),
        ("nanogpt", {"layer_norm_epsilon": 1e-3}, "a layer_norm_epsilon of 1e-5"),
        ("nanogpt", {"tie_word_embeddings": False}, "nanoGPT ties the head"),
    ],
)
def test_what_a_format_cannot_have(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_convert(random_model(replace(CONFIG, **change)), name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hf", "nanogpt"])
def test_what_is_not_equal_is_not_kept(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]

    def spoiled(job: Job, out: Path) -> None:
        with torch.no_grad():
            other = random_model(job.model.config, seed=9)
        target.write(replace(job, model=other), out)

    out = tmp_path / (target.file or name)
    with pytest.raises(UserError, match="is not equal to the original and was not kept: largest logit difference"):
        convert(replace(target, write=spoiled), Job(random_model(CONFIG), None, None, "float32"), out)
    assert not list(tmp_path.iterdir())


def test_an_untied_head_is_a_warning_about_sglang(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_convert(random_model(CONFIG), "hf", tmp_path / "tied")
    assert not caplog.records
    out, _ = run_convert(random_model(replace(CONFIG, tie_word_embeddings=False)), "hf", tmp_path / "untied")
    (record,) = caplog.records
    assert "SGLang ties the head to the token embedding" in record.getMessage()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_another_model_is_not_replaced(tmp_path: Path) -> None:
    model, other = random_model(CONFIG), random_model(CONFIG, seed=9)
    for name in ("hf", "nanogpt", "llmc"):
        out, _ = run_convert(model, name, tmp_path)
        check_replaceable(out, model)
        check_replaceable(out, model.to(torch.bfloat16))
        model = model.float()
        with pytest.raises(UserError, match="holds another model: --overwrite replaces it"):
            check_replaceable(out, other)
    onnx, _ = run_convert(random_model(CONFIG), "onnx", tmp_path)  # which is not read back
    with pytest.raises(UserError, match="holds another model: --overwrite replaces it"):
        check_replaceable(onnx, model)
    check_replaceable(tmp_path / "new", model)


def test_other_content_is_not_replaced(tmp_path: Path) -> None:
    hf, nanogpt = TARGETS["hf"], TARGETS["nanogpt"]
    folder, _ = run_convert(random_model(CONFIG), "hf", tmp_path)
    check_output(hf, folder, tmp_path)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no exported model"):
        check_output(hf, folder, tmp_path)
    with pytest.raises(UserError, match="is a folder, and nanogpt is one file"):
        check_output(nanogpt, folder, tmp_path)
    with pytest.raises(UserError, match=r"must have the suffix \.pt"):
        check_output(nanogpt, tmp_path / "x.bin", tmp_path)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = gpt2.save(random_model(CONFIG), get_tokenizer("bytes"), tmp_path / "m")
    out = str(tmp_path / "ckpt.pt")
    code, printed, report = command(capsys, "convert", str(source), out, "--to", "nanogpt")
    assert (code, printed) == (0, f"{out}\n")
    assert "nanogpt, float32: largest logit difference" in report
    assert "150 of 150 greedy tokens the same" in report
    other = gpt2.save(random_model(CONFIG, seed=9), None, tmp_path / "other")
    code, _, message = command(capsys, "convert", str(other), out, "--to", "nanogpt")
    assert code == 2
    assert "holds another model: --overwrite replaces it" in message
    assert command(capsys, "convert", str(source), out, "--to", "nanogpt", "--dtype", "float16")[0] == 0
    assert command(capsys, "convert", out, str(tmp_path / "back"), "--to", "hf", "--max-shard-size", "50KB")[0] == 0
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert {m} {tmp}/x", "--to is required"),
        ("convert {m}", "SOURCE and OUT are required"),
        ("convert {m} {tmp}/x --to onx", "there is no format 'onx' (did you mean 'onnx'?)"),
        ("convert {m} {tmp}/x --to hf --dtype int3", "hf has no dtype 'int3': there are float32, float16, bfloat16"),
        ("convert {m} {tmp}/x --to hf --max-shard-size big", "'big' is no size"),
        ("convert {m} {tmp}/x --to llmc", "must have the suffix .bin"),
        ("convert {tmp}/nowhere {tmp}/x --to hf", "there is no model folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = gpt2.save(random_model(CONFIG), None, tmp_path / "m")
    code, _, told = command(capsys, *arguments.format(m=source, tmp=tmp_path).split())
    assert code == 2
    assert message in told
    assert told.count("\n") == 1


def test_the_list_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = command(capsys, "convert", "--list")
    assert code == 0
    assert all(name in printed for name in (*TARGETS, "openai", "q4_0"))


@pytest.mark.parametrize("name", ["gguf", "onnx", "ctranslate2"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    target = target_of(name)
    with pytest.raises(UserError, match=rf"pip install 'plain-gpt2\[{name}\]'"):
        convert(target, Job(random_model(CONFIG), None, None, "float32"), tmp_path / (target.file or name))
    assert not list(tmp_path.iterdir())


def test_training_continues_from_a_gguf_file_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tokenizer = with_special_tokens(get_tokenizer("bytes"), get_template("chatml").special_tokens)
    model = random_model(replace(CONFIG, vocab_size=tokenizer.vocab_size))
    out = tmp_path / "m.gguf"
    convert(TARGETS["gguf"], Job(model, tokenizer, get_template("chatml"), "float32"), out)
    resolved = resolve_model(out)
    assert resolved.template is not None
    assert resolved.template.source == get_template("chatml").source
    (tmp_path / "rows.jsonl").write_text((json.dumps({"prompt": "hi", "completion": "there"}) + "\n") * 8)
    config = TrainConfig(data=str(tmp_path / "rows.jsonl"), init_from=str(out), block_size=32, batch_size=2)
    run = load_model_and_data(config, None)
    assert run.data.tokenizer.fingerprint == tokenizer.fingerprint
    assert run.artifact.template is not None
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), model.parameters(), strict=True))
