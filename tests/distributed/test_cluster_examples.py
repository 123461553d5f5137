"""The cluster examples, each run with fake versions of ssh, srun and torchrun.

Their arguments are checked by the parsers of torchrun and gpt2.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config
from torch.distributed.run import get_args_parser

from tests.helpers.cli_helpers import run_cli
from tests.helpers.fake_clusters import (
    ADDRESSES,
    ALL_EXAMPLES,
    EXAMPLES,
    FAILED,
    HOSTS,
    SCRIPTS,
    STOPPED,
    FakeCluster,
    launch_example,
    load_yaml_documents,
    running_processes,
)

GUIDE = EXAMPLES.parent / "docs" / "distributed.md"


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    cluster = FakeCluster(tmp_path)
    cluster.set_behavior(one="end", two="end", three="end")
    return cluster


@pytest.mark.parametrize("example", ALL_EXAMPLES)
def test_the_examples_use_valid_flags(
    example: str, cluster: FakeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)  # torchrun's parser would read them
    result = {
        host: get_args_parser().parse_args(arguments) for host, arguments in launch_example(example, cluster).items()
    }
    for args in result.values():
        assert (args.module, args.training_script) == (True, "gpt2")
        assert (args.rdzv_backend, args.max_restarts, int(args.nnodes)) == ("c10d", 3, len(HOSTS))
        assert args.nproc_per_node in ("8", "gpu")
    assert len({(args.rdzv_endpoint, args.rdzv_id, *args.training_script_args) for args in result.values()}) == 1
    host, _, port = result["one"].rdzv_endpoint.partition(":")
    assert host in ("one", ADDRESSES["one"], "gpt2-124m-node-0-0.gpt2-124m")
    assert 1024 < int(port) < 32768  # below those that a system gives away

    command, *flags = result["one"].training_script_args
    assert command == "train"
    monkeypatch.delenv("HOME")  # nothing of this machine's
    code, out, err = run_cli(capsys, "train", *flags, "--print-config")
    assert (code, err) == (0, "")
    config = tomllib.loads(out)
    assert config["name"] == "gpt2-124m"
    assert config["resume"] == "auto"
    assert config["out_dir"] in ("/shared/runs", "/shared disk/runs")
    assert config["data"] in ("/data of mine", "/data/fineweb10B", "/shared/fineweb10B")
    assert config["batch_size"] % (hosts_and_gpus(example) * config["micro_batch_size"]) == 0

    given = cluster.variables("two")
    assert given["GPT2_HOME"]
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30
    assert given["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def hosts_and_gpus(example: str) -> int:
    """The number of GPUs in the example."""
    if example == "slurm.sh":
        return int(batch_options()["nodes"]) * int(batch_options()["gpus-per-node"])
    if example == "skypilot.yaml":
        (task,) = load_yaml_documents(example)
        return task["num_nodes"] * int(task["resources"]["accelerators"].partition(":")[2])
    if example == "trainjob.yaml":
        trainer = load_yaml_documents(example)[2]["spec"]["trainer"]
        assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])
        return trainer["numNodes"] * trainer["numProcPerNode"]
    return 1  # as many as there are


@pytest.mark.parametrize("example", ["ssh.sh", "skypilot.yaml", "trainjob.yaml"])
def test_only_the_first_host_is_the_rendezvous_host(example: str, cluster: FakeCluster) -> None:
    parsed = {host: get_args_parser().parse_args(result) for host, result in launch_example(example, cluster).items()}
    meets = {host: _parse_rendezvous_config(args.rdzv_conf)["is_host"] for host, args in parsed.items()}
    assert meets == {"one": "true", "two": "false", "three": "false"}
    own = {host: args.local_addr for host, args in parsed.items()}
    expected = {"ssh.sh": {host: host for host in HOSTS}, "skypilot.yaml": ADDRESSES}
    assert own == expected.get(example, dict.fromkeys(HOSTS))


def texts_of_shells() -> dict[str, str]:
    """All bash code of the examples."""
    texts = {name: (EXAMPLES / name).read_text(encoding="utf-8") for name in SCRIPTS}
    (task,), job = load_yaml_documents("skypilot.yaml"), load_yaml_documents("trainjob.yaml")[2]
    bash = "#!/bin/bash\n"
    return texts | {
        "skypilot setup": bash + task["setup"],
        "skypilot run": bash + task["run"],
        "trainjob": bash + job["spec"]["trainer"]["command"][-1],
    }


def test_bash_and_shellcheck_find_nothing(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, text in texts_of_shells().items():
        script = tmp_path / name
        script.write_text(text)
        for command in (["bash", "-n"], [shellcheck] if shellcheck else ["true"]):
            result = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
            assert (result.returncode, result.stdout, result.stderr) == (0, "", ""), name


# ssh.sh


def test_without_a_host_ssh_says_how_it_is_used(cluster: FakeCluster) -> None:
    command = ["bash", str(EXAMPLES / "ssh.sh")]
    result = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


def test_a_host_that_fails_stops_the_others(cluster: FakeCluster) -> None:
    cluster.set_behavior(one="run", two="fail", three="run")
    code, stderr_text = cluster.run("ssh.sh")
    assert code == FAILED
    assert f"ssh.sh: torchrun on two ended with code {FAILED}\n" in stderr_text
    assert [host for host in HOSTS if cluster.has_note(f"{host}.stopped")] == ["one", "three"]


def test_a_host_that_cannot_be_reached_stops_the_others(cluster: FakeCluster) -> None:
    cluster.set_behavior(one="run", two="run")
    (cluster.notes / "three.does").unlink()
    code, stderr_text = cluster.run("ssh.sh")
    assert code
    assert "no route to three" in stderr_text
    assert not any(cluster.has_note(f"{host}.started") != cluster.has_note(f"{host}.stopped") for host in HOSTS)


def test_a_host_that_is_done_stops_nobody(cluster: FakeCluster) -> None:
    cluster.set_behavior(one="run, done", two="end", three="run, done")
    with cluster.running("ssh.sh") as process:
        time.sleep(0.3)
        assert process.poll() is None
        assert not any(cluster.has_note(f"{host}.stopped") for host in HOSTS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, "all ended well, though they were stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_all_are_stopped_with_the_script(number: signal.Signals, cluster: FakeCluster) -> None:
    cluster.set_behavior(one="run", two="run", three="run")
    with cluster.running("ssh.sh") as process:
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # which is how a terminal sends it
        else:
            process.send_signal(number)
        code = process.wait(20)
        assert code == (-number if number == signal.SIGKILL else STOPPED)
        cluster.wait_for(*(f"{host}.stopped" for host in HOSTS))


def test_nothing_is_left_behind(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.environment["TMPDIR"] = str(tmp_path / "tmp")
    (tmp_path / "tmp").mkdir()
    cluster.set_behavior(one="run", two="fail", three="run")
    with cluster.running("ssh.sh") as process:
        assert process.wait(20)
        until = time.monotonic() + 5
        while running_processes(process.pid):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not list((tmp_path / "tmp").iterdir())


# slurm.sh

# https://slurm.schedmd.com/sbatch.html
SBATCH = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "time",
    "signal",
    "requeue",
    "open-mode",
    "output",
}
SRUN_OPTIONS = {"kill-on-bad-exit", "wait"}  # https://slurm.schedmd.com/srun.html


def batch_options() -> dict[str, str]:
    """The options of the #SBATCH lines before the first command."""
    text = (EXAMPLES / "slurm.sh").read_text(encoding="utf-8")
    comments, commands = re.split(r"^(?=[^#\n])", text, maxsplit=1, flags=re.MULTILINE)
    assert "#SBATCH" not in commands
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", comments, re.MULTILINE))


def test_the_sbatch_options_exist() -> None:
    options = batch_options()
    assert options.keys() <= SBATCH
    assert options["ntasks-per-node"] == "1"
    assert options["requeue"] == ""
    assert re.fullmatch(r"\d+:\d\d:\d\d", options["time"])


def test_there_is_time_to_save_before_the_limit(cluster: FakeCluster) -> None:
    launch_example("slurm.sh", cluster)
    found = re.fullmatch(r"B:USR1@(\d+)", batch_options()["signal"])
    assert found
    save = int(cluster.variables("one")["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert save < int(found[1])
    result = dict(
        word.removeprefix("--").split("=")
        for word in cluster.arguments("srun")
        if word.startswith("--") and "=" in word
    )
    assert result.keys() == SRUN_OPTIONS
    assert result["kill-on-bad-exit"] == "0", "the first to end would have the others killed while they save"
    assert int(result["wait"]) >= save
    assert cluster.variables("one")["SRUN_CPUS_PER_TASK"] == "32"


@pytest.mark.parametrize(("does", "code", "again"), [("run", STOPPED, True), ("run, done", 0, False)])
def test_a_time_limit_becomes_a_saved_run_that_is_queued_again(
    does: str, code: int, again: bool, cluster: FakeCluster
) -> None:
    cluster.set_behavior(one=does, two=does, three=does)
    with cluster.running("slurm.sh") as process:
        process.send_signal(signal.SIGUSR1)  # to the batch shell alone
        assert process.wait(20) == code
    assert all(cluster.has_note(f"{host}.stopped") for host in HOSTS)
    assert cluster.has_note("requeued") == again
    assert not cluster.has_note("srun.signal")


def test_what_fails_is_not_queued_again(cluster: FakeCluster) -> None:
    cluster.set_behavior(one="fail", two="fail", three="fail")
    assert cluster.run("slurm.sh")[0] == FAILED
    assert not cluster.has_note("requeued")


# skypilot.yaml

# Those fields of https://docs.skypilot.co/en/latest/reference/yaml-spec.html that a job like ours has a use for.
SKY_TASK = {"name", "num_nodes", "resources", "workdir", "file_mounts", "volumes", "envs", "secrets", "setup", "run"}
SKY_RESOURCES = {
    "infra",
    "accelerators",
    "cpus",
    "memory",
    "disk_size",
    "network_tier",
    "use_spot",
    "image_id",
    "job_recovery",
}
SKY_RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
SKY_STORAGE = {"name", "source", "store", "mode"}


def test_the_skypilot_fields_exist() -> None:
    (task,) = load_yaml_documents("skypilot.yaml")
    assert task.keys() <= SKY_TASK
    assert task["resources"].keys() <= SKY_RESOURCES
    assert task["resources"]["job_recovery"].keys() <= SKY_RECOVERY
    assert all(isinstance(value, str) for value in task["envs"].values())
    for path, mount in task["file_mounts"].items():
        assert path.startswith("/")
        assert mount.keys() <= SKY_STORAGE
        assert mount["mode"] in ("MOUNT_CACHED", "COPY"), "the run folder is appended to, which MOUNT cannot"
    assert task["file_mounts"]["/shared"]["mode"] == "MOUNT_CACHED"
    assert "/data/fineweb10B" in task["file_mounts"]
    for name in re.findall(r"[\w./-]+\.txt", task["setup"]):
        assert (EXAMPLES.parent / name).is_file()


# The guide


def test_links_and_flags_in_the_guide_exist(capsys: pytest.CaptureFixture[str]) -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert len(guide.splitlines()) < 200
    for link in re.findall(r"\]\(([^)#]+)\)", guide):
        assert link.startswith("https://") or (GUIDE.parent / link).exists(), link
    linked = re.findall(r"\]\(\.\./examples/([^)]+)\)", guide)
    assert set(linked) >= set(ALL_EXAMPLES)
    ours = set(re.findall(r"--[a-z-]+", run_cli(capsys, "train", "--help")[1] + run_cli(capsys, "plan", "--help")[1]))
    torchs = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", guide))
    assert named - ours - torchs == {"--signal"}  # scancel's
    assert "--resume" in named


def test_error_messages_in_the_guide_are_in_the_code() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    sources = [*(EXAMPLES.parent / "src" / "gpt2").rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\n\s*f?"', "", code)  # strings over several lines
    rows = guide.split("| message |")[1].split("\n\n")[0].splitlines()[2:]
    named = [line.split("|")[1].strip().strip("`") for line in rows]
    assert len(named) > 10
    assert [words for words in named if words not in code] == []
