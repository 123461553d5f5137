"""Hostile bodies of requests: out of bounds, deep, long, of other types. The next client is served."""

import gc
import json
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
from gpt2.serve import app as app_module
from gpt2.serve import json_route
from gpt2.serve.limits import Limits
from gpt2.serve.schema import ErrorBody
from tests.helpers.live_server import LiveServer

pytest_plugins = "tests.helpers.server_fixtures"
pytestmark = pytest.mark.usefixtures("server_still_works")
COMPLETIONS = "/v1/completions"
SERVER_LIMITS = Limits(slots=4, max_tokens=10**6)
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [[1], "x"]}, "prompt"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"n": 16, "best_of": 17}, "best_of"),
        ({"n": 128}, "n"),
        ({"prompt": ["x"] * 128, "n": 16}, None),
        ({"temperature": 1e400}, "temperature"),
        ({"logit_bias": {str(10**30): 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"bad_words": [[10**9]]}, "bad_words"),
        ({"model": "\ud800"}, "model"),
        ({"stop": ["\udfff\ud800"]}, "stop"),
        ({"model": "x" * 10**6}, "model"),
        ({"x" * 10**6: 1}, f"{'x' * 148}...{'x' * 49}"),
        ({"prompt": "x" * 10**6}, "prompt"),
    ],
)
def test_a_request_out_of_bounds_is_refused(server: LiveServer, asked: dict[str, Any], param: str | None) -> None:
    with server.client() as client:
        reply = client.post(COMPLETIONS, content=json.dumps({"prompt": "x"} | asked).encode(), headers=JSON)
    assert reply.status_code in (400, 404)
    error = ErrorBody.model_validate(reply.json(), strict=True).error
    assert error.param == param
    assert "\n" not in error.message
    assert len(error.message) < 1000


@pytest.mark.parametrize("body", [b"[" * 10**6, b'{"a":' * 10**5, b'{"prompt": ' + b"[" * 10**5, b"9" * 10**6])
def test_deep_and_long_json_is_refused(server: LiveServer, body: bytes) -> None:
    with server.client() as client:
        assert client.post(COMPLETIONS, content=body, headers=JSON).status_code == 400


@pytest.mark.parametrize("text", ["\ud800", "\0", "\u202e\ufeff", "\U0010ffff", "é́́́́", "\r\n\r\ndata: [DONE]\n\n"])
def test_any_text_is_a_prompt(server: LiveServer, text: str) -> None:
    asked = {"prompt": text, "echo": True, "max_tokens": 2, "logprobs": 1, "stop": ["\0\0"]}
    with server.client() as client:
        reply = client.post(COMPLETIONS, content=json.dumps(asked).encode(), headers=JSON)
        assert reply.status_code == 200
        assert reply.json()["choices"][0]["text"].startswith(text.replace("\ud800", "\ufffd"))
        stream = client.post(COMPLETIONS, content=json.dumps(asked | {"stream": True}).encode(), headers=JSON)
    events = stream.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and json.loads(event[6:]) for event in events[:-2])


@pytest.mark.parametrize(
    ("method", "path"), [("HEAD", COMPLETIONS), ("OPTIONS", COMPLETIONS), ("TRACE", "/"), ("PUT", COMPLETIONS)]
)
def test_other_methods_are_refused(server: LiveServer, method: str, path: str) -> None:
    with server.client() as client:
        reply = client.request(method, path)
    assert reply.status_code == 405
    assert method == "HEAD" or "does not support" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "x" * 9999]
)
def test_other_content_types_are_refused(server: LiveServer, kind: str) -> None:
    with server.client() as client:
        reply = client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"tokens": [""] * 10**6}),
        ("/detokenize", {"tokens": [-1] * 10**6}),
        (COMPLETIONS, {"prompt": ["x", 1] * 300_000}),
        (COMPLETIONS, {"stop": [1] * 10**6}),
        (COMPLETIONS, {"logit_bias": {str(i): "x" for i in range(200_000)}}),
        (COMPLETIONS, {f"unknown{i}": 1 for i in range(200_000)}),
        (COMPLETIONS, {"bad_words": [["x"]] * 10**5}),
        ("/v1/chat/completions", {"messages": [{}] * 10**6}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 10**6}]}),
        (COMPLETIONS, {"prompt": [[1]] * 600_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 100_000}]}),
        ("/inspect/next", {"tokens": ["x"] * 10**6}),
        ("/inspect/next", {"text": "x", "model": "m" * 4 * 10**6}),
        ("/tokenize", {"text": "x" * 2 * 10**6}),
    ],
)
def test_only_the_first_error_of_a_body_is_collected(
    server: LiveServer, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    error_of = app_module._validation_error
    monkeypatch.setattr(
        app_module, "_validation_error", lambda errors, kind: (counts.append(len(errors)), error_of(errors, kind))[1]
    )
    with server.client() as client:
        reply = client.post(path, json=body)
    assert reply.status_code in (400, 404)
    assert all(count <= 2 for count in counts)  # a required field may be missing too
    assert len(reply.text) < 1000


def test_a_body_is_parsed_without_garbage_collections(server: LiveServer) -> None:
    """They would take most of the time of a body of many small lists."""
    phases: list[str] = []
    parsing = {"now": False}
    gc.callbacks.append(lambda phase, info: phases.append(phase) if parsing["now"] else None)
    loads = json.loads

    def watched(*given: Any, **options: Any) -> Any:
        parsing["now"] = True
        try:
            return loads(*given, **options)
        finally:
            parsing["now"] = False

    with pytest.MonkeyPatch.context() as patch, server.client() as client:
        patch.setattr(json_route.json, "loads", watched)
        reply = client.post(COMPLETIONS, content=b'{"prompt": [' + b"[]," * 10**5 + b"[]]}", headers=JSON)
        gc.callbacks.pop()
    assert reply.status_code == 400
    assert not phases
    assert gc.isenabled()
