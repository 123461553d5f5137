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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt2.errors import UserError
from gpt2.generation.engine import CHUNK, Continuation, Engine, LanguageModel, Request, Token
from gpt2.serve.prompt_logprobs import Scored, Scorer

GOODBYE = "the server is shutting down"
LEAST_READ = 24  # tokens of prompts in a step, however few texts wait for it


class Busy(Exception):
    """There is no room for a call now; `retry_after` is a guess in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closing(Exception):
    """The scheduler takes no more calls."""


@dataclass(frozen=True)
class ScoreRequest:
    """A prompt whose own tokens are to be scored: the log-probability of each after those before it.

    alternatives: how many of the most likely tokens are told with each.
    """

    prompt: Sequence[int]
    alternatives: int = 0


@dataclass(frozen=True)
class Finished:
    """The last event of a text: "stop", "length", "cancelled" or "error", and what went wrong."""

    reason: str
    error: UserError | None = None


Event = Token | list[Scored] | Finished


class Text:
    """One text of a call, on its way. Only the scheduler's thread touches it, once the call is open."""

    def __init__(self, call: "Call", index: int, request: Request | ScoreRequest) -> None:
        self.call, self.index, self.request = call, index, request
        self.continuation: Continuation | None = None
        self.began = 0.0
        self.done = False


class Call:
    """What one client asked for at once: any number of texts, and where their events arrive.

    events: (index of the text, event), for the event loop in which the call was made. The last event of each text is
    `Finished`.
    """

    def __init__(self, client: str, requests: Sequence[Request | ScoreRequest]) -> None:
        self.client = client
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.texts = [Text(self, i, request) for i, request in enumerate(requests)]
        self.open = len(self.texts)


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
        self._scorer = Scorer(model, max_length)  # before the engine: making a cache lets go of the CUDA graphs
        self.engine = Engine(model, slots, max_length)
        self.slots, self.max_waiting, self.per_client = slots, max_waiting, per_client
        self.context = min(max_length or model.config.block_size, model.config.block_size)
        self.cache_bytes = self._scorer.row_bytes * (slots + 1)
        self._letters: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[str, deque[Text]] = {}  # by client; the next to take a turn comes first
        self._running: dict[Continuation, Text] = {}
        self._scoring: Text | None = None
        self._speaking = 0  # texts that got a token from the last step, and go on
        self._outbox: list[tuple[Text, Event]] = []
        self._lock = threading.Lock()  # of what follows, which other threads change or read
        self._texts = 0
        self._calls: dict[str, int] = {}
        self._open: set[Call] = set()
        self._seconds_each = 1.0  # that a text took of a slot, lately
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
        return self.engine.running

    @property
    def waiting(self) -> int:
        """Texts that wait for one, or whose prompts wait to be scored."""
        return max(0, self._texts - self.engine.running)

    @property
    def idle(self) -> bool:
        """Whether no text is on its way."""
        return self._texts == 0

    def open(self, client: str, requests: Sequence[Request | ScoreRequest]) -> Call:
        """Take a call with all its texts, or none of it.

        Raises UserError for what the model cannot do, Busy when there is no room, Closing after `drain` or `stop`.
        """
        for request in requests:
            self.engine.check(request if isinstance(request, Request) else Request(request.prompt))
        if len(requests) > self.slots + self.max_waiting:
            most = self.slots + self.max_waiting
            raise UserError(f"{len(requests)} texts in one request are more than this server takes ({most})")
        call = Call(client, requests)
        with self._lock:
            if self._draining or not self.alive:
                raise Closing(GOODBYE)
            if self._calls.get(client, 0) >= self.per_client:
                raise Busy(f"you have {self.per_client} requests open already", self._seconds_each)
            if self._texts + len(requests) > self.slots + self.max_waiting:
                ahead = self._texts + len(requests) - self.slots
                raise Busy("the queue is full: try again later", min(60, self._seconds_each * ahead / self.slots))
            self._texts += len(requests)
            self._calls[client] = self._calls.get(client, 0) + 1
            self._open.add(call)
        self._letters.put(lambda: self._enqueue(call))
        return call

    def cancel(self, call: Call, index: int | None = None) -> None:
        """Let a text of a call go, or all of them; their slots are free for the next step."""
        texts = call.texts if index is None else [call.texts[index]]
        self._letters.put(lambda: self._cancel(texts))

    def drain(self) -> None:
        """Refuse new calls, and finish those that are open."""
        self._draining = True

    def give_up(self) -> None:
        """End the thread after its step. What is still open is told so, with the error `GOODBYE`."""
        self._draining = True
        self._letters.put(self._end)

    def stop(self, patience: float = 10.0) -> None:
        """`give_up`, and wait until the thread has ended."""
        self.give_up()
        if self.alive:
            self._thread.join(patience)

    # What follows is done by the thread.

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        finally:  # whatever happened, nobody waits for ever
            self._draining = True
            with self._lock:
                unfinished = [text for call in self._open for text in call.texts if not text.done]
            for text in unfinished:
                self._finish(text, Finished("error", UserError(GOODBYE)))
            self._deliver()

    def _turn(self) -> None:
        """One step of the engine, and what belongs to it."""
        self._read_letters()
        self._admit()
        self._score()
        self.engine.chunk = self._pace()
        tokens = self.engine.step() if self._running else []  # without texts the engine is left alone
        self._outbox += [(self._running[token.continuation], token) for token in tokens]
        self._speaking = sum(token.continuation.finished is None for token in tokens)
        self._collect_finished()
        self._deliver()

    def _pace(self) -> int:
        """How many tokens of prompts the next step reads, while texts that speak wait for it.

        On a CPU every token costs time, of a prompt or not: two for each text make the step of a full batch about
        twice as long. So texts that come do not stop those that run.
        """
        if self._speaking and self.engine.model.device.type == "cpu":
            return min(CHUNK, max(LEAST_READ, 2 * len(self._running)))
        return CHUNK

    def _read_letters(self) -> None:
        """Do what was asked for in the meantime; with nothing to do, wait for it."""
        block = not (self._running or self._scoring or self._waiting)
        while True:
            try:
                self._letters.get(block)()
            except queue.Empty:
                return
            block = False

    def _end(self) -> None:
        self._stopped = True

    def _enqueue(self, call: Call) -> None:
        self._waiting.setdefault(call.client, deque()).extend(text for text in call.texts if not text.done)

    def _cancel(self, texts: list[Text]) -> None:
        for text in texts:
            if not text.done:
                self._finish(text, Finished("cancelled"))

    def _admit(self) -> None:
        """Give what is free to those who wait, one text for each client in turn."""
        while client := next((client for client, texts in self._waiting.items() if self._has_room(texts[0])), None):
            texts = self._waiting.pop(client)
            text = texts.popleft()
            if texts:
                self._waiting[client] = texts  # behind all others
            if isinstance(text.request, ScoreRequest):
                self._scoring = text
                self._scorer.begin(text.request.prompt, text.request.alternatives)
            else:
                text.continuation = self.engine.submit(text.request)
                self._running[text.continuation] = text
                text.began = time.monotonic()

    def _has_room(self, text: Text) -> bool:
        if isinstance(text.request, ScoreRequest):
            return self._scoring is None
        return len(self._running) < self.slots

    def _score(self) -> None:
        """Read on in the prompt that is being scored."""
        if self._scoring is None:
            return
        text = self._scoring
        try:
            scored = self._scorer.advance()
        except UserError as error:
            self._finish(text, Finished("error", error))
            return
        if scored is not None:
            self._outbox.append((text, scored))
            self._finish(text, Finished("stop"))

    def _collect_finished(self) -> None:
        for continuation, text in list(self._running.items()):
            if continuation.finished:
                self._seconds_each += 0.1 * (time.monotonic() - text.began - self._seconds_each)
                self._finish(text, Finished(continuation.finished, continuation.error))

    def _finish(self, text: Text, event: Finished) -> None:
        """Take it out, wherever it is, and tell it."""
        text.done = True
        if text.continuation is not None:
            self.engine.cancel(text.continuation)
            del self._running[text.continuation]
        elif text is self._scoring:
            self._scoring = None
        elif (texts := self._waiting.get(text.call.client)) and text in texts:
            texts.remove(text)
            if not texts:
                del self._waiting[text.call.client]
        self._outbox.append((text, event))
        with self._lock:
            self._texts -= 1
            text.call.open -= 1
            if not text.call.open:
                self._open.discard(text.call)
                self._calls[text.call.client] -= 1
                if not self._calls[text.call.client]:
                    del self._calls[text.call.client]

    def _deliver(self) -> None:
        """Hand the events of a step to the event loops, once for each."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Text, Event]]] = {}
        for text, event in self._outbox:
            by_loop.setdefault(text.call.loop, []).append((text, event))
        self._outbox = []
        for loop, events in by_loop.items():
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody listens
                loop.call_soon_threadsafe(_hand_out, events)


def _hand_out(events: list[tuple[Text, Event]]) -> None:
    for text, event in events:
        text.call.events.put_nowait((text.index, event))
