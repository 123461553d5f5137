"""A fake cluster: hosts, ssh, SLURM and torchrun as small scripts that record their arguments."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("slurm.sh", "ssh.sh")
ALL_EXAMPLES = (*SCRIPTS, "skypilot.yaml", "trainjob.yaml")
HOSTS = ("one", "two", "three")
ADDRESSES = {"one": "10.0.0.1", "two": "10.0.0.2", "three": "10.0.0.3"}
JOB_ID = "4242"
STOPPED, FAILED = 1, 3  # exit codes: torchrun's when it is stopped, and the fake one's when it fails

# The fake torchrun records its arguments and environment, and then behaves as the file HOST.does says.
TORCHRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$NOTES/$HOST.arguments"
env -0 > "$NOTES/$HOST.environment"
does=$(cat "$NOTES/$HOST.does")
trap 'echo stopped > "$NOTES/$HOST.stopped"; [[ $does == *done* ]]; exit' TERM
echo $$ > "$NOTES/$HOST.started"
case $does in
    fail) while [[ $(ls "$NOTES"/*.started | wc -l) -lt $EXPECTED ]]; do sleep 0.02; done; exit 3 ;;
    run*) while true; do sleep 0.02; done ;;
esac
"""
# ssh passes everything after the host, as one string, to a shell on that host.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -o) shift 2 ;; *) shift ;; esac; done
host=${1#*@}
shift
echo "$*" > "$NOTES/$host.ssh"
[[ -e $NOTES/$host.does ]] || { echo "no route to $host" >&2; exit 255; }
HOST=$host exec sh -c "$*"
"""
# srun runs the same command on each host; TERM would make it kill them all.
SRUN = """#!/bin/bash
trap 'echo told > "$NOTES/srun.signal"' TERM USR1
printf '%s\\0' "$@" > "$NOTES/srun.arguments"
while [[ $1 == --* ]]; do shift; done
for host in $FAKE_HOSTS; do
    { HOST=$host "$@" || echo $? > "$NOTES/srun.code"; } &
done
wait
exit "$(cat "$NOTES/srun.code" 2>/dev/null || echo 0)"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") [[ $3 == "$SLURM_JOB_NODELIST" ]] && printf '%s\\n' $FAKE_HOSTS ;;
    "requeue $SLURM_JOB_ID") echo again > "$NOTES/requeued" ;;
    *) exit 1 ;;
esac
"""
SCANCEL = """#!/bin/bash
[[ "$*" == "--signal=TERM $SLURM_JOB_ID" ]] && kill -TERM $(cat "$NOTES"/*.started)
"""


class FakeCluster:
    """Fake hosts: a folder of files with the behavior of each, and what it has recorded."""

    def __init__(self, folder: Path) -> None:
        self.notes, self.bin, self.home = (folder / name for name in ("notes", "bin", "home"))
        programs = {"ssh": SSH, "srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "torchrun": TORCHRUN}
        for path in (self.notes, self.bin, self.home / "gpt2"):
            path.mkdir(parents=True)
        for name, text in programs.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        (self.home / "gpt2" / "bin").symlink_to(self.bin)
        (folder / "venv").mkdir()
        (folder / "venv" / "bin").symlink_to(self.bin)
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        self.environment = kept | {
            "PATH": f"{self.bin}:{os.defpath}",
            "HOME": str(self.home),
            "NOTES": str(self.notes),
            "FAKE_HOSTS": " ".join(HOSTS),
            "EXPECTED": str(len(HOSTS)),
            "VENV": str(folder / "venv"),
            "SHARED": "/shared disk",  # a space must go through all shells
            "DATA": "/data of mine",
            "SLURM_JOB_ID": JOB_ID,
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_SUBMIT_DIR": "/submitted/from",
            "SLURM_CPUS_PER_TASK": "32",
        }

    def set_behavior(self, **what: str) -> None:
        """The behavior of torchrun on a host: "end" at once, "fail" when all have started, "run" until it is stopped,
        or "run, done" to exit with code 0 when it is stopped."""
        for host, does in what.items():
            (self.notes / f"{host}.does").write_text(does)

    def has_note(self, name: str) -> bool:
        return (self.notes / name).exists()

    def arguments(self, who: str) -> list[str]:
        return (self.notes / f"{who}.arguments").read_text().split("\0")[:-1]

    def variables(self, host: str) -> dict[str, str]:
        lines = (self.notes / f"{host}.environment").read_text().split("\0")[:-1]
        return dict(line.split("=", 1) for line in lines)

    def command(self, script: str) -> list[str]:
        hosts = [f"me@{HOSTS[0]}", *HOSTS[1:]] if script == "ssh.sh" else []
        return ["bash", str(EXAMPLES / script), *hosts]

    @contextmanager
    def started(self, script: str) -> Iterator[subprocess.Popen[str]]:
        """A script in its own process group, as in a terminal; the group is killed after the block."""
        command, pipe = self.command(script), subprocess.PIPE
        with subprocess.Popen(
            command, env=self.environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        ) as process:
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    @contextmanager
    def running(self, script: str) -> Iterator[subprocess.Popen[str]]:
        """The same, once torchrun has started on every host."""
        with self.started(script) as process:
            self.wait_for(*(f"{host}.started" for host in HOSTS))
            yield process

    def wait_for(self, *names: str) -> None:
        until = time.monotonic() + 20
        while missing := [name for name in names if not self.has_note(name)]:
            assert time.monotonic() < until, missing
            time.sleep(0.01)

    def run(self, script: str) -> tuple[int, str]:
        """The exit code of a script that ends by itself, and its standard error."""
        with self.started(script) as process:
            _, errors = process.communicate(timeout=30)
            return process.returncode, errors

    def run_task(self, script: list[str], host: str, variables: dict[str, str]) -> None:
        """Run the command that the cluster's own launcher runs on each host."""
        subprocess.run(script, env=self.environment | {"HOST": host} | variables, timeout=30, check=True)


def running_processes(group: int) -> list[str]:
    """The processes of a process group that still run, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def load_yaml_documents(name: str) -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return list(yaml.safe_load_all((EXAMPLES / name).read_text(encoding="utf-8")))


def launch_example(example: str, cluster: FakeCluster) -> dict[str, list[str]]:
    """Run the example, and return torchrun's arguments by host."""
    if example in SCRIPTS:
        assert cluster.run(example) == (0, "")
    elif example == "skypilot.yaml":
        (task,) = load_yaml_documents(example)
        for rank, host in enumerate(HOSTS):
            own = {
                "SKYPILOT_NODE_RANK": str(rank),
                "SKYPILOT_NODE_IPS": "\n".join(ADDRESSES.values()),
                "SKYPILOT_NUM_NODES": str(len(HOSTS)),
                "SKYPILOT_NUM_GPUS_PER_NODE": "8",
            }
            cluster.run_task(["bash", "-c", task["run"]], host, task["envs"] | own)
    else:
        trainer = load_yaml_documents(example)[2]["spec"]["trainer"]
        for rank, host in enumerate(HOSTS):
            own = {
                "PET_NNODES": str(len(HOSTS)),
                "PET_NPROC_PER_NODE": "8",
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "gpt2-124m-node-0-0.gpt2-124m",
                "PET_MASTER_PORT": "29500",
            }
            given = {variable["name"]: variable["value"] for variable in trainer["env"]}
            cluster.run_task(trainer["command"], host, given | own)
    return {host: cluster.arguments(host) for host in HOSTS}
