"""The commands as they are typed: results, and error messages."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import gpt2
from gpt2.model import GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.cli_helpers import run_cli
from tests.helpers.transformers_reference import random_model


@pytest.fixture
def model_folder(tmp_path: Path) -> str:
    """A model folder: a small random model with a byte tokenizer."""
    model = random_model(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16))
    return str(gpt2.save(model, get_tokenizer("bytes"), tmp_path / "model_folder"))


def test_train_then_sample_then_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    flags = "--tokenizer bpe:300 --n-layer 1 --n_head 2 --n-embd=16 --block-size 16 --batch_size 4 --max-steps 6"
    more = "--warmup-steps 2 --eval-every 3 --device cpu --dtype float32 --sample-tokens 5"
    paths = ["--data", str(tmp_path / "text.txt"), "--out-dir", str(tmp_path / "runs")]
    code, out, err = run_cli(capsys, "train", "shakespeare", *paths, *flags.split(), *more.split())
    assert (code, out) == (0, f"{tmp_path}/runs/shakespeare\n"), err
    assert "step 6/6" in err
    assert "run folder" in err

    code, first, _ = run_cli(
        capsys, "sample", out.strip(), "--prompt", "To be", "--max-new-tokens", "12", "--seed", "3"
    )
    assert code == 0
    assert first.startswith("To be")
    assert (
        run_cli(capsys, "sample", out.strip(), "--prompt", "To be", "--max-new-tokens", "12", "--seed", "3")[1] == first
    )
    *_, both = run_cli(capsys, "sample", out.strip(), "--prompt", "To be", "--num-samples", "3", "--seed", "3")[:2]
    assert both.count("\n---\nTo be") == 2

    code, exported, _ = run_cli(capsys, "export", out.strip(), str(tmp_path / "out"), "--dtype", "float16")
    assert (code, exported) == (0, f"{tmp_path}/out\n")
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {"torch.float16"}
    assert gpt2.load(tmp_path / "out")[1] is not None

    again = run_cli(
        capsys, "train", "shakespeare", "--resume", "auto", "--out-dir", f"{tmp_path}/runs", "--max-steps", "8"
    )
    assert again[:2] == (0, out)
    assert "step 8/8" in again[2]


def test_print_config_can_be_fed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lr", "1e-3", "--name", "x", "--no-compile", "--print-config"]
    code, toml, _ = run_cli(capsys, "train", "gpt2-124m", *flags)
    assert code == 0
    assert "compile = false" in toml
    (tmp_path / "mine.toml").write_text(toml)
    assert run_cli(capsys, "train", str(tmp_path / "mine.toml"), "--print-config")[1] == toml
    assert not (tmp_path / "runs").exists()


def test_training_uses_the_tokenizer_of_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli(capsys, "data", "prepare", "python-docs", str(tmp_path / "docs"), "--tokenizer", "bytes")
    paths = ["--data", str(tmp_path / "docs"), "--out-dir", str(tmp_path / "runs")]
    flags = ["--max-steps", "2", "--warmup-steps", "1", "--n-embd", "16", "--n-layer", "1"]
    code, out, err = run_cli(capsys, "train", "quickstart", *paths, *flags)  # whose own tokenizer is bpe:1024
    assert code == 0, err
    _, tokenizer = gpt2.load(out.strip())
    assert tokenizer is not None
    assert tokenizer.name == "bytes"


def test_data_list_prepare_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "python-docs" in run_cli(capsys, "data", "list")[1]
    code, out, err = run_cli(capsys, "data", "prepare", "python-docs", str(tmp_path / "docs"), "--tokenizer", "bytes")
    assert code == 0, err
    assert "train: " in out
    code, out, _ = run_cli(capsys, "data", "inspect", str(tmp_path / "docs"))
    assert code == 0
    assert "bytes, 257 ids" in out
    assert "checksums match" in out
    shard = next((tmp_path / "docs").glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    assert run_cli(capsys, "data", "inspect", str(tmp_path / "docs"))[0] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("trian", "there is no command 'trian' (did you mean 'train'?)"),
        ("train quickstat", "no recipe 'quickstat' (did you mean 'quickstart'?)"),
        ("train --batchsize 4", "there is no --batchsize (did you mean '--batch-size'?)"),
        ("train --batch_sizes=4", "did you mean '--batch-size'?"),
        ("train --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("train --max-steps", "expected one argument"),
        ("train --lr -1", "--lr must be over 0"),
        ("train --optimizer muonn", "--optimizer 'muonn' is not one of adamw, muon, sgd"),
        ("train --data nowhere.txt", "nowhere.txt"),
        ("train --data {empty}", "is empty"),
        ("train --data {short} --tokenizer bytes", "is too short to train on"),
        ("train --data {latin}", "is not UTF-8"),
        ("train --data {shards} --tokenizer bpe:400", "were made with tokenizer bytes"),
        ("train --tokenizer wordpiece", "wordpiece"),
        ("train --device tpu", "device 'tpu' is not one of"),
        ("train --dtype int8", "dtype 'int8' is not one of float32, bfloat16, float16"),
        ("train --out-dir {file}", "cannot write the run folder"),
        ("train --resume {file}", "there is no run in that folder"),
        ("train --name a/b", "--name must be a valid folder name"),
        ("train nowhere.toml", "nowhere.toml cannot be read as TOML"),
        ("sample", "the following arguments are required: MODEL"),
        ("sample ./nowhere", "there is no model folder nowhere"),
        ("sample {tmp}", "it has no config.json"),
        ("sample {model_folder} --temperature -1", "temperature must be 0 or more"),
        ("sample {model_folder} --top-p 0", "top-p must be over 0"),
        ("sample {model_folder} --num-samples 0", "num_samples must be at least 1"),
        ("sample {model_folder} --num-samples 1000000000", "num_samples must be at least 1 and at most 10,000"),
        ("sample {model_folder} --prompt \udcff", "the prompt is not UTF-8 text"),
        ("sample {endless}", "File name too long"),
        ("train --name {endless}", "--name must be a valid folder name"),
        ("train --tokenizer x\ny", "no tokenizer 'x y'"),
        ("data prepare python-docs / --tokenizer bytes", "contains other files"),
        ("sample {model_folder} --dtype int3", "dtype 'int3' is not one of"),
        ("sample {model_folder} --prompt {long}", "70 tokens do not fit the model's context of 64"),
        ("export {model_folder} {file}/x", "cannot write the model folder"),
        ("export {model_folder} {tmp}", "is not empty and holds no exported model"),
        ("export {model_folder} {tmp}/app", "is not empty and holds no exported model"),
        ("export {model_folder} {model_folder}", "model_folder is the model itself: name another folder"),
        ("export {model_folder} {tmp}/model_folder/../model_folder", "is the model itself: name another folder"),
        ("export {model_folder} {tmp}/run/model", "is in the run folder"),
        ("export {model_folder} {tmp}/run/checkpoints/step-9/model", "is in the run folder"),
        ("export {model_folder} {tmp}/run", "is in the run folder"),
        ("export {model_folder} ~nobody-of-this-name/x", "~nobody-of-this-name/x cannot be found"),
        ("data prepare python-docs ~nobody-of-this-name/x --tokenizer bytes", "~nobody-of-this-name/x cannot be found"),
        ("data prepare {tmp}/run {tmp}/shards --tokenizer bytes", "is a run folder, not text to train on"),
        ("data prepare /dev/zero {tmp}/shards --tokenizer bytes", "/dev/zero is not a regular file"),
        ("data inspect {empty}", "is empty"),
        ("train --data {tmp}/\x1b[31m", "/\\x1b[31m'"),
        ("export {model_folder} {tmp}/new --format onx", "there is no format 'onx' (did you mean 'onnx'?)"),
        ("data", "the following arguments are required"),
        ("data inspect {tmp} --tokenizer bytes", "is not UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: str, message: str, tmp_path: Path, model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes("Müller ".encode("latin-1") * 100)
    (tmp_path / "file").write_text("in the way")
    for name in ("run/config.toml", "run/metrics.jsonl", "run/model/config.json", "app/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"port": 8080}')
    if "{shards}" in argv:
        run_cli(capsys, "data", "prepare", "python-docs", str(tmp_path / "shards"), "--tokenizer", "bytes")
    places = {name: str(tmp_path / f"{name}.txt") for name in ("empty", "short", "latin")}
    places |= {"shards": str(tmp_path / "shards"), "file": str(tmp_path / "file"), "tmp": str(tmp_path)}
    places |= {"model_folder": model_folder, "long": "x" * 70, "endless": "x" * 300}
    arguments = [word.format(**places) for word in argv.split(" ")]  # a path may have spaces
    if arguments[0] == "train" and "--out-dir" not in arguments:
        arguments += ["--out-dir", str(tmp_path / "runs")]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run_cli(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("gpt2: ")
    assert out == ""
    created = [p for p in tmp_path.rglob("*") if p not in before and "gpt2-home" not in p.parts]
    assert not created, "a refused command left files behind"


def test_a_missing_cuda_device_is_an_error(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    for command in (["sample", model_folder], ["train", "quickstart"], ["eval", model_folder]):
        code, out, err = run_cli(capsys, *command, "--device", "cuda")
        message = "gpt2: there is no cuda device on this machine: use --device cpu\n"
        assert (code, out, err) == (2, "", message)
    assert not (tmp_path / "runs").exists()


def test_a_closed_pipe_is_not_an_error(model_folder: str) -> None:
    command = (
        f"{sys.executable} -m gpt2 sample {model_folder} --num-samples 40 --max-new-tokens 300 | head -c 1 > /dev/null"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_an_earlier_export_is_overwritten_and_home_is_expanded(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for dtype in ("float32", "float16"):
        assert run_cli(capsys, "export", model_folder, "~/out", "--dtype", dtype)[:2] == (0, f"{tmp_path}/out\n")
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {"torch.float16"}
    assert run_cli(capsys, "data", "prepare", "python-docs", "~/docs", "--tokenizer", "bytes")[0] == 0
    code, out, _ = run_cli(capsys, "data", "inspect", "~/docs/train_000000.bin")
    assert code == 0
    assert "checksums match" in out
