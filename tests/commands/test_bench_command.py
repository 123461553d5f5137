"""`gpt2 bench train`: its output, result file, charts and error messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.train_peers import parse_peers

from gpt2.bench import ladder_chart
from gpt2.bench.common import BenchmarkError, InProcessRunner, read_result
from gpt2.bench.ladder import LADDER_STEPS, LadderStep, parse_step_names, run_ladder
from gpt2.commands import bench, bench_train
from gpt2.errors import UserError
from tests.helpers.bench_helpers import BENCH_TRAIN_ARGS, TINY_WORKLOAD, nan_loss, scaled_loss
from tests.helpers.cli_helpers import run_cli

pytestmark = pytest.mark.usefixtures("matmul_precision", "quick_matmul")


def test_a_failed_comparison_keeps_the_ladder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, nanogpt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(InProcessRunner):
        def call(self, method: str, *arguments: Any) -> Any:
            if (method, arguments) == ("step", ("eager", TINY_WORKLOAD.warmup + 1)):
                raise BenchmarkError("out of memory: the system killed the process (SIGKILL)", out_of_memory=True)
            return super().call(method, *arguments)

    monkeypatch.setattr(bench_train, "SubprocessRunner", Killed)
    flags = ["--ladder-steps", "float32", "--peer", f"nanogpt={nanogpt}", "--json", str(tmp_path / "a.json")]
    code, out, _ = run_cli(capsys, *BENCH_TRAIN_ARGS, *flags)
    assert code == 1
    assert "the peers could not be timed: out of memory" in out
    device = read_result(tmp_path / "a.json", "bench train")["devices"][0]
    assert device["rungs"][0]["ms"]["median"] > 0
    assert device["peers"]["contestants"] == {}


def test_train_prints_a_table_and_writes_json_and_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, nanogpt: str
) -> None:
    file, chart, again = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "again.png"
    outputs = ["--json", str(file), "--chart", str(chart), "--peer", f"nanogpt={nanogpt}"]
    code, out, err = run_cli(capsys, *BENCH_TRAIN_ARGS, "--ladder-steps", "float32,tf32,chunked-loss", *outputs)
    assert code == 0
    assert "chunked-loss" in out
    assert "not applicable: TF32" in out
    assert "the speed of nanogpt's best mode (eager; ours eager), with " in out
    assert "gpt2: cpu: chunked-loss: " in err

    result = json.loads(file.read_text())
    assert set(result) == {"kind", "date", "commit", "torch", "python", "threads", "workload", "devices"}
    assert result["workload"] | {"vocab_size": 301, "batch_size": 2, "block_size": 16, "steps": 2} == result["workload"]
    (device,) = result["devices"]
    assert set(device) == {"device", "name", "workload", "rungs", "peers"}
    ran, skipped = device["rungs"][0], device["rungs"][1]
    assert set(skipped) == {"name", "about", "arithmetic", "reason", "runs"}
    assert set(ran) - set(skipped) == {
        *("ms", "tokens_per_second", "flops_per_second", "matmul", "mfu", "datasheet", "mfu_datasheet"),
        *("peak_memory", "loss", "compared_with", "drift", "allowed", "wrong"),
    }
    assert set(ran["runs"][0]) == {"seconds", "warmup_seconds", "losses", "peak_memory", "matmul"}
    assert len(ran["runs"][0]["seconds"]) == 2
    assert set(device["peers"]["contestants"]) == {"gpt2", "nanogpt"}

    assert chart.read_bytes().startswith(b"\x89PNG")
    code, out, err = run_cli(capsys, "bench", "chart", str(file), str(again))
    assert (code, out, err) == (0, "", "")
    assert again.read_bytes() == chart.read_bytes()


def test_a_wrong_loss_is_marked_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (
        LADDER_STEPS[0],
        LadderStep("too-good", "a smaller loss", {"loss": scaled_loss}),
        LadderStep("nan", "", {"loss": nan_loss}),
    )
    monkeypatch.setattr(
        bench_train,
        "run_ladder",
        lambda workload, names, *rest, **kw: run_ladder(workload, None, *rest, steps=steps, **kw),
    )
    code, out, _ = run_cli(
        capsys, *BENCH_TRAIN_ARGS, "--json", str(tmp_path / "a.json"), "--chart", str(tmp_path / "a.svg")
    )
    assert code == 1
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "WRONG: off by 0.0057, 1e-03 allowed" in lines["too-good"]
    assert "WRONG: not finite" in lines["nan"]
    assert "WRONG" not in lines["float32"]
    assert [step["wrong"] for step in read_result(tmp_path / "a.json", "bench train")["devices"][0]["rungs"]] == [
        *(False, True, True)
    ]
    assert "WRONG LOSS" in (tmp_path / "a.svg").read_text()


def test_peers_only_skips_the_ladder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, nanogpt: str
) -> None:
    flags = ["--peers-only", "--peer", f"nanogpt={nanogpt}", "--json", str(tmp_path / "a.json")]
    code, out, _ = run_cli(capsys, *BENCH_TRAIN_ARGS, *flags)
    assert code == 0
    assert "float32" not in out
    device = read_result(tmp_path / "a.json", "bench train")["devices"][0]
    assert device["rungs"] == []
    assert device["peers"]["contestants"]["nanogpt"]["speed_ratio"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "trian"], "there is no benchmark 'trian' (did you mean 'train'?)"),
        (
            [*BENCH_TRAIN_ARGS, "--ladder-steps", "float32,compil"],
            "there is no ladder step 'compil' (did you mean 'compile'?)",
        ),
        ([*BENCH_TRAIN_ARGS, "--ladder-steps", ","], "--ladder-steps is empty"),
        ([*BENCH_TRAIN_ARGS, "--peer", "nanogpt"], "--peer nanogpt needs a checkout: --peer nanogpt=PATH"),
        (
            [*BENCH_TRAIN_ARGS, "--peer", "nanogpt=nowhere"],
            "nowhere is not a checkout of nanoGPT: it has no model.py",
        ),
        (
            [*BENCH_TRAIN_ARGS, "--peer", "transfromers"],
            "there is no peer 'transfromers' (did you mean 'transformers'?)",
        ),
        ([*BENCH_TRAIN_ARGS, "--peers-only"], "--peers-only needs a --peer"),
        ([*BENCH_TRAIN_ARGS, "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        ([*BENCH_TRAIN_ARGS, "--steps", "0"], "steps must be at least 1, not 0"),
        ([*BENCH_TRAIN_ARGS, "--rounds", "0"], "--rounds must be at least 1, not 0"),
        ([*BENCH_TRAIN_ARGS, "--n-head", "3"], "n_embd (32) must be a multiple of n_head (3)"),
        ([*BENCH_TRAIN_ARGS, "--shape", "gpt2-mdium"], "--shape gpt2-mdium is not one of"),
        ([*BENCH_TRAIN_ARGS, "--model", "gpt2"], "there is no --model: --shape names the model to train"),
        ([*BENCH_TRAIN_ARGS, "--device", "cuda:99"], "there is no cuda:99 device on this machine"),
        ([*BENCH_TRAIN_ARGS, "--device", "gpu"], "device 'gpu' is not one of"),
        ([*BENCH_TRAIN_ARGS, "--json", "nowhere/a.json"], "nowhere/a.json: there is no folder nowhere"),
        ([*BENCH_TRAIN_ARGS, "--chart", "a.txt"], "a.txt: a chart is one of .png, .svg, .pdf"),
        ([*BENCH_TRAIN_ARGS, "--stpes", "3"], "there is no --stpes (did you mean '--steps'?)"),
        (["bench", "chart", "nowhere.json", "a.png"], "nowhere.json cannot be read"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("gpt2: ")
    assert err.count("\n") == 1


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers, which is not installed"):
        parse_peers(["transformers"])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib, which is not installed: pip install 'plain-gpt2\[plot\]'"):
        ladder_chart.check_chart_path(tmp_path / "a.png")


def test_help_names_the_benchmarks_and_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(capsys, "bench", "--help")
    assert code == 0
    assert all(name in out for name in bench.BENCHMARKS)
    code, out, _ = run_cli(capsys, "bench", "train", "--help")
    assert code == 0
    assert all(flag in out for flag in ("--device", "--ladder-steps", "--peer", "--json", "--chart"))


@pytest.mark.slow
def test_the_whole_ladder_and_compiled_peers_in_their_own_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], nanogpt: str
) -> None:
    flags = ["--peer", f"nanogpt={nanogpt}", "--peer", "transformers", "--json", str(tmp_path / "a.json")]
    code = bench.main([*BENCH_TRAIN_ARGS[1:], *flags])
    assert code == 0, capfd.readouterr().err
    device = read_result(tmp_path / "a.json", "bench train")["devices"][0]
    assert [step["name"] for step in device["rungs"]] == parse_step_names("all")
    assert [step["name"] for step in device["rungs"] if not step["runs"]] == ["tf32"]
    for record in device["peers"]["contestants"].values():
        assert all(len(mode["seconds"]) == 2 for mode in record["modes"].values())
        assert list(record["modes"]) == ["eager", "compiled"]
        assert record["peak_memory"] > 2**20
