"""Help: at once, in groups, with examples; and `gpt2 help`, `gpt2 info`."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from benchmarks.decode_peers import PEERS

import gpt2
from gpt2 import cli
from gpt2.bench.decode import OUR_VARIANTS
from gpt2.cli import COMMANDS, command_module
from gpt2.commands import bench_args, generation_args
from gpt2.commands.completion import subcommand_parsers
from gpt2.commands.sample import MAX_SAMPLES
from gpt2.errors import UserError
from gpt2.generation import inference, text
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, OPENAI_CONFIGS, GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.cli_helpers import run_cli

PARSERS = {
    parser.prog: parser for verb in COMMANDS for parser in subcommand_parsers(command_module(verb).make_parser())
}
METAVAR = re.compile(r"[A-Z]+([|=/-][A-Z]+)*")
FLAGS_BY_WORD = {  # every flag whose name has the word
    "device": {"--device"},
    "batch-size": {"--batch-size", "--micro-batch-size"},
    "new-tokens": {"--max-new-tokens", "--min-new-tokens"},
    "model": {"--model", "--model-alias"},
    "json": {"--json"},
}


def test_the_parsers() -> None:
    assert {"gpt2 train", "gpt2 data prepare", "gpt2 bench generate", "gpt2 completion"} <= set(PARSERS)
    assert len(PARSERS) == len(COMMANDS) + 7  # three of data, four of bench


def test_no_help_imports_torch() -> None:
    """Importing torch takes seconds. All in one process: the first that imports it is named."""
    code = """
import json, sys
from gpt2.cli import main
for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
    except SystemExit as stop:
        if stop.code != 0 or "torch" in sys.modules:
            sys.exit(f"{argv}: exit code {stop.code}, torch is imported: {'torch' in sys.modules}")
print("no torch", end="")
"""
    commands = [[*prog.split()[1:], "--help"] for prog in PARSERS]
    commands += [["--help"], ["help", "train"], ["data", "list"], ["completion", "bash"]]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("no torch")


@pytest.mark.parametrize("prog", PARSERS)
def test_metavars_are_upper_case_and_flags_have_one_spelling(prog: str) -> None:
    """A value without a metavar would be shown as the name of its flag."""
    for action in PARSERS[prog]._actions:
        if action.nargs != 0:
            assert METAVAR.fullmatch(str(action.metavar)), (action.option_strings or action.dest, action.metavar)
        for flag in action.option_strings:
            for word, allowed in FLAGS_BY_WORD.items():
                assert word not in flag or flag in allowed, flag
            if flag in ("--json", "--model"):
                assert action.metavar == {"--json": "FILE", "--model": "MODEL"}[flag]
            if flag in ("--max-new-tokens", "--micro-batch-size"):
                assert action.metavar == "INT"


@pytest.mark.parametrize("prog", PARSERS)
def test_help_has_two_examples(prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(capsys, "help", *prog.split()[1:])
    assert code == 0
    examples = out[out.index("examples:") :].splitlines()[1:]
    assert len(examples) >= 2
    assert all(line.startswith("  ") and prog in line for line in examples)
    assert run_cli(capsys, *prog.split()[1:], "--help")[1] == out
    assert all(f"--{flag}" in out for flag in cli.COMMON_FLAGS)


@pytest.mark.parametrize("prog", [prog for prog in PARSERS if prog not in ("gpt2 bench", "gpt2 sweep")])
def test_examples_are_accepted(prog: str) -> None:
    """Those of `gpt2 bench` are of its subcommands; `gpt2 sweep` takes its ranges out before it parses."""
    lines = (PARSERS[prog].epilog or "").partition("examples:\n")[2].splitlines()
    assert lines
    for line in lines:
        words = shlex.split(line.removeprefix('  eval "$(').removesuffix(')"'))
        words = words[: next((i for i, word in enumerate(words) if word in (">", "|")), len(words))]
        if prog == "gpt2 sample":
            args = PARSERS[prog].parse_intermixed_args(words[2:])
        else:
            args = PARSERS[" ".join(words[:2])].parse_args(words[2:])
        assert vars(args)


def test_names_in_the_help_are_those_of_the_modules_that_import_torch() -> None:
    defaults = {field.name: field.default for field in fields(Sampling)} | {"top_k": 50}
    assert defaults == generation_args.SAMPLING_DEFAULTS
    assert generation_args.PRECISIONS == inference.PRECISIONS
    assert text.MAX_SAMPLES == MAX_SAMPLES
    assert (tuple(OPENAI_CONFIGS), tuple(PEERS)) == (bench_args.SHAPES, bench_args.PEERS)
    assert bench_args.OUR_VARIANTS == OUR_VARIANTS


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
    code, out, err = run_cli(capsys, "info", str(folder), "--json", "-")
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
    assert err.startswith("usage: gpt2 bench ")
    assert run_cli(capsys, "bench", "--help")[0] == 0


@pytest.mark.parametrize("flag", [["--threads", "3"], ["--threads=3"]])
def test_threads_is_a_flag_of_every_command(flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    assert cli._take_common_flags(["sample", *flag, "--", "--threads", "x"]) == ["sample", "--", "--threads", "x"]
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "3"
    for wrong in (["--threads"], ["--threads=no"], ["--threads", "0"]):
        with pytest.raises(UserError, match="--threads must be an integer of at least 1"):
            cli._take_common_flags(["train", *wrong])


def test_quiet_and_verbose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Results and errors are the same; --quiet leaves the rest out, --verbose says where an error was raised."""
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=16))
    folder = gpt2.save(model, get_tokenizer("bytes"), tmp_path / "model")
    convert = ["convert", str(folder), str(tmp_path / "out"), "--to", "hf", "--overwrite"]
    try:
        code, out, err = run_cli(capsys, *convert)
        assert (code, out) == (0, f"{tmp_path / 'out'}\n")
        assert err.startswith("gpt2: hf, float32: ")
        assert run_cli(capsys, "--quiet", *convert) == (0, out, "")
        assert run_cli(capsys, *convert, "--quiet") == (0, out, "")
        assert run_cli(capsys, "info", "--quiet", str(tmp_path / "none"))[2].count("\n") == 1
        assert "Traceback" not in caplog.text
        assert run_cli(capsys, "info", "--verbose", str(tmp_path / "none"))[0] == 2
        assert "Traceback (most recent call last):" in caplog.text
    finally:
        cli.set_log_level(cli.NORMAL)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_has_commands_flags_and_files(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    code, out, _ = run_cli(capsys, "completion", shell)
    assert code == 0
    for word in (*COMMANDS, "prepare", "--max-new-tokens", "--ladder-steps", "--no-compile"):
        assert word in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    script = run_cli(capsys, "completion", "bash")[1]
    ask = """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p gpt2 | sed 's/.*-F \\([^ ]*\\).*/\\1/') gpt2 "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

    def complete(*words: str) -> set[str]:
        command = ["bash", "--norc", "-c", script + ask, "bash", "gpt2", *words]
        return set(subprocess.check_output(command, text=True, cwd=tmp_path).split())

    (tmp_path / "notes.txt").touch()
    assert complete("tr") == {"train"}
    assert complete("data", "prep") == {"prepare"}
    assert "--max-new-tokens" in complete("sample", "--max")
    assert complete("info", "no") == {"notes.txt"}


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
