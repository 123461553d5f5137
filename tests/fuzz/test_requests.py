"""Hostile requests to `gpt2 serve`: during each, /health is answered within half a second; SIGTERM ends the process.

The half second is CPU time of the server and its template processes while /health waits, so that it does not depend on
what else the machine does: on an idle machine, what blocks the server for longer takes more. What would block it
without computing, such as a lock, is found by a limit of a minute.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
from gpt2.errors import MAX_MESSAGE_CHARACTERS
from gpt2.model import GPT
from gpt2.serve.schema import ChatRequest, CompletionRequest
from gpt2.terminal import UNSAFE_CHARACTERS
from gpt2.tokenizer import train_bpe
from gpt2.weights import save
from tests.fuzz.checks import SHAPE
from tests.fuzz.corpus import TEMPLATES
from tests.helpers.tokenizer_samples import SENTENCES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CPU time of a process is read from /proc")
HEALTH_CPU_SECONDS = 0.5
HEALTH_WALL_SECONDS = 60.0
ATTEMPTS = 4  # one may fall on a garbage collection; a request that blocks the server delays all of them
GRACE_SECONDS = 5
EXIT_SECONDS = 30  # the grace, and what a busy machine takes to end a process
EXAMPLES = 3000 if "GPT2_FUZZ_SECONDS" in os.environ else 30
M = 10**6
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    port: int
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Server]:
    """`gpt2 serve --log-prompts` of a model whose name and template are hostile."""
    folder, home = tmp_path_factory.mktemp("watchdog"), tmp_path_factory.mktemp("home")
    (home / "native").symlink_to(compiled)
    model = save(GPT(SHAPE), train_bpe(SENTENCES, SHAPE.vocab_size), folder / "na\nme\x1b[2J\u202e")
    loop = "{% if messages[0].content == 'loop' %}" + TEMPLATES["three loops"] + "{% endif %}{{ messages[0].content }}"
    (model / "chat_template.jinja").write_text(loop)
    flags = ("--port", "0", "--device", "cpu", "--grace", str(GRACE_SECONDS), "--log-prompts")
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpt2", "serve", str(model), *flags],
            stderr=file,
            env={**os.environ, "GPT2_HOME": str(home)},
        )
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8"))):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.05)
        yield Server(process, int(found[1]), log)
    finally:
        process.kill()
        process.wait()


def post(server: Server, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    with contextlib.closing(connection):
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        except ConnectionError:  # it was refused before it was sent
            return 0, b""
        reply = connection.getresponse()
        return reply.status, reply.read()


def send_raw(server: Server, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as plain, contextlib.suppress(OSError):
        plain.sendall(data)
        plain.settimeout(1)
        plain.recv(2**16)


def open_connections(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        time.sleep(0.5)


def cpu_seconds(process: int) -> float:
    """CPU time of a process and those that it started, in seconds; 0 for one that has ended."""
    lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    started = sum(cpu_seconds(int(each)) for each in " ".join(lists).split())
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return started + sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def slowest_health(server: Server, attack: Callable[[], Any]) -> float:
    """The longest time of a GET /health while the attack runs: CPU seconds of the server, and wall time if less."""
    slowest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal slowest
        while not done.is_set():
            start, used = time.monotonic(), cpu_seconds(server.process.pid)
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HEALTH_WALL_SECONDS)
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                assert connection.getresponse().read()
            used = cpu_seconds(server.process.pid) - used
            slowest = max(slowest, min(time.monotonic() - start, used))
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            attack()
        finally:
            done.set()
        watching.result()
    return slowest


def check_health(server: Server, attack: Callable[[], Any]) -> None:
    """Fail if /health is slow in all of `ATTEMPTS` attacks."""
    times: list[float] = []
    while not times or times[-1] >= HEALTH_CPU_SECONDS:
        assert len(times) < ATTEMPTS, times
        times.append(slowest_health(server, attack))


ATTACKS: dict[str, tuple[str, Any]] = {
    "spaces": ("/tokenize", {"text": (" " * 100_000 + "x") * 10}),
    "a long run of spaces": ("/tokenize", {"text": " " * M}),
    "a long word": ("/tokenize", {"text": "a" * M}),
    "special tokens": ("/tokenize", {"text": "<|endoftext|>" * 80_000}),
    "empty strings": ("/detokenize", {"tokens": [""] * M}),
    "negative tokens": ("/detokenize", {"tokens": [-1] * M}),
    "tokens": ("/detokenize", {"tokens": [0] * M}),
    "mixed prompts": (COMPLETIONS, {"prompt": ["x", 1] * 300_000}),
    "prompts": (COMPLETIONS, {"prompt": [[1]] * 600_000}),
    "a long prompt": (COMPLETIONS, {"prompt": " " * 4 * (M - 100)}),
    "stops": (COMPLETIONS, {"stop": [1] * M}),
    "biases": (COMPLETIONS, {"logit_bias": {str(i): "x" for i in range(200_000)}}),
    "unknown fields": (COMPLETIONS, {f"u{i}": 1 for i in range(200_000)}),
    "metadata": (COMPLETIONS, {"prompt": "x", "max_tokens": 1, "metadata": {"a": [[]] * M}}),
    "a long model name": ("/inspect/next", {"text": "x", "model": "m" * 4 * (M - 100)}),
    "empty messages": (CHAT, {"messages": [{}] * M}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 100_000}]}),
    "a template that loops": (CHAT, {"messages": [{"role": "user", "content": "loop"}]}),
    "control characters": (COMPLETIONS, {"prompt": "\x1b\x9b\u2028\u202e\n", "user": "\x85\u2029", "max_tokens": 1}),
    "deep JSON": (COMPLETIONS, b"[" * 4 * M),
    "digits": (COMPLETIONS, b'{"seed": ' + b"9" * 4 * (M - 100) + b"}"),
    "repeated keys": (COMPLETIONS, b'{"max_tokens": 1, ' + b'"prompt": "x", ' * 200_000 + b'"n": 1}'),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_health_is_answered_during_a_hostile_request(server: Server, name: str) -> None:
    path, body = ATTACKS[name]
    data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    replies: list[tuple[int, bytes]] = []
    check_health(server, lambda: replies.append(post(server, path, data)))
    status, reply = replies[-1]
    assert status in (0, 200, 400, 404, 413)
    assert status in (0, 200) or len(reply) < 2000


@pytest.mark.parametrize(
    "head",
    [
        "GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n",
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n",
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: evil@localhost\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost#.evil\r\n\r\n",
    ],
    ids=["a body of GET", "half a body", "two lengths", "a user name", "a fragment"],
)
def test_health_is_answered_during_a_hostile_header(server: Server, head: str) -> None:
    data = head.encode() + b"x" * 3 * M
    check_health(server, lambda: send_raw(server, data))


def test_health_is_answered_beside_idle_connections(server: Server) -> None:
    check_health(server, lambda: open_connections(server))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "text", "tokens", "top", "position"})


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
)
@given(
    path=st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/inspect/next", "/inspect/score"]),
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), JSON_VALUES, max_size=5) | JSON_VALUES,
)
@example(path=COMPLETIONS, body={"\n": 0})
@example(path=CHAT, body={"\x1b[2J\u202e": 0})
@example(path="/inspect/next", body={"text": "x", "model": "\n\x9b"})
def test_any_json_gets_a_response_that_is_no_server_error(server: Server, path: str, body: Any) -> None:
    status, reply = post(server, path, json.dumps(body).encode())
    assert status in (200, 400, 404)
    if status != 200:
        error = json.loads(reply)["error"]
        for text in (error["message"], error["param"] or ""):
            assert len(text) <= MAX_MESSAGE_CHARACTERS
            assert "\n" not in text
            assert not UNSAFE_CHARACTERS.search(text)


def test_sigterm_ends_the_process_during_hostile_requests(server: Server) -> None:
    """The last test: it ends the server. Its log has one line for each message, without control characters."""
    requests = [ATTACKS[name] for name in ("a template that loops", "spaces", "a long run of spaces")]
    threads = [
        threading.Thread(target=lambda p=path, b=body: ignore_errors(lambda: post(server, p, json.dumps(b).encode())))
        for path, body in requests
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(EXIT_SECONDS) == 0
    for thread in threads:
        thread.join()
    log = server.log.read_text(encoding="utf-8")
    assert not UNSAFE_CHARACTERS.search(log)
    assert "Traceback" not in log
    assert all(line.startswith("gpt2: ") for line in log.split("\n")[:-1])


def ignore_errors(request: Callable[[], Any]) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        request()
