"""Spellings of requests that clients use: paths, HEAD, request ids, fields of /tokenize, aliases, browsers' CORS."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
from gpt2.serve.errors import APIError
from gpt2.serve.metrics import Metrics
from gpt2.serve.middleware import AccessPolicy, RequestMiddleware
from tests.helpers.live_server import SMALL_LIMITS, LiveServer, run_server, temporary_home

KEY = "a-key"
SITE = "https://chat.example"
OTHER = "https://evil.example"


@pytest.fixture(scope="module")
def server(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    options = {"aliases": {"gpt-3.5-turbo": "tiny"}, "allowed_origins": [f"{SITE}/"]}
    with (
        temporary_home(compiled, tmp_path_factory.mktemp("home")),
        run_server(SMALL_LIMITS, AccessPolicy(api_keys=[KEY]), options) as served,
    ):
        yield served


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client(KEY) as one:
        yield one


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "/v1/models/", "//v1/models//"])
def test_slashes_more_or_less(server: LiveServer, client: httpx.Client, path: str) -> None:
    url = server.url + path
    assert client.get(url).json() == client.get("/v1/models").json()
    with server.client() as without_key:
        assert without_key.get(url).status_code == 401
    posted = client.post(server.url + "//v1/completions/", json={"prompt": "x", "max_tokens": 1})
    assert posted.status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny", "/nothing"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert client.get("/health").status_code == 200  # on the same connection


def test_every_response_has_a_request_id(server: LiveServer, client: httpx.Client) -> None:
    ids = [client.get("/v1/models").headers["x-request-id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert client.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/v1/models", headers={"X-Request-Id": "a b" * 99}).headers["x-request-id"].startswith("req_")
    with server.client() as without_key:
        assert "x-request-id" in without_key.get("/v1/models").headers


def test_v1_lists_the_endpoints(client: httpx.Client) -> None:
    assert "POST /v1/chat/completions" in client.get("/v1").json()["endpoints"]
    assert client.get("/v1/").status_code == 200


def test_tokenize_takes_the_fields_of_other_servers(client: httpx.Client) -> None:
    wanted = client.post("/tokenize", json={"text": "Hello"}).json()
    assert client.post("/tokenize", json={"prompt": "Hello", "add_special_tokens": True}).json() == wanted
    assert client.post("/tokenize", json={"content": "Hello"}).json() == wanted
    for body in {}, {"text": None}, {"text": "a", "prompt": "b"}:
        error = client.post("/tokenize", json=body).json()["error"]
        assert error["message"] == "give the text in one of the fields text, prompt and content"
        assert error["param"] == "text"


def test_an_alias_is_another_name_of_the_model(client: httpx.Client) -> None:
    asked = {"prompt": "x", "seed": 1, "max_tokens": 5}
    aliased, plain = (client.post("/v1/completions", json=asked | {"model": m}) for m in ("gpt-3.5-turbo", "tiny"))
    assert aliased.json()["choices"] == plain.json()["choices"]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "gpt-3.5-turbo"]
    assert client.get("/v1/models/gpt-3.5-turbo").json()["id"] == "gpt-3.5-turbo"
    assert list(client.get("/health").json()["models"]) == ["tiny"]


def test_pages_of_allowed_origins_can_use_the_server(server: LiveServer, client: httpx.Client) -> None:
    preflight = {
        "Origin": SITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    with server.client() as browser:  # a preflight request has no key
        answer = browser.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SITE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == preflight["Access-Control-Request-Headers"]
    assert "Origin" in answer.headers["vary"]
    reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"Origin": SITE})
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == SITE
    assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()
    with server.client() as browser:  # so that a page can read the error
        denied = browser.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": SITE})
    assert (denied.status_code, denied.headers["access-control-allow-origin"]) == (401, SITE)


def test_pages_of_other_origins_cannot(client: httpx.Client) -> None:
    asked = {"Origin": OTHER, "Access-Control-Request-Method": "POST"}
    for answer in client.options("/v1/completions", headers=asked), client.get("/v1/models", headers={"Origin": OTHER}):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("gpt2.example", "https://gpt2.example", 200),
        ("gpt2.example:443", "https://gpt2.example", 200),
        ("gpt2.example", "https://gpt2.example:443", 200),
        ("gpt2.example:80", "http://gpt2.example", 200),
        ("GPT2.example:8000", "http://gpt2.example:8000", 200),
        ("127.0.0.1:8000", "https://gpt2.example", 200),  # a tunnel that passes on another Host
        ("127.0.0.1:8000", "https://gpt2.example:8443", 403),
        ("127.0.0.1:8000", "http://localhost", 403),  # another server of this machine
        ("gpt2.example:443", "http://gpt2.example:8000", 403),
        ("gpt2.example", "https://gpt2.example.evil", 403),
        ("gpt2.example", "null", 403),
        ("gpt2.example", "ftp://gpt2.example", 403),
    ],
)
def test_the_origin_is_this_server_or_an_allowed_host(host: str, origin: str, status: int) -> None:
    access = AccessPolicy(allowed_hosts=["localhost", "127.0.0.1", "gpt2.example"])
    middleware = RequestMiddleware(unused_app, access, 1, Metrics({}), [])
    headers = Headers({"host": host, "origin": origin})
    if status == 200:
        middleware._check_host(headers)
    else:
        with pytest.raises(APIError, match="other sites"):
            middleware._check_host(headers)


async def unused_app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError
