"""Help: at once, in groups, with examples; and `gpt2 help`, `gpt2 info`."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from benchmarks.decode_peers import PEERS

import gpt2
from gpt2 import cli
from gpt2.bench.decode import OUR_VARIANTS
from gpt2.cli import COMMANDS
from gpt2.commands import bench_args, generation_args
from gpt2.commands.sample import MAX_SAMPLES
from gpt2.errors import UserError
from gpt2.generation import inference, text
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, OPENAI_CONFIGS, GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.cli_helpers import run_cli

VERBS = [*([verb, "--help"] for verb in COMMANDS), ["data", "list"], ["eval", "--help"]]
VERBS += [["bench", name, "--help"] for name in ("train", "generate", "serve", "chart")]


def test_no_help_imports_torch() -> None:
    """Importing torch takes seconds. All in one process: the first that imports it is named."""
    code = """
import json, sys
from gpt2.cli import main
for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
    except SystemExit as stop:
        assert stop.code == 0, argv
    assert "torch" not in sys.modules, argv
"""
    subprocess.run([sys.executable, "-c", code, json.dumps(VERBS)], check=True, stdout=subprocess.DEVNULL)


def test_names_in_the_help_are_those_of_the_modules_that_import_torch() -> None:
    defaults = {field.name: field.default for field in fields(Sampling)} | {"top_k": 50}
    assert defaults == generation_args.SAMPLING_DEFAULTS
    assert generation_args.PRECISIONS == inference.PRECISIONS
    assert text.MAX_SAMPLES == MAX_SAMPLES
    assert (tuple(OPENAI_CONFIGS), tuple(PEERS)) == (bench_args.SHAPES, bench_args.PEERS)
    assert bench_args.OUR_VARIANTS == OUR_VARIANTS


@pytest.mark.parametrize("verb", [verb for verb in COMMANDS if verb != "bench"])
def test_help_has_two_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(capsys, "help", verb)
    assert code == 0
    examples = out[out.index("examples:") :].splitlines()[1:]
    assert len(examples) >= 2
    assert all(line.startswith(f"  gpt2 {verb}") for line in examples)
    assert run_cli(capsys, verb, "--help")[1] == out


def test_flags_of_train_are_in_groups_and_plan_shows_only_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    train = run_cli(capsys, "train", "--help")[1]
    assert train.index("data and run folder:") < train.index("  --data SOURCE") < train.index("\nmodel:")
    assert train.index("\noptimizer:") < train.index("  --lr FLOAT") < train.index("device and precision:")
    plan = run_cli(capsys, "plan", "--help")[1]
    assert "--n-layer INT" in plan
    assert not any(flag in plan for flag in ("--wandb", "--save-every", "--sample-prompt", "--min-lr", "--seed"))


def test_info_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=16))
    folder = gpt2.save(model, get_tokenizer("bytes"), tmp_path / "model")
    code, out, err = run_cli(capsys, "info", str(folder), "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert (facts["layers"], facts["context"], facts["vocabulary"], facts["dtype"]) == (1, 48, 257, "F32")
    assert facts["tokenizer"] == "bytes, 257 ids"
    assert 256 in facts["end tokens"]
    lines = run_cli(capsys, "info", str(folder))[1].splitlines()
    assert "context:        48" in lines


def test_bench_without_a_benchmark_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys, "bench")
    assert (code, out) == (2, "")
    assert "usage: gpt2 bench WHAT" in err
    assert run_cli(capsys, "bench", "--help")[0] == 0


@pytest.mark.parametrize("flag", [["--threads", "3"], ["--threads=3"]])
def test_threads_is_a_flag_of_every_command(flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    assert cli._take_threads(["sample", *flag, "--", "--threads", "x"]) == ["sample", "--", "--threads", "x"]
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "3"
    for wrong in (["--threads"], ["--threads=no"], ["--threads", "0"]):
        with pytest.raises(UserError, match="--threads must be an integer of at least 1"):
            cli._take_threads(["train", *wrong])


@pytest.mark.parametrize(
    ("text", "size"),
    [("4 MiB", 4 * 2**20), ("4MiB", 4 * 2**20), ("500 kB", 500_000), ("1.5GB", 1_500_000_000), ("4194304", 4194304)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 XB", "-1", "0", "MiB", "1e6"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 500 kB or 4 MiB"):
        cli.parse_size(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_openmp_threads_sleep_early_unless_the_user_chose(given: dict[str, str], expected: str | None) -> None:
    """The variable is set before torch is imported, as the OpenMP library reads it only then."""
    show = "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    program = f"import os, sys; from gpt2 import cli; cli.run_and_exit(lambda: {show})"
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | given
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [str(expected), "False"]
