"""Continuous batching for many clients: one thread runs the engine, and sequences join and leave between its steps.

Commands of clients reach the thread through a queue, and events reach each request's own queue once per step.

Clients have equal shares of the slots. A waiting client with fewer running sequences than another gets one of its
slots in the next step: the sequence there is paused and resumed later (preemption with recomputation, as in vLLM). A
client's next sequence starts only when less than one step of its prompt tokens is left to prefill, so a prompt waits
for at most one step and one prompt of each other client. See `fair_share` for the queue.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter, abc, deque
from collections.abc import Callable
from dataclasses import dataclass

from gpt2.errors import RequestError, UserError
from gpt2.generation.engine import PREFILL_CHUNK, Engine, GenerationRequest, LanguageModel, SampledToken, Sequence
from gpt2.serve.errors import ShuttingDownError, TooManyRequestsError
from gpt2.serve.fair_share import client_to_pause, exceeds_queue_share
from gpt2.serve.prompt_logprobs import PromptScorer, TokenLogprob

MIN_PREFILL_TOKENS = 24  # prompt tokens in a step, however few sequences are decoding


@dataclass(frozen=True)
class PromptLogprobsRequest:
    """A request for the log-probabilities of a prompt's own tokens, each given the tokens before it.

    top_logprobs: the number of most likely tokens to report for each token.
    """

    prompt: abc.Sequence[int]
    top_logprobs: int = 0


@dataclass(frozen=True)
class SequenceFinished:
    """The last event of a sequence. finish_reason: "stop", "length", "cancelled" or "error"; then there is an error."""

    finish_reason: str
    error: UserError | None = None


SequenceEvent = SampledToken | list[TokenLogprob] | SequenceFinished


@dataclass(eq=False)
class SequenceHandle:
    """One sequence of a request. Only the scheduler's thread changes it once the request was submitted."""

    parent: "RequestHandle"
    index: int
    request: GenerationRequest | PromptLogprobsRequest
    sequence: Sequence | None = None
    start_time: float = 0.0
    done: bool = False


class RequestHandle:
    """All sequences that a client submitted together, and the queue of their events.

    events: (index of the sequence, event), for the event loop that submitted the request. The last event of each
            sequence is `SequenceFinished`.
    """

    def __init__(self, client: str, requests: abc.Sequence[GenerationRequest | PromptLogprobsRequest]) -> None:
        self.client = client
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, SequenceEvent]] = asyncio.Queue()
        self.sequences = [SequenceHandle(self, i, request) for i, request in enumerate(requests)]
        self.num_unfinished = len(self.sequences)


class Scheduler:
    """Continuous batching over an engine: `start` it, `submit` requests from any event loop, and `stop` it.

    model:       the model of the engine; nothing else may run it while the scheduler does.
    slots:       sequences that run at the same time.
    max_waiting: sequences that wait for a slot; more are refused, and more than the share of one client.
    per_client:  open requests of one client; more are refused.
    max_length:  the context length, if it is to be shorter than the model's.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int = 8,
        max_waiting: int = 512,
        per_client: int = 64,
        max_length: int | None = None,
    ) -> None:
        self._scorer = PromptScorer(model, max_length)  # before the engine: making a cache drops the CUDA graphs
        self.engine = Engine(model, slots, max_length)
        self.slots, self.max_waiting, self.per_client = slots, max_waiting, per_client
        self.context_length = min(max_length or model.config.block_size, model.config.block_size)
        self.cache_bytes = self._scorer.row_bytes * (slots + 1)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[str, deque[SequenceHandle]] = {}  # by client; the client whose turn it is comes first
        self._running: dict[Sequence, SequenceHandle] = {}
        self._scoring: SequenceHandle | None = None
        self._num_decoding = 0  # sequences that got a token from the last step and are not finished
        self._pending_events: list[tuple[SequenceHandle, SequenceEvent]] = []
        self._lock = threading.Lock()  # for what follows, which other threads change or read
        self._num_unfinished = 0
        self._open_per_client: Counter[str] = Counter()
        self._unfinished_per_client: Counter[str] = Counter()
        self._open_requests: set[RequestHandle] = set()
        self._mean_slot_seconds = 1.0  # moving average of the time that a sequence has its slot
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="gpt2-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def running(self) -> int:
        """The number of sequences that have a slot."""
        return self.engine.num_running

    @property
    def waiting(self) -> int:
        """The number of sequences that wait for a slot, and of prompts that wait to be scored."""
        return max(0, self._num_unfinished - self.engine.num_running)

    @property
    def idle(self) -> bool:
        """Whether every sequence has finished."""
        return self._num_unfinished == 0

    def submit(self, client: str, requests: abc.Sequence[GenerationRequest | PromptLogprobsRequest]) -> RequestHandle:
        """Submit all sequences of a request, or none.

        Raises RequestError for a request that can never be served, TooManyRequestsError when the client's share of the
        queue is full or it has too many open requests, and ShuttingDownError after `drain` or `stop`.
        """
        for request in requests:
            self.engine.check_request(
                request if isinstance(request, GenerationRequest) else GenerationRequest(request.prompt)
            )
        most = self.slots + (self.max_waiting + 1) // 2
        if len(requests) > most:
            raise RequestError(f"a request may have at most {most} sequences on this server, not {len(requests)}")
        handle = RequestHandle(client, requests)
        with self._lock:
            if self._draining or not self.alive:
                raise ShuttingDownError
            if self._open_per_client[client] >= self.per_client:
                raise TooManyRequestsError(f"this client has {self.per_client} open requests", self._mean_slot_seconds)
            self._check_queue(client, len(requests))
            self._num_unfinished += len(requests)
            self._open_per_client[client] += 1
            self._unfinished_per_client[client] += len(requests)
            self._open_requests.add(handle)
        self._commands.put(lambda: self._enqueue(handle))
        return handle

    def _check_queue(self, client: str, count: int) -> None:
        """Raise TooManyRequestsError if the queue has no place for so many further sequences of a client."""
        sequences, everything = self._unfinished_per_client[client] + count, self._num_unfinished + count
        num_clients = len(self._unfinished_per_client.keys() | {client})
        if exceeds_queue_share(sequences, everything, num_clients, self.slots, self.max_waiting):
            seconds = min(60, self._mean_slot_seconds * (everything - self.slots) / self.slots)
            raise TooManyRequestsError("the queue, or this client's share of it, is full: try again later", seconds)

    def cancel(self, request_handle: RequestHandle, index: int | None = None) -> None:
        """Cancel one sequence of a request, or all of them; their slots are free in the next step."""
        handles = request_handle.sequences if index is None else [request_handle.sequences[index]]
        self._commands.put(lambda: self._cancel(handles))

    def drain(self) -> None:
        """Refuse new requests, and finish those that are open."""
        self._draining = True

    def abort(self) -> None:
        """Stop the thread after its current step. Unfinished sequences end with ShuttingDownError."""
        self._draining = True
        self._commands.put(self._set_stopped)

    def stop(self, timeout: float = 10.0) -> None:
        """`abort`, and wait until the thread has ended."""
        self.abort()
        if self.alive:
            self._thread.join(timeout)

    # The methods below run in the thread.

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._step()
        finally:  # also after an exception: no client may wait forever
            self._draining = True
            with self._lock:
                unfinished = [one for request in self._open_requests for one in request.sequences if not one.done]
            for handle in unfinished:
                self._finish(handle, SequenceFinished("error", ShuttingDownError()))
            self._send_events()

    def _step(self) -> None:
        """Run the commands, admit sequences, score a chunk of a prompt, run the engine once, and send the events."""
        self._run_commands()
        self._admit()
        self._score_prompt()
        self.engine.prefill_chunk = self._prefill_budget()
        tokens = self.engine.step() if self._running else []  # without sequences the engine may be used by others
        self._pending_events += [(self._running[token.sequence], token) for token in tokens]
        self._num_decoding = sum(token.sequence.finish_reason is None for token in tokens)
        self._collect_finished()
        self._send_events()

    def _prefill_budget(self) -> int:
        """The most prompt tokens for the next step (chunked prefill), so that new prompts do not stall decoding.

        On a CPU the time of a step grows with every token: two prompt tokens for each sequence make the step of a full
        batch about twice as long.
        """
        if self._num_decoding and self.engine.model.device.type == "cpu":
            return min(PREFILL_CHUNK, max(MIN_PREFILL_TOKENS, 2 * len(self._running)))
        return PREFILL_CHUNK

    def _run_commands(self) -> None:
        """Run the commands in the queue; wait for one if there is nothing else to do."""
        block = not (self._running or self._scoring or self._waiting)
        while True:
            try:
                self._commands.get(block)()
            except queue.Empty:
                return
            block = False

    def _set_stopped(self) -> None:
        self._stopped = True

    def _enqueue(self, request_handle: RequestHandle) -> None:
        self._waiting.setdefault(request_handle.client, deque()).extend(
            handle for handle in request_handle.sequences if not handle.done
        )

    def _cancel(self, handles: list[SequenceHandle]) -> None:
        for handle in handles:
            if not handle.done:
                self._finish(handle, SequenceFinished("cancelled"))

    def _admit(self) -> None:
        """Start waiting sequences: of the client with the fewest running ones, and in turn among equals."""
        unfilled: Counter[str] = Counter()  # prompt tokens of running sequences that are still to be prefilled
        for sequence, handle in self._running.items():
            unfilled[handle.parent.client] += self.engine.num_unfilled(sequence)
        while client := self._next_client(unfilled):
            queued = self._waiting.pop(client)
            handle = queued.popleft()
            if queued:
                self._waiting[client] = queued  # behind all others
            if isinstance(handle.request, PromptLogprobsRequest):
                self._scoring = handle
                self._scorer.start(handle.request.prompt, handle.request.top_logprobs)
                continue
            if len(self._running) == self.slots:
                self._pause_for(client)
            unfilled[client] += self.engine.num_unfilled(self._start(handle, handle.request))

    def _next_client(self, unfilled: Counter[str]) -> str | None:
        """The client whose first waiting sequence can start now; None if none can."""
        running, budget = self._num_running(), self._prefill_budget()
        candidates = []
        for client, queued in self._waiting.items():
            if isinstance(queued[0].request, PromptLogprobsRequest):
                possible = self._scoring is None
            else:
                has_slot = len(self._running) < self.slots or client_to_pause(client, running) is not None
                possible = has_slot and unfilled[client] < budget
            if possible:
                candidates.append(client)
        return min(candidates, key=lambda client: running[client], default=None)

    def _num_running(self) -> Counter[str]:
        return Counter(handle.parent.client for handle in self._running.values())

    def _start(self, handle: SequenceHandle, request: GenerationRequest) -> Sequence:
        """Give a free slot to a sequence that is new or paused."""
        if handle.sequence is None:
            handle.sequence, handle.start_time = self.engine.submit(request), time.monotonic()
        else:
            self.engine.resume(handle.sequence)
        self._running[handle.sequence] = handle
        return handle.sequence

    def _pause_for(self, client: str) -> None:
        """Pause the sequence with the fewest tokens, which is the cheapest to resume, of the client with the most."""
        other = client_to_pause(client, self._num_running())
        mine = [(sequence, handle) for sequence, handle in self._running.items() if handle.parent.client == other]
        sequence, handle = min(mine, key=lambda item: len(item[0].context_tokens))
        self.engine.pause(sequence)
        del self._running[sequence]
        self._waiting.setdefault(handle.parent.client, deque()).appendleft(handle)

    def _score_prompt(self) -> None:
        """Score the next chunk of the prompt that is being scored, if there is one."""
        if self._scoring is None:
            return
        handle = self._scoring
        try:
            scored = self._scorer.step()
        except UserError as error:
            self._finish(handle, SequenceFinished("error", error))
            return
        if scored is not None:
            self._pending_events.append((handle, scored))
            self._finish(handle, SequenceFinished("stop"))

    def _collect_finished(self) -> None:
        for sequence, handle in list(self._running.items()):
            if sequence.finish_reason:
                self._mean_slot_seconds += 0.1 * (time.monotonic() - handle.start_time - self._mean_slot_seconds)
                self._finish(handle, SequenceFinished(sequence.finish_reason, sequence.error))

    def _finish(self, handle: SequenceHandle, event: SequenceFinished) -> None:
        """Remove a running, scoring or waiting sequence, and queue its last event."""
        handle.done = True
        client = handle.parent.client
        if handle.sequence is not None:
            self.engine.cancel(handle.sequence)
        if handle.sequence in self._running:
            del self._running[handle.sequence]
        elif handle is self._scoring:
            self._scoring = None
        elif (queued := self._waiting.get(client)) and handle in queued:
            queued.remove(handle)
            if not queued:
                del self._waiting[client]
        self._pending_events.append((handle, event))
        with self._lock:
            self._num_unfinished -= 1
            handle.parent.num_unfinished -= 1
            _decrement(self._unfinished_per_client, client)
            if not handle.parent.num_unfinished:
                self._open_requests.discard(handle.parent)
                _decrement(self._open_per_client, client)

    def _send_events(self) -> None:
        """Hand the events of a step to the event loops of their requests, with one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[SequenceHandle, SequenceEvent]]] = {}
        for handle, event in self._pending_events:
            by_loop.setdefault(handle.parent.loop, []).append((handle, event))
        self._pending_events = []
        for loop, events in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the request
                loop.call_soon_threadsafe(_enqueue_events, events)


def _enqueue_events(events: list[tuple[SequenceHandle, SequenceEvent]]) -> None:
    for handle, event in events:
        handle.parent.events.put_nowait((handle.index, event))


def _decrement(counts: Counter[str], key: str) -> None:
    """Subtract one; a count of zero is removed."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
