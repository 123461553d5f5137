"""Ranks that are killed, hang, or are stopped: the run resumes and equals an uninterrupted one."""

import importlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fault_launcher import ExitResults, RankForkServer

pytest_plugins = "tests.helpers.fault_fixtures"
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found by /proc")

STEPS = 60


@pytest.fixture(scope="module")
def soak(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """benchmarks/restart_soak.py, with a shorter run."""
    home = tmp_path_factory.mktemp("soak-home")
    (home / "native").symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_HOME", str(home))
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        module, single = importlib.import_module("restart_soak"), importlib.import_module("soak")
        for each in (module, single):  # one writes it to a file, the other tells of it
            patch.setattr(each, "CONFIG", replace(single.CONFIG, max_steps=STEPS))
        yield module


@pytest.fixture(scope="module")
def undisturbed(soak: Any, fork_server: RankForkServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of an uninterrupted run by two ranks with DDP."""
    home = soak.TorchrunWorkspace(tmp_path_factory.mktemp("whole") / "home")
    ended = fork_server.run([*soak.TRAIN, "--parallel", "ddp"], home.folder)
    assert ended.codes == [0, 0], ended.err
    return home


def until_it_goes_on(soak: Any, home: Any, torchrun: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until another step is recorded."""
    before = home.steps_recorded()
    soak.wait_until(torchrun or Living(), lambda: home.steps_recorded() > before)
    assert home.steps_recorded() > before, home.log_path.read_text()


class Living:
    """A process for `wait_until` that never ends."""

    def poll(self) -> None:
        return None


def lines(home: Any) -> list[str]:
    """What gpt2 has said under torchrun."""
    said = home.log_path.read_text(errors="replace").splitlines()
    return [line.removeprefix("gpt2: ") for line in said if line.startswith("gpt2: ")]


def test_a_killed_rank_is_started_anew_and_nothing_is_lost(soak: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Rank 0, while it writes a checkpoint."""
    home, chance, seen = soak.TorchrunWorkspace(tmp_path / "home"), random.Random(1), set[int]()
    torchrun = home.start_ranks("--parallel", "ddp", restarts=9, shutdown=2)
    try:
        pids = soak.wait_for_ranks(torchrun, seen)
        assert soak.kill_rank_at_moment(home, torchrun, pids, "saving", 0, chance)
        home.wait_until_done(torchrun)
    finally:
        torchrun.terminate()
        torchrun.wait()
    assert not soak.rank_pids(torchrun.pid)
    assert not any(Path(f"/proc/{pid}").exists() for pid in seen)
    assert soak.differences(undisturbed.run, home.run) == []


def test_a_hanging_rank_is_detected_within_the_timeout(soak: Any, fork_server: RankForkServer, tmp_path: Path) -> None:
    home = soak.TorchrunWorkspace(tmp_path / "home")
    fork_server.start([*soak.TRAIN, "--parallel", "ddp", "--rank-timeout", "3"], home.folder)
    until_it_goes_on(soak, home)
    (waiting, hung), began = fork_server.pids, time.monotonic()
    os.kill(hung, signal.SIGSTOP)
    soak.wait_until(Living(), lambda: is_over(waiting), 60, poll_seconds=0.02)
    assert 2 < time.monotonic() - began < 30
    os.kill(hung, signal.SIGKILL)
    ended = fork_server.wait()
    assert ended.codes == [75, -signal.SIGKILL]
    (line,) = ended.messages
    assert line.startswith("rank 0 on ")
    assert "lost the other ranks, or waited too long for them" in line


def is_over(pid: int) -> bool:
    """Return whether a process has ended."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def stopped_at(ended: ExitResults, why: str) -> int:
    """The step after which rank 0, and no other rank, reports that the run was stopped and saved."""
    (line,) = ended.messages
    assert ended.err[0].endswith(f"gpt2: {line}\n")
    assert line.startswith(f"stopped by {why} after step ")
    assert line.endswith(", everything saved; resume with: gpt2 train --resume runs/soak")
    return int(line.split()[5].strip(","))


def newest(home: Any) -> int:
    return max(int(path.name.removeprefix("step-")) for path in home.run.glob("checkpoints/step-*"))


@pytest.mark.slow
def test_a_run_stopped_in_every_way_equals_an_uninterrupted_one(
    soak: Any, undisturbed: Any, fork_server: RankForkServer, tmp_path: Path
) -> None:
    """By a signal to one rank, by --max-minutes, and by a scheduler's signal to torchrun; and resumed each time."""
    home = soak.TorchrunWorkspace(tmp_path / "home")
    train = [*soak.TRAIN, "--parallel", "ddp"]
    fork_server.start(train, home.folder)
    until_it_goes_on(soak, home)
    os.kill(fork_server.pids[1], signal.SIGTERM)
    ended = fork_server.wait()
    assert ended.codes == [143, 143]
    assert stopped_at(ended, "SIGTERM") == newest(home) == home.steps_recorded()

    ended = fork_server.run([*train, "--max-minutes", "0.0001"], home.folder)
    assert ended.codes == [75, 75]
    assert stopped_at(ended, "--max-minutes") == newest(home) == home.steps_recorded()

    torchrun = home.start_ranks("--parallel", "ddp", "--max-minutes", "0", restarts=3)
    try:
        until_it_goes_on(soak, home, torchrun)
        torchrun.send_signal(signal.SIGTERM)
        assert torchrun.wait(60) != 0
    finally:
        torchrun.kill()
        torchrun.wait()
    (line,) = lines(home)
    assert line.startswith(f"stopped by SIGTERM after step {newest(home)}, ")
    assert newest(home) == home.steps_recorded() < STEPS

    ended = fork_server.run(train, home.folder)
    assert ended.codes == [0, 0]
    assert ended.out == ["runs/soak\n", ""]
    assert soak.differences(undisturbed.run, home.run) == []


@pytest.mark.slow
def test_a_terminal_that_interrupts_twice_interrupts_once(soak: Any, tmp_path: Path) -> None:
    """Ctrl-C goes to torchrun and to the ranks, and torchrun passes it on to the ranks again."""
    home = soak.TorchrunWorkspace(tmp_path / "home")
    torchrun = home.start_ranks("--parallel", "fsdp")
    try:
        pids = soak.wait_for_ranks(torchrun, set())
        until_it_goes_on(soak, home, torchrun)
        for pid in pids.values():
            os.kill(pid, signal.SIGINT)
        time.sleep(0.003)  # a step takes longer
        for pid in (*pids.values(), torchrun.pid):
            os.kill(pid, signal.SIGINT)
        assert torchrun.wait(60) != 0
    finally:
        torchrun.kill()
        torchrun.wait()
    (line,) = lines(home)
    assert line.startswith(f"stopped by SIGINT after step {newest(home)}, ")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.slow
def test_ranks_killed_at_any_moment(soak: Any, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    found = soak.soak(6, seed, tmp_path, print)
    assert found["kills"] == 6
    assert found["differences"] == [], f"seed {seed}"
