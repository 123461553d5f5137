"""The benchmarks: what they compute is right, what is wrong is flagged, and everything ends up in the JSON."""

import functools
import json
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run
from torch import Tensor
from torch.nn import functional as F

from gpt2.bench import chart
from gpt2.bench.ladder import (
    RUNGS,
    TOLERANCE,
    Rung,
    choose,
    chunked_loss,
    climb,
    compare,
    full_loss,
    padded_loss,
    run_rung,
    unsteadiness,
)
from gpt2.bench.peers import Lane, build, compete, parse_peers, race, rank
from gpt2.bench.timing import (
    Failed,
    Here,
    Workload,
    in_fresh_process,
    in_this_process,
    milliseconds,
    read_result,
    silent,
)
from gpt2.commands import bench
from gpt2.costs import flops_per_token
from gpt2.errors import UserError
from gpt2.hardware import measure_matmul
from gpt2.model import GPT, GPTConfig

TINY = GPTConfig(vocab_size=301, block_size=1024, n_layer=2, n_head=2, n_embd=32)
WORK = Workload("cpu", TINY, batch_size=2, block_size=16, steps=3, warmup=2, lr=3e-3)
EAGER_RUNGS = tuple(rung for rung in RUNGS if rung.name != "compile")
FLAGS = "--devices cpu --n-layer 2 --n-head 2 --n-embd 32 --vocab-size 301 --batch-size 2 --block-size 16 --steps 2"
TRAIN = ["bench", "train", *FLAGS.split()]

NANOGPT = '''
"""A stand-in with the interface of nanoGPT's model.py."""
from dataclasses import dataclass
from torch.nn import functional as F
import gpt2.model

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.5
    bias: bool = False

class GPT(gpt2.model.GPT):
    def __init__(self, config):
        assert config.bias and config.dropout == 0
        shape = {name: getattr(config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
        super().__init__(gpt2.model.GPTConfig(**shape))
        print("number of parameters: many")

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
'''


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    """What a rung sets for its process is undone, as here it is ours."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def quick_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matmul rate is measured in no time, on a small matrix."""
    for name in ("gpt2.bench.ladder.measure_matmul", "gpt2.bench.peers.measure_matmul"):
        monkeypatch.setattr(name, lambda device, dtype, seconds: measure_matmul(device, dtype, 0.001, size=256))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt2.bench.ladder.can_compile", "gpt2.bench.peers.can_compile"):
        monkeypatch.setattr(name, lambda device: False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    """The commands measure in this process, without compiling."""
    monkeypatch.setattr(bench, "in_fresh_process", in_this_process)
    monkeypatch.setattr(bench, "Elsewhere", Here)


@pytest.fixture
def nanogpt(tmp_path: Path) -> str:
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text(NANOGPT)
    return str(folder)


def by_name(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in records}


def raw(seconds: list[float], losses: list[float | None], matmul: float = 1e9) -> dict[str, Any]:
    return {"seconds": seconds, "losses": losses, "peak_memory": 1000, "matmul": matmul}


# --- the work


def test_the_batches_are_the_same_for_the_same_seed_and_have_something_to_learn() -> None:
    batches = WORK.batches()
    assert len(batches) == WORK.warmup + WORK.steps
    for (tokens, targets), (again, _) in zip(batches, WORK.batches(), strict=True):
        assert tokens.shape == targets.shape == (2, 16)
        assert torch.equal(tokens, again)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
    many = torch.cat([tokens.flatten() for tokens, _ in Workload("cpu", TINY, 64, 64, steps=5).batches()])
    counts = torch.bincount(many, minlength=301).float()
    assert counts.argmax() == 0
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)  # Zipf


@pytest.mark.parametrize("loss", [padded_loss, chunked_loss])
def test_every_loss_of_the_ladder_is_the_plain_one_with_its_gradient(loss: Any) -> None:
    torch.manual_seed(0)
    model = GPT(TINY).double()
    tokens, targets = WORK.batches()[0]
    found = []
    for one in (full_loss, loss):
        model.zero_grad()
        value = one(model, tokens, targets)
        value.backward()
        found.append((value.item(), [p.grad for p in model.parameters()]))
    (expected, gradients), (value, others) = found
    assert value == pytest.approx(expected, rel=1e-6)  # full_loss ends in float32
    for a, b in zip(gradients, others, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_milliseconds_are_median_and_quartiles() -> None:
    assert milliseconds([0.004, 0.001, 0.002, 0.003, 0.005]) == pytest.approx({"median": 3, "low": 2, "high": 4})
    assert milliseconds([0.002]) == pytest.approx({"median": 2, "low": 2, "high": 2})


# --- the ladder


def test_all_rungs_give_the_same_loss() -> None:
    records = climb(WORK, rungs=EAGER_RUNGS, run=in_this_process)
    found = by_name(records)
    assert list(found) == [rung.name for rung in EAGER_RUNGS]
    assert found["tf32"]["reason"].startswith("not applicable")
    assert found["tf32"]["runs"] == []
    ran = [record for record in records if record["runs"]]
    assert len(ran) == 7
    for record in ran:
        assert record["reason"] is None
        assert not record["wrong"]
        assert record["drift"] < (1e-3 if record["arithmetic"] == "float32" else 3e-2)
        assert record["loss"] < 5.68 < record["runs"][0]["losses"][0] < 5.75  # ln 301 = 5.707, and it learns
        assert record["peak_memory"] > 2**20
        assert record["matmul"] > 0
    assert [record["arithmetic"] for record in ran] == ["float32"] + 6 * ["bfloat16"]


def test_the_foot_of_the_ladder_is_plain_training() -> None:
    """Beside a loop written out here: torch's own AdamW and clipping, on plain attention."""
    found = climb(WORK, ["float32"], run=in_this_process)[0]
    torch.manual_seed(WORK.seed)
    model = GPT(GPTConfig(**{**TINY.__dict__, "attention": "plain"}))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for tokens, targets in WORK.batches():
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert found["runs"][0]["losses"] == pytest.approx(losses, abs=1e-5)


def scaled_loss(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    return 1.001 * full_loss(model, tokens, targets)


def wrong_gradient(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(model.hidden_states(tokens), model.lm_head.weight.detach())  # the head does not learn
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def not_a_number(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    return full_loss(model, tokens, targets) * torch.nan


def no_memory(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB.\nmore lines")


def no_kernel(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("loss", [scaled_loss, wrong_gradient, not_a_number])
def test_a_rung_that_changes_the_loss_is_flagged(loss: Any) -> None:
    rungs = (RUNGS[0], Rung("wrong", "", {"loss": loss}), Rung("right", "", {"loss": chunked_loss}))
    found = by_name(climb(WORK, rungs=rungs, run=in_this_process))
    assert not found["float32"]["wrong"]
    assert found["wrong"]["wrong"]
    assert found["wrong"]["drift"] is None or found["wrong"]["drift"] > TOLERANCE["float32"]
    assert not found["right"]["wrong"]


def test_a_rung_that_cannot_run_is_listed_and_the_others_go_on() -> None:
    rungs = (
        Rung("too big", "", {"loss": no_memory}),
        Rung("still too big", "", {"attention": "sdpa"}),  # on top of what had too little memory
        Rung("broken", "", {"loss": no_kernel}),
        Rung("small", "", {"loss": full_loss}),
    )
    found = by_name(climb(WORK, rungs=rungs, run=in_this_process))
    assert found["too big"]["reason"] == "out of memory: CUDA out of memory. Tried to allocate 3.07 GiB."
    assert found["still too big"]["reason"].startswith("out of memory")
    assert found["broken"]["reason"] == "no kernel image is available"
    assert found["small"]["reason"] is None
    rungs = (RUNGS[0], Rung("broken", "", {"loss": no_kernel}), Rung("above", "", {"attention": "sdpa"}))
    found = by_name(climb(WORK, rungs=rungs, run=in_this_process))
    assert found["above"]["reason"] is None  # went on without the broken one
    assert not found["above"]["wrong"]


def test_without_a_compiler_the_rung_says_so(no_compiler: None) -> None:
    found = by_name(climb(WORK, ["float32", "compile", "chunked-loss"], run=in_this_process))
    assert "needs a C++ compiler" in found["compile"]["reason"]
    assert not found["chunked-loss"]["wrong"]


def test_chosen_rungs_stand_on_all_below_them(no_compiler: None) -> None:
    seen = []

    def watch(work: Any, settings: Any, workload: Workload) -> Any:
        seen.append(settings)
        return work(settings, workload)

    (record,) = climb(WORK, ["fused-adamw"], rounds=2, run=watch)
    assert len(record["runs"]) == 2
    assert seen[0] == seen[1]
    assert (seen[0].dtype, seen[0].attention, seen[0].loss) == (torch.bfloat16, "sdpa", padded_loss)
    assert seen[0].kernels == {"fused": True}
    assert not seen[0].compiled
    assert record["compared_with"] == "fused-adamw"


def test_what_follows_from_the_raw_times_is_right() -> None:
    records: list[dict[str, Any]] = [
        {"name": "a", "arithmetic": "float32", "runs": [raw([0.2, 0.4], [5.0, 4.0], 1e9), raw([0.3], [5.0, 4.0], 3e9)]},
        {"name": "b", "arithmetic": "bfloat16", "runs": [raw([0.1, 0.1], [5.01, 4.02], 4e9)]},
        {"name": "c", "arithmetic": "float32", "runs": []},
        {"name": "d", "arithmetic": "float32", "runs": [raw([0.1], [5.0, 4.0011], 2e9)]},
    ]
    a, b, c, d = compare(records, WORK)
    assert a["ms"]["median"] == pytest.approx(300)
    assert a["tokens_per_second"] == pytest.approx(32 / 0.3)
    assert a["matmul"] == 2e9  # the median of 1, 3 and d's 2
    assert a["mfu"] == pytest.approx(32 / 0.3 * flops_per_token(TINY, 16) / 2e9)
    assert a["mfu_datasheet"] is None
    assert (a["drift"], a["wrong"]) == (0, False)
    assert b["drift"] == pytest.approx(0.02)
    assert not b["wrong"]
    assert "ms" not in c
    assert d["wrong"]
    assert unsteadiness(records) == pytest.approx(2.0)


# --- a process of its own


def test_a_fresh_process_answers_and_its_death_is_told() -> None:
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(Failed, match="SIGKILL") as death:
        in_fresh_process(signal.raise_signal, signal.SIGKILL)
    assert death.value.out_of_memory
    with pytest.raises(Failed, match="block_size must be at least 1") as failure:
        in_this_process(Workload, "cpu", TINY, 1, 0)
    sent = pickle.loads(pickle.dumps(failure.value))  # what comes out of a process
    assert (sent.reason, sent.out_of_memory) == (failure.value.reason, False)


# --- peers


def test_peers_begin_with_our_weights_and_give_our_loss(nanogpt: str) -> None:
    tokens, targets = WORK.batches()[0]
    expected = build("gpt2", None, WORK).modes["eager"](tokens, targets)
    for name, path in (("nanogpt", nanogpt), ("transformers", None)):
        contestant = build(name, path, WORK)
        assert contestant.version
        loss = contestant.modes["eager"](tokens, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        loss.backward()
        assert all(p.grad is not None for p in contestant.model.parameters())


def test_a_race_in_turns(nanogpt: str, no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    peers = {"nanogpt": nanogpt, "transformers": None}
    result = compete(WORK, peers, host=Here, say=silent)
    found = result["contestants"]
    assert list(found) == ["gpt2", "nanogpt", "transformers"]
    for one in found.values():
        assert list(one["modes"]) == ["eager"]
        assert one["best"] == "eager"
        assert len(one["modes"]["eager"]["seconds"]) == WORK.steps
        assert one["peak_memory"] > 2**20
        assert one["first_loss"] == pytest.approx(found["gpt2"]["first_loss"], abs=3e-2)
    for name in peers:
        assert not found[name]["wrong"]
        ratio = found[name]["ms"]["median"] / found["gpt2"]["ms"]["median"]
        assert found[name]["speed_ratio"] == pytest.approx(ratio)
        ratio = found["gpt2"]["peak_memory"] / found[name]["peak_memory"]
        assert found[name]["memory_ratio"] == pytest.approx(ratio)
    assert capsys.readouterr().out == ""  # a peer that prints does not speak into our result


def test_ratios_are_of_the_best_modes() -> None:
    def contestant(eager: list[float], compiled: list[float], loss: float | None, peak: int) -> dict[str, Any]:
        modes: dict[str, Any] = {"eager": {"seconds": eager}, "compiled": {"seconds": compiled}}
        return {"reason": None, "modes": modes, "first_loss": loss, "peak_memory": peak}

    slow = contestant([0.5, 0.6, 0.7], [], 5.5, 2000)
    slow["modes"]["compiled"] = {"reason": "no compiler"}
    result = rank(
        {
            "matmul": 1e9,
            "contestants": {
                "gpt2": contestant([0.4, 0.4, 0.4], [0.1, 0.2, 0.3], 5.5, 700),
                "nanogpt": contestant([0.3, 0.3, 0.3], [0.8, 0.9, 1.0], 5.6, 1000),
                "transformers": slow,
                "other": contestant([0.3], [0.4], None, 1000),
            },
        },
        WORK,
    )["contestants"]
    assert (result["gpt2"]["best"], result["nanogpt"]["best"]) == ("compiled", "eager")
    assert "speed_ratio" not in result["gpt2"]
    assert result["nanogpt"]["speed_ratio"] == pytest.approx(1.5)
    assert result["nanogpt"]["memory_ratio"] == pytest.approx(0.7)
    assert result["transformers"]["speed_ratio"] == pytest.approx(3)
    assert result["gpt2"]["mfu"] == pytest.approx(32 / 0.2 * flops_per_token(TINY, 16) / 1e9)
    assert [result[name]["wrong"] for name in ("nanogpt", "transformers", "other")] == [True, False, True]


def test_a_peer_that_cannot_run_is_listed(tmp_path: Path, no_compiler: None) -> None:
    (tmp_path / "model.py").write_text("GPTConfig = dict\nclass GPT:\n    pass\n".replace("class GPT", "class Other"))
    result = compete(WORK, {"nanogpt": str(tmp_path)}, host=Here)
    assert "is not nanoGPT's" in result["contestants"]["nanogpt"]["reason"]
    assert result["contestants"]["gpt2"]["ms"]["median"] > 0


def test_a_race_that_breaks_off_keeps_what_the_ladder_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, nanogpt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Here):
        def call(self, method: str, *arguments: Any) -> Any:
            if (method, arguments) == ("step", ("eager", WORK.warmup + 1)):
                raise Failed("out of memory: the system killed the process (SIGKILL)", out_of_memory=True)
            return super().call(method, *arguments)

    monkeypatch.setattr(bench, "Elsewhere", Killed)
    flags = ["--rungs", "float32", "--peer", f"nanogpt={nanogpt}", "--json", str(tmp_path / "a.json")]
    code, out, _ = run(capsys, *TRAIN, *flags)
    assert code == 1
    assert "the peers could not be timed: out of memory" in out
    device = read_result(tmp_path / "a.json", "bench train")["devices"][0]
    assert device["rungs"][0]["ms"]["median"] > 0
    assert device["peers"]["contestants"] == {}


# --- the command


def test_train_prints_a_table_and_writes_json_and_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, nanogpt: str
) -> None:
    file, picture, again = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "again.png"
    outputs = ["--json", str(file), "--chart", str(picture), "--peer", f"nanogpt={nanogpt}"]
    code, out, err = run(capsys, *TRAIN, "--rungs", "float32,tf32,chunked-loss", *outputs)
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

    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, err = run(capsys, "bench", "chart", str(file), str(again))
    assert (code, out, err) == (0, "", "")
    assert again.read_bytes() == picture.read_bytes()


def test_a_wrong_rung_is_marked_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs = (
        RUNGS[0],
        Rung("too-good", "a smaller loss", {"loss": scaled_loss}),
        Rung("nan", "", {"loss": not_a_number}),
    )
    monkeypatch.setattr(
        bench, "climb", lambda workload, chosen, *rest, **kw: climb(workload, None, *rest, rungs=rungs, **kw)
    )
    code, out, _ = run(capsys, *TRAIN, "--json", str(tmp_path / "a.json"), "--chart", str(tmp_path / "a.svg"))
    assert code == 1
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "WRONG: off by 0.0057, 1e-03 allowed" in lines["too-good"]
    assert "WRONG: not finite" in lines["nan"]
    assert "WRONG" not in lines["float32"]
    assert [rung["wrong"] for rung in read_result(tmp_path / "a.json", "bench train")["devices"][0]["rungs"]] == [
        *(False, True, True)
    ]
    assert "WRONG LOSS" in (tmp_path / "a.svg").read_text()


def test_peers_only_leaves_the_ladder_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], here: None, nanogpt: str
) -> None:
    flags = ["--peers-only", "--peer", f"nanogpt={nanogpt}", "--json", str(tmp_path / "a.json")]
    code, out, _ = run(capsys, *TRAIN, *flags)
    assert code == 0
    assert "float32" not in out
    device = read_result(tmp_path / "a.json", "bench train")["devices"][0]
    assert device["rungs"] == []
    assert device["peers"]["contestants"]["nanogpt"]["speed_ratio"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "trian"], "there is no benchmark 'trian' (did you mean 'train'?)"),
        ([*TRAIN, "--rungs", "float32,compil"], "there is no rung 'compil' (did you mean 'compile'?)"),
        ([*TRAIN, "--rungs", ","], "--rungs names none"),
        ([*TRAIN, "--peer", "nanogpt"], "--peer nanogpt needs a checkout: --peer nanogpt=PATH"),
        ([*TRAIN, "--peer", "nanogpt=nowhere"], "nowhere: that is no checkout of nanoGPT, it has no model.py"),
        ([*TRAIN, "--peer", "transfromers"], "there is no peer 'transfromers' (did you mean 'transformers'?)"),
        ([*TRAIN, "--peers-only"], "--peers-only needs a --peer"),
        ([*TRAIN, "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        ([*TRAIN, "--steps", "0"], "steps must be at least 1, not 0"),
        ([*TRAIN, "--rounds", "0"], "--rounds must be at least 1, not 0"),
        ([*TRAIN, "--n-head", "3"], "n_embd (32) must be a multiple of n_head (3)"),
        ([*TRAIN, "--model", "gpt2-mdium"], "--model gpt2-mdium is not one of"),
        ([*TRAIN, "--devices", "cuda:99"], "there is no cuda:99 device on this machine"),
        ([*TRAIN, "--devices", "gpu"], "device 'gpu' is not one of"),
        ([*TRAIN, "--json", "nowhere/a.json"], "nowhere/a.json: there is no folder nowhere"),
        ([*TRAIN, "--chart", "a.txt"], "a.txt: a chart is one of .png, .svg, .pdf"),
        ([*TRAIN, "--stpes", "3"], "there is no --stpes (did you mean '--steps'?)"),
        (["bench", "chart", "nowhere.json", "a.png"], "nowhere.json cannot be read"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("gpt2: ")
    assert err.count("\n") == 1


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="transformers, which is not installed"):
        parse_peers(["transformers"])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs matplotlib, which is not installed: pip install 'gpt2\[plot\]'"):
        chart.check_can_draw(tmp_path / "a.png")


def test_help_names_the_benchmarks_and_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "--help")
    assert code == 0
    assert all(name in out for name in bench.BENCHMARKS)
    code, out, _ = run(capsys, "bench", "train", "--help")
    assert code == 0
    assert all(flag in out for flag in ("--devices", "--rungs", "--peer", "--json", "--chart"))


# --- the chart


def result_of(devices: dict[str, float]) -> dict[str, Any]:
    """A made-up result: two rungs and a race on each device, `ms` for the first rung."""
    verdict = {"wrong": False, "reason": None, "mfu": 0.5, "tokens_per_second": 1000.0}
    found = []
    for name, ms in devices.items():
        rungs = [
            {"name": "float32", "ms": {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms}, **verdict},
            {"name": "tf32", "reason": "not applicable: no such thing"},
        ]
        lane = {"ms": {"median": ms, "low": ms, "high": ms}, "best": "eager", "mfu": 0.5}
        race = {"contestants": {"gpt2": lane, "nanogpt": lane | {"speed_ratio": 1.5, "memory_ratio": 0.5}}}
        device = {"device": name, "name": f"A {name}", "rungs": rungs, "peers": race, "workload": chart.A40_SHAPE}
        found.append(device)
    about = {"torch": "2.13", "date": "2025-01-01T00:00:00", "commit": None, "workload": chart.A40_SHAPE}
    return {"kind": "bench train", "devices": found, **about}


def test_the_chart_says_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw = functools.partial(chart.draw, path=path)
    draw(result_of({"cpu": 4000.0}))
    text = path.read_text()
    assert all(part in text for part in ("4,000 ms", "MFU 50%", "no such thing", "1.50x our time", "2.00x our memory"))
    assert "A40" not in text  # that was a GPU
    draw(result_of({"cpu": 4000.0, "cuda": 100.0}))
    text = path.read_text()
    assert all(part in text for part in ("A cpu", "A cuda", "4,000 ms", "100 ms", "1,250 ms", "on an A40"))
    other = result_of({"cuda": 100.0})
    other["devices"][0]["workload"] = chart.A40_SHAPE | {"batch_size": 4}
    draw(other)
    assert "A40" not in path.read_text()


def test_a_chart_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing was measured"):
        chart.draw({"devices": [{"rungs": [], "peers": None}]}, tmp_path / "a.png")
    (tmp_path / "other.json").write_text('{"kind": "bench generate"}')
    with pytest.raises(UserError, match="is no result of gpt2 bench train"):
        read_result(tmp_path / "other.json", "bench train")


# --- what takes longer, or a GPU


@pytest.mark.slow
def test_the_whole_ladder_and_compiled_peers_in_their_own_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], nanogpt: str
) -> None:
    flags = ["--peer", f"nanogpt={nanogpt}", "--peer", "transformers", "--json", str(tmp_path / "a.json")]
    code = bench.main([*TRAIN[1:], *flags])
    assert code == 0, capfd.readouterr().err
    device = read_result(tmp_path / "a.json", "bench train")["devices"][0]
    assert [rung["name"] for rung in device["rungs"]] == choose("all")
    assert [rung["name"] for rung in device["rungs"] if not rung["runs"]] == ["tf32"]
    for one in device["peers"]["contestants"].values():
        assert all(len(mode["seconds"]) == 2 for mode in one["modes"].values())
        assert list(one["modes"]) == ["eager", "compiled"]
        assert one["peak_memory"] > 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_ladder_on_a_gpu() -> None:
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256)
    work = Workload("cuda", config, batch_size=4, block_size=256, steps=5)
    for record in climb(work):
        assert record["runs"] or record["reason"].startswith("not applicable")
        assert not record.get("wrong", False), record
        assert 0 < record.get("mfu", 0.5) < 1
    peaks = [run_rung(settings, work)["peak_memory"] for settings in _first_and_last(work)]
    assert peaks[1] < peaks[0]
    found = race(work, {}, Here, silent)["gpt2"]["modes"]
    assert len(found["eager"]["seconds"]) == 5
    assert Lane("gpt2", None, work).peak("eager") > 2**20


def _first_and_last(work: Workload) -> list[Any]:
    seen: list[Any] = []

    def note(work: Any, settings: Any, workload: Workload) -> Any:
        seen.append(settings)
        raise Failed("only looked at", out_of_memory=True)

    climb(work, ["float32", "chunked-loss"], run=note)
    return seen
