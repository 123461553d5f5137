"""The same numbers on a GPU as on the CPU: losses, gradients, attention backends, decoding, and an exact resume.

On a machine without a GPU the cases of the CPU run alone, so that this code is exercised everywhere.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt2
from gpt2.generation.engine import Engine, GenerationRequest
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import autocast, compile_blocks
from tests.helpers.training_helpers import NUMBERS_TEXT
from tests.helpers.transformers_reference import random_batch, random_model, relative_error

SHAPE = GPTConfig(vocab_size=257, block_size=128, n_layer=2, n_head=4, n_embd=256)
GPU_MARKS = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=GPU_MARKS)]
BACKENDS = [
    *(("cpu", each) for each in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)),
    *(
        pytest.param("cuda", each, marks=GPU_MARKS)
        for each in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    ),
]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """No TF32: it is measured by the ladder, with its own tolerance."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def gradients(model: GPT, device: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss on a batch, and the gradient of each parameter, on the CPU in float32."""
    tokens, targets = (tensor.to(device) for tensor in random_batch(SHAPE))
    model = model.to(device)
    model.zero_grad()
    with autocast(torch.device(device), dtype):
        loss = model.loss(tokens, targets)
    loss.backward()
    found = {name: p.grad.detach().cpu().float() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "loss_error", "grad_error"), [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 2e-2, 1e-1)]
)
def test_loss_and_gradients_equal_float32_on_the_cpu(
    device: str, dtype: torch.dtype, loss_error: float, grad_error: float
) -> None:
    expected, reference = gradients(random_model(SHAPE), "cpu", torch.float32)
    loss, found = gradients(random_model(SHAPE), device, dtype)
    assert abs(loss - expected) < loss_error
    assert found.keys() == reference.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, reference[name]) < grad_error, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_weights_in_half_precision_give_the_same_logits(device: str, dtype: str, error: float, tmp_path: Path) -> None:
    model, tokens = random_model(SHAPE), random_batch(SHAPE)[0]
    gpt2.save(model, None, tmp_path)
    loaded, _ = gpt2.load(tmp_path, device=device, dtype=dtype)
    assert relative_error(loaded(tokens.to(device)).float().cpu(), model(tokens)) < error


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_attention_backends_equal_plain_attention(device: str, backend: SDPBackend) -> None:
    plain = random_model(GPTConfig(**{**vars(SHAPE), "attention": "plain"}))
    expected, reference = gradients(plain, "cpu", torch.float32)
    with sdpa_kernel(backend):
        loss, found = gradients(random_model(SHAPE), device, torch.bfloat16)
    assert abs(loss - expected) < 2e-2
    for name, gradient in found.items():
        assert relative_error(gradient, reference[name]) < 1e-1, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_blocks_equal_eager_ones_on_a_gpu() -> None:
    expected, reference = gradients(random_model(SHAPE), "cuda", torch.bfloat16)
    model = random_model(SHAPE)
    compile_blocks(model.transformer.h)
    loss, found = gradients(model, "cuda", torch.bfloat16)
    assert abs(loss - expected) < 1e-2
    for name, gradient in found.items():
        assert relative_error(gradient, reference[name]) < 5e-2, name


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_the_engine_decodes_the_tokens_of_the_plain_model(device: str) -> None:
    """Greedily, in float32, with what is used to decode on the device (a CUDA graph on a GPU)."""
    prompt, new_tokens = list(range(1, 20)), 24
    plain, tokens = random_model(SHAPE).to(device), list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(plain(torch.tensor([tokens], device=device))[0, -1].argmax()))
    engine = Engine(prepare_for_inference(plain, "float32"), slots=2)
    sequence = engine.submit(GenerationRequest(prompt, Sampling(0), new_tokens, seed=0))
    while not engine.idle:
        engine.step()
    assert sequence.new_tokens == tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    device: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("numbers.txt").write_text(NUMBERS_TEXT)
    settings: dict[str, Any] = {
        "data": "numbers.txt",
        "tokenizer": "bytes",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 32,
        "batch_size": 8,
        "max_steps": 12,
        "warmup_steps": 2,
        "save_every": 4,
        "keep_checkpoints": 9,
        "sample_tokens": 0,
        "eval_tokens": 256,
        "dropout": 0.1,
        "device": device,
        "optimizer": optimizer,
        "compile": False,
    }
    whole = gpt2.train("quickstart", **settings, name="whole")
    parts = gpt2.train("quickstart", **settings, name="parts")
    for later in ("step-12", "step-8"):
        (parts.folder / "checkpoints" / later).rename(parts.folder / later)
    resumed = gpt2.train(resume=parts.folder)
    assert resumed.metrics["val_loss"] == whole.metrics["val_loss"]
    first, second = (gpt2.load(run.folder)[0].state_dict() for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
