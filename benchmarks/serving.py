"""Load test of the server: throughput, time to first token and inter-token latency, compared with the engine alone.

The server runs in one process and all clients in another, on this machine. All clients start at the same time, and each
streams several completions one after the other, so that prompts are prefilled while other sequences decode. In the same
run, the server's engine decodes a batch of the same size without HTTP.
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
from gpt2.bench.decode import DecodeWorkload, run_until_idle
from gpt2.errors import UserError
from gpt2.generation.engine import PREFILL_CHUNK, GenerationRequest
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.resolve import resolve_model
from gpt2.runtime import DTYPES
from gpt2.tokenizer import Tokenizer

START_TIMEOUT_SECONDS = 60
REQUESTS_PER_CLIENT = 2  # in each round
WARMUP_ROUND = 10**6  # its prompts are used only once, so that the prefix cache does not affect later rounds
EVENT_PREFIX, USAGE_MARKER, EMPTY_TEXT_MARKER = b"data: {", b'"choices":[]', b'"text":""'


class TokenIdTokenizer:
    """A tokenizer for models without one: the text of a token is the decimal form of its id."""

    name = "numbers"
    fingerprint = ""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, vocab_size  # outside the vocabulary: no token ends a text
        self.special_tokens: dict[str, int] = {}
        self.end_tokens: tuple[int, ...] = (self.end_of_text,)
        self.prompt_prefix: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The numbers in a text, modulo the vocabulary size."""
        return [int(word) % self.vocab_size for word in re.findall(r"\d+", text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The ids, each after a space."""
        return "".join(f" {token}" for token in tokens)

    def token_bytes(self, token: int) -> bytes:
        """A space and the id."""
        return f" {token}".encode()

    def save(self, folder: Path) -> None:
        """There is nothing to save."""


class ServerWorker:
    """The server, in its own process."""

    def __init__(self, workload: DecodeWorkload, precision: str) -> None:
        import uvicorn

        from gpt2.serve.app import create_app
        from gpt2.serve.limits import Limits
        from gpt2.serve.models import create_served_model

        self._work, slots = workload, max(workload.batch_sizes)
        plain = workload.build_model().to(workload.device, DTYPES.get(precision))
        tokenizer: Tokenizer | None = resolve_model(workload.model).tokenizer if workload.model else None
        tokenizer = tokenizer or TokenIdTokenizer(workload.config.vocab_size)
        limits = Limits(slots=slots, max_waiting=2 * slots, per_client=2 * slots)
        fast = prepare_for_inference(plain, precision)
        served = create_served_model("bench", plain, fast, tokenizer, limits, max_length=workload.sequence_length)
        self._engine = served.scheduler.engine
        config = uvicorn.Config(create_app({"bench": served}, limits), port=0, log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        threading.Thread(target=self._server.run, daemon=True).start()
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self._server.started:
            if time.monotonic() > deadline:
                raise UserError("the server does not start")
            time.sleep(0.01)

    def port(self) -> int:
        """Its port on the loopback interface."""
        return self._server.servers[0].sockets[0].getsockname()[1]

    def engine_seconds(self, round_index: int, batch_size: int) -> float:
        """Seconds in which the engine alone decodes a batch, while the server is idle."""
        requests = [
            GenerationRequest(prompt, Sampling(temperature=0), self._work.new_tokens)
            for prompt in self._work.prompts(round_index, batch_size)
        ]
        time.sleep(self._work.pause)
        self._engine.prefill_chunk = PREFILL_CHUNK  # the scheduler may have changed it
        start = time.perf_counter()
        run_until_idle(self._engine, [self._engine.submit(request) for request in requests])
        return time.perf_counter() - start


@dataclass(frozen=True)
class RequestTiming:
    """One request as its client saw it: seconds from the request to each event with text, and its number of tokens."""

    event_times: list[float]
    tokens: int


class ClientWorker:
    """All clients, in one process of their own."""

    def __init__(self, port: int, workload: DecodeWorkload) -> None:
        self._port, self._work = port, workload

    def run(self, first_round: int, num_clients: int, requests_per_client: int) -> tuple[float, list[RequestTiming]]:
        """Let each client send its requests one after the other; returns seconds in total, and all timings."""
        prompts = [self._work.prompts(first_round + i, num_clients) for i in range(requests_per_client)]
        bodies = [[self._request_body(prompt) for prompt in own] for own in zip(*prompts, strict=True)]
        time.sleep(self._work.pause)
        return asyncio.run(self._run_clients(bodies))

    def _request_body(self, prompt: list[int]) -> bytes:
        request = {"prompt": prompt, "max_tokens": self._work.new_tokens, "temperature": 0, "stream": True}
        return json.dumps(request | {"stream_options": {"include_usage": True}}).encode()

    async def _run_clients(self, bodies: list[list[bytes]]) -> tuple[float, list[RequestTiming]]:
        async def client(own: list[bytes]) -> list[RequestTiming]:
            return [await self._stream_request(body) for body in own]

        start = time.perf_counter()
        timings = await asyncio.gather(*map(client, bodies))
        return time.perf_counter() - start, [timing for own in timings for timing in own]

    async def _stream_request(self, body: bytes) -> RequestTiming:
        """Send one request and read the response line by line, with little CPU time."""
        start, times, usage, first = time.perf_counter(), [], b"", b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
        writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        async for line in reader:
            first = first or line
            if line.startswith(EVENT_PREFIX):
                if USAGE_MARKER in line:
                    usage = line
                elif EMPTY_TEXT_MARKER not in line:
                    times.append(time.perf_counter() - start)
        writer.close()
        if not usage:
            raise UserError(f"the server did not finish a response: {first.decode(errors='replace').strip()}")
        times = times or [time.perf_counter() - start]  # a text that ended with its first token
        return RequestTiming(times, json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])


def measure_serving(
    workload: DecodeWorkload,
    precision: str,
    runner_class: type[InProcessRunner] = SubprocessRunner,
    progress: ProgressFn = no_progress,
    save_partial: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """For each number of clients in `workload.batch_sizes`: their throughput and latencies, and the engine's own.

    save_partial: called with the records so far after each number of clients.
    Raises BenchmarkError if the server cannot run.
    """
    records: list[dict[str, Any]] = []
    with (
        runner_class(ServerWorker, workload, precision) as server,
        runner_class(ClientWorker, server.call("port"), workload) as clients,
    ):
        server.call("engine_seconds", WARMUP_ROUND, min(8, max(workload.batch_sizes)))
        clients.call("run", WARMUP_ROUND + 1, 2, 1)
        round_index = 1
        for num_clients in workload.batch_sizes:
            progress(f"{num_clients} client{'s' if num_clients > 1 else ''}")
            engine_seconds, client_runs = [], []
            for _ in range(workload.rounds):  # in turns
                engine_seconds.append(server.call("engine_seconds", round_index, num_clients))
                client_runs.append(clients.call("run", round_index + 1, num_clients, REQUESTS_PER_CLIENT))
                round_index += 1 + REQUESTS_PER_CLIENT
            records.append(_record(workload, num_clients, engine_seconds, client_runs))
            save_partial(records)
    return records


def _record(
    workload: DecodeWorkload,
    num_clients: int,
    engine_seconds: list[float],
    client_runs: list[tuple[float, list[RequestTiming]]],
) -> dict[str, Any]:
    engine = [num_clients * workload.new_tokens / seconds for seconds in engine_seconds]
    rates = [sum(timing.tokens for timing in timings) / seconds for seconds, timings in client_runs]
    all_timings = [timing for _, timings in client_runs for timing in timings]
    gaps = [later - earlier for timing in all_timings for earlier, later in pairwise(timing.event_times)]
    between = _median_and_p99(gaps or [0.0])
    return {
        "clients": num_clients,
        "tokens_per_second": statistics.median(rates),
        "engine_tokens_per_second": statistics.median(engine),
        "of_engine": statistics.median(rates) / statistics.median(engine),
        "first_token_ms": _median_and_p99([timing.event_times[0] for timing in all_timings]),
        "between_tokens_ms": between,
        "between_tokens_p99_of_median": between["p99"] / between["median"] if between["median"] else None,
        "rates": rates,
        "engine_rates": engine,
    }


def _median_and_p99(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median": 1e3 * statistics.median(ordered), "p99": 1e3 * p99}


def cold_start(workload: DecodeWorkload, precision: str, home: Path | None = None) -> dict[str, float]:
    """Seconds from the start of `gpt2 serve MODEL` to its first response ("ready") and first token ("first_token").

    home: an empty `$GPT2_HOME`, as on a new machine, where the CPU kernel is compiled first.
    Raises BenchmarkError if the server does not start.
    """
    flags = ["--dtype", precision, "--device", workload.device, "--port", "0", "--no-api-key"]
    command = [sys.executable, "-m", "gpt2", "serve", str(workload.model), *flags]
    environ = os.environ if home is None else {**os.environ, "GPT2_HOME": str(home)}
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as server:
        assert server.stderr is not None
        try:
            line = next((line for line in server.stderr if " at http://" in line), "")
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if found is None:
                raise BenchmarkError("gpt2 serve does not start")
            with urllib.request.urlopen(f"{found[0]}/health") as response:
                response.read()
            ready = time.perf_counter() - start
            _, (timing,) = ClientWorker(int(found[1]), replace(workload, pause=0.0)).run(0, 1, 1)
            return {"ready": ready, "first_token": ready + timing.event_times[0]}
        finally:
            server.send_signal(signal.SIGTERM)
