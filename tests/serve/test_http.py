"""The server over plain HTTP: server-sent events, error bodies, access control, limits and disconnects."""

import asyncio
import gc
import json
import random
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
import gpt2
from gpt2.generation.engine import Sequence
from gpt2.serve.limits import Limits
from gpt2.serve.middleware import SECURITY_HEADERS, AccessPolicy
from gpt2.serve.response_stream import ResponseStream
from gpt2.serve.scheduler import RequestHandle
from gpt2.serve.schema import ErrorBody
from gpt2.serve.sse import SSEResponse
from gpt2.templates import ChatTemplate
from tests.helpers.live_server import BYTE_TOKENIZER, SMALL_LIMITS, LiveServer, run_server

pytest_plugins = "tests.helpers.server_fixtures"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
LONG = 4000


def error_in(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, checked against the schema."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = ErrorBody.model_validate(response.json(), extra="forbid", strict=True)
    assert "\n" not in body.error.message
    return body.error.model_dump()


def test_curl_reads_the_stream(server: LiveServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    asked = {"prompt": "curl", "max_tokens": 5, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
    asked["logit_bias"] = {"256": -100}
    command = ["curl", "-sN", "--noproxy", "*", "-i", server.url + COMPLETIONS, "--json", json.dumps(asked)]
    output = subprocess.check_output(command, timeout=20).decode()
    head, _, body = output.partition("\r\n\r\n")
    assert "200 OK" in head
    assert "content-type: text/event-stream; charset=utf-8" in head.lower()
    events = body.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(event.startswith("data: {") for event in events[:-2])
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
    bias: Any = {256: -100}
    assert ["curl" + text] == gpt2.generate(
        server.model, BYTE_TOKENIZER, "curl", max_new_tokens=5, seed=1, logit_bias=bias
    )
    assert chunks[-1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}


def test_texts_are_batch_invariant(server: LiveServer) -> None:
    """Thirty-two requests at the same time, each with the text that it has alone."""
    asked = [
        {"prompt": "x" * (1 + i * 3 % 50), "seed": i, "max_tokens": 5 + i % 30, "temperature": 0.4 + i % 3, "top_k": i}
        for i in range(32)
    ]

    async def go() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
            replies = await asyncio.gather(*(client.post(COMPLETIONS, json=one) for one in asked))
        return [reply.json()["choices"][0]["text"] for reply in replies]

    texts = asyncio.run(go())
    for one, text in zip(asked, texts, strict=True):
        names = ("seed", "temperature", "top_k")
        settings: dict[str, Any] = {name: one[name] for name in names} | {"max_new_tokens": one["max_tokens"]}
        prompt = str(one["prompt"])
        assert [prompt + text] == gpt2.generate(server.model, BYTE_TOKENIZER, prompt, **settings)


def test_tokenize_and_detokenize(client: httpx.Client) -> None:
    reply = client.post("/tokenize", json={"text": "aÄ<|endoftext|>"}).json()
    assert reply == {
        "tokens": [97, 195, 132, 256],
        "texts": ["a", "\ufffd", "\ufffd", "<|endoftext|>"],
        "count": 4,
    }
    assert client.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"text": "aÄ<|endoftext|>"}
    assert error_in(client.post("/detokenize", json={"tokens": [257]}), 400)["param"] == "tokens"
    assert error_in(client.post("/tokenize", json={"text": 1}), 400)["param"] == "text"


def test_health_and_metrics(server: LiveServer, client: httpx.Client) -> None:
    assert client.get("/health").json() == {
        "status": "ok",
        "models": {"tiny": {"running": 0, "waiting": 0, "slots": 4}},
    }

    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    names = ("gpt2_new_tokens_total", "gpt2_prompt_tokens_total", "gpt2_first_token_seconds_count")
    before = [value(name) for name in names]
    client.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 7, "logit_bias": {"256": -100}})
    client.get("/inspect/models")
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [7, 3, 1]
    assert value('gpt2_slots{model="tiny"}') == 4
    assert value('gpt2_requests_total{path="/v1/completions",status="200"}') >= 1
    assert value('gpt2_requests_total{path="/inspect/models",status="200"}') >= 1


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda c: c.get("/nothing"), 404),
        (lambda c: c.get("/v1/models/none/such"), 404),
        (lambda c: c.get(COMPLETIONS), 405),
        (lambda c: c.post(COMPLETIONS, content=b"{", headers=JSON), 400),
        (lambda c: c.post(COMPLETIONS, content=b"\xff\xfe", headers=JSON), 400),
        (lambda c: c.post(COMPLETIONS, json=[1]), 400),
        (lambda c: c.post(COMPLETIONS, content=b"hello"), 400),
        (lambda c: c.post(COMPLETIONS, json={"prompt": "x", "model": "none"}), 404),
        (lambda c: c.post(COMPLETIONS, content=b'{"\\ud800": 1}', headers=JSON), 400),
        (lambda c: c.post(COMPLETIONS, json={"prompt": "x" * 5 * 2**20}), 413),
        (lambda c: c.post(COMPLETIONS, content=(b"x" * 2**16 for _ in range(80))), 413),
        (lambda c: c.post(COMPLETIONS, content=b'{"temperature": NaN}', headers=JSON), 400),
        (lambda c: c.get("/health", headers={"Origin": "https://example.com"}), 403),
        (lambda c: c.get("/health", headers={"Origin": "null"}), 403),
        (lambda c: c.post(CHAT, json={"messages": [{"role": "tools", "content": "x"}]}), 400),
        (lambda c: c.post(CHAT, json={"messages": []}), 400),
        (lambda c: c.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "top_logprobs": 1}), 400),
    ],
)  # fmt: skip
def test_every_error_has_the_error_body(
    client: httpx.Client, send: Callable[[httpx.Client], httpx.Response], status: int
) -> None:
    error_in(send(client), status)


def test_server_faults_have_the_error_body(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2.serve.app.find_model", lambda models, name: 1 / 0)
    assert error_in(client.get("/v1/models/tiny"), 500)["type"] == "server_error"


def test_every_response_has_security_headers(client: httpx.Client) -> None:
    for response in client.get("/health"), client.get("/nothing"), client.post(COMPLETIONS, json={}):
        assert {name: response.headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert "access-control-allow-origin" not in response.headers
    page = client.get("/")  # which has a stricter policy of its own
    assert all(name in page.headers for name in SECURITY_HEADERS)
    for policy in SECURITY_HEADERS["Content-Security-Policy"], page.headers["Content-Security-Policy"]:
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    preflight = client.options(COMPLETIONS, headers={"Origin": "https://a.b", "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 403


def test_a_disconnect_frees_the_slots(server: LiveServer, client: httpx.Client) -> None:
    asked = {"prompt": "x", "max_tokens": LONG, "logit_bias": {"256": -100}}
    with client.stream("POST", COMPLETIONS, json=asked | {"stream": True, "n": 3}) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        assert server.scheduler.running == 3
    server.wait_until_idle()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(asked).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as plain:
        plain.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not server.scheduler.running:
            time.sleep(0.001)
    server.wait_until_idle()


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_disconnects_lose_no_slot_and_no_memory(server: LiveServer, count: int) -> None:
    rng = random.Random(count)

    async def one(client: httpx.AsyncClient, i: int) -> None:
        asked = {"prompt": "x" * rng.randrange(1, 100), "max_tokens": rng.randrange(0, 40), "seed": i}
        asked |= {"stream": rng.random() < 0.5, "n": rng.randrange(1, 4)}
        if rng.random() < 0.2:
            asked |= {"echo": True, "logprobs": 1}
        try:
            async with asyncio.timeout(rng.choice([None, 0.005, 0.02, 0.1])):
                reply = await client.post(COMPLETIONS, json=asked)
                assert reply.status_code in (200, 429), reply.text
        except TimeoutError:
            pass

    async def go() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
            semaphore = asyncio.Semaphore(24)

            async def limited(i: int) -> None:
                async with semaphore:
                    await one(client, i)

            await asyncio.gather(*(limited(i) for i in range(count)))

    asyncio.run(go())
    server.wait_until_idle()
    assert not server.scheduler._open_per_client
    assert not server.scheduler._open_requests
    with server.client() as client:
        assert client.post(COMPLETIONS, json={"prompt": "x", "n": 4, "seed": 1}).status_code == 200
    gc.collect()
    alive = Counter(type(thing) for thing in gc.get_objects())  # local names hold one or two
    assert max(alive[kind] for kind in (ResponseStream, RequestHandle, Sequence, SSEResponse)) < 10


def test_a_full_server_sends_retry_after(home: None) -> None:
    asked = {"prompt": "x", "max_tokens": LONG, "logit_bias": {"256": -100}, "stream": True}
    with run_server(Limits(slots=1, max_waiting=1, per_client=2)) as served, served.client() as client:
        with client.stream("POST", COMPLETIONS, json=asked) as first:
            lines = first.iter_lines()
            assert next(lines).startswith("data: {")
            reply = client.post(COMPLETIONS, json={"prompt": "x", "n": 2})
            assert error_in(reply, 429)["code"] == "rate_limit_exceeded"
            assert 1 <= int(reply.headers["Retry-After"]) <= 60
            assert error_in(client.post(COMPLETIONS, json={"prompt": "x", "n": 3}), 400)["param"] is None
            served.scheduler.drain()
            assert error_in(client.post(COMPLETIONS, json={"prompt": "x"}), 503)["message"].endswith("shutting down")
            assert client.get("/health").status_code == 503
        served.wait_until_idle()


def test_a_request_times_out(home: None) -> None:
    asked = {"prompt": "x", "max_tokens": LONG, "logit_bias": {"256": -100}}
    with run_server(Limits(slots=1, timeout=1)) as served, served.client() as client:
        assert error_in(client.post(COMPLETIONS, json=asked), 504)["type"] == "timeout_error"
        lines = [line for line in client.post(COMPLETIONS, json=asked | {"stream": True}).text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        served.wait_until_idle()


def test_api_keys(home: None) -> None:
    with run_server(SMALL_LIMITS, AccessPolicy(api_keys=["first", "second"])) as served:
        for key in (None, "wrong", "firs", "first second"):
            with served.client(key) as client:
                for path in ("/v1/models", "/metrics", "/nothing"):
                    reply = client.get(path)
                    assert error_in(reply, 401)["code"] == "invalid_api_key"
                    assert reply.headers["WWW-Authenticate"] == "Bearer"
                assert error_in(client.post(COMPLETIONS, json={"prompt": "x"}), 401)
                assert client.post("/inspect/next", json={}).status_code == 401
                assert client.get("/health").status_code == client.get("/").status_code == 200
        for key in ("first", "second"):
            with served.client(key) as client:
                assert client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 200


def test_other_host_names_are_refused(home: None) -> None:
    """DNS rebinding: a page whose name was made to resolve to this machine sends that name."""
    with (
        run_server(SMALL_LIMITS, AccessPolicy(allowed_hosts=["127.0.0.1", "localhost"])) as served,
        served.client() as client,
    ):
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            error_in(client.get("/v1/models", headers={"Host": host}), 403)
        for host in ("localhost", "localhost:99", "LOCALHOST", "127.0.0.1"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200
        mine = {"Host": "localhost:99", "Origin": "http://localhost:99"}
        assert client.get("/v1/models", headers=mine).status_code == 200


def test_the_chat_template_of_the_model_is_used(home: None) -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    source += "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    source += "{% if messages[0]['content'] == 'out' %}{{ ''.__class__.__mro__ }}{% endif %}[assistant]"
    template = ChatTemplate(source, {"bos_token": "<|endoftext|>"})
    asked = {"seed": 1, "max_tokens": 6}
    with run_server(SMALL_LIMITS, template=template) as served, served.client() as client:
        reply = client.post(CHAT, json=asked | {"messages": [{"role": "user", "content": "Hi"}]}).json()
        same = client.post(COMPLETIONS, json=asked | {"prompt": "<|endoftext|>[user]Hi[assistant]"}).json()
        assert reply["choices"][0]["message"]["content"] == same["choices"][0]["text"]
        assert reply["usage"] == same["usage"]
        for word in ("no", "out"):
            reply = client.post(CHAT, json=asked | {"messages": [{"role": "user", "content": word}]})
            assert error_in(reply, 400)["param"] == "messages"


@pytest.mark.parametrize("examples", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_violation(server: LiveServer, examples: int) -> None:
    """Valid and invalid requests generated from /openapi.json."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi import checks

    chosen = [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
    ]
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.large_base_example]
    few = settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
    schema, sent = schemathesis.openapi.from_url(f"{server.url}/openapi.json"), 0

    def check(case: Any) -> None:
        nonlocal sent
        sent += 1
        case.call_and_validate(checks=chosen, timeout=20)

    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            if mode == GenerationMode.NEGATIVE and not operation.body:
                continue
            few(given(operation.as_strategy(generation_mode=mode))(check))()
    assert sent >= 12 * examples
