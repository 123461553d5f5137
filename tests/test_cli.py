"""The commands, as a person types them: what they print, and what they say when it cannot be."""

import argparse
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference import random_model
from safetensors.torch import load_file

import gpt2
from gpt2.cli import Parser, exit_after, main
from gpt2.model import GPTConfig
from gpt2.tokenizer import get_tokenizer
from gpt2.train.config import RECIPES

ROOT = Path(__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """`gpt2 ARGV` in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return code, out, err


@pytest.fixture
def talker(tmp_path: Path) -> str:
    """A folder with a small model that speaks bytes."""
    model = random_model(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16))
    return str(gpt2.save(model, get_tokenizer("bytes"), tmp_path / "talker"))


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    seconds, said = [], ""
    for _ in range(3):
        start = time.perf_counter()
        said = subprocess.check_output([sys.executable, "-m", "gpt2", "--help"], text=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    assert all(verb in said for verb in ("train", "sample", "export", "data"))
    heavy = "import sys, gpt2, gpt2.cli; print([m for m in ('torch', 'numpy', 'rich', 'tiktoken') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True) == "[]\n"


def test_every_module_imports_with_the_core_alone() -> None:
    """The optional packages are hidden; every module of the program must import all the same."""
    code = """
import importlib, pkgutil, sys
for name in ("matplotlib", "transformers", "fastapi", "uvicorn", "datasets", "pyarrow", "peft", "pytest", "hypothesis"):
    sys.modules[name] = None
import gpt2
names = [m.name for m in pkgutil.walk_packages(gpt2.__path__, "gpt2.") if m.name != "gpt2.__main__"]
for name in names:
    importlib.import_module(name)
for name in gpt2.__all__:
    getattr(gpt2, name)
print(len(names))
"""
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True)) > 15


def test_train_then_sample_then_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    flags = "--tokenizer bpe:300 --n-layer 1 --n_head 2 --n-embd=16 --block-size 16 --batch_size 4 --max-steps 6"
    more = f"--warmup-steps 2 --eval-every 3 --device cpu --dtype float32 --out-dir {tmp_path}/runs --sample-tokens 5"
    code, out, err = run(
        capsys, "train", "shakespeare", "--data", str(tmp_path / "text.txt"), *flags.split(), *more.split()
    )
    assert (code, out) == (0, f"{tmp_path}/runs/shakespeare\n"), err
    assert "step 6/6" in err
    assert "run folder" in err

    code, first, _ = run(capsys, "sample", out.strip(), "--prompt", "To be", "--max-new-tokens", "12", "--seed", "3")
    assert code == 0
    assert first.startswith("To be")
    assert run(capsys, "sample", out.strip(), "--prompt", "To be", "--max-new-tokens", "12", "--seed", "3")[1] == first
    *_, both = run(capsys, "sample", out.strip(), "--prompt", "To be", "--num-samples", "3", "--seed", "3")[:2]
    assert both.count("\n---\nTo be") == 2

    code, exported, _ = run(capsys, "export", out.strip(), str(tmp_path / "out"), "--dtype", "float16")
    assert (code, exported) == (0, f"{tmp_path}/out\n")
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {"torch.float16"}
    assert gpt2.load(tmp_path / "out")[1] is not None

    again = run(capsys, "train", "shakespeare", "--resume", "auto", "--out-dir", f"{tmp_path}/runs", "--max-steps", "8")
    assert again[:2] == (0, out)
    assert "step 8/8" in again[2]


def test_print_config_can_be_fed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lr", "1e-3", "--name", "x", "--no-compile", "--print-config"]
    code, toml, _ = run(capsys, "train", "gpt2-124m", *flags)
    assert code == 0
    assert "compile = false" in toml
    (tmp_path / "mine.toml").write_text(toml)
    assert run(capsys, "train", str(tmp_path / "mine.toml"), "--print-config")[1] == toml
    assert not (tmp_path / "runs").exists()


def test_shards_bring_their_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "data", "prepare", "python-docs", str(tmp_path / "docs"), "--tokenizer", "bytes")
    flags = f"--data {tmp_path}/docs --max-steps 2 --warmup-steps 1 --n-embd 16 --n-layer 1 --out-dir {tmp_path}/runs"
    code, out, err = run(capsys, "train", "quickstart", *flags.split())  # whose own tokenizer is bpe:1024
    assert code == 0, err
    _, tokenizer = gpt2.load(out.strip())
    assert tokenizer is not None
    assert tokenizer.name == "bytes"


def test_data_list_prepare_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "python-docs" in run(capsys, "data", "list")[1]
    code, out, err = run(capsys, "data", "prepare", "python-docs", str(tmp_path / "docs"), "--tokenizer", "bytes")
    assert code == 0, err
    assert "train: " in out
    code, out, _ = run(capsys, "data", "inspect", str(tmp_path / "docs"))
    assert code == 0
    assert "bytes, 257 ids" in out
    assert "checksums hold" in out
    shard = next((tmp_path / "docs").glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    assert run(capsys, "data", "inspect", str(tmp_path / "docs"))[0] == 2


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
        ("train --data {short} --tokenizer bytes", "use more text or a smaller block size"),
        ("train --data {latin}", "is not UTF-8"),
        ("train --data {shards} --tokenizer bpe:400", "were made with tokenizer bytes"),
        ("train --tokenizer wordpiece", "wordpiece"),
        ("train --device tpu", "device 'tpu' is not one of"),
        ("train --dtype float16", "training in float16 would need loss scaling"),
        ("train --out-dir {file}", "cannot write the run folder"),
        ("train --resume {file}", "there is no run in that folder"),
        ("train --name a/b", "a run needs a --name that can be a folder's"),
        ("train nowhere.toml", "nowhere.toml cannot be read as TOML"),
        ("sample", "the following arguments are required: MODEL"),
        ("sample ./nowhere", "there is no model folder nowhere"),
        ("sample {tmp}", "it has no config.json"),
        ("sample {talker} --temperature -1", "temperature must be 0 or more"),
        ("sample {talker} --top-p 0", "top-p must be over 0"),
        ("sample {talker} --num-samples 0", "num_samples must be at least 1"),
        ("sample {talker} --num-samples 1000000000", "num_samples must be at least 1 and at most 10,000"),
        ("sample {talker} --prompt \udcff", "the prompt is not UTF-8 text"),
        ("sample {endless}", "File name too long"),
        ("train --name {endless}", "a run needs a --name that can be a folder's"),
        ("train --tokenizer x\ny", "no tokenizer 'x y'"),
        ("data prepare python-docs / --tokenizer bytes", "has something else in it"),
        ("sample {talker} --dtype int3", "dtype 'int3' is not one of"),
        ("sample {talker} --prompt {long}", "70 tokens do not fit the model's context of 64"),
        ("export {talker} {file}/x", "cannot write the model folder"),
        ("export {talker} {tmp}", "has something else in it"),
        ("export {talker} {tmp}/app", "has something else in it"),
        ("export {talker} {talker}", "talker is the model itself: name another folder"),
        ("export {talker} {tmp}/talker/../talker", "is the model itself: name another folder"),
        ("export {talker} {tmp}/run/model", "is in the run folder"),
        ("export {talker} {tmp}/run/checkpoints/step-9/model", "is in the run folder"),
        ("export {talker} {tmp}/run", "is in the run folder"),
        ("export {talker} ~nobody-of-this-name/x", "~nobody-of-this-name/x cannot be found"),
        ("data prepare python-docs ~nobody-of-this-name/x --tokenizer bytes", "~nobody-of-this-name/x cannot be found"),
        ("data prepare {tmp}/run {tmp}/shards --tokenizer bytes", "is a run folder, and no text to train on"),
        ("data prepare /dev/zero {tmp}/shards --tokenizer bytes", "/dev/zero is not a regular file"),
        ("data inspect {file}", "holds no token shards"),
        ("train --data {tmp}/\x1b[31m", "/\\x1b[31m'"),
        ("export {talker} {tmp}/new --format onnx", "--format 'onnx' is not one of hf"),
        ("data", "the following arguments are required"),
        ("data inspect {tmp}", "holds no token shards"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    argv: str, message: str, tmp_path: Path, talker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes("Müller ".encode("latin-1") * 100)
    (tmp_path / "file").write_text("in the way")
    for name in ("run/config.toml", "run/metrics.jsonl", "run/model/config.json", "app/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"port": 8080}')
    if "{shards}" in argv:
        run(capsys, "data", "prepare", "python-docs", str(tmp_path / "shards"), "--tokenizer", "bytes")
    places = {name: str(tmp_path / f"{name}.txt") for name in ("empty", "short", "latin")}
    places |= {"shards": str(tmp_path / "shards"), "file": str(tmp_path / "file"), "tmp": str(tmp_path)}
    arguments = argv.format(**places, talker=talker, long="x" * 70, endless="x" * 300).split(" ")
    if arguments[0] == "train" and "--out-dir" not in arguments:
        arguments += ["--out-dir", str(tmp_path / "runs")]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("gpt2: ")
    assert out == ""
    made = [p for p in tmp_path.rglob("*") if p not in before and "gpt2-home" not in p.parts]
    assert not made, "a command that was refused left something behind"


def test_a_cuda_device_that_is_not_there_is_said_and_the_cpu_used(
    talker: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, out, _ = run(capsys, "sample", talker, "--device", "cuda", "--prompt", "x", "--max-new-tokens", "2")
    assert code == 0
    assert out.startswith("x")
    assert "there is no cuda device on this machine: running on the CPU" in caplog.text


def test_every_recipe_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert all(name in out for name in RECIPES)
    assert "--batch-size" in out
    assert "--batch_size" not in out


def test_a_reader_that_leaves_early_is_no_error(talker: str) -> None:
    command = f"{sys.executable} -m gpt2 sample {talker} --num-samples 40 --max-new-tokens 300 | head -c 1 > /dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_an_earlier_export_is_written_over_and_home_is_written_out(
    talker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for dtype in ("float32", "float16"):
        assert run(capsys, "export", talker, "~/out", "--dtype", dtype)[:2] == (0, f"{tmp_path}/out\n")
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {"torch.float16"}
    assert run(capsys, "data", "prepare", "python-docs", "~/docs", "--tokenizer", "bytes")[0] == 0
    code, out, _ = run(capsys, "data", "inspect", "~/docs/train_000000.bin")
    assert code == 0
    assert "checksums hold" in out


@pytest.mark.parametrize("spelling", ["--no-fast-mode", "--no_fast_mode", "--no-fast_mode", "--no_fast-mode"])
def test_every_spelling_of_a_flag(spelling: str) -> None:
    parser = Parser(prog="x")
    parser.flag("compile", action=argparse.BooleanOptionalAction, default=None)
    parser.flag("fast-mode", action=argparse.BooleanOptionalAction, default=None)
    parser.flag("two-words", default="")
    parser.add_argument("rest", nargs="*")
    assert vars(parser.parse_args([spelling, "--no_compile", "--two_words=--a_b", "c_d"])) == {
        "fast_mode": False,
        "compile": False,
        "two_words": "--a_b",
        "rest": ["c_d"],
    }
    assert parser.parse_args(["--fast_mode", "--compile"]).fast_mode is True
    assert "_" not in parser.format_help().replace("two_words", "").replace("TWO_WORDS", "")
    with pytest.raises(gpt2.UserError, match=r"there is no --no_fast_node \(did you mean '--no-fast-mode'\?\)"):
        parser.parse_args(["--no_fast_node"])


@pytest.mark.parametrize(
    "error",
    [
        "MemoryError()",
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')",
        "RuntimeError('CUDA error: out of memory')",
        "None",
    ],
)
def test_too_little_memory_is_one_line_with_the_mend(error: str) -> None:
    """The last one is torch's own: two exabytes asked of the CPU's allocator."""
    raises = f"raise {error}" if error != "None" else "torch.empty(2**61, dtype=torch.uint8)"
    code = f"import torch\nfrom gpt2.cli import exit_after\ndef main():\n    {raises}\nexit_after(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpt2: this needs more memory than there is: for training, lower --micro-batch-size")
    assert done.stderr.count("\n") == 1


def test_any_other_runtime_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug of ours"):
        exit_after(lambda: (_ for _ in ()).throw(RuntimeError("a bug of ours")))


OUTPUT = r"""
import sys
from gpt2.cli import exit_after
def main():
    print("déjà vu α \udcff")
    print("naïve", file=sys.stderr)
exit_after(main)
"""


@pytest.mark.parametrize(
    ("encoding", "out"),
    [("ascii", rb"d\xe9j\xe0 vu \u03b1 \udcff"), ("latin-1", b"d\xe9j\xe0 vu " + rb"\u03b1 \udcff"), ("utf-8", None)],
)
def test_what_the_terminal_has_no_letters_for_is_escaped(encoding: str, out: bytes | None) -> None:
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", OUTPUT], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out or "déjà vu α \\udcff".encode()) + b"\n"
    assert done.stderr


LOUD = """
import logging, sys
from gpt2.cli import exit_after
from rich.console import Console
def main():
    sys.stdin.readline()
    for i in range(3):
        print("step", file=sys.stderr, flush=True)
        logging.getLogger("gpt2").warning("talk")
        Console(stderr=True).print("more talk")
    open(sys.argv[1], "w").write("all done")
exit_after(main)
"""


@pytest.mark.parametrize("nobody_reads", [True, False])
def test_a_run_goes_on_when_nobody_listens_any_more(nobody_reads: bool, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOUD, str(tmp_path / "done")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    if nobody_reads:
        process.stderr.close()
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()
        process.wait(60)
    else:
        _, said = process.communicate("go\n", timeout=60)
        assert said == "step\ngpt2: talk\nmore talk\n" * 3
    assert process.returncode == 0
    assert (tmp_path / "done").read_text() == "all done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "gpt2", "data", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "gpt2: No space left on device\n"


def script(folder: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT / folder, capture_output=True, text=True, env=os.environ | env, timeout=300
    )


def test_the_original_generation_command(gpt2_vocabulary: None, tmp_path: Path) -> None:
    """Through the hub's name `gpt2`, served on loopback with random weights; the texts are an independent loop's."""
    import torch
    from hub import serve_hub
    from reference import transformers_twin

    model = random_model(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=16))
    tokenizer = get_tokenizer("gpt2")
    gpt2.save(model, tokenizer, tmp_path / "repo")
    with serve_hub({"openai-community/gpt2": tmp_path / "repo"}) as (address, _):
        command = ["generate_5_samples.py", "--hf_weight", "--no-train"]
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        done = script("experiment", *command, **env)
        other = script("experiment", *command, "--seed", "7", "--num_return_sequences", "2", "--device", "cpu", **env)
    assert done.returncode == 0, done.stderr

    twin = transformers_twin(model)
    tokens = torch.tensor([tokenizer.encode("Hello, I'm a language model,")] * 5)
    torch.manual_seed(1337)
    with torch.no_grad():
        while tokens.size(1) < 30:
            probs, ids = torch.softmax(twin(tokens).logits[:, -1, :], -1).topk(50, -1)
            tokens = torch.cat((tokens, torch.gather(ids, -1, torch.multinomial(probs, 1))), 1)
    assert done.stdout == "".join(f">>  {tokenizer.decode(row)}\n" for row in tokens.tolist())
    assert other.stdout.count(">>  Hello, I'm a language model,") == 2


def test_the_original_training_command_for_two_epochs(
    gpt2_vocabulary: None, shakespeare_file: Path, gpt2_home: Path
) -> None:
    (gpt2_home / "tinyshakespeare").mkdir(parents=True)
    (gpt2_home / "tinyshakespeare" / "input.txt").write_bytes(shakespeare_file.read_bytes())
    flags = "--train --data_type super_tiny_shakespear --lr 3e-4 --optimizer adam --epochs 2 --device cuda"
    done = script("train", "train_gpt2_test.py", *flags.split())
    assert done.returncode == 0, done.stderr
    untrained, first, second = done.stdout.splitlines()
    assert float(untrained.split()[-1]) == pytest.approx(10.8249, abs=0.15)
    assert first.startswith("epoch 1, loss: 10.")
    assert second.startswith("epoch 2, loss: ")
    assert second.endswith(" ms")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train/train_gpt2_test.py --epochs 0", "argument --epochs: must be a whole number of at least 1, not 0"),
        ("train/train_gpt2_test.py --epochs=-3", "argument --epochs: must be a whole number of at least 1, not -3"),
        ("train/train_gpt2_test.py --batch_size 0", "argument --batch-size: must be a whole number of at least 1"),
        ("train/train_gpt2_test.py --token_size 1025", "--token-size 1,025 is more than the context of 1,024"),
        ("train/train_gpt2_test.py --lr nan", "--lr must be over 0, not nan"),
        ("train/train_gpt2_test.py --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("train/train_gpt2_test.py --optimizer adan", "argument --optimizer: invalid choice: 'adan'"),
        ("train/train_gpt2_test.py --seed 18446744073709551616", "the seed must lie between"),
        ("train/train_gpt2_test.py --device tpu", "device 'tpu' is not one of"),
        ("train/train_gpt2_test.py --epoch 3", "there is no --epoch (did you mean '--epochs'?)"),
        (
            "experiment/generate_5_samples.py --num_return_sequences 0",
            "argument --num-return-sequences: must be a whole",
        ),
        ("experiment/generate_5_samples.py --max_length -1", "argument --max-length: must be a whole number of at"),
        ("experiment/generate_5_samples.py --no_train --model_type ./nowhere", "there is no model folder nowhere"),
        (
            "experiment/generate_5_samples.py --no-train --hf_wait",
            "there is no --hf_wait (did you mean '--hf-weight'?)",
        ),
    ],
)
def test_bad_flags_of_the_original_commands_are_one_line(
    argv: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, because importing torch takes longer than all of them together."""
    path, *flags = argv.split()
    monkeypatch.setattr(sys, "argv", [path, *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_fifty_epochs_on_one_batch_know_it_by_heart(
    gpt2_vocabulary: None, shakespeare_file: Path, gpt2_home: Path
) -> None:
    """The original ends at 0.0027; docs/lab-notes.md says why the paper's initialization ends at 0.0145."""
    (gpt2_home / "tinyshakespeare").mkdir(parents=True)
    (gpt2_home / "tinyshakespeare" / "input.txt").write_bytes(shakespeare_file.read_bytes())
    done = script("train", "train_gpt2_test.py", "--train", "--epochs", "50", "--device", "cpu", "--flash_attention")
    losses = [float(line.split("loss: ")[1].split(",")[0]) for line in done.stdout.splitlines()[1:]]
    assert len(losses) == 50
    assert losses[20] < 2.5
    assert losses[49] < 0.03
