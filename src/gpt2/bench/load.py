"""How much of the engine's speed clients get from the server: throughput, time to the first token, and its pulse.

The server runs in one process and all clients in another, on this machine. All begin at once, and each streams one
text and then another, whose prompt is read while the others' texts go on. Beside it, in the same run, the server's own
engine writes as many texts at once with nobody in between.
"""

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpt2.bench.decode import Decoding
from gpt2.bench.timing import Elsewhere, Failed, Here, Say, silent
from gpt2.errors import UserError
from gpt2.generation.engine import CHUNK, Request
from gpt2.generation.inference import accelerated
from gpt2.generation.sampling import Sampling
from gpt2.runtime import DTYPES
from gpt2.tokenizer import Tokenizer
from gpt2.weights import load

START_SECONDS = 60
TEXTS = 2  # of each client, in every round
EVENT, USAGE, WORDLESS = b"data: {", b'"choices":[]', b'"text":""'


class Numbers:
    """A tokenizer for models that have none: every token is its number."""

    name = "numbers"
    fingerprint = ""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, vocab_size  # no token ends a text
        self.special_tokens: dict[str, int] = {}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The numbers in a text."""
        return [int(word) % self.vocab_size for word in re.findall(r"\d+", text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The numbers, with spaces."""
        return "".join(f" {token}" for token in tokens)

    def token_bytes(self, token: int) -> bytes:
        """A number, with a space."""
        return f" {token}".encode()

    def save(self, folder: Path) -> None:
        """There is nothing to save."""


class ServerHost:
    """The server, in the process that this is made in."""

    def __init__(self, work: Decoding, precision: str) -> None:
        import uvicorn

        from gpt2.serve.app import create_app
        from gpt2.serve.limits import Limits
        from gpt2.serve.models import create_served_model

        self._work, most = work, max(work.batch_sizes)
        plain = work.build().to(work.device, DTYPES.get(precision))
        tokenizer: Tokenizer | None = load(work.model)[1] if work.model else None
        limits = Limits(slots=most, max_waiting=most, per_client=2 * most)
        fast = accelerated(plain, precision)
        words = tokenizer or Numbers(work.config.vocab_size)
        served = create_served_model("bench", plain, fast, words, limits, max_length=work.length)
        self._engine = served.scheduler.engine
        config = uvicorn.Config(create_app({"bench": served}, limits), port=0, log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        threading.Thread(target=self._server.run, daemon=True).start()
        until = time.monotonic() + START_SECONDS
        while not self._server.started:
            if time.monotonic() > until:
                raise UserError("the server does not start")
            time.sleep(0.01)

    def port(self) -> int:
        """Where it answers, on the loopback interface."""
        return self._server.servers[0].sockets[0].getsockname()[1]

    def engine_seconds(self, number: int, rows: int) -> float:
        """How long the engine takes to write a batch by itself, while the server has nothing to do."""
        asked = [
            Request(prompt, Sampling(temperature=0), self._work.new_tokens)
            for prompt in self._work.prompts(number, rows)
        ]
        time.sleep(self._work.pause)
        self._engine.chunk = CHUNK  # whatever the scheduler thought right for its clients
        began = time.perf_counter()
        texts = [self._engine.submit(request) for request in asked]
        while not self._engine.idle:
            self._engine.step()
        seconds = time.perf_counter() - began
        if error := next((text.error for text in texts if text.error is not None), None):
            raise error
        return seconds


@dataclass(frozen=True)
class Told:
    """One text as its client saw it: seconds from its request to each event with text, and how many tokens it had."""

    times: list[float]
    tokens: int


class ClientHost:
    """All clients, in the process that this is made in."""

    def __init__(self, port: int, work: Decoding) -> None:
        self._port, self._work = port, work

    def run(self, number: int, clients: int, rounds: int) -> tuple[float, list[Told]]:
        """Each client streams `rounds` texts, one after the other: seconds in all, and what was told."""
        prompts = [self._work.prompts(number + i, clients) for i in range(rounds)]
        bodies = [[self._body(prompt) for prompt in own] for own in zip(*prompts, strict=True)]
        time.sleep(self._work.pause)
        return asyncio.run(self._all(bodies))

    def _body(self, prompt: list[int]) -> bytes:
        asked = {"prompt": prompt, "max_tokens": self._work.new_tokens, "temperature": 0, "stream": True}
        return json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()

    async def _all(self, bodies: list[list[bytes]]) -> tuple[float, list[Told]]:
        async def client(own: list[bytes]) -> list[Told]:
            return [await self._stream(body) for body in own]

        began = time.perf_counter()
        told = await asyncio.gather(*map(client, bodies))
        return time.perf_counter() - began, [one for own in told for one in own]

    async def _stream(self, body: bytes) -> Told:
        """One request, read line by line: a client that costs next to nothing."""
        began, times, usage, first = time.perf_counter(), [], b"", b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
        writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        async for line in reader:
            first = first or line
            if line.startswith(EVENT):
                if USAGE in line:
                    usage = line
                elif WORDLESS not in line:
                    times.append(time.perf_counter() - began)
        writer.close()
        if not usage:
            raise UserError(f"the server did not finish a text: {first.decode(errors='replace').strip()}")
        times = times or [time.perf_counter() - began]  # a text that ended with its first token
        return Told(times, json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])


def measure(
    work: Decoding,
    precision: str,
    host: type[Here] = Elsewhere,
    say: Say = silent,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """For each number of clients in `work.batch_sizes`, what they got, and what the engine does by itself.

    keep: is given the records so far after each of them. Raises Failed where the server cannot be run.
    """
    found: list[dict[str, Any]] = []
    with host(ServerHost, work, precision) as server, host(ClientHost, server.call("port"), work) as clients:
        warm = 10**6  # a number of prompts that nothing else has: what was read before need not be read again
        server.call("engine_seconds", warm, min(8, max(work.batch_sizes)))
        clients.call("run", warm + 1, 2, 1)
        number = 1
        for rows in work.batch_sizes:
            say(f"{rows} client{'s' if rows > 1 else ''}")
            alone, served = [], []
            for _ in range(work.rounds):  # in turns
                alone.append(server.call("engine_seconds", number, rows))
                served.append(clients.call("run", number + 1, rows, TEXTS))
                number += 1 + TEXTS
            found.append(_record(work, rows, alone, served))
            keep(found)
    return found


def _record(work: Decoding, clients: int, alone: list[float], served: list[tuple[float, list[Told]]]) -> dict[str, Any]:
    engine = [clients * work.new_tokens / seconds for seconds in alone]
    rates = [sum(told.tokens for told in texts) / seconds for seconds, texts in served]
    texts = [told for _, told_ in served for told in told_]
    gaps = [later - earlier for told in texts for earlier, later in pairwise(told.times)]
    between = _spread(gaps or [0.0])
    return {
        "clients": clients,
        "tokens_per_second": statistics.median(rates),
        "engine_tokens_per_second": statistics.median(engine),
        "of_engine": statistics.median(rates) / statistics.median(engine),
        "first_token_ms": _spread([told.times[0] for told in texts]),
        "between_tokens_ms": between,
        "between_tokens_p99_of_median": between["p99"] / between["median"] if between["median"] else None,
        "rates": rates,
        "engine_rates": engine,
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median": 1e3 * statistics.median(ordered), "p99": 1e3 * last}


def cold_start(work: Decoding, precision: str, home: Path | None = None) -> dict[str, float]:
    """Seconds from the command `gpt2 serve MODEL` until it answers ("ready"), and until a first token ("first_token").

    home: an empty `$GPT2_HOME`, as on a machine that never ran it: then the CPU kernel is compiled too.
    Raises Failed where it does not start.
    """
    flags = ["--dtype", precision, "--device", work.device, "--port", "0", "--no-api-key"]
    command = [sys.executable, "-m", "gpt2", "serve", str(work.model), *flags]
    environ = os.environ if home is None else {**os.environ, "GPT2_HOME": str(home)}
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as server:
        assert server.stderr is not None
        try:
            line = next((line for line in server.stderr if " at http://" in line), "")
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found is None:
                raise Failed("gpt2 serve does not start")
            with urllib.request.urlopen(f"{found[0]}/health") as answer:
                answer.read()
            ready = time.perf_counter() - began
            _, (told,) = ClientHost(int(found[1]), replace(work, pause=0.0)).run(0, 1, 1)
            return {"ready": ready, "first_token": ready + told.times[0]}
        finally:
            server.send_signal(signal.SIGTERM)
