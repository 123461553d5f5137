"""What makes a step fast or small must not change it: recomputation, kept memory, attention in float32 on a CPU."""

import platform
import subprocess
import sys

import pytest
import torch

from gpt2.model import GPT, GPTConfig, sdpa_attention
from gpt2.runtime import MIN_BFLOAT16_WIDTH, apply_activation_checkpointing, pick_training_dtype


def model_of(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=61, block_size=32, n_layer=3, n_head=2, n_embd=32, dropout=dropout))


def saved_bytes(model: GPT, tokens: torch.Tensor) -> int:
    """What the backward pass of a loss keeps, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(tokens, tokens)
    loss.backward()
    return sum(kept.values())


def test_activation_checkpointing_gives_the_same_gradients_with_less_memory() -> None:
    """With dropout, whose masks have to be the same the second time."""
    tokens = torch.randint(61, (4, 32), generator=torch.Generator().manual_seed(1))
    plain, recomputed = model_of(dropout=0.1), model_of(dropout=0.1)
    apply_activation_checkpointing(recomputed.transformer.h)
    torch.manual_seed(5)
    everything = saved_bytes(plain, tokens)
    torch.manual_seed(5)
    inputs_only = saved_bytes(recomputed, tokens)
    assert inputs_only < everything / 4
    for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_attention_under_autocast_on_a_cpu_is_float32_of_the_rounded_inputs() -> None:
    q, k, v = torch.randn(3, 2, 2, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = sdpa_attention(q, k, v, None, 0.0)
    assert y.dtype == torch.float32
    assert torch.equal(y, sdpa_attention(q.float(), k.float(), v.float(), None, 0.0))
    assert sdpa_attention(q, k, v, None, 0.0).dtype == torch.bfloat16  # without autocast it is what it is given


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept_and_comes_back_without_page_faults() -> None:
    program = """
import resource, torch
from gpt2.runtime import configure_malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(2**24).fill_(1.0)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
without = faults()
configure_malloc(keep_freed=True)
faults(), faults()
print(without, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    without, kept = map(int, done.stdout.split())
    assert without > 1000
    assert kept < without / 50


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "width", "expected"),
    [
        (False, False, 768, torch.float32),
        (True, False, MIN_BFLOAT16_WIDTH, torch.bfloat16),
        (False, True, MIN_BFLOAT16_WIDTH, torch.bfloat16),
        (True, True, MIN_BFLOAT16_WIDTH - 1, torch.float32),
    ],
)
def test_dtype_auto_follows_from_the_cpu_and_the_width(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, width: int, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert pick_training_dtype("auto", torch.device("cpu"), width) == expected


def test_dtype_auto_reads_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_clock() -> float:
        raise AssertionError("a timing decides the dtype")

    expected = pick_training_dtype("auto", torch.device("cpu"), 768)
    assert expected in (torch.bfloat16, torch.float32)
    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(f"time.{clock}", no_clock)
    assert pick_training_dtype("auto", torch.device("cpu"), 768) == expected
