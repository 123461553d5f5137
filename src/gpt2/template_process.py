"""Untrusted Jinja templates, rendered in a process of their own under limits of time, memory, output and size."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt2.errors import ModelFilesError, RequestError, UserError, missing_extra
from gpt2.terminal import shorten

MAX_SOURCE_CHARACTERS = 2**18
RENDER_SECONDS = 2.0  # of CPU time, for all texts of a request of up to MESSAGES_PER_BUDGET messages, and for compiling
WALL_TIME_FACTOR = 10  # of wall time: for a busy machine, and for Windows, which has no limit of CPU time
MESSAGES_PER_BUDGET = 64
START_SECONDS = 60.0  # for Python and jinja2 to start, before the process has seen the template

_WORKER = Path(__file__).with_name("template_worker.py")
_INHERITED_VARIABLES = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # no keys, no tokens


class TemplateLimitError(RequestError):
    """A template was stopped at its time, or ended its process: rendering it again would take as long again."""


class TemplateProcess:
    """A compiled template. Its process is started when needed, and again after it was stopped for its time.

    source:    a Jinja template.
    variables: its variables beside the messages, such as `eos_token`.

    Raises ModelFilesError for a source that is too long or is not a template.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise missing_extra("jinja2", "serve", "the model's chat template")
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ModelFilesError(
                f"the model's chat template cannot be read: it has {len(source):,} characters, "
                f"and at most {MAX_SOURCE_CHARACTERS:,} are read"
            )
        self._source, self._variables, self._lock = source, variables, threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._process_owner = 0  # after a fork, the pipes belong to the parent
        with self._lock:
            self._start()

    def render(self, messages: Sequence[tuple[str, str]], renders: Sequence[tuple[int, bool]]) -> list[str]:
        """The texts of (number of leading messages, whether to add the generation prompt) each.

        All texts together have `RENDER_SECONDS` for each 64 messages. Raises RequestError if the template fails, and
        TemplateLimitError if it was stopped.
        """
        request = {"messages": list(messages), "variables": self._variables, "renders": list(renders)}
        seconds = RENDER_SECONDS * max(1.0, len(messages) / MESSAGES_PER_BUDGET)
        with self._lock:
            if self._process is None or self._process.poll() is not None or self._process_owner != os.getpid():
                self._start()
            answer = self._ask(request, seconds)
        if "error" in answer:
            kind = TemplateLimitError if answer.get("stopped") else RequestError
            raise kind(f"the model's chat template cannot be used for these messages: {answer['error']}")
        return answer["texts"]

    def _start(self) -> None:
        """Start the process and compile the template in it."""
        environment = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                env=environment,
            )
        except OSError as error:
            raise UserError(f"the process for the chat template cannot be started: {error.strerror}") from error
        self._process, self._process_owner = process, os.getpid()
        weakref.finalize(self, _stop, process, os.getpid())
        ready = self._ask(None, START_SECONDS)
        answer = ready if "error" in ready else self._ask({"source": self._source}, RENDER_SECONDS)
        if "error" in answer:
            _stop(process, os.getpid())
            raise ModelFilesError(f"the model's chat template cannot be read: {answer['error']}")

    def _ask(self, request: Any, seconds: float) -> dict[str, Any]:
        """The answer to a request, None for the start. The process ends after `seconds` of CPU time, or is killed."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()
        wall_seconds = seconds if request is None else seconds * WALL_TIME_FACTOR
        timer = threading.Timer(wall_seconds, lambda: (expired.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                process.stdin.write(json.dumps(request | {"seconds": seconds}) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it ended before it read the request
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n") and not expired.is_set():
            answer = json.loads(line)
            return answer | {"error": shorten(answer["error"], 500)} if "error" in answer else answer
        _stop(process, os.getpid())
        out_of_time = expired.is_set() or process.returncode == -getattr(signal, "SIGPROF", 0)
        error = f"it takes more than {seconds:g} s" if out_of_time else "it ended its process"
        return {"error": error, "stopped": True}


def _stop(process: subprocess.Popen[str], owner: int) -> None:
    """End the process, unless it belongs to the parent of this process."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:  # what was not written yet cannot be
            continue
