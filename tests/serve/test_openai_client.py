"""The official OpenAI client against the server, with a test for each feature."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2

openai = pytest.importorskip("openai", reason="the openai client is not installed")
from gpt2.serve.limits import Limits  # noqa: E402
from gpt2.serve.middleware import AccessPolicy  # noqa: E402
from tests.helpers.live_server import BYTE_TOKENIZER, CONFIG, LiveServer, run_server, temporary_home  # noqa: E402

KEY = "a-key"


@pytest.fixture(scope="module")
def server(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with (
        temporary_home(compiled, tmp_path_factory.mktemp("home")),
        run_server(Limits(slots=4, per_client=4), AccessPolicy(api_keys=[KEY])) as served,
    ):
        yield served


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as one:
        yield one


def library_text(server: LiveServer, prompt: str, **settings: Any) -> str:
    """The text of `gpt2.generate` for the same request."""
    return gpt2.generate(server.model, BYTE_TOKENIZER, prompt, **settings)[0]


def logits_after(server: LiveServer, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return server.model(torch.tensor([tokens]))[0].log_softmax(-1)


def test_list_and_retrieve_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").context_length == CONFIG.block_size
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tinny")
    assert caught.value.code == "model_not_found"
    assert "did you mean 'tiny'" in str(caught.value)


def test_completions_equal_the_library(server: LiveServer, client: Any) -> None:
    settings: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "logit_bias": {"256": -100}}
    reply = client.completions.create(model="tiny", prompt="Once", max_tokens=20, n=3, **settings)
    texts = gpt2.generate(server.model, BYTE_TOKENIZER, "Once", max_new_tokens=20, num_samples=3, **settings)
    assert ["Once" + choice.text for choice in reply.choices] == texts
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    assert reply.usage.model_dump() == {
        "prompt_tokens": 4,
        "completion_tokens": 60,
        "total_tokens": 64,
        "completion_tokens_details": None,
        "prompt_tokens_details": None,
    }


def test_further_samplers(server: LiveServer, client: Any) -> None:
    extra: dict[str, Any] = {"top_k": 30, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4}
    extra |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "bad_words": [[65], [66, 67]]}
    usual: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": 1}
    reply = client.completions.create(model="tiny", prompt="x", max_tokens=30, extra_body=extra, **usual)
    assert "x" + reply.choices[0].text == library_text(server, "x", max_new_tokens=30, **extra, **usual)


def test_lists_and_token_ids_as_prompts(server: LiveServer, client: Any) -> None:
    prompts = ["ab", "", "ab"]
    reply = client.completions.create(model="tiny", prompt=prompts, max_tokens=9, seed=3, n=2)
    texts = gpt2.generate(server.model, BYTE_TOKENIZER, prompts, max_new_tokens=9, num_samples=2, seed=3)
    wanted = [text[len(prompt) :] for prompt, pair in zip(prompts, texts, strict=True) for text in pair]
    assert [choice.text for choice in reply.choices] == wanted
    ids = client.completions.create(model="tiny", prompt=[97, 98], max_tokens=9, seed=3)
    assert ids.choices[0].text == wanted[0]
    lists = client.completions.create(model="tiny", prompt=[[97, 98], [256]], max_tokens=9, seed=3, n=2)
    assert [choice.text for choice in lists.choices] == wanted[:4]
    assert lists.usage.prompt_tokens == 3


def test_stop_strings(server: LiveServer, client: Any) -> None:
    bias: Any = {str(ord("a")): 1e6}
    reply = client.completions.create(model="tiny", prompt="x", max_tokens=20, temperature=0, logit_bias=bias)
    assert reply.choices[0].text == "a" * 20
    free = library_text(server, "x", max_new_tokens=40, seed=5)[1:]
    for stop in (free[3], [free[7:9], free[12]], "never there"):
        reply = client.completions.create(model="tiny", prompt="x", max_tokens=40, seed=5, stop=stop)
        cut = min([at for at in map(free.find, [stop] if isinstance(stop, str) else stop) if at >= 0], default=None)
        assert reply.choices[0].text == free[:cut]
        assert reply.choices[0].finish_reason == ("length" if cut is None else "stop")
    server.wait_until_idle()


def test_the_end_of_text_token_has_no_text(client: Any) -> None:
    reply = client.completions.create(model="tiny", prompt="x", logit_bias={"256": 1e6}, logprobs=0, temperature=0)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason, reply.usage.completion_tokens) == ("", "stop", 1)
    assert choice.logprobs.tokens == ["<|endoftext|>"]
    longer = client.completions.create(
        model="tiny", prompt="x", logit_bias={"256": 50}, seed=1, extra_body={"min_tokens": 4}
    )
    assert (longer.choices[0].finish_reason, longer.usage.completion_tokens) == ("stop", 5)


def test_logprobs_are_those_of_the_model(server: LiveServer, client: Any) -> None:
    reply = client.completions.create(model="tiny", prompt="Hi", max_tokens=6, seed=2, logprobs=3, temperature=0.5)
    logprobs = reply.choices[0].logprobs
    ids, wanted = logprobs.token_ids, logits_after(server, [72, 105, *logprobs.token_ids])
    assert len(ids) == 6
    for i, token in enumerate(ids):
        row = wanted[1 + i]
        assert logprobs.token_logprobs[i] == pytest.approx(row[token].item(), abs=1e-4)
        assert logprobs.top_token_ids[i] == row.topk(3).indices.tolist()
        assert max(logprobs.top_logprobs[i].values()) == pytest.approx(row.max().item(), abs=1e-4)
        assert logprobs.top_logprobs[i][logprobs.tokens[i]] == logprobs.token_logprobs[i]
        assert 3 <= len(logprobs.top_logprobs[i]) <= 4
    own = client.completions.create(model="tiny", prompt="Hi", max_tokens=6, seed=2, logprobs=0, temperature=0.5)
    assert own.choices[0].logprobs.token_logprobs == logprobs.token_logprobs
    assert own.choices[0].logprobs.top_logprobs is None


def test_echo_with_logprobs(server: LiveServer, client: Any) -> None:
    plain = client.completions.create(model="tiny", prompt="Hi Ä", max_tokens=4, seed=2)
    reply = client.completions.create(model="tiny", prompt="Hi Ä", max_tokens=4, seed=2, echo=True, logprobs=1, n=2)
    choice, logprobs = reply.choices[0], reply.choices[0].logprobs
    assert choice.text == "Hi Ä" + plain.choices[0].text
    assert logprobs.text_offset[:5] == [0, 1, 2, 3, 3]
    assert logprobs.tokens[:5] == ["H", "i", " ", "bytes:\\xc3", "bytes:\\x84"]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    wanted = logits_after(server, logprobs.token_ids)
    for i, token in enumerate(logprobs.token_ids[1:]):
        assert logprobs.token_logprobs[i + 1] == pytest.approx(wanted[i, token].item(), abs=1e-4)
    again = client.completions.create(model="tiny", prompt="Hi Ä", max_tokens=0, echo=True, logprobs=1)
    assert (again.choices[0].text, again.usage.completion_tokens) == ("Hi Ä", 0)
    assert again.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:5]
    assert client.completions.create(model="tiny", prompt="Hi", max_tokens=0, echo=True).choices[0].text == "Hi"


def test_best_of_returns_the_most_likely_texts(server: LiveServer, client: Any) -> None:
    """Ranked by the mean log-probability of the tokens, computed here from the choices of `n`."""
    every = client.completions.create(model="tiny", prompt="q", max_tokens=8, seed=4, n=6, logprobs=0)
    best = client.completions.create(model="tiny", prompt="q", max_tokens=8, seed=4, n=2, best_of=6)
    order = sorted(every.choices, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best.choices] == [choice.text for choice in order[:2]]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == 48
    assert best.usage.prompt_tokens == 1


def test_streamed_chunks_join_to_the_response(server: LiveServer, client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["Stream", "b"], "max_tokens": 25, "seed": 9, "n": 2}
    whole = client.completions.create(**asked, logprobs=2, echo=True)
    chunks = list(
        client.completions.create(**asked, logprobs=2, echo=True, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs", "token_ids"):
            joined = [value for piece in own for value in getattr(piece.logprobs, name)]
            assert joined == getattr(choice.logprobs, name)


def test_streamed_stop_strings_are_held_back_and_free_the_slot(server: LiveServer, client: Any) -> None:
    free = library_text(server, "x", max_new_tokens=60, seed=5)[1:]
    stop = free[10:13]
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=4000, seed=5, stop=stop, stream=True, logprobs=0
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == free[: free.find(stop)]
    assert chunks[-1].finish_reason == "stop"
    server.wait_until_idle()


def test_chat_equals_gpt2_chat(server: LiveServer, client: Any) -> None:
    from gpt2.generation.chat import Conversation
    from gpt2.generation.inference import prepare_for_inference
    from gpt2.generation.sampling import Sampling

    model, sampling = prepare_for_inference(server.model), Sampling(temperature=0.7, top_k=50)  # as gpt2 chat does
    talk = Conversation(model, BYTE_TOKENIZER, sampling, max_new_tokens=12, seed=6)
    answer = "".join(talk.send("Hello"))
    messages: Any = [{"role": "user", "content": "Hello"}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0.7, "seed": 6}
    reply = client.chat.completions.create(**asked, max_completion_tokens=12, logprobs=True, top_logprobs=2)
    message = reply.choices[0].message
    assert message.content == answer.removeprefix(" ")
    assert message.role == "assistant"
    assert reply.usage.prompt_tokens == len("User: Hello\nAssistant:")
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens
    assert all(len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob for one in content)
    assert b"".join(bytes(one.bytes) for one in content).decode("utf-8", "replace") == answer
    stream = client.chat.completions.create(**asked, max_tokens=12, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == message.content
    assert chunks[-1].usage == reply.usage
    assert chunks[-2].choices[0].finish_reason == reply.choices[0].finish_reason


def test_chat_with_text_parts_and_several_choices(client: Any) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    whole: Any = [{"role": "user", "content": "Hello"}]
    asked: dict[str, Any] = {"model": "tiny", "seed": 1, "n": 3, "max_tokens": 5}
    first, second = (client.chat.completions.create(messages=one, **asked) for one in (parts, whole))
    assert [choice.message.content for choice in first.choices] == [c.message.content for c in second.choices]
    assert len({choice.message.content for choice in first.choices}) > 1


def test_chat_stop_strings_and_streamed_logprobs(client: Any) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "seed": 5, "logit_bias": {"256": -100}}
    free = client.chat.completions.create(**asked, max_tokens=30).choices[0].message.content
    stop = free[8:10]
    whole = client.chat.completions.create(**asked, max_tokens=30, stop=stop, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == free[: free.find(stop)]
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(**asked, max_tokens=30, n=2, logprobs=True, top_logprobs=1, stream=True)
    both = client.chat.completions.create(**asked, max_tokens=30, n=2, logprobs=True, top_logprobs=1)
    pieces = [chunk.choices[0] for chunk in stream]
    for choice in both.choices:
        own = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.delta.content or "" for piece in own) == choice.message.content
        streamed = [one.model_dump() for piece in own if piece.logprobs for one in piece.logprobs.content]
        assert streamed == [one.model_dump() for one in choice.logprobs.content]


def test_the_asynchronous_client_gets_the_same_texts(server: LiveServer, client: Any) -> None:
    """Completions and chat, with and without streaming, at the same time; and a stream that is closed early."""
    messages: Any = [{"role": "user", "content": "Hello"}]
    asked: dict[str, Any] = {"model": "tiny", "seed": 3, "max_tokens": 12}

    async def joined_text(stream: Any) -> str:
        return "".join([chunk.choices[0].text async for chunk in await stream])

    async def go() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as one:
            found = await asyncio.gather(
                one.completions.create(prompt="ab", **asked),
                joined_text(one.completions.create(prompt="ab", stream=True, **asked)),
                one.chat.completions.create(messages=messages, **asked),
                one.models.list(),
            )
            endless = asked | {"max_tokens": 4000, "logit_bias": {"256": -100}}
            async with await one.completions.create(prompt="x", stream=True, **endless) as stream:
                await anext(aiter(stream))
            return found

    whole, streamed, chat, models = asyncio.run(go())
    assert whole.choices[0].text == streamed == client.completions.create(prompt="ab", **asked).choices[0].text
    wanted = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
    assert chat.choices[0].message.content == wanted
    assert [model.id for model in models.data] == ["tiny"]
    server.wait_until_idle()


def test_authentication_and_rate_limit_errors(server: LiveServer, client: Any) -> None:
    with pytest.raises(openai.AuthenticationError) as denied:
        client.with_options(api_key="another").completions.create(model="tiny", prompt="x")
    assert denied.value.code == "invalid_api_key"
    endless: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "logit_bias": {"256": -100}}
    streams = [client.completions.create(**endless, stream=True) for _ in range(server.scheduler.per_client)]
    with pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(**endless)
    assert int(busy.value.response.headers["Retry-After"]) >= 1
    for stream in streams:
        stream.close()
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": "x" * 501}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x" * 129}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"max_completion_tokens": 3}, "max_tokens": 4}, "max_tokens"),
        ({"extra_body": {"top_k": -2}}, "top_k"),
        ({"extra_body": {"top_k": "5"}}, "top_k"),
        ({"extra_body": {"bad_words": [[1.5]]}}, "bad_words[0][0]"),
    ],
)  # fmt: skip
def test_invalid_fields_are_named(client: Any, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x"} | asked)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert "\n" not in caught.value.body["message"]


def test_a_prompt_longer_than_the_context_has_its_own_code(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="128") as caught:
        client.completions.create(model="tiny", prompt="x" * 129)
    assert caught.value.code == "context_length_exceeded"
    message: Any = {"role": "user", "content": "x" * 129}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[message])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_generation_beyond_the_context(server: LiveServer, client: Any) -> None:
    settings: dict[str, Any] = {"seed": 1, "logit_bias": {"256": -100}}
    reply = client.completions.create(model="tiny", prompt="x" * 100, max_tokens=200, **settings)
    assert reply.usage.completion_tokens == 200
    assert "x" * 100 + reply.choices[0].text == library_text(server, "x" * 100, max_new_tokens=200, **settings)
