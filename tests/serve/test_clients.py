"""Requests in the form in which clients send them: openai-python itself, and bodies in the shape of those of others."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai", reason="the openai client is not installed")
from gpt2.serve import chat_completions, completions  # noqa: E402
from gpt2.serve.limits import Limits  # noqa: E402
from gpt2.serve.schema import ChatRequest, CompletionRequest  # noqa: E402
from tests.helpers.live_server import LiveServer  # noqa: E402

pytest_plugins = "tests.helpers.server_fixtures"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
NEVER_ENDS = {"256": -100}


@pytest.fixture
def openai_client(server: LiveServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as one:
        yield one


def chat(client: httpx.Client, **asked: Any) -> httpx.Response:
    return client.post(CHAT, json={"messages": HELLO, "seed": 1, "max_tokens": 5, "logit_bias": NEVER_ENDS} | asked)


def complete(client: httpx.Client, **asked: Any) -> httpx.Response:
    return client.post(
        COMPLETIONS, json={"prompt": "Hello", "seed": 1, "max_tokens": 5, "logit_bias": NEVER_ENDS} | asked
    )


def answer(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    return response.json()["error"]


NEUTRAL = [
    {"store": False}, {"metadata": {}}, {"service_tier": "auto"}, {"safety_identifier": "a"}, {"prompt_cache_key": "a"},
    {"response_format": None}, {"response_format": {"type": "text"}}, {"add_special_tokens": True},
    {"max_tokens": 5.0}, {"n": 1.0}, {"stop": ""}, {"stop": [""]}, {"model": ""}, {"ignore_eos": False},
    {"stop_token_ids": []}, {"guided_regex": None}, {"stream_options": None}, {"user": "a"}, {"length_penalty": 1.0},
]  # fmt: skip
NEUTRAL_IN_CHAT = [
    {"tools": None}, {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": False},
    {"functions": None}, {"function_call": "none"}, {"modalities": ["text"]}, {"reasoning_effort": None},
    {"verbosity": None}, {"audio": None}, {"logprobs": False}, {"chat_template_kwargs": {}}, {"best_of": 1},
]  # fmt: skip


@pytest.mark.parametrize("field", NEUTRAL, ids=str)
def test_fields_at_neutral_values_change_nothing(client: httpx.Client, field: dict[str, Any]) -> None:
    assert text_of(complete(client, **field)) == text_of(complete(client))
    assert answer(chat(client, **field)) == answer(chat(client))


@pytest.mark.parametrize("field", NEUTRAL_IN_CHAT, ids=str)
def test_chat_fields_at_neutral_values_change_nothing(client: httpx.Client, field: dict[str, Any]) -> None:
    response = chat(client, **field)
    assert answer(response) == answer(chat(client))
    assert "warning" not in response.headers


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format: must be {'type': 'text'}: JSON mode is not"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format: must be {'type': 'text'}"),
        ({"guided_regex": "a+"}, "guided_regex: is not supported"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice: must be 'none' or 'auto': the model cannot call"),
        ({"tool_choice": {"type": "function", "function": {"name": "search"}}}, "tool_choice: must be 'none' or"),
        ({"store": True}, "store: must be false"),
        ({"modalities": ["text", "audio"]}, "modalities: must be ['text']"),
        ({"best_of": 2}, "best_of: is not supported in a chat"),
        ({"temprature": 1}, "there is no field 'temprature' (did you mean 'temperature'?)"),
        ({"prompt": "x"}, "there is no field 'prompt' here: it is a field of /v1/completions"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "(did you mean 'include_usage'?)"),
        ({"zzz": 1}, "there is no field 'zzz'"),
        ({"max_tokens": 5.5}, "max_tokens: input should be a valid integer"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(client: httpx.Client, field: dict[str, Any], message: str) -> None:
    error = error_of(chat(client, **field))
    assert message in error["message"]
    assert error["param"].split(".")[0] in field


def test_tools_are_left_out_with_a_warning(client: httpx.Client) -> None:
    """Open WebUI, LangChain and others offer tools in every request."""
    for asked in {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}, {"functions": [TOOL["function"]]}:
        response = chat(client, **asked)
        assert answer(response) == answer(chat(client))
        assert response.headers["warning"] == '299 gpt2 "tools left out: the model cannot call tools"'
        streamed = chat(client, **asked, stream=True)
        assert streamed.headers["warning"] == response.headers["warning"]
    assert "warning" not in chat(client, tools=[TOOL], tool_choice="none").headers


def test_logprobs_true_and_false_in_completions(client: httpx.Client) -> None:
    assert complete(client, logprobs=True).json()["choices"] == complete(client, logprobs=1).json()["choices"]
    assert complete(client, logprobs=False).json()["choices"][0]["logprobs"] is None


def test_seed_minus_one_is_random(client: httpx.Client) -> None:
    assert len({text_of(complete(client, seed=-1, max_tokens=30)) for _ in range(3)}) == 3


def test_ignore_eos_generates_all_tokens(client: httpx.Client) -> None:
    biased = {"logit_bias": {"256": 50}, "max_tokens": 7}
    for send in complete, chat:
        assert send(client, **biased).json()["choices"][0]["finish_reason"] == "stop"
        reply = send(client, **biased, ignore_eos=True).json()
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == 7


def test_stop_token_ids_end_the_text(client: httpx.Client) -> None:
    whole = complete(client, max_tokens=30, logprobs=0).json()["choices"][0]
    ids = whole["logprobs"]["token_ids"]
    ascii_pairs = ((i, token) for i, token in enumerate(ids) if i > 3 and max(token, ids[i - 1]) < 128)
    stop = next(token for i, token in ascii_pairs if token not in ids[:i])
    reply = complete(client, max_tokens=30, stop_token_ids=[stop], logprobs=0).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["text"] == whole["text"].partition(chr(stop))[0]
    assert reply["choices"][0]["logprobs"]["token_ids"] == ids[: ids.index(stop) + 1]
    assert reply["usage"]["completion_tokens"] == ids.index(stop) + 1


@pytest.mark.parametrize("value", [None, True, False])
def test_skip_special_tokens_reaches_the_detokenizer(server: LiveServer, value: bool | None) -> None:
    served, limits = server.models["tiny"], Limits()
    completion = CompletionRequest.model_validate({"prompt": "x", "skip_special_tokens": value})
    conversation = ChatRequest.model_validate({"messages": HELLO, "skip_special_tokens": value})
    assert completions.parse_request(completion, served, limits).skip_special_tokens is (value is not False)
    assert chat_completions.parse_request(conversation, served, limits).skip_special_tokens is (value is not False)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_reply_object_comes_back_in_the_second_turn(openai_client: Any, client: httpx.Client) -> None:
    """As an object of openai-python, as its whole dictionary, and as openai-node sends it: the JSON of the message."""
    first = openai_client.chat.completions.create(model="tiny", messages=HELLO, seed=1, max_tokens=5).choices[0].message
    raw = chat(client, logit_bias={}).json()["choices"][0]["message"]
    more = {"tool_calls": None, "function_call": None, "audio": None, "annotations": [], "reasoning_content": None}
    texts = set()
    for reply in first, first.model_dump(), raw, raw | more, {"role": "assistant", "content": first.content}:
        messages: Any = [*HELLO, reply, {"role": "user", "content": "And?"}]
        second = openai_client.chat.completions.create(model="tiny", messages=messages, seed=2, max_tokens=5)
        texts.add(second.choices[0].message.content)
    assert len(texts) == 1


def test_messages_of_other_clients(client: httpx.Client) -> None:
    def prompt_tokens(*messages: dict[str, Any]) -> int:
        reply = chat(client, messages=list(messages))
        assert reply.status_code == 200, reply.text
        return reply.json()["usage"]["prompt_tokens"]

    plain = prompt_tokens(*HELLO)
    assert prompt_tokens({"role": "user", "content": "Hello", "type": "text", "name": "me"}) == plain
    cached = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
    assert prompt_tokens({"role": "user", "content": [cached]}) == plain
    system, developer = ({"role": role, "content": "Be kind."} for role in ("system", "developer"))
    assert prompt_tokens(developer, *HELLO) == prompt_tokens(system, *HELLO)
    for empty in {}, {"content": None}, {"content": ""}, {"content": None, "tool_calls": []}:
        nothing = {"role": "assistant"} | empty
        assert prompt_tokens(*HELLO, nothing, *HELLO) == len("User: Hello\nAssistant: \nUser: Hello\nAssistant:")
    for role in "user", "system", "tool":
        error = error_of(chat(client, messages=[{"role": role, "content": None}]))
        assert error["param"] == "messages[0]"
        assert f"a message of role '{role}' needs content" in error["message"]


def test_tool_calls_of_earlier_turns_are_left_out(client: httpx.Client) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a", "content": "42"}
    response = chat(client, messages=[*HELLO, called, result])
    assert response.headers["warning"] == '299 gpt2 "tool_calls left out: the model cannot call tools"'
    assert response.json()["usage"]["prompt_tokens"] == len("User: Hello\n42\nAssistant:")


def turns(count: int) -> list[dict[str, str]]:
    """`count` turns of 20 characters with their answers of 10, after a system message."""
    found = [{"role": "system", "content": "Be kind."}]
    for i in range(count):
        found += [{"role": "user", "content": f"{i:020d}"}, {"role": "assistant", "content": "y" * 10}]
    return found[:-1]


def test_the_oldest_turns_are_dropped(client: httpx.Client) -> None:
    """The context has 128 tokens. The system message and the last turns stay, with room for the answer."""
    messages = turns(40)
    response = chat(client, messages=messages, max_tokens=30)
    reply = response.json()
    dropped = reply["truncated_messages"]
    kept = chat(client, messages=[messages[0], *messages[1 + dropped :]], max_tokens=30)
    assert "truncated_messages" not in kept.json()
    assert answer(kept) == answer(response)
    one_less = chat(client, messages=[messages[0], *messages[1 + dropped - 2 :]], max_tokens=30)
    assert one_less.json()["truncated_messages"] == 2
    assert 128 - 30 - 52 < reply["usage"]["prompt_tokens"] <= 128 - 30
    chunks = events_of(chat(client, messages=messages, max_tokens=30, stream=True))
    assert {chunk["truncated_messages"] for chunk in chunks} == {dropped}
    assert "truncated_messages" not in chat(client, messages=turns(1)).json()


def test_a_very_long_conversation_is_truncated(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x" * 3000} for _ in range(1000)] + HELLO
    reply = chat(client, messages=messages).json()
    assert reply["truncated_messages"] == 1000
    assert reply["usage"]["prompt_tokens"] == len("User: Hello\nAssistant:")


def test_a_prompt_that_cannot_be_truncated_is_refused_in_the_usual_words(client: httpx.Client) -> None:
    long = {"role": "user", "content": "x" * 129}
    refused = [
        chat(client, messages=turns(40), truncate="none"),
        chat(client, messages=[long]),
        chat(client, messages=[*turns(3), long]),
        complete(client, prompt="x" * 129),
        complete(client, prompt="x" * 10**5),
    ]
    for response in refused:
        error = error_of(response)
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 128 tokens" in error["message"]


def test_the_text_comes_before_the_finish_reason(client: httpx.Client) -> None:
    """A stop string that begins inside what a chunk would hold: some clients ignore the text of the last chunk."""
    for send in complete, chat:
        chunks = events_of(send(client, stream=True, max_tokens=40, stop=["\x01", "e", "a"]))
        last = chunks[-1]["choices"][0]
        assert last["finish_reason"] in ("stop", "length")
        assert not last.get("text") and not last.get("delta", {}).get("content")  # noqa: PT018
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


def test_top_k_of_minus_one_is_all_tokens(client: httpx.Client) -> None:
    assert text_of(complete(client, top_k=-1)) == text_of(complete(client, top_k=0))
    assert text_of(complete(client)) == text_of(complete(client, top_k=50))
