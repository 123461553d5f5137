"""Requests in, tokens out: one thread drives the engine, and clients join and leave its batch between two steps.

What clients send arrives in that thread through a queue; what the engine says leaves it through the queue of each
call, once for each step. A text waits until the engine has a free slot; the clients take turns, so that one with a
hundred texts does not keep out another with one.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass

from gpt2.errors import UserError
from gpt2.generation.engine import PREFILL_CHUNK, Engine, GenerationRequest, LanguageModel, SampledToken, Sequence
from gpt2.serve.prompt_logprobs import PromptLogprob, PromptScorer

SHUTTING_DOWN = "the server is shutting down"
MIN_PREFILL_TOKENS = 24  # tokens of prompts in a step, however few texts wait for it


class TooManyRequestsError(Exception):
    """There is no room for a call now; `retry_after` is a guess in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDownError(Exception):
    """The scheduler takes no more calls."""


@dataclass(frozen=True)
class PromptLogprobsRequest:
    """A prompt whose own tokens are to be scored: the log-probability of each after those before it.

    alternatives: how many of the most likely tokens are told with each.
    """

    prompt: abc.Sequence[int]
    top_logprobs: int = 0


@dataclass(frozen=True)
class SequenceFinished:
    """The last event of a text: "stop", "length", "cancelled" or "error", and what went wrong."""

    finish_reason: str
    error: UserError | None = None


SequenceEvent = SampledToken | list[PromptLogprob] | SequenceFinished


class SequenceHandle:
    """One text of a call, on its way. Only the scheduler's thread touches it, once the call is open."""

    def __init__(self, parent: "RequestHandle", index: int, request: GenerationRequest | PromptLogprobsRequest) -> None:
        self.parent, self.index, self.request = parent, index, request
        self.sequence: Sequence | None = None
        self.start_time = 0.0
        self.done = False


class RequestHandle:
    """What one client asked for at once: any number of texts, and where their events arrive.

    events: (index of the text, event), for the event loop in which the call was made. The last event of each text is
    `Finished`.
    """

    def __init__(self, client: str, requests: abc.Sequence[GenerationRequest | PromptLogprobsRequest]) -> None:
        self.client = client
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, SequenceEvent]] = asyncio.Queue()
        self.sequences = [SequenceHandle(self, i, request) for i, request in enumerate(requests)]
        self.num_unfinished = len(self.sequences)


class Scheduler:
    """Continuous batching over an engine. `start` it, `open` calls from any event loop, `stop` it.

    model:       what the engine runs; nothing else may run it while the scheduler does.
    max_waiting: texts beyond the slots that are kept waiting; more are refused with Busy.
    per_client:  calls that one client may have open.
    max_length:  the context, when it is to be shorter than the model's.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int = 8,
        max_waiting: int = 256,
        per_client: int = 64,
        max_length: int | None = None,
    ) -> None:
        self._scorer = PromptScorer(model, max_length)  # before the engine: making a cache lets go of the CUDA graphs
        self.engine = Engine(model, slots, max_length)
        self.slots, self.max_waiting, self.per_client = slots, max_waiting, per_client
        self.context_length = min(max_length or model.config.block_size, model.config.block_size)
        self.cache_bytes = self._scorer.row_bytes * (slots + 1)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[str, deque[SequenceHandle]] = {}  # by client; the next to take a turn comes first
        self._running: dict[Sequence, SequenceHandle] = {}
        self._scoring: SequenceHandle | None = None
        self._num_decoding = 0  # texts that got a token from the last step, and go on
        self._pending_events: list[tuple[SequenceHandle, SequenceEvent]] = []
        self._lock = threading.Lock()  # of what follows, which other threads change or read
        self._num_unfinished = 0
        self._open_per_client: dict[str, int] = {}
        self._open_requests: set[RequestHandle] = set()
        self._mean_slot_seconds = 1.0  # that a text took of a slot, lately
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="gpt2-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it works: it was started, and nothing has ended its thread."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether new calls are refused."""
        return self._draining

    @property
    def running(self) -> int:
        """Texts that have a slot."""
        return self.engine.num_running

    @property
    def waiting(self) -> int:
        """Texts that wait for one, or whose prompts wait to be scored."""
        return max(0, self._num_unfinished - self.engine.num_running)

    @property
    def idle(self) -> bool:
        """Whether no text is on its way."""
        return self._num_unfinished == 0

    def submit(self, client: str, requests: abc.Sequence[GenerationRequest | PromptLogprobsRequest]) -> RequestHandle:
        """Take a call with all its texts, or none of it.

        Raises UserError for what the model cannot do, Busy when there is no room, Closing after `drain` or `stop`.
        """
        for request in requests:
            self.engine.check_request(
                request if isinstance(request, GenerationRequest) else GenerationRequest(request.prompt)
            )
        if len(requests) > self.slots + self.max_waiting:
            most = self.slots + self.max_waiting
            raise UserError(f"{len(requests)} texts in one request are more than this server takes ({most})")
        call = RequestHandle(client, requests)
        with self._lock:
            if self._draining or not self.alive:
                raise ShuttingDownError(SHUTTING_DOWN)
            if self._open_per_client.get(client, 0) >= self.per_client:
                raise TooManyRequestsError(f"you have {self.per_client} requests open already", self._mean_slot_seconds)
            if self._num_unfinished + len(requests) > self.slots + self.max_waiting:
                ahead = self._num_unfinished + len(requests) - self.slots
                raise TooManyRequestsError(
                    "the queue is full: try again later", min(60, self._mean_slot_seconds * ahead / self.slots)
                )
            self._num_unfinished += len(requests)
            self._open_per_client[client] = self._open_per_client.get(client, 0) + 1
            self._open_requests.add(call)
        self._commands.put(lambda: self._enqueue(call))
        return call

    def cancel(self, request_handle: RequestHandle, index: int | None = None) -> None:
        """Let a text of a call go, or all of them; their slots are free for the next step."""
        texts = request_handle.sequences if index is None else [request_handle.sequences[index]]
        self._commands.put(lambda: self._cancel(texts))

    def drain(self) -> None:
        """Refuse new calls, and finish those that are open."""
        self._draining = True

    def abort(self) -> None:
        """End the thread after its step. What is still open is told so, with the error `GOODBYE`."""
        self._draining = True
        self._commands.put(self._set_stopped)

    def stop(self, timeout: float = 10.0) -> None:
        """`give_up`, and wait until the thread has ended."""
        self.abort()
        if self.alive:
            self._thread.join(timeout)

    # What follows is done by the thread.

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._step()
        finally:  # whatever happened, nobody waits for ever
            self._draining = True
            with self._lock:
                unfinished = [text for call in self._open_requests for text in call.sequences if not text.done]
            for text in unfinished:
                self._finish(text, SequenceFinished("error", UserError(SHUTTING_DOWN)))
            self._send_events()

    def _step(self) -> None:
        """One step of the engine, and what belongs to it."""
        self._run_commands()
        self._admit()
        self._score_prompt()
        self.engine.prefill_chunk = self._prefill_budget()
        tokens = self.engine.step() if self._running else []  # without texts the engine is left alone
        self._pending_events += [(self._running[token.sequence], token) for token in tokens]
        self._num_decoding = sum(token.sequence.finish_reason is None for token in tokens)
        self._collect_finished()
        self._send_events()

    def _prefill_budget(self) -> int:
        """How many tokens of prompts the next step reads, while texts that speak wait for it.

        On a CPU every token costs time, of a prompt or not: two for each text make the step of a full batch about
        twice as long. So texts that come do not stop those that run.
        """
        if self._num_decoding and self.engine.model.device.type == "cpu":
            return min(PREFILL_CHUNK, max(MIN_PREFILL_TOKENS, 2 * len(self._running)))
        return PREFILL_CHUNK

    def _run_commands(self) -> None:
        """Do what was asked for in the meantime; with nothing to do, wait for it."""
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
            text for text in request_handle.sequences if not text.done
        )

    def _cancel(self, handles: list[SequenceHandle]) -> None:
        for text in handles:
            if not text.done:
                self._finish(text, SequenceFinished("cancelled"))

    def _admit(self) -> None:
        """Give what is free to those who wait, one text for each client in turn."""
        while client := next((client for client, texts in self._waiting.items() if self._has_room(texts[0])), None):
            texts = self._waiting.pop(client)
            text = texts.popleft()
            if texts:
                self._waiting[client] = texts  # behind all others
            if isinstance(text.request, PromptLogprobsRequest):
                self._scoring = text
                self._scorer.start(text.request.prompt, text.request.top_logprobs)
            else:
                text.sequence = self.engine.submit(text.request)
                self._running[text.sequence] = text
                text.start_time = time.monotonic()

    def _has_room(self, handle: SequenceHandle) -> bool:
        if isinstance(handle.request, PromptLogprobsRequest):
            return self._scoring is None
        return len(self._running) < self.slots

    def _score_prompt(self) -> None:
        """Read on in the prompt that is being scored."""
        if self._scoring is None:
            return
        text = self._scoring
        try:
            scored = self._scorer.step()
        except UserError as error:
            self._finish(text, SequenceFinished("error", error))
            return
        if scored is not None:
            self._pending_events.append((text, scored))
            self._finish(text, SequenceFinished("stop"))

    def _collect_finished(self) -> None:
        for continuation, text in list(self._running.items()):
            if continuation.finish_reason:
                self._mean_slot_seconds += 0.1 * (time.monotonic() - text.start_time - self._mean_slot_seconds)
                self._finish(text, SequenceFinished(continuation.finish_reason, continuation.error))

    def _finish(self, handle: SequenceHandle, event: SequenceFinished) -> None:
        """Take it out, wherever it is, and tell it."""
        handle.done = True
        if handle.sequence is not None:
            self.engine.cancel(handle.sequence)
            del self._running[handle.sequence]
        elif handle is self._scoring:
            self._scoring = None
        elif (texts := self._waiting.get(handle.parent.client)) and handle in texts:
            texts.remove(handle)
            if not texts:
                del self._waiting[handle.parent.client]
        self._pending_events.append((handle, event))
        with self._lock:
            self._num_unfinished -= 1
            handle.parent.num_unfinished -= 1
            if not handle.parent.num_unfinished:
                self._open_requests.discard(handle.parent)
                self._open_per_client[handle.parent.client] -= 1
                if not self._open_per_client[handle.parent.client]:
                    del self._open_per_client[handle.parent.client]

    def _send_events(self) -> None:
        """Hand the events of a step to the event loops, once for each."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[SequenceHandle, SequenceEvent]]] = {}
        for text, event in self._pending_events:
            by_loop.setdefault(text.parent.loop, []).append((text, event))
        self._pending_events = []
        for loop, events in by_loop.items():
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody listens
                loop.call_soon_threadsafe(_enqueue_events, events)


def _enqueue_events(events: list[tuple[SequenceHandle, SequenceEvent]]) -> None:
    for text, event in events:
        text.parent.events.put_nowait((text.index, event))
