"""Hostile and broken clients: incomplete requests, unread streams, invalid HTTP. The next client is served."""

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
from gpt2.serve import middleware, sse, tokenizer_threads, uvicorn_server
from gpt2.serve.limits import Limits
from gpt2.serve.schema import ErrorBody
from gpt2.serve.uvicorn_server import bind_socket
from tests.helpers.live_server import LiveServer

pytest_plugins = "tests.helpers.server_fixtures"
pytestmark = pytest.mark.usefixtures("server_still_works")
COMPLETIONS = "/v1/completions"
LONG = 10**6
SERVER_LIMITS = Limits(slots=4, max_tokens=LONG)
HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
ENDLESS = {"prompt": "x", "max_tokens": LONG, "logit_bias": {"256": -100}}


@pytest.fixture
def plain(server: LiveServer) -> Iterator[socket.socket]:
    """A raw connection to the server."""
    with socket.create_connection(address_of(server), timeout=20) as one:
        yield one


def address_of(server: LiveServer) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def read_to_end(plain: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    parts = []
    while part := plain.recv(2**16):
        parts.append(part)
    return b"".join(parts)


def read_error(plain: socket.socket) -> bytes:
    """Read to the end of an error body; the connection may stay open."""
    data = b""
    while not data.endswith(b"}}"):
        part = plain.recv(2**16)
        assert part, data
        data += part
    return data


def request(asked: Any, more: str = "") -> bytes:
    body = json.dumps(asked).encode()
    return f"{HEAD}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def error_in(data: bytes, status: int) -> str:
    """The message of the only response, checked against the schema."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), data
    error = ErrorBody.model_validate(json.loads(body), strict=True).error
    assert "\n" not in error.message
    return error.message


@pytest.mark.parametrize("sent", [b"P", b"POST /v1", HEAD.encode()[:-2]])
def test_an_incomplete_header_times_out(server: LiveServer, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it arrives byte by byte, and after a response."""
    monkeypatch.setattr(uvicorn_server, "HEADER_TIMEOUT_SECONDS", 0.3)
    for before in (b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"):
        with socket.create_connection(address_of(server), timeout=20) as plain:
            if before:
                plain.sendall(before)
                assert b"200 OK" in plain.recv(2**16)
                time.sleep(0.05)
            began = time.monotonic()
            for byte in sent:
                plain.sendall(bytes([byte]))
            assert b"200 OK" not in read_to_end(plain)
            assert 0.2 < time.monotonic() - began < 4


def test_an_incomplete_body_times_out(plain: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_SECONDS", 0.1)
    plain.sendall(request(ENDLESS)[:-3])
    assert "did not arrive" in error_in(read_error(plain), 408)


def test_an_unread_stream_is_closed(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream fills the buffers of both sockets, and then waits until the send timeout."""
    monkeypatch.setattr(sse, "SEND_TIMEOUT_SECONDS", 0.2)
    send_events, timeouts = sse.SSEResponse._send_events, []

    async def recorded(*given: Any) -> None:
        try:
            await send_events(*given)
        except TimeoutError as error:
            timeouts.append(error)
            raise

    monkeypatch.setattr(sse.SSEResponse, "_send_events", recorded)
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect(address_of(server))
        plain.sendall(request(ENDLESS | {"stream": True, "n": 4, "logprobs": 20}))
        until = time.monotonic() + 60
        while not timeouts:
            assert time.monotonic() < until
            time.sleep(0.01)
        server.wait_until_idle()


def test_the_socket_has_a_user_timeout() -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no TCP_USER_TIMEOUT")
    with bind_socket("127.0.0.1", 0) as bound:
        wanted = 1000 * sse.SEND_TIMEOUT_SECONDS
        assert bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == wanted


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"hello\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 2**18 + b"\r\n\r\n",
        b"GET /" + b"y" * 2**18 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        HEAD.encode() + b"Content-Length: -1\r\n\r\n",
        HEAD.encode() + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
    ids=["tls", "words", "0.9", "no host", "two hosts", "long header", "long path", "minus", "two lengths", "no chunk"],
)
def test_invalid_http_gets_an_error_body(plain: socket.socket, sent: bytes) -> None:
    try:
        plain.sendall(sent)
        data = read_to_end(plain)
    except ConnectionError:  # closed before everything was sent
        return
    assert error_in(data, 400) == "this is not HTTP/1.1"


def test_invalid_data_after_a_response_gets_no_second_one(plain: socket.socket) -> None:
    """The request is refused before its body is read, and its body is not a valid chunk."""
    plain.sendall(f"{HEAD}Transfer-Encoding: chunked\r\nOrigin: http://evil.example\r\n\r\n".encode())
    data = read_error(plain)
    plain.sendall(b"nonsense\r\n")
    assert "other sites" in error_in(data + read_to_end(plain), 403)


def test_pipelined_requests_are_answered_in_order(server: LiveServer, plain: socket.socket) -> None:
    """All are sent before the first response is read."""
    asked = [{"prompt": "x", "seed": seed, "max_tokens": 5, "logit_bias": {"256": -100}} for seed in range(4)]
    plain.sendall(b"".join(map(request, asked)) + request({"prompt": 1}, "Connection: close\r\n"))
    data = read_to_end(plain)
    with server.client() as client:
        wanted = [client.post(COMPLETIONS, json=one).json()["choices"][0]["text"] for one in asked]
    bodies = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in data.split(b"HTTP/1.1 ")[1:]]
    assert [body["choices"][0]["text"] for body in bodies[:4]] == wanted
    assert bodies[4]["error"]["param"] == "prompt"


def test_an_unsupported_upgrade_is_a_plain_request(plain: socket.socket) -> None:
    plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n")
    assert read_to_end(plain).startswith(b"HTTP/1.1 200 OK")


def test_a_body_where_none_is_read_is_not_read(server: LiveServer, plain: socket.socket) -> None:
    """The response comes before the body, which never arrives."""
    plain.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n" + b"x" * 1000)
    assert plain.recv(2**16).startswith(b"HTTP/1.1 200 OK")


def test_bodies_that_arrive_together_are_limited(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_ARRIVING_BODIES", 1)
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_SECONDS", 20)
    half = b"x" * (SERVER_LIMITS.max_body * 2 // 3)
    head = f"{HEAD}Content-Length: {SERVER_LIMITS.max_body}\r\n\r\n".encode()
    with (
        socket.create_connection(address_of(server), timeout=20) as one,
        socket.create_connection(address_of(server), timeout=20) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        list(pool.map(lambda plain: plain.sendall(head + half), (one, other)))
        ready, _, _ = select.select([one, other], [], [], 20)
        assert "too many request bodies" in error_in(read_error(ready[0]), 429)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_request_with_two_lengths_is_refused_and_closed(plain: socket.socket, method: str) -> None:
    """What follows it is no second request: a proxy may have taken it for a part of the body."""
    head = request({"prompt": "x"}, "Transfer-Encoding: chunked\r\n").partition(b"\r\n\r\n")[0]
    plain.sendall(head.replace(b"POST", method.encode()) + b"\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert "not both" in error_in(read_to_end(plain), 400)


@pytest.mark.parametrize("host", ["evil@localhost", "localhost#.evil", "localhost/x", "localhost?x", "[::1]x", ""])
def test_a_host_header_is_a_host_and_a_port(host: str) -> None:
    assert middleware._hostname(host) is None


@pytest.mark.parametrize(
    ("host", "name"), [("localhost", "localhost"), ("LOCALHOST:80", "localhost"), ("[::1]:8", "::1")]
)
def test_a_host_header_names_a_host(host: str, name: str) -> None:
    assert middleware._hostname(host) == name


def test_connections_beyond_the_limit_replace_those_that_wait(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Idle connections are closed, the oldest first; the next request is answered, and one warning is logged."""
    monkeypatch.setattr(uvicorn_server, "max_connections", lambda: 3)
    opened = [socket.create_connection(address_of(server), timeout=20) for _ in range(20)]
    with server.client() as client:
        assert client.get("/health").status_code == 200
    assert all(is_closed(plain) for plain in opened[:17])
    for plain in opened:
        plain.close()
    assert len([record for record in caplog.records if "connection(s) closed" in record.getMessage()]) == 1


def test_connections_beyond_the_limit_are_closed_if_none_waits(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = f"{HEAD}Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n".encode()
    with socket.create_connection(address_of(server), timeout=20) as busy:
        busy.sendall(head)
        assert b"100 Continue" in busy.recv(2**16)
        monkeypatch.setattr(uvicorn_server, "max_connections", lambda: 1)
        with socket.create_connection(address_of(server), timeout=20) as other:
            assert is_closed(other)
        assert not is_closed(busy)


def is_closed(plain: socket.socket) -> bool:
    plain.settimeout(0.5)
    try:
        return plain.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_health_is_answered_while_texts_are_tokenized(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a template is rendered: both run in threads, of which there are few."""
    release, entered = threading.Event(), threading.Semaphore(0)
    encode = server.models["tiny"].tokenizer.encode

    def slow(*given: Any, **options: Any) -> list[int]:
        entered.release()
        release.wait(30)
        return encode(*given, **options)

    monkeypatch.setattr(server.models["tiny"].tokenizer, "encode", slow)
    requests = [("/tokenize", {"text": "x"}), (COMPLETIONS, {"prompt": "x", "max_tokens": 1})] * 2
    requests += [("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})]
    with ThreadPoolExecutor(len(requests)) as pool, server.client() as client:
        replies = [pool.submit(client.post, path, json=body) for path, body in requests]
        try:
            for _ in range(tokenizer_threads.MAX_THREADS):
                assert entered.acquire(timeout=20)
            assert client.get("/health").status_code == 200
            assert not any(reply.done() for reply in replies)
        finally:
            release.set()
        assert [reply.result().status_code for reply in replies] == [200] * len(requests)
