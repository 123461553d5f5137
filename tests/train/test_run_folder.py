"""The run folder: locked by one process, and unchanged when something fails."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt2.config import TrainConfig, config_for_resume, read_toml
from gpt2.data.prepare import open_data
from gpt2.errors import UserError
from gpt2.templates import CHATML_TEMPLATE
from gpt2.train.run_folder import RunFolder, check_run_metadata, run_metadata, truncate_samples, write_config
from gpt2.train.trainer import train
from tests.helpers.tiny_trainer import TinyTrainer, file_contents
from tests.helpers.training_helpers import NUMBERS_TEXT, with_frequent_saves


@pytest.fixture
def tiny(tiny: TrainConfig) -> TrainConfig:
    return with_frequent_saves(tiny)


def test_a_fresh_folder_appears_whole_and_its_lock_goes_with_the_run(tiny: TrainConfig) -> None:
    with RunFolder(tiny) as folder:
        assert not folder.path.parent.exists()
        folder.initialize(tiny, None)
        assert sorted(p.name for p in folder.path.iterdir()) == [".lock", "config.toml"]
        assert read_toml(folder.path / "config.toml") == tiny
    assert [p.name for p in folder.path.parent.iterdir()] == ["tiny"]
    assert [p.name for p in folder.path.iterdir()] == ["config.toml"]


def test_home_is_written_out(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder(replace(tiny, out_dir="~/here")).path == tmp_path / "here" / "tiny"
    with pytest.raises(UserError, match="~nobody-of-that-name"):
        RunFolder(replace(tiny, out_dir="~nobody-of-that-name/here"))


def test_only_one_of_several_simultaneous_starts_succeeds(tiny: TrainConfig) -> None:
    ready, output, won = threading.Barrier(8), [], []
    over = threading.Barrier(8)

    def start() -> None:
        try:
            with RunFolder(tiny) as folder:
                ready.wait(20)
                try:
                    folder.initialize(tiny, None)
                    won.append(folder)
                finally:
                    over.wait(20)
        except UserError as error:
            output.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert output == [f"{won[0].path} exists: --resume auto resumes it, another --name starts a new run"] * 7
    assert [p.name for p in won[0].path.parent.iterdir()] == ["tiny"]


def test_a_locked_run_is_a_one_line_error(tiny: TrainConfig) -> None:
    again = replace(tiny, resume="auto")
    with RunFolder(tiny) as first:
        first.initialize(tiny, None)
        with pytest.raises(UserError) as error, RunFolder(again):
            pass
        assert (
            str(error.value) == f"{first.path} is in use by process {os.getpid()}: wait until it has ended, or stop it"
        )
    (first.path / ".lock").write_text("process 1")  # left by a killed process: not locked
    with RunFolder(again), pytest.raises(UserError, match="is in use"), RunFolder(again):
        pass
    with RunFolder(again):
        pass


def test_a_folder_is_never_locked_twice(tiny: TrainConfig) -> None:
    with RunFolder(tiny) as folder:
        folder.initialize(tiny, None)
    inside, most, entered = 0, 0, 0
    count, end = threading.Lock(), time.monotonic() + 1.0

    def come_and_go() -> None:
        nonlocal inside, most, entered
        while time.monotonic() < end:
            try:
                with RunFolder(replace(tiny, resume="auto")):
                    with count:
                        inside += 1
                        most, entered = max(most, inside), entered + 1
                    time.sleep(0)
                    with count:
                        inside -= 1
            except UserError:
                pass

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1
    assert entered > 1


@pytest.mark.parametrize(
    ("there", "kept"),
    [({}, False), ({"metrics.jsonl": ""}, False), ({"metrics.jsonl": "{}\n"}, True), ({"dumps/step-1": "x"}, True)],
)
def test_a_start_that_failed_leaves_the_name_free_unless_there_is_something_to_keep(
    tiny: TrainConfig, there: dict[str, str], kept: bool
) -> None:

    def failing_start() -> None:
        with RunFolder(tiny) as folder:
            folder.initialize(tiny, None)
            (folder.path / "checkpoints").mkdir()
            for name, text in there.items():
                (folder.path / name).parent.mkdir(exist_ok=True)
                (folder.path / name).write_text(text)
            raise ZeroDivisionError

    run = Path(tiny.out_dir) / "tiny"
    with pytest.raises(ZeroDivisionError):
        failing_start()
    assert run.exists() == kept
    assert not (run / ".lock").exists()
    write_config(run, tiny)
    with pytest.raises(ZeroDivisionError), RunFolder(replace(tiny, resume="auto")):
        raise ZeroDivisionError
    assert run.exists()  # an existing folder is never removed


def test_leftovers_of_killed_processes_are_removed_on_resume(tiny: TrainConfig) -> None:
    with RunFolder(tiny) as folder:
        folder.initialize(tiny, None)
    run = folder.path
    for name in ("checkpoints/.step-7.unfinished/model", "checkpoints/.step-1.removed", ".model.0123abcd.partial"):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_text("half")
    for name in (".config.toml.partial", "metrics.tmp", ".lock", "notes.txt"):
        (run / name).write_text("mine")
    again = replace(tiny, resume="auto")
    with pytest.raises(UserError, match="was started with"):
        RunFolder(replace(again, seed=2))
    assert (run / "metrics.tmp").exists()  # nothing is changed before the checks have passed
    with RunFolder(again) as folder:
        folder.initialize(again, None)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.toml", "notes.txt"]
    assert not list((run / "checkpoints").iterdir())


def test_a_config_that_cannot_be_written_leaves_the_old_one(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tiny.out_dir) / "tiny"
    write_config(folder, tiny)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write the run folder .*tiny: No space left on device"):
        write_config(folder, replace(tiny, max_steps=99))
    assert read_toml(folder / "config.toml") == tiny


@pytest.mark.parametrize("after", [b"", b"-", b"--- step 2", b"--- step 20\nnew\n\n", b"--- step 4\nas if old\n\n"])
def test_samples_are_cut_back_to_the_byte(tmp_path: Path, after: bytes) -> None:
    path = tmp_path / "samples.txt"
    saved = (
        b"--- step 10\nline\r\nline\r--- step 99\n--- step 99\r\n\xf0\x9f\x99\x82\n\n"  # a sample may contain anything
    )
    path.write_bytes(saved + after)
    truncate_samples(path, 10, len(saved))
    assert path.read_bytes() == saved


def test_samples_of_unknown_length_are_cut_by_their_headers(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_bytes(b"--- step 10\r\none\r\ntwo\n\n--- step 20\nthree\n\n--- step 30\nfour\n\n")
    truncate_samples(path, 20)
    assert path.read_bytes() == b"--- step 10\r\none\r\ntwo\n\n--- step 20\nthree\n\n"
    truncate_samples(path, 5)
    assert path.read_bytes() == b""
    truncate_samples(tmp_path / "none.txt", 5)


# The data and the settings that must not change.


def test_the_fingerprint_follows_the_tokens_and_not_the_place(tiny: TrainConfig, tmp_path: Path) -> None:
    text = tmp_path / "numbers.txt"
    first = open_data(str(text), "bytes").fingerprint
    os.utime(text, (1, 1))
    assert open_data(str(text), "bytes").fingerprint == first  # touched, not changed
    moved = text.rename(tmp_path / "moved.txt")
    assert open_data(str(moved), "bytes").fingerprint == first
    assert open_data(str(moved), "bpe:300").fingerprint != first
    moved.write_text(NUMBERS_TEXT.replace("number 200 ", "number 2oo "))
    assert open_data(str(moved), "bytes").fingerprint != first


def test_the_fingerprint_sees_shards_without_a_meta_that_change(tiny: TrainConfig, tmp_path: Path) -> None:
    shards = open_data(str(tmp_path / "numbers.txt"), "bytes").folder
    (shards / "meta.json").unlink()
    prints = {open_data(str(shards)).fingerprint}
    for name in ("train_000000.bin", "val_000000.bin"):
        whole = (shards / name).read_bytes()
        for place in (1024, len(whole) // 4 * 2, len(whole) - 2):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            (shards / name).write_bytes(damaged)
            prints.add(open_data(str(shards)).fingerprint)
        (shards / name).write_bytes(whole)
    assert len(prints) == 7


def test_changed_data_or_settings_are_refused_in_one_line(tiny: TrainConfig, tmp_path: Path) -> None:
    run, learner = Path(tiny.out_dir) / "tiny", TinyTrainer()
    facts = run_metadata(tiny, open_data(tiny.data, "bytes"))
    path = learner.save(run / "checkpoints", 1, metadata=facts)
    check_run_metadata(path, facts, tiny.data)
    assert (
        check_run_metadata(
            path, run_metadata(replace(tiny, lr=1.0, max_steps=99), open_data(tiny.data, "bytes")), tiny.data
        )
        is None
    )
    (tmp_path / "numbers.txt").write_text(NUMBERS_TEXT + "And one more.\n")
    with pytest.raises(UserError) as error:
        check_run_metadata(path, run_metadata(tiny, open_data(tiny.data, "bytes")), tiny.data)
    assert str(error.value) == (
        f"the data changed since {run} was started ({tiny.data}): "
        f"--init-from {run}, with another --name, starts a new run from its weights"
    )
    (tmp_path / "numbers.txt").write_text(NUMBERS_TEXT)
    with pytest.raises(UserError, match=r"step-1 was saved with batch_size 4: .*config.toml, with 8, was changed"):
        check_run_metadata(path, run_metadata(replace(tiny, batch_size=8), open_data(tiny.data, "bytes")), tiny.data)


def no_sample(*args: object) -> str:
    return ""


def test_resuming_with_other_data_is_an_error_and_changes_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    run = train(tiny, no_sample)
    before = file_contents(run)
    (tmp_path / "numbers.txt").write_text(NUMBERS_TEXT.replace("comes", "goes"))
    with pytest.raises(UserError, match="the data changed since"):
        train(config_for_resume(run, {"max_steps": 8}), no_sample)
    assert file_contents(run) == before
    (tmp_path / "numbers.txt").write_text(NUMBERS_TEXT)
    train(config_for_resume(run, {"max_steps": 8}), no_sample)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("block_size = 32", "block_size = 16"))
    with pytest.raises(UserError, match=r"step-8 was saved with block_size 32: .* was changed"):
        train(config_for_resume(run, {}), no_sample)


def test_a_second_training_of_the_same_run_is_refused(tiny: TrainConfig) -> None:
    output: list[str] = []

    def second(*args: object) -> str:
        for again in (tiny, replace(tiny, resume="auto")):
            with pytest.raises(UserError) as error:
                train(again, no_sample)
            output.append(str(error.value))
        return "a sample"

    run = train(tiny, second)
    assert output == [
        f"{run} exists: --resume auto resumes it, another --name starts a new run",
        f"{run} is in use by process {os.getpid()}: wait until it has ended, or stop it",
    ]
    assert train(replace(tiny, resume="auto"), no_sample) == run


def test_a_run_killed_before_its_first_checkpoint_begins_again_as_it_began(tiny: TrainConfig) -> None:
    """Also where the first start measures the faster dtype, and the second reads it from the config."""
    whole = train(replace(tiny, dtype="auto"), no_sample)
    again = whole.with_name("again")
    again.mkdir()
    (again / "config.toml").write_text((whole / "config.toml").read_text().replace('"tiny"', '"again"'))
    (again / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (again / "samples.txt").write_text("--- step 1\nhalf a s")
    train(config_for_resume(again, {}), no_sample)
    for name in ("model/model.safetensors", "checkpoints/step-6/optimizer.safetensors", "samples.txt"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_start_that_fails_in_its_first_step_leaves_the_name_free(tiny: TrainConfig) -> None:
    def failing(*args: object) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(replace(tiny, max_steps=1, warmup_steps=0), failing)
    assert not (Path(tiny.out_dir) / "tiny").exists()


def test_a_relative_data_path_is_resumed_from_another_folder(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(replace(tiny, data="numbers.txt", max_steps=5), no_sample)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    train(config_for_resume(run, {"max_steps": 8}), no_sample)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_text_shorter_than_a_row_gives_shorter_rows(
    tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "short.txt").write_text("abcdefghi\n" * 28)
    run = train(replace(tiny, data=str(tmp_path / "short.txt"), block_size=512, batch_size=2, max_steps=3), no_sample)
    assert "short has 252 training tokens: rows have 251, not 512\n" in caplog.text
    assert read_toml(run / "config.toml").block_size == 251
    train(config_for_resume(run, {"max_steps": 5}), no_sample)
    tokens = [json.loads(line)["tokens"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert tokens == [2 * 251 * step for step in (1, 2, 3, 4, 5)]
    assert json.loads((run / "model" / "config.json").read_text())["n_positions"] == 512


def test_relative_paths_in_a_mixture_are_resumed_from_another_folder(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"notes/{name}.txt").write_text(NUMBERS_TEXT[:6000].upper())
    ref = "numbers.txt:0.8, notes/*.txt:.15,python-docs:0.05"
    monkeypatch.chdir(tmp_path)
    run = train(replace(tiny, data=ref, batch_size=64, max_steps=5), no_sample)
    stored = f"{tmp_path}/numbers.txt:0.8,{tmp_path}/notes/*.txt:.15,python-docs:0.05"
    assert read_toml(run / "config.toml").data == stored
    epochs = {name: 320 / open_data(name, "bytes").loader(1, 32, 0).windows_per_epoch
              for name in ("numbers.txt", "notes/*.txt", "python-docs")}  # fmt: skip
    assert epochs["notes/*.txt"] > 0.5
    assert capsys.readouterr().err.splitlines()[2:5] == [
        f"  numbers: 80.0% of the rows, {0.8 * epochs['numbers.txt']:.2f} epochs",
        f"  notes: 15.0% of the rows, {0.15 * epochs['notes/*.txt']:.2f} epochs",
        f"  python-docs: 5.0% of the rows, {0.05 * epochs['python-docs']:.2f} epochs",
    ]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    train(config_for_resume(run, {"max_steps": 8}), no_sample)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8
    rows = 8 * 64 * 4 // 5  # of all rows to step 8
    assert f"  numbers: 80.0% of the rows, {rows / 320 * epochs['numbers.txt']:.2f} epochs" in capsys.readouterr().err
    (tmp_path / "numbers.txt").rename(tmp_path / "moved.txt")
    moved = stored.replace("numbers", "moved")
    train(config_for_resume(run, {"max_steps": 9, "data": moved}), no_sample)
    assert read_toml(run / "config.toml").data == moved


def test_data_that_moved_is_accepted_by_its_fingerprint_and_written_down(tiny: TrainConfig, tmp_path: Path) -> None:
    run = train(replace(tiny, max_steps=5), no_sample)
    moved = (tmp_path / "numbers.txt").rename(tmp_path / "moved.txt")
    train(config_for_resume(run, {"max_steps": 8, "data": str(moved)}), no_sample)
    assert read_toml(run / "config.toml").data == str(moved)
    moved.write_text(NUMBERS_TEXT.replace("comes", "goes"))
    with pytest.raises(UserError, match="the data changed since"):
        train(config_for_resume(run, {"max_steps": 9}), no_sample)


def test_a_base_model_and_a_template_that_moved_are_accepted(tiny: TrainConfig, tmp_path: Path) -> None:
    rows, template = tmp_path / "rows.jsonl", tmp_path / "t.jinja"
    rows.write_text("".join(f'{{"prompt": "say {i}", "answer": "{i}"}}\n' for i in range(40)))
    template.write_text(CHATML_TEMPLATE)
    base = train(replace(tiny, name="base", max_steps=2), no_sample)
    given = {"data": str(rows), "init_from": str(base), "template": str(template), "tokenizer": None}
    run = train(replace(tiny, name="tuned", max_steps=3, warmup_steps=1, **given), no_sample)
    moved = {"init_from": str(base.rename(tmp_path / "base-2")), "template": str(template.rename(tmp_path / "u.jinja"))}
    train(config_for_resume(run, {"max_steps": 5, **moved}), no_sample)
    stored = read_toml(run / "config.toml")
    assert {"init_from": stored.init_from, "template": stored.template} == moved
