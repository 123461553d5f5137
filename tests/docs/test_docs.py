"""Every code block and command of README.md and docs/ is executed, in one folder per page.

A block that cannot run here has a comment with the reason in the line above it: ``<!-- not run: needs a network -->``.
The arguments of its `gpt2` commands are parsed all the same. Commands that train run with few steps, and a MODEL, a hub
name and runs/NAME are stand-ins: small models in folders of those names.
"""

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
from gpt2.cli import Parser, main
from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, save_adapter
from gpt2.tokenizer import ByteTokenizer
from tests.docs.blocks import NOT_RUN, SHELL, Block, blocks_of, commands_of, gpt2_arguments
from tests.helpers.training_helpers import NUMBERS_TEXT

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "MODEL", "A", "B", "C")
SHAPE = gpt2.GPTConfig(vocab_size=257, block_size=128, n_layer=1, n_head=2, n_embd=32)
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32"]
SHORT = ["--max-steps", "2", "--batch-size", "2", "--eval-tokens", "64", "--sample-tokens", "3", "--device", "cpu"]
SHORT_TEXT = ["--max-new-tokens", "3"]
NOT_EXECUTED = ("text", "json", "yaml", "toml", "jsonl", "ini", "nginx", "")
ROWS = '{"prompt": "What is 1 + 1?", "answer": "2"}\n' * 30
TASK_ROWS = '{"query": "The dog", "choices": ["barks", "reads"], "gold": 0}\n'


class Parsed(Exception):
    """Raised once the arguments of a command are parsed."""


@pytest.fixture(scope="module")
def prototype(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page starts with: stand-ins for models, runs and data."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    for name in MODELS:
        gpt2.save(gpt2.GPT(SHAPE), ByteTokenizer(), folder / name)
    model, tokenizer = gpt2.load(folder / "gpt2")
    fingerprint, lora = base_fingerprint(model), LoRAConfig(rank=2, alpha=4.0)
    add_adapter(model, lora)
    for name in ("finetune", "poems", "questions"):
        run = folder / "runs" / name
        save_adapter(run / "adapter", lora, adapter_state_dict(model), "gpt2", fingerprint)
        gpt2.save(gpt2.load(folder / "gpt2")[0], tokenizer, run / "model")
    (folder / "my-notes").mkdir()
    for path in ("my-notes/numbers.txt", "notes.txt", "input.txt"):
        (folder / path).write_text(NUMBERS_TEXT)
    (folder / "questions.jsonl").write_text(ROWS)
    (folder / "mine.jsonl").write_text(TASK_ROWS)
    return folder


@pytest.fixture
def page_folder(prototype: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the prototype, the current folder; with a run that can be resumed."""
    folder = tmp_path / "page"
    shutil.copytree(prototype, folder)
    monkeypatch.chdir(folder)
    settings: dict[str, Any] = {"block_size": 32, "sample_tokens": 0, "eval_tokens": 64, "device": "cpu"}
    shape: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 32}
    gpt2.train("quickstart", data="notes.txt", tokenizer="bytes", max_steps=2, batch_size=2, **shape, **settings)
    return folder


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Execute a Python block in the namespace of its page."""
    exec(compile(block.code, block.where, "exec"), names)


def run_command(arguments: list[str], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run `gpt2 ARGUMENTS` in this process, shortened; it must succeed."""
    verb = arguments[0]
    if "--tokenizer gpt2" in " ".join(arguments) and "TIKTOKEN_CACHE_DIR" not in os.environ:
        return  # GPT-2's vocabulary would be downloaded
    if verb in ("train", "finetune"):
        given = {word.partition("=")[0] for word in arguments}
        is_new = verb == "train" and not given & {"--resume", "--init-from"}
        extra = [*(TINY if is_new else []), *SHORT]
        if "--resume" in given:
            extra = ["--max-steps", "3"]
        arguments = [*arguments, *extra]
    elif verb == "sample" and "--max-new-tokens" not in arguments:
        arguments = [*arguments, *SHORT_TEXT]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    shown = capsys.readouterr()
    assert stop.value.code == 0, f"{where}: gpt2 {' '.join(arguments)}\n{shown.err}"


def parse_command(arguments: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of `gpt2 ARGUMENTS`, and go no further."""
    reject: Callable[[Parser, list[str]], None] = Parser._reject

    def reject_and_stop(self: Parser, extra: list[str]) -> None:
        reject(self, extra)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "_reject", reject_and_stop)
        with pytest.raises((Parsed, SystemExit)) as stop:
            main(arguments)
    accepted = isinstance(stop.value, Parsed) or stop.value.code == 0
    assert accepted, f"{where}: gpt2 {' '.join(arguments)} is not accepted"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_a_page_runs(
    page: Path, page_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page, ROOT):
        if block.not_run or block.language in NOT_EXECUTED:
            continue
        if block.language == "python":
            run_python(block, names)
            continue
        for command in commands_of(block):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
            arguments = gpt2_arguments(command)
            assert arguments is not None, f"{block.where}: {command} cannot run here: mark the block"
            run_command(arguments, block.where, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_is_accepted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in blocks that are not run. Python code is compiled."""
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page, ROOT):
        if block.language == "python":
            compile(block.code, block.where, "exec")
        elif block.language in SHELL:
            for command in commands_of(block):
                if (arguments := gpt2_arguments(command)) is not None:
                    parse_command(arguments, block.where, monkeypatch)
        else:
            assert block.language in NOT_EXECUTED, f"{block.where}: what is {block.language}?"


def test_a_reason_stands_above_the_block_that_is_not_run() -> None:
    """A comment that is somewhere else would have no effect."""
    for page in PAGES:
        marked = sum(bool(block.not_run) for block in blocks_of(page, ROOT))
        assert marked == len(NOT_RUN.findall(page.read_text(encoding="utf-8"))), page


def test_a_wrong_flag_in_a_block_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: takes days -->\n```sh\ngpt2 train shakespeare \\\n  --learning-rat 1  # fast\n```\n")
    (block,) = blocks_of(page, tmp_path)
    assert block.not_run == "takes days"
    (command,) = commands_of(block)
    with pytest.raises(AssertionError, match=r"page\.md:2"):
        parse_command(gpt2_arguments(command) or [], block.where, monkeypatch)
