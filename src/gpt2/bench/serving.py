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

from gpt2.bench.common import BenchmarkError, InProcessRunner, ProgressFn, SubprocessRunner, no_progress
from gpt2.bench.decode import DecodeWorkload
from gpt2.errors import UserError
from gpt2.generation.engine import PREFILL_CHUNK, GenerationRequest
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.runtime import DTYPES
from gpt2.tokenizer import Tokenizer
from gpt2.weights import load

START_TIMEOUT_SECONDS = 60
REQUESTS_PER_CLIENT = 2  # of each client, in every round
EVENT_PREFIX, USAGE_MARKER, EMPTY_TEXT_MARKER = b"data: {", b'"choices":[]', b'"text":""'


class TokenIdTokenizer:
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


class ServerWorker:
    """The server, in the process that this is made in."""

    def __init__(self, workload: DecodeWorkload, precision: str) -> None:
        import uvicorn

        from gpt2.serve.app import create_app
        from gpt2.serve.limits import Limits
        from gpt2.serve.models import create_served_model

        self._work, most = workload, max(workload.batch_sizes)
        plain = workload.build_model().to(workload.device, DTYPES.get(precision))
        tokenizer: Tokenizer | None = load(workload.model)[1] if workload.model else None
        limits = Limits(slots=most, max_waiting=most, per_client=2 * most)
        fast = prepare_for_inference(plain, precision)
        words = tokenizer or TokenIdTokenizer(workload.config.vocab_size)
        served = create_served_model("bench", plain, fast, words, limits, max_length=workload.sequence_length)
        self._engine = served.scheduler.engine
        config = uvicorn.Config(create_app({"bench": served}, limits), port=0, log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        threading.Thread(target=self._server.run, daemon=True).start()
        until = time.monotonic() + START_TIMEOUT_SECONDS
        while not self._server.started:
            if time.monotonic() > until:
                raise UserError("the server does not start")
            time.sleep(0.01)

    def port(self) -> int:
        """Where it answers, on the loopback interface."""
        return self._server.servers[0].sockets[0].getsockname()[1]

    def engine_seconds(self, round_index: int, batch_size: int) -> float:
        """How long the engine takes to write a batch by itself, while the server has nothing to do."""
        asked = [
            GenerationRequest(prompt, Sampling(temperature=0), self._work.new_tokens)
            for prompt in self._work.prompts(round_index, batch_size)
        ]
        time.sleep(self._work.pause)
        self._engine.prefill_chunk = PREFILL_CHUNK  # whatever the scheduler thought right for its clients
        began = time.perf_counter()
        texts = [self._engine.submit(request) for request in asked]
        while not self._engine.idle:
            self._engine.step()
        seconds = time.perf_counter() - began
        if error := next((text.error for text in texts if text.error is not None), None):
            raise error
        return seconds


@dataclass(frozen=True)
class RequestTiming:
    """One text as its client saw it: seconds from its request to each event with text, and how many tokens it had."""

    event_times: list[float]
    tokens: int


class ClientWorker:
    """All clients, in the process that this is made in."""

    def __init__(self, port: int, workload: DecodeWorkload) -> None:
        self._port, self._work = port, workload

    def run(self, first_round: int, num_clients: int, requests_per_client: int) -> tuple[float, list[RequestTiming]]:
        """Each client streams `rounds` texts, one after the other: seconds in all, and what was told."""
        prompts = [self._work.prompts(first_round + i, num_clients) for i in range(requests_per_client)]
        bodies = [[self._request_body(prompt) for prompt in own] for own in zip(*prompts, strict=True)]
        time.sleep(self._work.pause)
        return asyncio.run(self._run_clients(bodies))

    def _request_body(self, prompt: list[int]) -> bytes:
        asked = {"prompt": prompt, "max_tokens": self._work.new_tokens, "temperature": 0, "stream": True}
        return json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()

    async def _run_clients(self, bodies: list[list[bytes]]) -> tuple[float, list[RequestTiming]]:
        async def client(own: list[bytes]) -> list[RequestTiming]:
            return [await self._stream_request(body) for body in own]

        began = time.perf_counter()
        told = await asyncio.gather(*map(client, bodies))
        return time.perf_counter() - began, [one for own in told for one in own]

    async def _stream_request(self, body: bytes) -> RequestTiming:
        """One request, read line by line: a client that costs next to nothing."""
        began, times, usage, first = time.perf_counter(), [], b"", b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
        writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        async for line in reader:
            first = first or line
            if line.startswith(EVENT_PREFIX):
                if USAGE_MARKER in line:
                    usage = line
                elif EMPTY_TEXT_MARKER not in line:
                    times.append(time.perf_counter() - began)
        writer.close()
        if not usage:
            raise UserError(f"the server did not finish a text: {first.decode(errors='replace').strip()}")
        times = times or [time.perf_counter() - began]  # a text that ended with its first token
        return RequestTiming(times, json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])


def measure_serving(
    workload: DecodeWorkload,
    precision: str,
    runner_class: type[InProcessRunner] = SubprocessRunner,
    progress: ProgressFn = no_progress,
    save_partial: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """For each number of clients in `work.batch_sizes`, what they got, and what the engine does by itself.

    keep: is given the records so far after each of them. Raises Failed where the server cannot be run.
    """
    found: list[dict[str, Any]] = []
    with (
        runner_class(ServerWorker, workload, precision) as server,
        runner_class(ClientWorker, server.call("port"), workload) as clients,
    ):
        warm = 10**6  # a number of prompts that nothing else has: what was read before need not be read again
        server.call("engine_seconds", warm, min(8, max(workload.batch_sizes)))
        clients.call("run", warm + 1, 2, 1)
        number = 1
        for rows in workload.batch_sizes:
            progress(f"{rows} client{'s' if rows > 1 else ''}")
            alone, served = [], []
            for _ in range(workload.rounds):  # in turns
                alone.append(server.call("engine_seconds", number, rows))
                served.append(clients.call("run", number + 1, rows, REQUESTS_PER_CLIENT))
                number += 1 + REQUESTS_PER_CLIENT
            found.append(_record(workload, rows, alone, served))
            save_partial(found)
    return found


def _record(
    workload: DecodeWorkload,
    num_clients: int,
    engine_seconds: list[float],
    client_runs: list[tuple[float, list[RequestTiming]]],
) -> dict[str, Any]:
    engine = [num_clients * workload.new_tokens / seconds for seconds in engine_seconds]
    rates = [sum(told.tokens for told in texts) / seconds for seconds, texts in client_runs]
    texts = [told for _, told_ in client_runs for told in told_]
    gaps = [later - earlier for told in texts for earlier, later in pairwise(told.event_times)]
    between = _median_and_p99(gaps or [0.0])
    return {
        "clients": num_clients,
        "tokens_per_second": statistics.median(rates),
        "engine_tokens_per_second": statistics.median(engine),
        "of_engine": statistics.median(rates) / statistics.median(engine),
        "first_token_ms": _median_and_p99([told.event_times[0] for told in texts]),
        "between_tokens_ms": between,
        "between_tokens_p99_of_median": between["p99"] / between["median"] if between["median"] else None,
        "rates": rates,
        "engine_rates": engine,
    }


def _median_and_p99(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median": 1e3 * statistics.median(ordered), "p99": 1e3 * last}


def cold_start(workload: DecodeWorkload, precision: str, home: Path | None = None) -> dict[str, float]:
    """Seconds from the command `gpt2 serve MODEL` until it answers ("ready"), and until a first token ("first_token").

    home: an empty `$GPT2_HOME`, as on a machine that never ran it: then the CPU kernel is compiled too.
    Raises Failed where it does not start.
    """
    flags = ["--dtype", precision, "--device", workload.device, "--port", "0", "--no-api-key"]
    command = [sys.executable, "-m", "gpt2", "serve", str(workload.model), *flags]
    environ = os.environ if home is None else {**os.environ, "GPT2_HOME": str(home)}
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as server:
        assert server.stderr is not None
        try:
            line = next((line for line in server.stderr if " at http://" in line), "")
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found is None:
                raise BenchmarkError("gpt2 serve does not start")
            with urllib.request.urlopen(f"{found[0]}/health") as answer:
                answer.read()
            ready = time.perf_counter() - began
            _, (told,) = ClientWorker(int(found[1]), replace(workload, pause=0.0)).run(0, 1, 1)
            return {"ready": ready, "first_token": ready + told.event_times[0]}
        finally:
            server.send_signal(signal.SIGTERM)
