"""Continuous batching: who waits, who goes first, who may leave, and that nobody's text depends on the others."""

import asyncio
import gc
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gpt2.errors import UserError
from gpt2.generation.engine import Engine, GenerationRequest, SampledToken, Sequence
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.serve.scheduler import (
    SHUTTING_DOWN,
    PromptLogprobsRequest,
    RequestHandle,
    Scheduler,
    SequenceFinished,
    ShuttingDownError,
    TooManyRequestsError,
)
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=64, block_size=48, n_layer=1, n_head=2, n_embd=16)
LONG = 10_000  # tokens: as long as nobody stops it


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


@contextmanager
def running(model: Any, **settings: Any) -> Iterator[Scheduler]:
    scheduler = Scheduler(model, **settings)
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.stop()
        assert not scheduler.alive


def request(seed: int = 0, length: int = 6, prompt: int = 5, **settings: Any) -> GenerationRequest:
    tokens = [(seed + i * i) % CONFIG.vocab_size for i in range(prompt)]
    return GenerationRequest(tokens, Sampling(**settings), max_new_tokens=length, seed=seed)


async def tokens_of(call: RequestHandle) -> tuple[list[list[int]], list[SequenceFinished]]:
    """All tokens of a call, and how each text ended."""
    texts: list[list[int]] = [[] for _ in call.sequences]
    ends: dict[int, SequenceFinished] = {}
    while len(ends) < len(texts):
        index, event = await asyncio.wait_for(call.events.get(), 60)
        if isinstance(event, SampledToken):
            texts[index].append(event.id)
        elif isinstance(event, SequenceFinished):
            ends[index] = event
    return texts, [ends[i] for i in range(len(texts))]


def alone(model: GPT, asked: GenerationRequest) -> list[int]:
    """What the request gives in an engine of its own."""
    engine = Engine(model, slots=1)
    text = engine.submit(asked)
    while not engine.idle:
        engine.step()
    return text.new_tokens


async def until(condition: Any) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it does not come to pass")


def test_every_text_is_what_it_is_alone_whoever_comes_and_goes(model: GPT) -> None:
    asked = [request(seed, 3 + seed % 20, 1 + seed * 7 % 40, temperature=0.5 + seed % 3) for seed in range(40)]

    async def go(scheduler: Scheduler) -> None:
        calls = []
        for i, one in enumerate(asked):
            calls.append(scheduler.submit(f"client {i % 5}", [one]))
            await asyncio.sleep(0.001 * (i % 3))
        for one, call in zip(asked, calls, strict=True):
            texts, ends = await tokens_of(call)
            assert texts == [alone(model, one)]
            assert ends == [SequenceFinished("length")]
        assert scheduler.idle

    with running(model, slots=5) as scheduler:
        asyncio.run(go(scheduler))


def test_the_clients_take_turns(model: GPT) -> None:
    """One with twelve texts does not keep out one with two, who came after it."""
    order: list[str] = []

    class Watched(Scheduler):
        def _deliver(self) -> None:
            order.extend(
                text.parent.client for text, event in self._pending_events if isinstance(event, SequenceFinished)
            )
            super()._send_events()

    async def go(scheduler: Scheduler) -> None:
        first = scheduler.submit("first", [request(0, LONG)])
        await until(lambda: scheduler.running == 1)
        calls = [scheduler.submit("greedy", [request(i) for i in range(12)])]
        calls += [scheduler.submit(name, [request(1), request(2)]) for name in ("a", "b")]
        scheduler.cancel(first)
        for call in calls:
            await tokens_of(call)

    scheduler = Watched(model, slots=1)
    scheduler.start()
    asyncio.run(go(scheduler))
    scheduler.stop()
    assert order[1:8] == ["greedy", "a", "b", "greedy", "a", "b", "greedy"]
    assert order[8:] == ["greedy"] * 9


def test_a_full_queue_and_a_greedy_client_are_refused(model: GPT) -> None:
    async def go(scheduler: Scheduler) -> None:
        calls = [scheduler.submit("a", [request(i, LONG)]) for i in range(2)]
        with pytest.raises(TooManyRequestsError, match="2 requests open") as busy:
            scheduler.submit("a", [request()])
        assert busy.value.retry_after > 0
        others = scheduler.submit("b", [request(i, LONG) for i in range(3)])
        with pytest.raises(TooManyRequestsError, match="full") as busy:
            scheduler.submit("c", [request()])
        assert 0 < busy.value.retry_after <= 60
        with pytest.raises(UserError, match="6 texts"):
            scheduler.submit("d", [request()] * 6)
        assert (scheduler.running + scheduler.waiting) == 5
        scheduler.cancel(calls[0])
        await until(lambda: scheduler.running + scheduler.waiting == 4)
        scheduler.cancel(others)
        assert (await tokens_of(scheduler.submit("c", [request(1, 0)])))[1] == [SequenceFinished("length")]

    with running(model, slots=2, max_waiting=3, per_client=2) as scheduler:
        asyncio.run(go(scheduler))


def test_a_cancelled_text_leaves_its_slot_within_a_step(model: GPT) -> None:
    """Running, waiting, and reading its prompt."""

    async def go(scheduler: Scheduler) -> None:
        steps = 0
        step = scheduler.engine.step

        def counted() -> list[SampledToken]:
            nonlocal steps
            steps += 1
            return step()

        scheduler.engine.step = counted  # pyright: ignore[reportAttributeAccessIssue]
        first, second = (scheduler.submit("a", [request(i, LONG), request(9, LONG)]) for i in range(2))
        await until(lambda: scheduler.running == 2)
        before = steps
        scheduler.cancel(first)
        ended: list[int] = []
        while len(ended) < 2:
            index, event = await first.events.get()
            if isinstance(event, SequenceFinished):
                assert event.finish_reason == "cancelled"
                ended.append(index)
        assert steps - before <= 25  # the loop's own delay; a text has ten thousand
        scheduler.cancel(second, 1)
        assert (await asyncio.wait_for(_end_of(second, 1), 10)).finish_reason == "cancelled"
        scheduler.cancel(second)
        await until(lambda: scheduler.idle and scheduler.engine.idle)
        scheduler.cancel(second)  # once more: nothing happens
        assert (await tokens_of(scheduler.submit("a", [request(3)])))[0] == [alone(model, request(3))]

    with running(model, slots=2) as scheduler:
        asyncio.run(go(scheduler))


async def _end_of(call: RequestHandle, index: int) -> SequenceFinished:
    while True:
        i, event = await call.events.get()
        if i == index and isinstance(event, SequenceFinished):
            return event


def test_what_goes_wrong_with_one_text_ends_that_one(model: GPT) -> None:
    async def go(scheduler: Scheduler) -> None:
        ban = request(0, 5, logit_bias=[(token, -torch.inf) for token in range(CONFIG.vocab_size)])
        call = scheduler.submit("a", [ban, request(1)])
        texts, ends = await tokens_of(call)
        assert texts == [[], alone(model, request(1))]
        assert ends[0].finish_reason == "error"
        assert "rule out every token" in str(ends[0].error)
        with pytest.raises(UserError, match="vocabulary"):
            scheduler.submit("a", [GenerationRequest([64])])
        with pytest.raises(UserError, match="49 tokens do not fit"):
            scheduler.submit("a", [PromptLogprobsRequest([0] * 49)])
        assert scheduler.idle

    with running(model, slots=2) as scheduler:
        asyncio.run(go(scheduler))


def test_a_prompt_is_scored_beside_those_that_speak(model: GPT) -> None:
    prompt = [i * 11 % 64 for i in range(48)]

    async def go(scheduler: Scheduler) -> list[Any]:
        speaking = scheduler.submit("a", [request(1, LONG)])
        call = scheduler.submit("b", [PromptLogprobsRequest(prompt, 2), PromptLogprobsRequest(prompt[:1])])
        found: dict[int, Any] = {}
        while len(found) < 2:
            index, event = await asyncio.wait_for(call.events.get(), 10)
            if isinstance(event, list):
                found[index] = event
        scheduler.cancel(speaking)
        assert [one.id for one in found[1]] == prompt[:1]
        return found[0]

    with running(model, slots=2) as scheduler:
        scored = asyncio.run(go(scheduler))
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt]))[0].log_softmax(-1)
    assert scored[0].logprob is None
    for i in range(1, 48):
        assert scored[i].logprob == pytest.approx(wanted[i - 1, prompt[i]].item(), abs=1e-4)
        assert [token for token, _ in scored[i].alternatives] == wanted[i - 1].topk(2).indices.tolist()


def test_the_end_is_told_to_everybody(model: GPT) -> None:
    async def go(scheduler: Scheduler) -> None:
        call = scheduler.submit("a", [request(i, LONG) for i in range(4)])
        await until(lambda: scheduler.running == 2)
        scheduler.drain()
        with pytest.raises(ShuttingDownError, match=SHUTTING_DOWN):
            scheduler.submit("b", [request()])
        await asyncio.to_thread(scheduler.stop)
        _, ends = await tokens_of(call)
        assert {(end.finish_reason, str(end.error)) for end in ends} == {("error", SHUTTING_DOWN)}

    scheduler = Scheduler(model, slots=2)
    scheduler.start()
    asyncio.run(go(scheduler))
    assert scheduler.idle


def test_a_thread_that_dies_leaves_nobody_waiting(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, the GPU has gone."""
    monkeypatch.setattr(threading, "excepthook", lambda given: None)

    def fail() -> list[SampledToken]:
        raise RuntimeError("no GPU")

    async def go(scheduler: Scheduler) -> None:
        scheduler.engine.step = fail  # pyright: ignore[reportAttributeAccessIssue]
        _, ends = await tokens_of(scheduler.submit("a", [request(0), request(1)]))
        assert [end.finish_reason for end in ends] == ["error", "error"]
        await until(lambda: not scheduler.alive)
        with pytest.raises(ShuttingDownError):
            scheduler.submit("a", [request()])

    scheduler = Scheduler(model, slots=2)
    scheduler.start()
    asyncio.run(go(scheduler))


def test_a_thousand_random_cancellations_lose_no_slot_and_no_memory(model: GPT) -> None:
    draw = random.Random(1000)

    async def one(scheduler: Scheduler, i: int) -> None:
        asked = [request(i, draw.randrange(0, 30), draw.randrange(1, 40)) for _ in range(draw.randrange(1, 4))]
        patience, others = draw.choice([None, 0, 1, 5, 20]), draw.random() < 0.3
        while True:
            try:
                call = scheduler.submit(f"client {i % 7}", asked)
                break
            except TooManyRequestsError:
                await asyncio.sleep(0.01)
        if patience is None:
            texts, _ = await tokens_of(call)
            if i % 10 == 0:
                assert texts == [alone(model, request_) for request_ in asked]
            return
        for _ in range(patience):
            if call.num_unfinished:
                await asyncio.wait_for(call.events.get(), 60) if not call.events.empty() else await asyncio.sleep(0)
        scheduler.cancel(call, 0 if others else None)
        scheduler.cancel(call)

    async def go(scheduler: Scheduler) -> None:
        at_once = asyncio.Semaphore(40)

        async def in_turn(i: int) -> None:
            async with at_once:
                await one(scheduler, i)

        await asyncio.gather(*(in_turn(i) for i in range(1000)))
        await until(lambda: scheduler.idle and scheduler.engine.idle)

    with running(model, slots=6, max_waiting=20) as scheduler:
        asyncio.run(go(scheduler))
        assert scheduler.running == scheduler.waiting == 0
        assert not scheduler._running
        assert not scheduler._waiting
        assert not scheduler._open_per_client
        assert not scheduler._open_requests
        gc.collect()
        assert sum(type(thing) is Sequence for thing in gc.get_objects()) < 10  # a local name holds one or two
