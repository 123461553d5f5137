"""Machines that differ from a developer's: no home folder, drives that cannot sync a folder, no network."""

import errno
import os
import pwd
import stat
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import gpt2
from gpt2 import tokenizer, weights
from gpt2.errors import ModelFilesError, UserError
from gpt2.files import cache_home, fsync_paths
from gpt2.native.build import load_library
from gpt2.runtime import compile_blocks
from gpt2.tokenizer import ByteTokenizer
from gpt2.vocabulary import NO_VOCABULARY

TINY: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_steps": 2,
    "warmup_steps": 1,
    "sample_tokens": 0,
    "eval_tokens": 64,
    "device": "cpu",
    "dtype": "float32",
    "eval_every": 0,
}


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a name and a home folder, as `docker run --user 12345` makes one."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "GPT2_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_variable_to_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set GPT2_HOME"):
        cache_home()
    with pytest.raises(UserError, match="set HF_HOME"):
        gpt2.load("someone/somemodel")
    assert not list(tmp_path.iterdir())
    assert load_library.__wrapped__() is None


@pytest.mark.usefixtures("no_home")
def test_without_a_user_name_the_compiler_has_a_cache_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")  # so that it is restored afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_blocks(nn.ModuleList([]))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_run_is_saved_on_a_drive_that_cannot_sync_a_folder(
    number: int, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, refused = os.fsync, 0

    def without_folders(descriptor: int) -> None:
        nonlocal refused
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused += 1
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", without_folders)
    run = gpt2.train("quickstart", data=text_file, tokenizer="bytes", **TINY)
    assert run.finished
    assert (run.folder / "checkpoints" / "step-2").is_dir()
    assert refused


def test_another_error_of_a_sync_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_paths([tmp_path])


def test_a_folder_without_a_model_does_not_hide_the_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    model = gpt2.GPT(gpt2.GPTConfig(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=8))
    fetched = {"openai-community/gpt2": gpt2.save(model, ByteTokenizer(), "cache")}
    monkeypatch.setattr(weights, "_download_from_hub", fetched.__getitem__)
    assert gpt2.load("gpt2")[0].config == model.config

    def offline(name: str) -> Path:
        raise UserError("no connection")

    monkeypatch.setattr(weights, "_download_from_hub", offline)
    with pytest.raises(UserError, match=r"gpt2 is no model folder: .*; no connection"):
        gpt2.load("gpt2")


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2_vocabulary")
def test_without_a_network_a_run_resumes_and_a_new_one_is_told_what_to_do(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpt2.train("quickstart", data=text_file, tokenizer="gpt2", name="made-online", **TINY)

    def offline() -> None:
        raise ModelFilesError("cannot get GPT-2's vocabulary", code=NO_VOCABULARY)

    monkeypatch.setattr(tokenizer, "gpt2_encoding", offline)
    resumed = gpt2.train(resume=run.folder, max_steps=3)
    assert (resumed.finished, resumed.steps) == (True, 3)
    with pytest.raises(ModelFilesError, match="--tokenizer bpe:1024") as raised:
        gpt2.train("quickstart", data=text_file, tokenizer="gpt2", name="new", **TINY)
    assert raised.value.field == "tokenizer"
