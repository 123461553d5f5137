"""Continuous batching: order, limits, cancellation, errors, shutdown, and batch-invariant results."""

import asyncio
import gc
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gpt2.errors import RequestError, UserError
from gpt2.generation.engine import GenerationRequest, SampledToken, Sequence
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.serve.errors import ShuttingDownError, TooManyRequestsError
from gpt2.serve.scheduler import PromptLogprobsRequest, RequestHandle, Scheduler, SequenceFinished
from tests.helpers.engine_helpers import generate_alone
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=64, block_size=48, n_layer=1, n_head=2, n_embd=16)
LONG = 10_000  # new tokens: runs until it is cancelled


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


async def tokens_of(handle: RequestHandle) -> tuple[list[list[int]], list[SequenceFinished]]:
    """All tokens of a request, and the last event of each sequence."""
    token_lists: list[list[int]] = [[] for _ in handle.sequences]
    ends: dict[int, SequenceFinished] = {}
    while len(ends) < len(token_lists):
        index, event = await asyncio.wait_for(handle.events.get(), 60)
        if isinstance(event, SampledToken):
            token_lists[index].append(event.id)
        elif isinstance(event, SequenceFinished):
            ends[index] = event
    return token_lists, [ends[i] for i in range(len(token_lists))]


async def until(condition: Any) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the condition is never true")


def test_sequences_are_batch_invariant(model: GPT) -> None:
    asked = [request(seed, 3 + seed % 20, 1 + seed * 7 % 40, temperature=0.5 + seed % 3) for seed in range(40)]

    async def go(scheduler: Scheduler) -> None:
        handles = []
        for i, one in enumerate(asked):
            handles.append(scheduler.submit(f"client {i % 5}", [one]))
            await asyncio.sleep(0.001 * (i % 3))
        for one, handle in zip(asked, handles, strict=True):
            token_lists, ends = await tokens_of(handle)
            assert token_lists == [generate_alone(model, one)]
            assert ends == [SequenceFinished("length")]
        assert scheduler.idle

    with running(model, slots=5) as scheduler:
        asyncio.run(go(scheduler))


def test_clients_get_slots_in_turn(model: GPT) -> None:
    """A client with twelve sequences does not keep out a later client with two."""
    order: list[str] = []

    class RecordingScheduler(Scheduler):
        def _send_events(self) -> None:
            finished = (one for one, event in self._pending_events if isinstance(event, SequenceFinished))
            order.extend(handle.parent.client for handle in finished)
            super()._send_events()

    async def go(scheduler: Scheduler) -> None:
        first = scheduler.submit("first", [request(0, LONG)])
        await until(lambda: scheduler.running == 1)
        handles = [scheduler.submit("greedy", [request(i) for i in range(12)])]
        handles += [scheduler.submit(name, [request(1), request(2)]) for name in ("a", "b")]
        scheduler.cancel(first)
        for handle in handles:
            await tokens_of(handle)

    scheduler = RecordingScheduler(model, slots=1)
    scheduler.start()
    asyncio.run(go(scheduler))
    scheduler.stop()
    assert order[1:8] == ["greedy", "a", "b", "greedy", "a", "b", "greedy"]
    assert order[8:] == ["greedy"] * 9


def test_a_full_queue_and_a_client_over_its_limit_are_refused(model: GPT) -> None:
    async def go(scheduler: Scheduler) -> None:
        handles = [scheduler.submit("a", [request(i, LONG)]) for i in range(2)]
        with pytest.raises(TooManyRequestsError, match="2 open requests") as busy:
            scheduler.submit("a", [request()])
        assert busy.value.retry_after > 0
        others = scheduler.submit("b", [request(i, LONG) for i in range(3)])
        handles += [scheduler.submit(name, [request(0, LONG)]) for name in ("c", "d", "e")]
        with pytest.raises(TooManyRequestsError, match="full") as busy:
            scheduler.submit("f", [request()])
        assert 0 < busy.value.retry_after <= 60
        with pytest.raises(RequestError, match="5 sequences on this server, not 6"):
            scheduler.submit("f", [request()] * 6)
        assert (scheduler.running + scheduler.waiting) == 8
        scheduler.cancel(handles[0])
        await until(lambda: scheduler.running + scheduler.waiting == 7)
        for handle in (others, *handles[1:]):
            scheduler.cancel(handle)
        await until(lambda: scheduler.idle)
        assert (await tokens_of(scheduler.submit("e", [request(1, 0)])))[1] == [SequenceFinished("length")]

    with running(model, slots=2, max_waiting=6, per_client=2) as scheduler:
        asyncio.run(go(scheduler))


def test_cancellation_frees_the_slot_within_a_step(model: GPT) -> None:
    """For running and waiting sequences."""

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
        assert steps - before <= 25  # the delay of the event loop; a sequence has ten thousand
        scheduler.cancel(second, 1)
        assert (await asyncio.wait_for(_end_of(second, 1), 10)).finish_reason == "cancelled"
        scheduler.cancel(second)
        await until(lambda: scheduler.idle and scheduler.engine.idle)
        scheduler.cancel(second)  # a second cancellation has no effect
        assert (await tokens_of(scheduler.submit("a", [request(3)])))[0] == [generate_alone(model, request(3))]

    with running(model, slots=2) as scheduler:
        asyncio.run(go(scheduler))


async def _end_of(handle: RequestHandle, index: int) -> SequenceFinished:
    while True:
        i, event = await handle.events.get()
        if i == index and isinstance(event, SequenceFinished):
            return event


def test_an_error_ends_only_its_own_sequence(model: GPT) -> None:
    async def go(scheduler: Scheduler) -> None:
        ban = request(0, 5, logit_bias=[(token, -torch.inf) for token in range(CONFIG.vocab_size)])
        handle = scheduler.submit("a", [ban, request(1)])
        token_lists, ends = await tokens_of(handle)
        assert token_lists == [[], generate_alone(model, request(1))]
        assert ends[0].finish_reason == "error"
        assert "rule out every token" in str(ends[0].error)
        with pytest.raises(UserError, match="vocabulary"):
            scheduler.submit("a", [GenerationRequest([64])])
        with pytest.raises(UserError, match="49 tokens do not fit"):
            scheduler.submit("a", [PromptLogprobsRequest([0] * 49)])
        assert scheduler.idle

    with running(model, slots=2) as scheduler:
        asyncio.run(go(scheduler))


def test_prompts_are_scored_while_sequences_decode(model: GPT) -> None:
    prompt = [i * 11 % 64 for i in range(48)]

    async def go(scheduler: Scheduler) -> list[Any]:
        decoding = scheduler.submit("a", [request(1, LONG)])
        handle = scheduler.submit("b", [PromptLogprobsRequest(prompt, 2), PromptLogprobsRequest(prompt[:1])])
        found: dict[int, Any] = {}
        while len(found) < 2:
            index, event = await asyncio.wait_for(handle.events.get(), 10)
            if isinstance(event, list):
                found[index] = event
        scheduler.cancel(decoding)
        assert [one.id for one in found[1]] == prompt[:1]
        return found[0]

    with running(model, slots=2) as scheduler:
        scored = asyncio.run(go(scheduler))
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt]))[0].log_softmax(-1)
    assert scored[0].logprob is None
    for i in range(1, 48):
        assert scored[i].logprob == pytest.approx(wanted[i - 1, prompt[i]].item(), abs=1e-4)
        assert [token for token, _ in scored[i].top_logprobs] == wanted[i - 1].topk(2).indices.tolist()


def test_stop_ends_every_sequence_with_an_error(model: GPT) -> None:
    async def go(scheduler: Scheduler) -> None:
        handle = scheduler.submit("a", [request(i, LONG) for i in range(4)])
        await until(lambda: scheduler.running == 2)
        scheduler.drain()
        with pytest.raises(ShuttingDownError, match="shutting down"):
            scheduler.submit("b", [request()])
        await asyncio.to_thread(scheduler.stop)
        _, ends = await tokens_of(handle)
        assert {(end.finish_reason, type(end.error)) for end in ends} == {("error", ShuttingDownError)}

    scheduler = Scheduler(model, slots=2)
    scheduler.start()
    asyncio.run(go(scheduler))
    assert scheduler.idle


def test_an_exception_in_the_thread_ends_every_sequence(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a lost GPU."""
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


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_cancellations_lose_no_slot_and_no_memory(model: GPT, count: int) -> None:
    rng = random.Random(count)

    async def one(scheduler: Scheduler, i: int) -> None:
        asked = [request(i, rng.randrange(0, 30), rng.randrange(1, 40)) for _ in range(rng.randrange(1, 4))]
        num_events, only_first = rng.choice([None, 0, 1, 5, 20]), rng.random() < 0.3
        while True:
            try:
                handle = scheduler.submit(f"client {i % 7}", asked)
                break
            except TooManyRequestsError:
                await asyncio.sleep(0.01)
        if num_events is None:
            token_lists, _ = await tokens_of(handle)
            if i % 10 == 0:
                assert token_lists == [generate_alone(model, request_) for request_ in asked]
            return
        for _ in range(num_events):
            if handle.num_unfinished:
                await asyncio.wait_for(handle.events.get(), 60) if not handle.events.empty() else await asyncio.sleep(0)
        scheduler.cancel(handle, 0 if only_first else None)
        scheduler.cancel(handle)

    async def go(scheduler: Scheduler) -> None:
        semaphore = asyncio.Semaphore(40)

        async def limited(i: int) -> None:
            async with semaphore:
                await one(scheduler, i)

        await asyncio.gather(*(limited(i) for i in range(count)))
        await until(lambda: scheduler.idle and scheduler.engine.idle)

    with running(model, slots=6, max_waiting=20) as scheduler:
        asyncio.run(go(scheduler))
        assert scheduler.running == scheduler.waiting == 0
        assert not scheduler._running
        assert not scheduler._waiting
        assert not scheduler._open_per_client
        assert not scheduler._open_requests
        gc.collect()
        assert sum(type(thing) is Sequence for thing in gc.get_objects()) < 10  # local names hold one or two
