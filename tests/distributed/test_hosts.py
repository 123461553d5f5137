"""Several hosts: torchrun on each, one run folder, and a network that fails. See virtual_hosts.py."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gpt2.train.recipes import load_recipe
from gpt2.train.trainer import train
from tests.helpers.training_helpers import NUMBERS_TEXT
from tests.helpers.virtual_hosts import Host, Process, virtual_hosts

STEPS, CUT = 60, 12  # of a run, and the one after which something happens to a host
RANK_TIMEOUT = 5
VALUES = {
    "tokenizer": "bytes",
    "optimizer": "adamw",
    "dropout": 0.0,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 12,
    "max_steps": STEPS,
    "warmup_steps": 2,
    "lr": 1e-3,
    "device": "cpu",
    "dtype": "float32",
    "eval_every": 0,
    "save_every": 5,
    "sample_tokens": 0,
}


@pytest.fixture(scope="module")
def permitted(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip, with the reason, where the system does not permit namespaces."""
    try:
        with virtual_hosts(1, tmp_path_factory.mktemp("permitted")):
            pass
    except OSError as error:
        pytest.skip(f"no hosts can be made of namespaces here: {error}")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "numbers.txt"
    path.write_text(NUMBERS_TEXT)
    return path


@pytest.fixture(scope="module")
def alone(permitted: None, tmp_path_factory: pytest.TempPathFactory, numbers: Path) -> Path:
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_HOME", str(folder / "home"))
        return train(replace(load_recipe("quickstart"), name="x", out_dir=str(folder), data=str(numbers), **VALUES))


@pytest.fixture
def two(permitted: None, tmp_path: Path) -> Iterator[list[Host]]:
    with virtual_hosts(2, tmp_path) as made:
        yield made


@dataclass
class Job:
    """A training run on several hosts, each with a torchrun of two ranks, its own log and its own cache."""

    hosts: list[Host]
    folder: Path
    data: Path
    parallel: str
    nnodes: str = "2"
    rdzv_conf: str = "join_timeout=120"
    running: dict[str, Process] = field(default_factory=dict)  # by host

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "x"

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def output(self, host: Host) -> str:
        return (self.folder / f"{host.name}.log").read_text()

    def start(self, host: Host) -> None:
        """The torchrun command for a host."""
        given = {
            **VALUES,
            "data": self.data,
            "out_dir": self.folder / "runs",
            "name": "x",
            "resume": "auto",
            "parallel": self.parallel,
            "rank_timeout": RANK_TIMEOUT,
        }
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={self.nnodes}", "--nproc-per-node=2", "--max-restarts=3"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.hosts[0].address}:29400", "--rdzv-id=x"),
            f"--rdzv-conf={self.rdzv_conf}",
            *("-m", "gpt2", "train", "quickstart"),
            *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()),
        ]
        environment = {
            "GPT2_HOME": str(self.folder / f"home-{host.name}"),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as the examples have it
        }
        with (self.folder / f"{host.name}.log").open("a") as log:
            self.running[host.name] = host.start(command, environment, log, self.folder)

    def supervise(self, *there: Host) -> None:
        """Restart each torchrun that fails, as SLURM, Kubernetes or systemd do, until all have succeeded."""
        starts = 0

        def done() -> bool:
            nonlocal starts
            codes = {host: self.running[host.name].poll() for host in there}
            for host in (host for host, code in codes.items() if code not in (None, 0)):
                starts += 1
                assert starts < 9, self.tail()
                self.start(host)
            return set(codes.values()) == {0}

        self.wait(done, "the end", 240)

    def wait(self, true: Callable[[], bool], what: str, limit: float) -> None:
        """Wait for a condition; fails after `limit` seconds."""
        deadline = time.monotonic() + limit
        while not true():
            assert time.monotonic() < deadline, f"no {what} within {limit} seconds\n{self.tail()}"
            time.sleep(0.02)

    def losses(self, host: Host) -> int:
        """The number of ranks on this host that reported lost ranks."""
        return self.output(host).count("lost the other ranks")

    def tail(self) -> str:
        return "\n".join(f"{host.name}: {self.output(host)[-3000:]}" for host in self.hosts)

    def in_mid_run(self, what: Callable[[], None], *witnesses: Host) -> None:
        """Cause a fault, and check that the ranks of these hosts detect it in time."""
        self.wait(lambda: self.step >= CUT, f"step {CUT}", 120)
        before = {host.name: self.losses(host) for host in witnesses}
        what()
        self.wait(
            lambda: all(self.losses(host) > before[host.name] for host in witnesses),
            "word of the loss",
            RANK_TIMEOUT + 10,
        )
        assert self.step < STEPS, "the run was over before"


@pytest.fixture
def job(two: list[Host], tmp_path: Path, numbers: Path, request: pytest.FixtureRequest) -> Job:
    return Job(two, tmp_path, numbers, request.param)


def assert_same(run: Path, alone: Path) -> None:
    """Both runs have the same losses and weights to rounding; each step is in the metrics once."""
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, alone))
    assert weights.keys() == expected.keys()
    assert max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items()) < 5e-5
    result, right = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, alone)
    )
    assert [record["step"] for record in result] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in result] == pytest.approx([record[name] for record in right], abs=2e-4)
    assert result[-1]["val_loss"] == pytest.approx(right[-1]["val_loss"], abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["fsdp", "ddp"], indirect=True)
def test_two_hosts_equal_one_process(job: Job, alone: Path) -> None:
    for host in job.hosts:
        job.start(host)
    job.wait(lambda: all(process.poll() is not None for process in job.running.values()), "end", 240)
    assert {process.poll() for process in job.running.values()} == {0}, job.tail()
    assert f"on 4 ranks ({job.parallel}) of cpu" in job.output(job.hosts[0])
    assert_same(job.run, alone)
    caches = [
        sorted(path.relative_to(home) for path in home.rglob("*") if path.is_file())
        for home in (job.folder / f"home-{host.name}" for host in job.hosts)
    ]
    assert caches[0]  # the text's tokens
    assert caches[0] == caches[1]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["ddp", "fsdp"], indirect=True)
def test_a_host_that_reconnects_rejoins_the_run(job: Job, alone: Path) -> None:
    first, second = job.hosts
    for host in job.hosts:
        job.start(host)
    job.in_mid_run(second.disconnect, first, second)
    second.connect()
    job.supervise(first, second)
    assert job.output(first).count(f"on 4 ranks ({job.parallel}) of cpu") >= 2
    assert_same(job.run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["ddp"], indirect=True)
@pytest.mark.parametrize("number", [0, 1])
def test_a_restarted_host_rejoins_the_run(job: Job, alone: Path, number: int) -> None:
    lost, other = job.hosts[number], job.hosts[1 - number]
    for host in job.hosts:
        job.start(host)

    def reboot() -> None:
        lost.disconnect()
        lost.crash()
        lost.connect()

    job.in_mid_run(reboot, other)
    job.supervise(*job.hosts)
    assert_same(job.run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["ddp", "fsdp"], indirect=True)
def test_the_run_continues_without_a_lost_host(job: Job, alone: Path) -> None:
    job.nnodes, job.rdzv_conf = "1:2", "last_call_timeout=3"
    first, second = job.hosts
    for host in job.hosts:
        job.start(host)

    def power_cut() -> None:
        second.disconnect()
        second.crash()

    job.in_mid_run(power_cut, first)
    job.supervise(first)
    assert f"on 2 ranks ({job.parallel}) of cpu" in job.output(first)
    assert_same(job.run, alone)


def test_hosts_leave_nothing(permitted: None, tmp_path: Path) -> None:
    left, killed = (f"{1000 + number}.{time.time_ns()}" for number in range(2))
    sleeping: list[Process] = []

    def fails(host: Host) -> None:
        with (tmp_path / "log").open("w") as log:
            sleeping.append(host.start(["sleep", left], {}, log, tmp_path))
        wait_for(lambda: runs(left))
        raise ValueError

    with pytest.raises(ValueError), virtual_hosts(1, tmp_path) as (host,):
        fails(host)
    assert sleeping[0].wait(10) != 0
    assert not runs(left)
    program = f"""
from pathlib import Path
from tests.helpers.virtual_hosts import virtual_hosts
with virtual_hosts(1, Path.cwd()) as (host,), open("log", "w") as log:
    host.start(["sleep", "{killed}"], {{}}, log, Path.cwd()).wait()
"""
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    user = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, **path})
    wait_for(lambda: runs(killed))
    user.kill()
    user.wait()
    wait_for(lambda: not runs(killed))


def runs(seconds: str) -> bool:
    """Return whether a process sleeps for this many seconds."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{seconds}\0".encode():
                return True
        except OSError:  # it has just ended
            continue
    return False


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
