"""TensorBoard and Weights & Biases hold the records of the run, each step once, also after a resume."""

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gpt2.config import TrainConfig
from gpt2.errors import UserError
from gpt2.reporting.trackers import open_trackers

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offline mode. W&B's helper process reads the environment at its start, so each test starts its own."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield
    wandb.teardown()


def records(first: int, last: int) -> list[dict[str, Any]]:
    """The records of steps `first` to `last`, as the trainer writes them."""
    made = []
    for step in range(first, last + 1):
        record = {"step": step, "loss": 5 / step, "lr": 1e-3 * step, "grad_norm": 0.1 * step, "tokens": 512 * step}
        if step % 5 == 0:
            record |= {"val_loss": 6 / step, "eval/hellaswag/acc_norm": step / 40}
        if step == 7:
            record["skipped"] = True
        made.append(record)
    return made


def track(config: TrainConfig, folder: Path, first_step: int, last_step: int) -> None:
    trackers = open_trackers(config, folder, first_step)
    assert len(trackers) == 1
    for record in records(first_step + 1, last_step):
        trackers[0].log(record)
    trackers[0].close()


def scalars(recorded: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by name."""
    by_name: dict[str, list[tuple[int, float]]] = {}
    for record in recorded:
        for name, value in record.items():
            if name != "step":
                by_name.setdefault(name, []).append((record["step"], float(value)))
    return by_name


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def as_float32(by_name: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """The values rounded to float32, as in TensorBoard's files."""
    return {k: [(s, struct.unpack("f", struct.pack("f", x))[0]) for s, x in v] for k, v in by_name.items()}


def in_wandb(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any], set[str]]:
    """The history, the config of the first run, and the ids of the runs, from the files of offline runs."""
    import wandb

    wandb.teardown()  # its helper process writes the files
    Record: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record  # created at import

    history, configs, ids = [], [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        for data in leveldb_records(path.read_bytes()[7:]):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.append({"step": row["_step"], **{k: v for k, v in row.items() if not k.startswith("_")}})
    return scalars(history), configs[0], ids


def leveldb_records(data: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format (github.com/google/leveldb/blob/main/doc/log_format.md)."""
    found, whole, at = [], b"", 0
    while at + 7 <= len(data):
        left_in_block = 32768 - (at + 7) % 32768  # W&B's own header of 7 bytes counts
        if left_in_block < 7:
            at += left_in_block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            found.append(whole)
            whole = b""
    return found


@needs_tensorboard
def test_tensorboard_holds_the_records(tmp_path: Path) -> None:
    track(TrainConfig(tensorboard=True), tmp_path, 0, 12)
    assert in_tensorboard(tmp_path / "tensorboard") == as_float32(scalars(records(1, 12)))


@needs_tensorboard
def test_resumed_run_has_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    config = TrainConfig(tensorboard=True)
    (killed,) = open_trackers(config, tmp_path, 0)
    for record in records(1, 12):
        killed.log({**record, "loss": 99.0} if record["step"] > 8 else record)  # steps after the last checkpoint
    assert len(in_tensorboard(tmp_path / "tensorboard")["loss"]) == 12  # without close()
    track(config, tmp_path, 8, 20)
    assert in_tensorboard(tmp_path / "tensorboard") == as_float32(scalars(records(1, 20)))


@needs_wandb
@pytest.mark.usefixtures("wandb_offline")
def test_an_offline_wandb_run_is_one_run_with_each_step_once(tmp_path: Path) -> None:
    config = TrainConfig(name="tiny", wandb="shakespeare", lr=3e-3)
    track(config, tmp_path, 0, 12)
    state = json.loads((tmp_path / "wandb.json").read_text())
    track(config, tmp_path, 8, 20)  # from the checkpoint of step 8
    history, logged_config, ids = in_wandb(tmp_path)
    assert history == scalars(records(1, 20))
    assert {k: v for k, v in logged_config.items() if k != "_wandb"} == asdict(config)
    assert ids == {state["id"]}
    assert state["step"] == 12
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": state["id"], "step": 20}


@needs_wandb
@pytest.mark.usefixtures("wandb_offline")
def test_wandb_without_a_key_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"^--wandb shakespeare: No API key.*WANDB_MODE=offline") as caught:
        open_trackers(TrainConfig(name="tiny", wandb="shakespeare"), tmp_path, 0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "wandb.json").exists()


@needs_wandb
def test_broken_wandb_state_raises(tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text('{"id": "a"')
    with pytest.raises(UserError, match=r"wandb\.json is broken"):
        open_trackers(TrainConfig(name="tiny", wandb="shakespeare"), tmp_path, 0)


@pytest.mark.parametrize(
    ("config", "module", "flag"),
    [
        (TrainConfig(tensorboard=True), "torch.utils.tensorboard", "--tensorboard needs tensorboard"),
        (TrainConfig(wandb="p"), "wandb", "--wandb needs wandb"),
    ],
)
def test_missing_package_names_the_extra(
    config: TrainConfig, module: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{flag}, which is not installed: pip install 'plain-gpt2\[track\]'"):
        open_trackers(config, tmp_path, 0)


@needs_tensorboard
def test_unwritable_folder_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write"):
        open_trackers(TrainConfig(tensorboard=True), tmp_path, 0)


def test_no_tracker_by_default(tmp_path: Path) -> None:
    assert open_trackers(TrainConfig(), tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []
