"""Several hosts on one machine: Linux namespaces, each with its own name, address and processes.

Each host exists as long as its holder process, which reads from a pipe of the test. So links, mounts and processes of
the host end with the test process.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

IS_ROOT = os.geteuid() == 0  # others need a user namespace, in which they are root
HOLD_COMMAND = "echo held; read -r _"
NSENTER_FLAGS = {"mnt": "mount"}  # nsenter's name, where it differs from that under /proc
NAMESPACE_FILES = {"pid": "pid_for_children"}  # under /proc, where it is not the holder's own namespace

Process = subprocess.Popen[str]


@dataclass(frozen=True, eq=False)
class Host:
    """A host; on all hosts its `name` resolves to its `address`."""

    name: str
    address: str
    holder: Process
    switch: Process
    processes: list[Process] = field(default_factory=list)

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: IO[str], cwd: Path) -> Process:
        """A process on this host; its standard output and error go to `output`."""
        process = subprocess.Popen(
            [*_nsenter(self.holder, "mnt", "uts", "net", "pid"), *command],
            env={**os.environ, **environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def disconnect(self) -> None:
        """Disconnect the host at the switch: packets are lost without an error."""
        _ip(self.switch, f"link set {self.name} down")

    def connect(self) -> None:
        """Reconnect the host."""
        _ip(self.switch, f"link set {self.name} up")

    def crash(self) -> None:
        """Kill all processes on the host; the others notice unless it is disconnected."""
        subprocess.run([*_nsenter(self.holder, "mnt", "pid"), "sh", "-c", "kill -9 -1"], check=True)
        for process in self.processes:
            process.wait()


@contextmanager
def virtual_hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """This many hosts, host1, host2 ..., connected to one switch; removed after the block.

    folder: for the hosts file.

    Raises OSError, with the reason, where the system does not permit it.
    """
    missing = next((tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None), None)
    if missing is not None:
        raise OSError(f"{missing} is not installed")
    places = {f"host{n}": f"10.0.0.{n}" for n in range(1, count + 1)}
    table = folder / "hosts"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in places.items()))
    with ExitStack() as stack:
        switch = stack.enter_context(
            _namespace_holder(["--net", *([] if IS_ROOT else ["--map-root-user"])], HOLD_COMMAND)
        )
        _ip(switch, "link add name switch type bridge", "link set switch up")
        made = []
        for name, address in places.items():
            begin = f"hostname {name} && mount --bind '{table}' /etc/hosts && {HOLD_COMMAND}"
            holder = stack.enter_context(_namespace_holder(["--net", "--uts", "--mount"], begin, _nsenter(switch)))
            _ip(switch, f"link add name {name} master switch type veth peer name eth0 netns {holder.pid}")
            _ip(switch, f"link set {name} up")
            _ip(holder, "link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up")
            made.append(Host(name, address, holder, switch))
        yield made


@contextmanager
def _namespace_holder(kinds: list[str], begin: str, where: Sequence[str] = ()) -> Iterator[Process]:
    """New namespaces of these kinds and a process namespace, in which a shell has run `begin`.

    where: a command prefix that creates them inside other namespaces.
    """
    own = ["--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*where, "unshare", *kinds, *own, "sh", "-c", begin]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stderr is not None
            if holder.stdout.readline() != "held\n":
                raise OSError(" ".join(holder.stderr.read().split()))
            yield holder
        finally:
            holder.kill()  # kills the first process of its namespace, and so all others


def _nsenter(holder: Process, *kinds: str) -> list[str]:
    """The command prefix that runs a command in these namespaces of a holder."""
    files = {
        kind: f"/proc/{holder.pid}/ns/{NAMESPACE_FILES.get(kind, kind)}"
        for kind in (*kinds, *([] if IS_ROOT else ["user"]))
    }
    return [
        "nsenter",
        "--preserve-credentials",
        *(f"--{NSENTER_FLAGS.get(kind, kind)}={file}" for kind, file in files.items()),
    ]


def _ip(holder: Process, *commands: str) -> None:
    """Run `ip` in the network namespace of a holder. Raises OSError with its error output."""
    done = subprocess.run(
        [*_nsenter(holder, "net"), "ip", "-batch", "-"], input="\n".join(commands), capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(" ".join(done.stderr.split()))
