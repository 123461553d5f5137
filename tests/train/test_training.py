"""Training: equal to a plain loop, with gradient accumulation too, and with a complete run folder."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gpt2
from gpt2.config import TrainConfig, config_for_resume, read_toml
from gpt2.data.loader import Batch, TokenLoader
from gpt2.data.prepare import open_data
from gpt2.distributed.parallel import DistributedModel
from gpt2.distributed.process_group import SINGLE_PROCESS
from gpt2.errors import UserError
from gpt2.loss import IGNORE_INDEX
from gpt2.model import GPT, GPTConfig
from gpt2.optimizers import build_optimizers, learning_rate
from gpt2.reporting.metrics import read_metrics
from gpt2.train.artifact import ModelArtifact
from gpt2.train.setup import Run
from gpt2.train.trainer import train, update, validate
from tests.helpers.training_helpers import NUMBERS_TEXT, fixed_seed_sampler
from tests.helpers.transformers_reference import as_conv1d, to_transformers


def ready_run(config: TrainConfig, model: GPT) -> Run:
    data = open_data(config.data, config.tokenizer)
    loader = TokenLoader(data.train, config.batch_size, config.block_size, config.seed)
    folder, cpu = Path(config.out_dir) / "ready", torch.device("cpu")
    return Run(
        folder,
        config,
        data,
        loader,
        model,
        build_optimizers(model, config),
        cpu,
        torch.float32,
        ModelArtifact(model.config, data.tokenizer),
        SINGLE_PROCESS,
        DistributedModel("none", model, SINGLE_PROCESS, cpu),
    )


def random_batches(count: int, shape: tuple[int, int], vocab_size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    pairs = (torch.randint(vocab_size, (2, *shape), generator=generator) for _ in range(count))
    return [Batch(tokens, targets) for tokens, targets in pairs]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_ten_steps_equal_a_plain_transformers_loop(tiny: TrainConfig, optimizer: str) -> None:
    config = replace(tiny, dropout=0.0, optimizer=optimizer, max_steps=10, warmup_steps=3, grad_clip=0.5)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32))
    twin = to_transformers(model).train()
    run = ready_run(config, model)
    matrices = [p for p in twin.parameters() if p.dim() >= 2]
    vectors = [p for p in twin.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95)) if optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    )
    for step, batch in enumerate(random_batches(10, (8, 32), 257), start=1):
        rate = learning_rate(step, config)
        loss, norm = update(run, batch, rate)[:2]
        their_loss = F.cross_entropy(twin(batch.tokens).logits.flatten(0, 1), batch.targets.flatten())
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
def test_gradient_accumulation_equals_the_whole_batch(tiny: TrainConfig, micro: int) -> None:
    """With different numbers of targets per micro-batch: a mean of means would be wrong."""
    config = replace(tiny, dropout=0.0)
    (batch,) = random_batches(1, (8, 32), 257)
    batch.targets[0] = IGNORE_INDEX
    batch.targets[5, :20] = IGNORE_INDEX
    results = []
    for rows in (None, micro):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32))
        run = ready_run(replace(config, micro_batch_size=rows, optimizer="sgd", beta1=0.0), model)
        results.append((update(run, batch, 0.1)[:2], model))
    (whole, model), (parts, other) = results
    assert parts == pytest.approx(whole, rel=1e-5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_validation_is_the_mean_over_every_held_out_token(tiny: TrainConfig) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32))
    run = ready_run(tiny, model)
    val = open_data(tiny.data, tiny.tokenizer).val
    assert val is not None
    held_out = torch.from_numpy(val.read(0, len(val)).astype("int64"))
    assert bytes(held_out.tolist()).decode() == NUMBERS_TEXT[int(len(NUMBERS_TEXT) * 0.9) :]
    total, model = 0.0, model.eval()
    for start in range(0, len(held_out) - 1, 32):
        window = held_out[start : start + 33]
        total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert validate(run) == pytest.approx(total / (len(held_out) - 1), abs=1e-5)


def test_a_run_folder_is_complete(tiny: TrainConfig) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    def sampler(model: GPT, tokenizer: Any, prompt: str, length: int) -> str:
        assert not model.training
        return fixed_seed_sampler(model, tokenizer, prompt, length)

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


def test_a_prompt_that_does_not_fit_is_refused_before_the_run(tiny: TrainConfig) -> None:
    with pytest.raises(UserError, match="--sample-prompt has 40 tokens, more than the context of 32"):
        train(replace(tiny, sample_prompt="x" * 40, sample_tokens=5))
    assert not Path(tiny.out_dir).exists()


def test_init_from_takes_weights_shape_and_tokenizer(tiny: TrainConfig) -> None:
    first = train(tiny)
    second = train(
        replace(tiny, name="second", init_from=str(first), tokenizer="bpe:300", n_layer=7, block_size=512, lr=1e-5)
    )
    model, _ = gpt2.load(second)
    assert model.config.n_layer == 2
    assert read_toml(second / "config.toml").block_size == 32
    (first / "model" / "config.json").rename(first / "model" / "moved")  # to go on does not need where it began
    train(config_for_resume(second, {"max_steps": 31}))
    start = read_metrics(second / "metrics.jsonl")[0]["loss"]
    assert start == pytest.approx(read_metrics(first / "metrics.jsonl")[-1]["val_loss"], abs=0.3)


@pytest.mark.slow
def test_a_compiled_run_learns_as_an_eager_one_does(tiny: TrainConfig) -> None:
    from gpt2.runtime import can_compile

    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler for torch.compile")

    losses = []
    for compiled in (False, True):
        config = replace(tiny, name=f"c{compiled}", compile=compiled, dropout=0.0, sample_tokens=5, eval_every=0)
        folder = train(config, fixed_seed_sampler)
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


def test_a_run_without_matplotlib_names_the_extra(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = train(replace(tiny, max_steps=2, warmup_steps=0))
    assert not (folder / "loss.png").exists()
    assert (folder / "model" / "model.safetensors").exists()
    assert "pip install 'plain-gpt2[plot]'" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(tiny: TrainConfig) -> None:
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.inf
    before = [p.clone() for p in model.parameters()]
    run = ready_run(tiny, model)
    with pytest.raises(UserError, match=r"step 0: the loss is nan; .* transformer.ln_f.weight is inf"):
        update(run, random_batches(1, (8, 32), 257)[0], 0.1)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
