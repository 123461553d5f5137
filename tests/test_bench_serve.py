"""`gpt2 bench serve`: what clients count is what the server did."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
from gpt2.bench.decode import Decoding
from gpt2.bench.load import Numbers, ServerHost, measure
from gpt2.bench.timing import Elsewhere, Here
from gpt2.commands import bench, bench_serve
from gpt2.errors import UserError
from gpt2.model import GPTConfig

CONFIG = GPTConfig(vocab_size=99, block_size=64, n_layer=1, n_head=2, n_embd=16)
WORK = Decoding("cpu", CONFIG, prompt_tokens=5, new_tokens=9, batch_sizes=(1, 3), rounds=2, pause=0.0)


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch runs the model: compiling takes longer than all of this."""
    monkeypatch.setattr("gpt2.bench.load.accelerated", lambda model, precision: model)


class Counting(Here):
    """A host that keeps what its objects gave."""

    answers: list[tuple[str, Any]] = []  # noqa: RUF012

    def call(self, method: str, *arguments: Any) -> Any:
        answer = super().call(method, *arguments)
        self.answers.append((method, answer))
        return answer


def test_every_text_is_counted_and_the_engine_makes_the_same() -> None:
    kept: list[int] = []
    found = measure(WORK, "float32", Counting, keep=lambda so_far: kept.append(len(so_far)))
    assert [row["clients"] for row in found] == [1, 3]
    assert kept == [1, 2]
    runs = [answer for name, answer in Counting.answers if name == "run"][1:]
    assert [len(texts) for _, texts in runs] == [2, 2, 6, 6]
    for seconds, texts in runs:
        for told in texts:
            assert told.tokens == 9
            assert 1 <= len(told.times) <= 9
            assert 0 < told.times[0] <= told.times[-1] <= seconds
    for row in found:
        assert row["of_engine"] == row["tokens_per_second"] / row["engine_tokens_per_second"] > 0
        for name in ("first_token_ms", "between_tokens_ms"):
            assert row[name]["p99"] >= row[name]["median"] >= 0


def test_the_tokens_of_numbers_are_numbers() -> None:
    tokenizer = Numbers(99)
    assert tokenizer.encode(tokenizer.decode([1, 98, 5])) == [1, 98, 5]
    assert b"".join(map(tokenizer.token_bytes, [1, 98])).decode() == tokenizer.decode([1, 98])


def test_the_command_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench_serve, "Elsewhere", Here)
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--vocab-size", "99"]
    files = ["--json", str(tmp_path / "load.json"), "--chart", str(tmp_path / "load.png")]
    small = ["--clients", "2,1", "--rounds", "1", "--new-tokens", "4", "--prompt-tokens", "3", "--device", "cpu"]
    assert bench_serve.main([*shape, *files, *small]) == 0
    result = json.loads((tmp_path / "load.json").read_text())
    assert [row["clients"] for row in result["clients"]] == [1, 2]
    assert result["workload"]["new_tokens"] == 4
    assert (tmp_path / "load.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "tokens/s" in out
    assert all(f"{row['tokens_per_second']:,.1f}" in out for row in result["clients"])
    bench.main(["chart", str(tmp_path / "load.json"), str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--clients", "0"], "--clients"), (["--clients", "a"], "--clients"), (["--shape", "gpt3"], "--shape gpt3"),
     (["--dtype", "int5"], "did you mean 'int"), (["--clients", ""], "at least 1")],
)  # fmt: skip
def test_what_cannot_be_is_a_user_error(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench_serve.main(flags)


@pytest.mark.slow
def test_the_server_runs_in_a_process_of_its_own() -> None:
    with Elsewhere(ServerHost, WORK, "float32") as server:
        assert server.call("port") > 0
        assert server.call("engine_seconds", 1, 2) > 0
