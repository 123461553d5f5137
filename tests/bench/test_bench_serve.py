"""`gpt2 bench serve`: the clients count what the server generated."""

import json
import shutil
import socketserver
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
from benchmarks import serve
from benchmarks.serving import ClientWorker, ServerWorker, TokenIdTokenizer, cold_start, measure_serving

from gpt2.bench.common import BenchmarkError, InProcessRunner, SubprocessRunner
from gpt2.bench.decode import DecodeWorkload
from gpt2.commands import bench
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import ByteTokenizer
from gpt2.weights import save

CONFIG = GPTConfig(vocab_size=99, block_size=64, n_layer=1, n_head=2, n_embd=16)
WORK = DecodeWorkload("cpu", CONFIG, prompt_tokens=5, new_tokens=9, batch_sizes=(1, 3), rounds=2, pause=0.0)


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the model in torch, because compiling the kernel would take longer than the tests."""
    monkeypatch.setattr("benchmarks.serving.prepare_for_inference", lambda model, precision: model)


class Recording(InProcessRunner):
    """A runner that keeps all results."""

    answers: list[tuple[str, Any]] = []  # noqa: RUF012

    def call(self, method: str, *arguments: Any) -> Any:
        answer = super().call(method, *arguments)
        self.answers.append((method, answer))
        return answer


def test_all_tokens_are_counted_and_compared_with_the_engine() -> None:
    kept: list[int] = []
    found = measure_serving(WORK, "float32", Recording, save_partial=lambda so_far: kept.append(len(so_far)))
    assert [row["clients"] for row in found] == [1, 3]
    assert kept == [1, 2]
    runs = [answer for name, answer in Recording.answers if name == "run"][1:]
    assert [len(texts) for _, texts in runs] == [2, 2, 6, 6]
    for seconds, texts in runs:
        for timing in texts:
            assert timing.tokens == 9
            assert 1 <= len(timing.event_times) <= 9
            assert 0 < timing.event_times[0] <= timing.event_times[-1] <= seconds
    for row in found:
        between = row["between_tokens_ms"]
        assert row["between_tokens_p99_of_median"] == between["p99"] / between["median"] >= 1
        assert row["of_engine"] == row["tokens_per_second"] / row["engine_tokens_per_second"] > 0
        for name in ("first_token_ms", "between_tokens_ms"):
            assert row[name]["p99"] >= row[name]["median"] >= 0


def test_a_response_without_text_is_timed_at_its_end() -> None:
    """As when the first token is the end of text."""

    class Ended(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                if line == b"\r\n":
                    break
            time.sleep(0.01)
            events = b'data: {"choices":[{"text":""}]}\n\ndata: {"choices":[],"usage":{"completion_tokens":1}}\n\n'
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + events)

    with socketserver.TCPServer(("127.0.0.1", 0), Ended) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            seconds, texts = ClientWorker(server.server_address[1], WORK).run(0, 2, 1)
        finally:
            server.shutdown()
    assert [timing.tokens for timing in texts] == [1, 1]
    for timing in texts:
        (at,) = timing.event_times
        assert 0.01 <= at <= seconds


def test_the_token_id_tokenizer_round_trips() -> None:
    tokenizer = TokenIdTokenizer(99)
    assert tokenizer.encode(tokenizer.decode([1, 98, 5])) == [1, 98, 5]
    assert b"".join(map(tokenizer.token_bytes, [1, 98])).decode() == tokenizer.decode([1, 98])


def test_the_command_prints_and_writes_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(serve, "SubprocessRunner", InProcessRunner)
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--vocab-size", "99"]
    files = ["--json", str(tmp_path / "load.json"), "--chart", str(tmp_path / "load.png")]
    small = ["--clients", "2,1", "--rounds", "1", "--max-new-tokens", "4", "--prompt-tokens", "3", "--device", "cpu"]
    assert bench.main(["serve", *shape, *files, *small]) == 0
    result = json.loads((tmp_path / "load.json").read_text())
    assert [row["clients"] for row in result["clients"]] == [1, 2]
    assert result["workload"]["new_tokens"] == 4
    assert (tmp_path / "load.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "tokens/s" in out
    for row in result["clients"]:
        for number in (row["tokens_per_second"], row["between_tokens_p99_of_median"]):
            assert f"{number:,.1f}" in out
    bench.main(["chart", str(tmp_path / "load.json"), str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--clients", "0"], "--clients"), (["--clients", "a"], "--clients"), (["--shape", "gpt3"], "--shape gpt3"),
     (["--dtype", "int5"], "did you mean 'int"), (["--clients", ""], "at least 1")],
)  # fmt: skip
def test_invalid_flags_are_user_errors(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.main(["serve", *flags])


@pytest.mark.slow
def test_the_server_runs_in_a_subprocess() -> None:
    with SubprocessRunner(ServerWorker, WORK, "float32") as server:
        assert server.call("port") > 0
        assert server.call("engine_seconds", 1, 2) > 0


@pytest.mark.slow
def test_cold_start_is_timed(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=ByteTokenizer().vocab_size)
    torch.manual_seed(0)
    save(GPT(config), ByteTokenizer(), tmp_path / "model")
    work = replace(WORK, config=config, model=str(tmp_path / "model"))
    found = cold_start(work, "float32", tmp_path / "home")
    assert 0 < found["ready"] < found["first_token"]
    assert list((tmp_path / "home" / "native").glob("*.so")) or shutil.which("g++") is None
    with pytest.raises(BenchmarkError, match="does not start"):
        cold_start(replace(work, model=str(tmp_path / "none")), "float32")
