"""/v1/responses, as openai-python sends requests to it and reads its responses and streams."""

from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai client is not installed")
from gpt2.serve.limits import Limits  # noqa: E402
from tests.helpers.live_server import LiveServer  # noqa: E402

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}, "strict": True}


pytest_plugins = "tests.helpers.server_fixtures"
SERVER_LIMITS = Limits(max_tokens=1000)


@pytest.fixture
def client(server: LiveServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as one:
        yield one


def chat_text(client: Any, messages: list[Any], seed: int = 1) -> str:
    reply = client.chat.completions.create(model="tiny", messages=messages, seed=seed, max_tokens=12)
    return reply.choices[0].message.content


def respond(client: Any, given: Any, **asked: Any) -> Any:
    return client.responses.create(
        model="tiny", input=given, **({"max_output_tokens": 12, "extra_body": {"seed": 1}} | asked)
    )


def test_the_text_is_that_of_a_chat(client: Any) -> None:
    reply = respond(client, "Hello")
    assert reply.output_text == chat_text(client, HELLO)
    assert (reply.object, reply.error, reply.model) == ("response", None, "tiny")
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    with_system = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert respond(client, HELLO, instructions="Be brief.").output_text == chat_text(client, with_system)


def test_two_turns_with_the_output_of_the_first(client: Any) -> None:
    first = respond(client, HELLO)
    more = {"role": "user", "content": [{"type": "input_text", "text": "And then?"}]}
    second = respond(client, [*HELLO, *(item.model_dump() for item in first.output), more])
    messages = [*HELLO, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And then?"}]
    assert second.output_text == chat_text(client, messages)
    assert second.id != first.id


def test_the_stream_adds_up_to_the_response(client: Any) -> None:
    whole = respond(client, "Hello")
    events = list(respond(client, "Hello", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    final = events[-1].response
    assert (final.output_text, final.usage, final.status) == (whole.output_text, whole.usage, whole.status)
    assert final.id == events[0].response.id


def test_the_stream_helper_of_the_client(client: Any) -> None:
    asked = {"max_output_tokens": 1000, "extra_body": {"seed": seed_of_a_complete_text(client)}}
    with client.responses.stream(model="tiny", input="Hello", **asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == respond(client, "Hello", **asked).output_text


def seed_of_a_complete_text(client: Any) -> int:
    """A seed for which the text ends before 1,000 tokens."""
    for seed in range(100):
        if respond(client, "Hello", max_output_tokens=1000, extra_body={"seed": seed}).status == "completed":
            return seed
    raise AssertionError("no text ended")


def test_the_end_of_the_text_and_of_the_tokens(client: Any) -> None:
    short = respond(client, "Hello", max_output_tokens=1)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    seed = seed_of_a_complete_text(client)
    ended = respond(client, "Hello", max_output_tokens=1000, extra_body={"seed": seed})
    assert ended.incomplete_details is None
    assert ended.usage.output_tokens < 1000


def test_neutral_fields_and_tools(server: LiveServer) -> None:
    body = {
        "input": "Hello",
        "max_output_tokens": 2,
        "store": True,
        "text": {"format": {"type": "text"}},
        "include": [],
    }
    body |= {
        "tools": [TOOL],
        "tool_choice": "auto",
        "reasoning": {"effort": None},
        "truncation": "auto",
        "metadata": {},
    }
    with server.client() as client:
        reply = client.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    assert "tools left out" in reply.headers["Warning"]


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format", "JSON mode is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "cannot call tools"),
        ({"input": [{"role": "user"}]}, "input[0]", "needs role and content"),
        ({"input": [{"type": "reasoning"}]}, "input", "has no message"),
        ({"input": "x" * 10**6, "truncation": "disabled"}, "input", "maximum context length"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "at most 1,000"),
        ({"max_tokens": 5}, "max_tokens", "it is a field of /v1/"),
        ({"imput": 5}, "imput", "did you mean 'input'"),
    ],
)
def test_what_is_not_supported_is_named(server: LiveServer, change: dict[str, Any], param: str, says: str) -> None:
    with server.client() as client:
        for stream in (False, True):
            reply = client.post("/v1/responses", json={"input": "x", "stream": stream} | change)
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert error["param"] == param
            assert says in error["message"]
