"""The playground with a long text: seconds until each panel has its answer, and from a key to the next frame.

    python benchmarks/playground.py

Serves GPT-2 124M with random weights and inspects a text of 1,000 tokens over HTTP, several times each: `new_text` (the
first token is another one, so nothing is known), `known_text` (the text has been inspected, by another panel) and
`repeated` (the same request again). `processor_seconds` is what the server used, of all its threads: divided by the
number of threads it is what an idle machine would need at most. Patching is one layer of two short texts: a page sends
one such request for each layer. In Chromium, letters are typed at the beginning of the text while panels are computed.
Writes results/playground.json.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import write_result

from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer
from gpt2.weights import save

START_TIMEOUT_SECONDS = 120
TOKENS, PATCHED_TOKENS, KEYS = 1000, 16, 40
PANELS: dict[str, dict[str, Any]] = {  # route: fields of the request beside the text
    "next": {"top": 10},
    "score": {},
    "attention": {},
    "lens": {"top": 3, "asked": 11},
    "heads": {},
    "head": {"layer": 5, "head": 3},
    "contributions": {"target": 11, "alternative": 13},
    "lens-map": {"positions": 24},
    "ablate": {"heads": [[5, 3], [7, 1]], "mlps": [2]},
    "steer": {"plus": "Love", "minus": "Hate", "layer": 6, "strength": 4},
}


class Client:
    """Requests to a server process."""

    def __init__(self, address: str, pid: int) -> None:
        self._address, self._stat = address, Path(f"/proc/{pid}/stat")

    def timed(self, route: str, body: dict[str, Any]) -> dict[str, float]:
        """Seconds until the response is complete, and processor seconds of the server."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self._address}inspect/{route}", data, {"Content-Type": "application/json"})
        used, start = self._processor_seconds(), time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as response:
            response.read()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "processor_seconds": self._processor_seconds() - used}

    def _processor_seconds(self) -> float:
        fields = self._stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def run_server(model: Path, threads: int) -> Iterator[tuple[str, int]]:
    """`gpt2 serve` on a free port: its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "gpt2", "serve", str(model), "--port", str(port), "--slots", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready(address, process)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{address}health", timeout=5).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError("the server does not start") from None
            time.sleep(0.1)


def measure_panels(client: Client, tokens: list[int], times: int) -> dict[str, Any]:
    """The medians for each panel and kind of request."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    client.timed("head-scores", {})  # once for a model
    for number in range(times):
        for at, (route, fields) in enumerate(PANELS.items()):
            print(f"{number + 1} of {times}: {route}", file=sys.stderr, flush=True)
            first = 100 + 2 * (number * len(PANELS) + at)  # a first token that no earlier text has
            texts = [[first, *tokens[1:]], [first + 1, *tokens[1:]]]
            kinds = found.setdefault(route, {"new_text": [], "known_text": [], "repeated": []})
            kinds["new_text"].append(client.timed(route, {"tokens": texts[0], **fields}))
            client.timed("attention" if route == "next" else "next", {"tokens": texts[1]})
            kinds["known_text"].append(client.timed(route, {"tokens": texts[1], **fields}))
            kinds["repeated"].append(client.timed(route, {"tokens": texts[1], **fields}))
    return {route: {kind: _medians(each) for kind, each in kinds.items()} for route, kinds in found.items()}


def measure_patching(client: Client, tokens: list[int], times: int) -> dict[str, float]:
    """One layer of two texts that differ in their second token."""
    text, rest = tokens[:1], tokens[2:PATCHED_TOKENS]
    runs = []
    for number in range(times):
        body = {"tokens": [*text, 100 + number, *rest], "source": [*text, 300 + number, *rest], "layer": 5}
        runs.append(client.timed("patch", body))
    return _medians(runs)


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def measure_typing(address: str, text: str) -> dict[str, Any]:
    """Milliseconds from a key to the end of the next frame, while panels of the long text are computed."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        raise UserError("typing is measured in chromium, which is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.wait_for_selector("#next li", timeout=60_000)
        page.fill("#text", text)
        found: dict[str, Any] = {}
        for tab in ("settings", "attention", "layers", "contributions", "whatif", "tokens"):
            page.click(f"#tab-{tab}")
            if tab == "attention":
                page.click("#view-heads")
            page.focus("#text")
            page.keyboard.press("Control+Home")
            page.evaluate(_RECORD_FRAMES)
            for letter in ("the cat and " * KEYS)[:KEYS]:
                page.keyboard.type(letter, delay=20)
            page.wait_for_timeout(500)
            delays = page.evaluate("window.delays")
            worst, median = round(max(delays), 1), round(statistics.median(delays), 1)
            found[tab] = {"keys": len(delays), "median_ms": median, "largest_ms": worst}
        browser.close()
    return found


_RECORD_FRAMES = """() => {
  window.delays = [];
  window.record ??= document.addEventListener("keydown", (event) => {
    const start = event.timeStamp;
    requestAnimationFrame(() => setTimeout(() => window.delays.push(performance.now() - start)));
  }, true) ?? true;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of each panel of the playground for a text of 1,000 tokens.")
    parser.add_argument("--times", type=int, default=3, help="measurements of each panel [3]")
    parser.add_argument("--threads", type=int, default=2, help="threads of the server [2]")
    args = parser.parse_args()
    tokenizer = get_tokenizer("gpt2")
    license_text = (Path(__file__).parent.parent / "LICENSE").read_text()
    tokens = (tokenizer.encode(license_text) * TOKENS)[:TOKENS]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1337)
        model = Path(folder, "random-124m")
        save(GPT(GPTConfig()), tokenizer, model)
        with run_server(model, args.threads) as (address, pid):
            client = Client(address, pid)
            found = {
                "model": "GPT-2 124M, random weights",
                "tokens": TOKENS,
                "threads": args.threads,
                "panels": measure_panels(client, tokens, args.times),
                "patch_a_layer": {"tokens": PATCHED_TOKENS, **measure_patching(client, tokens, args.times)},
                "typing": measure_typing(address, tokenizer.decode(tokens)),
                "load_average": round(os.getloadavg()[0], 1),
            }
    command = shlex.join(["python", "benchmarks/playground.py", *sys.argv[1:]])
    print(json.dumps(write_result("playground", command, found), indent=2))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
