"""Training: equal to a plain loop, exact when cut up or interrupted, and leaving a folder that tells its story."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import as_conv1d, transformers_twin
from torch.nn import functional as F

import gpt2
from gpt2.data.loader import Loader
from gpt2.data.prepare import open_data
from gpt2.errors import UserError
from gpt2.loss import IGNORE
from gpt2.model import GPT, GPTConfig
from gpt2.train.checkpoint import newest_checkpoint
from gpt2.train.config import RECIPES, TrainConfig, read_toml, recipe, resumed, run_name, to_toml, with_values
from gpt2.train.optim import build_optimizers, learning_rate
from gpt2.train.report import read_metrics
from gpt2.train.run import Run
from gpt2.train.trainer import train, update, validate

TEXT = "".join(f"The number {i} comes before the number {i + 1}, as everybody knows.\n" for i in range(400))


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    """A run of a second or two on a text file."""
    (tmp_path / "numbers.txt").write_text(TEXT)
    return TrainConfig(
        name="tiny",
        out_dir=str(tmp_path / "runs"),
        data=str(tmp_path / "numbers.txt"),
        tokenizer="bytes",
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=32,
        dropout=0.1,
        batch_size=8,
        max_steps=30,
        lr=3e-3,
        warmup_steps=5,
        dtype="float32",
        device="cpu",
        eval_every=10,
        save_every=10,
        sample_tokens=0,
    )


def ready_run(config: TrainConfig, model: GPT) -> Run:
    data = open_data(config.data, config.tokenizer)
    loader = Loader(data.train, config.batch_size, config.block_size, config.seed)
    folder, cpu = Path(config.out_dir) / "ready", torch.device("cpu")
    return Run(folder, config, data, loader, model, build_optimizers(model, config), cpu, torch.float32)


def random_batches(count: int, shape: tuple[int, int], vocab_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    pairs = (torch.randint(vocab_size, (2, *shape), generator=generator) for _ in range(count))
    return [(tokens, targets) for tokens, targets in pairs]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_ten_steps_equal_a_plain_transformers_loop(tiny: TrainConfig, optimizer: str) -> None:
    config = replace(tiny, dropout=0.0, optimizer=optimizer, max_steps=10, warmup_steps=3, grad_clip=0.5)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32))
    twin = transformers_twin(model).train()
    run = ready_run(config, model)
    matrices = [p for p in twin.parameters() if p.dim() >= 2]
    vectors = [p for p in twin.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95)) if optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    )
    for step, (tokens, targets) in enumerate(random_batches(10, (8, 32), 257), start=1):
        rate = learning_rate(step, config)
        loss, norm, _ = update(run, tokens, targets, rate)
        their_loss = F.cross_entropy(twin(tokens).logits.flatten(0, 1), targets.flatten())
        theirs.zero_grad()
        their_loss.backward()
        their_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        assert loss == pytest.approx(their_loss.item(), abs=1e-5)
        assert norm == pytest.approx(their_norm.item(), rel=1e-4)
    their_weights = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        assert (as_conv1d(name, p) - their_weights[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(tiny: TrainConfig, micro: int) -> None:
    """With uneven numbers of counted targets in the parts, which a mean of means would get wrong."""
    config = replace(tiny, dropout=0.0)
    ((tokens, targets),) = random_batches(1, (8, 32), 257)
    targets[0] = IGNORE
    targets[5, :20] = IGNORE
    results = []
    for rows in (None, micro):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32))
        run = ready_run(replace(config, micro_batch_size=rows, optimizer="sgd", beta1=0.0), model)
        results.append((update(run, tokens, targets, 0.1)[:2], model))
    (whole, model), (parts, other) = results
    assert parts == pytest.approx(whole, rel=1e-5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_validation_is_the_mean_over_every_held_out_token(tiny: TrainConfig) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32))
    run = ready_run(tiny, model)
    assert run.data.val is not None
    held_out = torch.from_numpy(run.data.val.read(0, len(run.data.val)).astype("int64"))
    assert bytes(held_out.tolist()).decode() == TEXT[int(len(TEXT) * 0.9) :]
    total, model = 0.0, model.eval()
    for start in range(0, len(held_out) - 1, 32):
        window = held_out[start : start + 33]
        total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert validate(run, run.data.val) == pytest.approx(total / (len(held_out) - 1), abs=1e-5)


def test_schedules() -> None:
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110)
    rate = {
        name: [learning_rate(s, replace(config, schedule=name)) for s in range(1, 111)]
        for name in ("cosine", "linear", "constant")
    }
    for name, rates in rate.items():
        assert rates[:10] == pytest.approx([s / 10 for s in range(1, 11)]), name
        assert rates[9] == max(rates) == 1.0
    assert rate["cosine"][59] == pytest.approx(0.6)  # half way
    assert rate["cosine"][34] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate["cosine"][-1] == rate["linear"][-1] == pytest.approx(0.2)
    assert rate["linear"][59] == pytest.approx(0.6)
    assert rate["constant"][-1] == 1.0
    assert learning_rate(110, replace(config, min_lr=None)) == pytest.approx(0.1)


def test_a_run_folder_tells_its_story(tiny: TrainConfig) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    def sampler(model: GPT, tokenizer: Any, prompt: str, length: int) -> str:
        assert not model.training
        return gpt2.generate(model, tokenizer, prompt, max_new_tokens=length, seed=1)[0]

    folder = train(replace(tiny, sample_tokens=20, sample_prompt="The number"), sampler)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints",
        "config.toml",
        "loss.png",
        "metrics.jsonl",
        "model",
        "report.md",
        "samples.txt",
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20, 30]
    assert lines[0]["loss"] == pytest.approx(math.log(257), abs=0.15)
    assert lines[-1]["val_loss"] < lines[9]["val_loss"] < lines[0]["loss"]
    assert lines[-1]["tokens"] == 30 * 8 * 32
    assert {"lr", "grad_norm", "seconds", "tokens_per_second"} <= lines[0].keys()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.txt").read_text().count("--- step") == 3
    assert "--- step 30\nThe number" in (folder / "samples.txt").read_text()

    model, tokenizer = gpt2.load(folder)
    assert tokenizer is not None
    assert tokenizer.name == "bytes"
    twin = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    ids = tokenizer.encode("The number 7 comes")
    assert AutoTokenizer.from_pretrained(folder / "model")("The number 7 comes")["input_ids"] == ids
    torch.testing.assert_close(twin(torch.tensor([ids])).logits, model(torch.tensor([ids])), rtol=0, atol=1e-4)
    assert gpt2.load(folder / "checkpoints" / "step-30")[0].config == model.config


def comparable(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics without what the clock says."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    assert comparable(one) == comparable(other)
    assert [(p / "samples.txt").exists() for p in (one, other)] in ([True, True], [False, False])
    if (one / "samples.txt").exists():
        assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()
    for name in ("model/model.safetensors", "model/config.json", "checkpoints/step-30/optimizer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_resumed_is_never_stopped_bit_for_bit(tiny: TrainConfig) -> None:
    def sampler(model: GPT, tokenizer: Any, prompt: str, length: int) -> str:
        return gpt2.generate(model, tokenizer, prompt, max_new_tokens=length, seed=1)[0]

    tiny = replace(tiny, sample_tokens=20)
    whole = train(tiny, sampler)
    folder = train(replace(tiny, name="parts", keep_checkpoints=9), sampler)
    for later in ("step-30", "step-20"):  # as if killed after step 20 was recorded and before it was saved
        (folder / "checkpoints" / later).rename(folder / later)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": 1.')  # half a line
    train(resumed(folder, {"keep_checkpoints": 2}), sampler)
    assert_same_run(whole, folder)


def test_a_broken_newest_checkpoint_is_passed_over(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    whole = train(tiny)
    folder = train(replace(tiny, name="broken"))
    checkpoints = folder / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-20", "step-30"]  # the newest two are kept
    os.truncate(checkpoints / "step-30" / "optimizer.safetensors", 100)
    (checkpoints / ".step-40.unfinished").mkdir()
    newest = newest_checkpoint(checkpoints)
    assert newest is not None
    assert newest.name == "step-20"
    assert "step-30 is broken (optimizer.safetensors)" in caplog.text
    train(resumed(folder, {}))
    assert_same_run(whole, folder)


@pytest.mark.parametrize(
    "state", ["[]", "null", '{"step": 30, "sha256": []}', '{"sha256": {}}', '{"step": "x", "sha256": {"a": "b"}}', "{"]
)
def test_a_state_file_of_any_kind_makes_a_broken_checkpoint_and_no_more(tiny: TrainConfig, state: str) -> None:
    folder = train(replace(tiny, max_steps=20))
    (folder / "checkpoints" / "step-20" / "state.json").write_text(state)
    (folder / "checkpoints" / "step-²").mkdir()
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.name == "step-10"


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_over_its_model(tiny: TrainConfig) -> None:
    folder = train(replace(tiny, max_steps=10))
    (folder / "checkpoints" / "step-10" / "state.json").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="has no whole checkpoint to go on from: --init-from"):
        train(resumed(folder, {"max_steps": 30}))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_fewer_steps_than_are_done_and_folders_that_are_no_run(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = train(replace(tiny, max_steps=10))
    stored = (folder / "config.toml").read_text()
    with pytest.raises(UserError, match=r"has done 10 steps, more than --max-steps \(6\)"):
        train(resumed(folder, {"max_steps": 6}))
    assert (folder / "config.toml").read_text() == stored
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text("my own")
    with pytest.raises(UserError, match="has something else in it"):
        train(replace(tiny, name="mine", resume="auto"))
    with pytest.raises(UserError, match="a run needs a --name"):
        train(replace(tiny, name="..", resume="auto"))
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text() == "my own"


def test_retention_drops_broken_later_checkpoints_and_never_the_newest_good_one(tiny: TrainConfig) -> None:
    folder = train(replace(tiny, max_steps=20))
    (folder / "checkpoints" / "step-20" / "optimizer.safetensors").write_text("x")
    train(resumed(folder, {"max_steps": 15, "keep_checkpoints": 1}))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-15"]


def test_a_prompt_that_does_not_fit_is_refused_before_the_run(tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match="--sample-prompt has 40 tokens, more than the context of 32"):
        train(replace(tiny, sample_prompt="x" * 40, sample_tokens=5))
    assert not Path(tiny.out_dir).exists()


def test_broken_metrics_and_samples_do_not_stop_a_resumed_run(
    tiny: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train(replace(tiny, max_steps=20))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\0\xff\n[1]\n{"step": "x"}\n')
    (folder / "samples.txt").write_bytes(b"\xff garbage\n--- step 10\nkept\n\n--- step 90\ndropped\n\n")
    train(resumed(folder, {"max_steps": 30}))
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, 31))
    assert "passed over 3 line(s)" in caplog.text
    text = (folder / "samples.txt").read_text()
    assert "kept" in text
    assert "dropped" not in text


def test_ctrl_c_saves_and_says_how_to_go_on(tiny: TrainConfig, tmp_path: Path) -> None:
    """In a process of its own, through the real command, with the real signal."""
    whole = train(replace(tiny, name="whole", max_steps=30))
    config = replace(tiny, name="cut")
    toml = tmp_path / "cut.toml"
    toml.write_text(to_toml(config))
    command = [sys.executable, "-m", "gpt2", "train"]
    process = subprocess.Popen([*command, str(toml)], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    metrics = Path(config.out_dir) / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"go on with: gpt2 train --resume {config.out_dir}/cut" in said
    assert "Traceback" not in said
    done = len(read_metrics(metrics))
    assert 3 <= done < 30
    again = subprocess.run([*command, "--resume", f"{config.out_dir}/cut"], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == f"{config.out_dir}/cut"
    assert_same_run(whole, Path(config.out_dir) / "cut")


def test_init_from_takes_weights_shape_and_tokenizer(tiny: TrainConfig) -> None:
    first = train(tiny)
    second = train(
        replace(tiny, name="second", init_from=str(first), tokenizer="bpe:300", n_layer=7, block_size=512, lr=1e-5)
    )
    model, _ = gpt2.load(second)
    assert model.config.n_layer == 2
    assert read_toml(second / "config.toml").block_size == 32
    (first / "model" / "config.json").rename(first / "model" / "moved")  # to go on does not need where it began
    train(resumed(second, {"max_steps": 31}))
    start = read_metrics(second / "metrics.jsonl")[0]["loss"]
    assert start == pytest.approx(read_metrics(first / "metrics.jsonl")[-1]["val_loss"], abs=0.3)


def test_a_compiled_run_learns_as_an_eager_one_does(tiny: TrainConfig) -> None:
    from gpt2.runtime import can_compile

    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler for torch.compile")

    def sampler(model: GPT, tokenizer: Any, prompt: str, length: int) -> str:
        return gpt2.generate(model, tokenizer, prompt, max_new_tokens=length, seed=1)[0]

    losses = []
    for compiled in (False, True):
        config = replace(tiny, name=f"c{compiled}", compile=compiled, dropout=0.0, sample_tokens=5, eval_every=0)
        folder = train(config, sampler)
        losses.append([line["loss"] for line in read_metrics(folder / "metrics.jsonl")])
        assert gpt2.load(folder)[0].config.n_layer == 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_bfloat16_learns_as_float32_does(tiny: TrainConfig) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        folder = train(replace(tiny, name=dtype, dtype=dtype, dropout=0.0))
        losses[dtype] = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
        assert {p.dtype for p in gpt2.load(folder, dtype=None)[0].parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.05)


def test_a_run_without_matplotlib_says_what_brings_it(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = train(replace(tiny, max_steps=2, warmup_steps=0))
    assert not (folder / "loss.png").exists()
    assert (folder / "model" / "model.safetensors").exists()
    assert "pip install 'gpt2[plot]'" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(tiny: TrainConfig) -> None:
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.inf
    before = [p.clone() for p in model.parameters()]
    run = ready_run(tiny, model)
    with pytest.raises(UserError, match=r"step 0: the loss is nan; .* transformer.ln_f.weight is inf"):
        update(run, *random_batches(1, (8, 32), 257)[0], 0.1)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_sound_and_survive_toml(name: str, tmp_path: Path) -> None:
    config = recipe(name).check()
    (tmp_path / "r.toml").write_text(to_toml(config))
    assert recipe(str(tmp_path / "r.toml")) == config


def test_toml_keeps_any_text(tmp_path: Path) -> None:
    config = TrainConfig(sample_prompt='"quoted" \\ é 🙂\n\ttab', lr=1e-5, compile=False)
    (tmp_path / "r.toml").write_text(to_toml(config), encoding="utf-8")
    assert read_toml(tmp_path / "r.toml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "--lr must be over 0"),
        ({"lr": math.nan}, "--lr must be over 0"),
        ({"min_lr": 1.0}, "--min-lr must be between 0 and --lr"),
        ({"warmup_steps": 2000}, "--warmup-steps (2000) is more than --max-steps (1000)"),
        ({"batch_size": 8, "micro_batch_size": 3}, "--batch-size (8) must be a multiple"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"optimizer": "adamx"}, "--optimizer 'adamx' is not one of adamw, muon, sgd (did you mean 'adamw'?)"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"dropout": 1.5}, "--dropout must be in [0, 1)"),
        ({"n_head": 5}, "--n-embd (768) must be a multiple of --n-head (5)"),
        ({"seed": 2**63}, "--seed must be below 2**63"),
        ({"data": "\udcff.txt"}, "--data is not UTF-8 text"),
        ({"weight_decay": math.nan}, "--weight-decay must be at least 0"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints must be at least 1"),
    ],
)
def test_impossible_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        replace(TrainConfig(), **values).check()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1.0", "there is no setting 'learning_rate'"),
        ("batchsize = 1", "did you mean 'batch_size'?"),
        ('lr = "fast"', "lr cannot be 'fast'"),
        ("max_steps = true", "max_steps cannot be True"),
        ("max_steps = ", "cannot be read as TOML"),
    ],
)
def test_bad_toml(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError) as error:
        recipe(str(tmp_path / "bad.toml"))
    assert message in str(error.value)


def test_names_of_runs(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert run_name(out, "quick", resume=False) == run_name(out, "quick", resume=True) == "quick"
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick-2").mkdir()
    assert run_name(out, "quick", resume=False) == "quick-3"
    assert run_name(out, "quick", resume=True) == "quick-2"


def test_a_finished_or_foreign_folder_is_not_written_over(tiny: TrainConfig) -> None:
    folder = train(replace(tiny, max_steps=5))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="exists: --resume auto goes on with it"):
        train(tiny)
    with pytest.raises(UserError, match="was begun with --n-embd 32: it cannot go on with 64"):
        train(resumed(folder, {"n_embd": 64}))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    longer = train(resumed(folder, {"max_steps": 8}))
    assert [line["step"] for line in read_metrics(longer / "metrics.jsonl")] == list(range(1, 9))


def test_with_values_takes_an_integer_for_a_float_only() -> None:
    assert with_values(TrainConfig(), {"lr": 1, "min_lr": 0}, "here").lr == 1.0
    with pytest.raises(UserError, match=r"here: max_steps cannot be 1\.5"):
        with_values(TrainConfig(), {"max_steps": 1.5}, "here")
