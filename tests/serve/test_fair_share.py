"""Equal shares of slots, queue and prefill for all clients, counted in steps of the scheduler."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gpt2.generation.engine import GenerationRequest, SampledToken
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.serve.errors import TooManyRequestsError
from gpt2.serve.fair_share import client_to_pause, exceeds_queue_share
from gpt2.serve.limits import Limits
from gpt2.serve.middleware import AccessPolicy
from gpt2.serve.scheduler import MIN_PREFILL_TOKENS, RequestHandle, Scheduler, SequenceFinished
from tests.helpers.engine_helpers import generate_alone
from tests.helpers.live_server import run_server
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=64, block_size=200, n_layer=1, n_head=2, n_embd=16)
LONG = 10_000  # new tokens: runs until it is cancelled


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(CONFIG)


class SteppedScheduler(Scheduler):
    """A scheduler without a thread: the test runs its steps."""

    @property
    def alive(self) -> bool:
        return True

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @property
    def running_per_client(self) -> Counter[str]:
        return self._num_running()

    async def steps_to_first_token(self, handle: RequestHandle) -> int:
        """Run steps until a request has its first token. Returns their number."""
        for count in range(1, 1000):
            self._step()
            await asyncio.sleep(0)
            if not handle.events.empty():
                assert isinstance(handle.events.get_nowait()[1], SampledToken)
                return count
        raise AssertionError("there is no token")


def stepped(test: Callable[[SteppedScheduler], Coroutine[Any, Any, None]], model: GPT, **settings: Any) -> None:
    asyncio.run(test(SteppedScheduler(model, **settings)))


def request(seed: int, length: int = LONG, prompt: int = 5, temperature: float = 1) -> GenerationRequest:
    tokens = [(seed + (seed + 3) * i) % CONFIG.vocab_size for i in range(prompt)]
    return GenerationRequest(tokens, Sampling(temperature), max_new_tokens=length, seed=seed)


def most_steps(prompt: int, num_clients: int = 2, budget: int = MIN_PREFILL_TOKENS) -> int:
    """The bound of docs/serving.md."""
    return 1 + math.ceil((prompt + (num_clients - 1) * (budget + CONFIG.block_size)) / budget)


def test_a_client_gets_a_slot_in_the_next_step_beside_long_streams(model: GPT) -> None:
    """288 sequences of A without end; B's first token comes in the step after the slot at the latest."""

    async def go(scheduler: SteppedScheduler) -> None:
        for i in range(16):
            scheduler.submit("A", [request(18 * i + k) for k in range(18)])
        scheduler.steps(40)
        assert scheduler.running_per_client == {"A": 32}
        late = scheduler.submit("B", [request(1000)])
        assert await scheduler.steps_to_first_token(late) <= 2
        assert scheduler.running_per_client == {"A": 31, "B": 1}

    stepped(go, model, slots=32, max_waiting=512)


@pytest.mark.parametrize("prompt", [1, 60, 199])
def test_a_prompt_waits_for_one_prompt_of_each_other_client(model: GPT, prompt: int) -> None:
    """Two clients send as many of the longest prompts as they can, each for one token only."""

    async def go(scheduler: SteppedScheduler) -> None:
        for name in ("A", "C"):
            scheduler.submit(name, [request(i, 1, 199) for i in range(20)])
            scheduler.submit(name, [request(99)])  # decodes, which makes the prefill budget small
        scheduler.steps(12)
        late = scheduler.submit("B", [request(1000, prompt=prompt)])
        assert await scheduler.steps_to_first_token(late) <= most_steps(prompt, 3)

    stepped(go, model, slots=12, max_waiting=128)


def test_clients_have_equal_numbers_of_slots(model: GPT) -> None:
    async def go(scheduler: SteppedScheduler) -> None:
        handles = {}
        for name, expected in (("A", [6]), ("B", [3, 3]), ("C", [2, 2, 2]), ("D", [1, 1, 2, 2])):
            handles[name] = scheduler.submit(name, [request(i) for i in range(9)])
            scheduler.steps(10)
            assert sorted(scheduler.running_per_client.values()) == expected
        for name, expected in (("A", [2, 2, 2]), ("B", [3, 3]), ("D", [6])):
            scheduler.cancel(handles[name])
            scheduler.steps(10)
            assert sorted(scheduler.running_per_client.values()) == expected
        scheduler.cancel(handles["C"])
        scheduler.steps(1)
        assert scheduler.idle

    stepped(go, model, slots=6, max_waiting=128)


def test_paused_sequences_have_the_same_text_and_all_finish(model: GPT) -> None:
    asked = {name: [request(i + 50 * k, 60 + i) for i in range(6)] for k, name in enumerate("ABC")}

    async def go(scheduler: SteppedScheduler) -> None:
        handles = {}
        for name, requests in asked.items():
            handles[name] = scheduler.submit(name, requests)
            scheduler.steps(20)
        while not scheduler.idle:
            scheduler.steps(1)
        await asyncio.sleep(0)
        for name, requests in asked.items():
            texts: list[list[int]] = [[] for _ in requests]
            while not handles[name].events.empty():
                index, event = handles[name].events.get_nowait()
                if isinstance(event, SampledToken):
                    texts[index].append(event.id)
                else:
                    assert event == SequenceFinished("length")
            assert texts == [generate_alone(model, one) for one in requests]

    stepped(go, model, slots=4, max_waiting=64)


def test_samples_of_one_prompt_do_not_wait_for_each_other(model: GPT) -> None:
    """Their prompt is prefilled once and then copied: all 16 decode one step after the first has its token."""

    async def go(scheduler: SteppedScheduler) -> None:
        handle = scheduler.submit("A", [request(1, prompt=100)] * 16)
        await scheduler.steps_to_first_token(handle)
        scheduler.steps(1)
        assert scheduler._num_decoding == 16

    stepped(go, model, slots=16)


def test_one_client_leaves_room_in_the_queue(model: GPT) -> None:
    """A fills its share with the last request that fits; B still gets in, and both can use their share."""

    async def go(scheduler: SteppedScheduler) -> None:
        for seed in range(8 + 16):
            scheduler.submit("A", [request(seed)])
        with pytest.raises(TooManyRequestsError, match="this client's share"):
            scheduler.submit("A", [request(99)])
        for seed in range(4 + 6):
            scheduler.submit("B", [request(seed)])
        with pytest.raises(TooManyRequestsError):
            scheduler.submit("B", [request(99)] * 2)
        scheduler.submit("C", [request(99)])

    stepped(go, model, slots=8, max_waiting=32)


def test_the_share_of_the_queue() -> None:
    def accepted(sequences: int, others: int, num_clients: int, max_waiting: int = 64) -> bool:
        return not exceeds_queue_share(sequences, sequences + others, num_clients, 8, max_waiting)

    assert accepted(8 + 32, 0, 1)
    assert not accepted(8 + 33, 0, 1)
    assert accepted(4 + 16, 8 + 32 - 4, 2)  # half of what is free
    assert not accepted(1, 8 + 64, 3)
    assert accepted(8 + 1, 0, 1, max_waiting=1)
    assert accepted(8, 0, 1, max_waiting=0)
    assert accepted(7, 1, 2, max_waiting=0)  # nobody waits
    assert not accepted(1, 8, 2, max_waiting=0)


def test_who_gives_a_slot() -> None:
    assert client_to_pause("B", {"A": 2}) == "A"
    assert client_to_pause("B", {"A": 1}) is None
    assert client_to_pause("B", {"A": 3, "B": 2}) is None
    assert client_to_pause("B", {"A": 4, "B": 2, "C": 5}) == "C"
    assert client_to_pause("B", {}) is None


@pytest.mark.parametrize(("keys", "second"), [(["A", "B"], 200), (["A"], 429)])
def test_a_client_is_a_key_or_an_address(keys: list[str], second: int) -> None:
    """One key of several fills its queue: the other key is served. With one key, this address is one client."""
    limits = Limits(slots=2, max_waiting=4, per_client=1, max_tokens=10**6)
    body = {"prompt": "x", "n": 3, "max_tokens": 10**6, "stream": True, "logit_bias": {"256": -100}}
    with run_server(limits, AccessPolicy(api_keys=keys)) as served, served.client() as client:
        first, last = ({"Authorization": f"Bearer {key}"} for key in (keys[0], keys[-1]))
        short = {"prompt": "x", "max_tokens": 1}
        with client.stream("POST", "/v1/completions", json=body, headers=first) as reply:
            assert reply.status_code == 200, reply.read()
            assert client.post("/v1/completions", json=short, headers=first).status_code == 429
            assert client.post("/v1/completions", json=short, headers=last).status_code == second
