"""Requests recorded from client programs, two turns and streams where they have them, and what the server answers.

recorded/CLIENT.json has the client's version, and its requests to a server like this one. Generated texts, ids and long
descriptions in them were replaced. A structured answer is a 400 that says what is not supported.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai", reason="the openai client is not installed")
from openai.types import Completion  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402
from openai.types.responses import Response  # noqa: E402

from tests.helpers.live_server import LiveServer, run_server, temporary_home  # noqa: E402

RECORDED = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "recorded").glob("*.json"))]
REQUESTS = [
    pytest.param(request, id=f"{one['client']}-{number}")
    for one in RECORDED
    for number, request in enumerate(one["requests"])
]
WHOLE = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion, "/v1/responses": Response}


@pytest.fixture(scope="module")
def client(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    served: LiveServer
    with temporary_home(compiled, tmp_path_factory.mktemp("home")), run_server() as served, served.client() as one:
        yield one


def test_the_clients() -> None:
    names = {one["client"] for one in RECORDED}
    assert names == {
        *("ai-sdk", "guidellm", "instructor", "langchain-openai", "litellm", "llama-index", "llm", "lm-eval"),
        *("open-webui", "openai-node", "pydantic-ai"),
    }
    assert all(one["version"] for one in RECORDED)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_recorded_request(client: httpx.Client, request_: dict[str, Any]) -> None:
    body = request_["body"]
    reply = client.post(request_["path"], json=body)
    assert reply.status_code == request_["status"], reply.text
    if reply.status_code == 400:
        message = reply.json()["error"]["message"]
        assert "JSON mode is not supported" in message or "the model cannot call tools" in message
    elif body.get("stream"):
        check_stream(request_["path"], reply.text, body)
    else:
        whole = WHOLE[request_["path"]].model_validate(reply.json(), strict=False)
        assert whole.model == "tiny"
        assert isinstance(whole, Response) or whole.choices[0].finish_reason in ("stop", "length")


def check_stream(path: str, text: str, body: dict[str, Any]) -> None:
    """Check that every event is valid, that one ends the text, and the number of tokens that guidellm asks for."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    parsed = [json.loads(event) for event in events[:-1]]
    if path == "/v1/responses":
        assert parsed[-1]["type"] in ("response.completed", "response.incomplete")
        Response.model_validate(parsed[-1]["response"])
        return
    chunks: list[Any]
    if path == "/v1/completions":  # openai-python does not validate these: its type has no null as finish_reason
        chunks = [Completion.construct(**event) for event in parsed]
    else:
        chunks = [ChatCompletionChunk.model_validate(event) for event in parsed]
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends in (["stop"], ["length"])
    if body.get("ignore_eos"):
        counts = [chunk.usage.completion_tokens for chunk in chunks]  # in every chunk: continuous_usage_stats
        assert counts == sorted(counts)
        assert counts[-1] == body.get("max_tokens", body.get("max_completion_tokens"))
