"""What a run will take: the arithmetic against torch's own counts, and the plan against the command line."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gpt2.commands.plan import _count, main
from gpt2.costs import Setup, block_activations, flops_per_token, num_parameters, optimizer_bytes, training_memory
from gpt2.errors import UserError
from gpt2.hardware import (
    KNOWN,
    accelerator,
    available_memory,
    device_name,
    known_accelerator,
    measure_bandwidth,
    measure_matmul,
    peak_memory,
    resident_memory,
    total_memory,
)
from gpt2.model import GPT, Block, GPTConfig
from gpt2.runtime import autocast, recompute_blocks
from gpt2.train.config import TrainConfig, recipe
from gpt2.train.optim import build_optimizers
from gpt2.train.plan import OPENAI, Place, largest_batch, model_shape, plan, suggest

CPU = torch.device("cpu")
TINY = GPTConfig(vocab_size=101, block_size=32, n_layer=3, n_head=4, n_embd=64)
GPT2_PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", OPENAI)
def test_the_parameters_of_openais_models(name: str) -> None:
    assert num_parameters(OPENAI[name]) == GPT2_PARAMETERS[name]


@pytest.mark.parametrize(
    "config",
    [OPENAI["gpt2-xl"], TINY, replace(TINY, tie_word_embeddings=False), replace(TINY, n_inner=100)],
    ids=["xl", "tiny", "untied", "inner"],
)
def test_parameters_are_those_of_the_model(config: GPTConfig) -> None:
    with torch.device("meta"):
        model = GPT(config)
    assert num_parameters(config) == model.num_parameters()


@pytest.mark.parametrize("length", [8, 32])
def test_flops_are_those_torch_counts_when_attention_does_the_whole_square(length: int) -> None:
    model = GPT(replace(TINY, attention="plain"))
    tokens = torch.zeros(2, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(TINY, length)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(TINY, length, backward=False)


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_keeps_the_activations_it_is_said_to_keep(dtype: torch.dtype, dropout: float, attention: str) -> None:
    config = replace(TINY, dropout=dropout, attention=attention)
    block = Block(config).train()
    x = torch.randn(10, config.block_size, config.n_embd, requires_grad=True)
    kept: dict[int, Tensor] = {}
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) is None or tensor, lambda t: t
        ),
        autocast(CPU, dtype),
    ):
        block(x)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    casts = {p.numel() * 2 for p in block.parameters() if p.dim() == 2} if dtype == torch.bfloat16 else set()
    seen = sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in weights and tensor.untyped_storage().nbytes() not in casts
    )
    said = sum(block_activations(config, Setup(rows=10, length=config.block_size, dtype=dtype)).values())
    assert said == pytest.approx(seen, rel=0.03)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and remembers the most."""

    def __init__(self, already: list[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: dict[int, Any] = {}
        self._note(already)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        return result

    def _note(self, tensors: list[Tensor]) -> None:
        for storage in {id(s): s for s in (tensor.untyped_storage() for tensor in tensors)}.values():
            key, size = storage.data_ptr(), storage.nbytes()
            if key in self.known or not size:
                continue
            self.known[key] = weakref.finalize(storage, self._forget, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size


@pytest.mark.parametrize(
    ("vocab_size", "change"),
    [
        (2000, {}),
        (2000, {"dtype": torch.bfloat16}),
        (50257, {}),
        (50257, {"dtype": torch.bfloat16}),
        (2000, {"micro_batches": 2}),
        (50257, {"micro_batches": 2, "dtype": torch.bfloat16}),
        (2000, {"recompute": True}),
        (2000, {"recompute": True, "dtype": torch.bfloat16}),
        (2000, {"optimizer": "muon"}),
        (2000, {"optimizer": "sgd"}),
    ],
)
def test_the_peak_is_that_of_the_tensors_of_real_steps(vocab_size: int, change: dict[str, Any]) -> None:
    config = GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=3, n_head=4, n_embd=64)
    setup = replace(Setup(rows=16, length=64), **change)
    model = GPT(config).train()
    if setup.recompute:
        recompute_blocks(model.transformer.h)
    optimizers = build_optimizers(model, TrainConfig(optimizer=setup.optimizer))
    tokens = torch.zeros(setup.rows, setup.length, dtype=torch.int64)
    with LiveBytes(list(model.parameters())) as counted:
        for _ in range(2):
            _step(model, optimizers, tokens, setup)
    memory = training_memory(config, setup)
    assert memory.step - memory.allocator == pytest.approx(counted.peak, rel=0.08)


def _step(model: GPT, optimizers: list[Any], tokens: Tensor, setup: Setup) -> None:
    for _ in range(setup.micro_batches):
        with autocast(CPU, setup.dtype):
            loss = model.loss(tokens, tokens, 100.0)
        loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


MEASURED = """
import json
import torch
from gpt2.costs import Setup, training_memory
from gpt2.hardware import peak_memory, reset_peak_memory
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import manage_freed_memory
from gpt2.train.config import TrainConfig
from gpt2.train.optim import build_optimizers
from gpt2.train.plan import _program_memory

cpu = torch.device("cpu")
block = torch.ones(2**25)
before = peak_memory(cpu)
del block
forgot = reset_peak_memory(cpu) and before - peak_memory(cpu)
manage_freed_memory(keep=True)
program = _program_memory(TrainConfig())
config = GPTConfig(vocab_size=1024, block_size=256, n_layer=5, n_head=4, n_embd=256)
setup = Setup(rows=8, length=256)
reset_peak_memory(cpu)
model = GPT(config)
(optimizer,) = build_optimizers(model, TrainConfig())
tokens = torch.zeros(setup.rows, setup.length, dtype=torch.int64)
for _ in range(2):
    model.loss(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps([forgot, program, training_memory(config, setup, program).step, peak_memory(cpu)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_peak_is_that_of_a_process() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    forgot, program, said, seen = json.loads(run.stdout)
    if forgot is False:
        pytest.skip("the system does not let a process forget its peak")
    assert forgot >= 2**26  # of 128 MiB, as other things may have come since
    assert said == pytest.approx(seen, rel=0.15)
    assert said - program == pytest.approx(seen - program, rel=0.3)  # the heap's holes are not the same each time


def test_muon_and_sgd_remember_less_than_adamw() -> None:
    for name in ("adamw", "muon", "sgd"):
        model = GPT(TINY)
        optimizers = build_optimizers(model, TrainConfig(optimizer=name))
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        _step(model, optimizers, tokens, Setup(rows=1, length=8))
        tensors = [
            value
            for each in optimizers
            for state in each.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim()
        ]
        assert optimizer_bytes(TINY, name) == sum(t.untyped_storage().nbytes() for t in tensors)


def test_recomputing_leaves_the_blocks_inputs_and_one_block() -> None:
    setup = Setup(rows=16, length=1024, dtype=torch.bfloat16, device="cuda")
    kept = training_memory(OPENAI["gpt2"], setup)
    again = training_memory(OPENAI["gpt2"], replace(setup, recompute=True))
    assert again.activations < 0.2 * kept.activations
    assert kept.peak > again.peak > again.weights + again.gradients + again.optimizer


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("AMD Instinct MI300X", "mi300x"),
        ("rtx4090", "4090"),
        ("H100", "h100"),
    ],
)
def test_gpus_are_known_by_what_torch_and_people_call_them(said: str, meant: str) -> None:
    assert known_accelerator(said) is KNOWN[meant]


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD EPYC"]
)
def test_other_chips_of_the_same_number_are_not_mistaken_for_them(name: str) -> None:
    assert known_accelerator(name) is None


def test_every_short_name_finds_its_own_datasheet() -> None:
    assert all(accelerator(name) is KNOWN[name] for name in KNOWN)


def test_the_dtype_is_what_that_gpu_has() -> None:
    assert plan(recipe("gpt2-124m"), on="l4").dtype == "bfloat16"
    assert plan(recipe("gpt2-124m"), on="t4").dtype == "float32"
    with pytest.raises(UserError, match="loss scaling"):
        plan(replace(recipe("gpt2-124m"), dtype="float16"), on="t4")


def test_an_unknown_gpu_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^no datasheet of 'h1000' \(did you mean 'h100'\?\): there are [^\n]+$"):
        plan(recipe("gpt2-124m"), on="h1000")


def test_rates_and_memory_of_this_machine() -> None:
    small = measure_matmul(CPU, torch.float32, 0.01, size=64)
    assert 1e6 < small < 1e15
    assert 1e7 < measure_bandwidth(CPU, 0.01) < 1e14
    assert 0 < available_memory(CPU) <= total_memory(CPU)
    assert device_name(CPU)
    assert peak_memory(CPU) >= resident_memory() > 2**25


def test_karpathys_reproduction_on_eight_h100s() -> None:
    made = plan(recipe("gpt2-124m"), on="h100", devices=8, tokens=10 * 10**9, price_per_hour=24)
    assert (made.steps, made.tokens_per_step, made.micro_batch_size) == (19_074, 2**19, 16)
    assert made.parameters == GPT2_PARAMETERS["gpt2"]
    assert made.flops_per_token == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    assert made.seconds == pytest.approx(made.flops / (8 * 0.45 * 989.4e12))
    assert made.cost == pytest.approx(made.seconds / 3600 * 24)
    assert made.fits
    assert not made.measured
    assert made.dtype == "bfloat16"


def test_what_does_not_fit_gets_a_suggestion_and_needs_the_less_memory_the_more_it_gives_up() -> None:
    config = replace(recipe("gpt2-124m"), n_layer=48, n_head=25, n_embd=1600, micro_batch_size=32)
    made = plan(config, on="a100")
    assert not made.fits
    assert made.suggestion is not None
    fitting = plan(replace(config, **made.suggestion), on="a100")
    assert fitting.fits
    assert not plan(replace(config, **{**made.suggestion, "micro_batch_size": 512}), on="a100").fits
    assert plan(config, on="t4").suggestion is None  # 24 GiB of weights and their company, for 15


def test_recomputing_is_suggested_only_where_nothing_else_helps() -> None:
    setup = Setup(rows=1, length=8192, dtype=torch.bfloat16, device="cuda")
    shape = replace(OPENAI["gpt2"], block_size=8192)
    without = training_memory(shape, setup)
    tight = Place("a GPU", "cuda", None, None, without.peak, 0)
    assert suggest(shape, setup, tight, 1) == {"micro_batch_size": 1, "recompute": True}
    roomy = replace(tight, memory=2 * without.peak)
    assert suggest(shape, setup, roomy, 1) == {"micro_batch_size": 1, "recompute": False}


def test_a_batch_found_for_you_fits_and_twice_as_many_rows_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shape = replace(TrainConfig(), save_every=0), replace(TINY, block_size=1024)
    monkeypatch.setattr("gpt2.train.plan.available_memory", lambda device: 2**30)
    found = largest_batch(config, shape, CPU, torch.float32)
    setup = Setup(rows=found, length=1024, saves_midway=False)
    assert (
        training_memory(shape, setup).peak <= 0.9 * 2**30 < training_memory(shape, replace(setup, rows=2 * found)).peak
    )
    monkeypatch.setattr("gpt2.train.plan.available_memory", lambda device: 2**20)
    with pytest.raises(UserError, match="not even one row"):
        largest_batch(config, shape, CPU, torch.float32)


def test_the_vocabulary_comes_from_the_name_of_the_tokenizer(tmp_path: Path) -> None:
    for spec, size in (("gpt2", 50257), ("bytes", 257), ("bpe:1024", 1024), (None, 50257)):
        assert model_shape(TrainConfig(tokenizer=spec, data=str(tmp_path / "none.txt"))).vocab_size == size
    assert model_shape(TrainConfig(init_from="gpt2-medium")).n_embd == 1024


SMALL = ["--n-layer", "4", "--n-embd", "32", "--n-head", "2", "--block-size", "16", "--dtype", "float32"]


def test_a_plan_for_here_in_json_and_no_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(
        [
            "quickstart",
            *SMALL,
            "--batch-size",
            "16",
            "--device",
            "cpu",
            "--tokens",
            "1M",
            "--price-per-hour",
            "2",
            "--json",
        ]
    )
    made = json.loads(capsys.readouterr().out)
    assert set(made) == {
        *("device", "devices", "measured", "dtype", "compile", "parameters", "vocab_size", "batch_size"),
        *("micro_batch_size", "recompute", "flops_per_token", "flops_per_step", "flops", "memory", "device_memory"),
        *("fits", "suggestion", "tokens_per_step", "steps", "tokens", "seconds_per_step", "seconds"),
        *("tokens_per_second", "matmul_rate", "utilization", "cost"),
    }
    assert set(made["memory"]) == {
        *("program", "weights", "gradients", "optimizer", "casts", "activations", "logits", "working"),
        *("allocator", "snapshot", "step", "peak"),
    }
    assert made["measured"]
    assert made["steps"] == 3907  # of 16 * 16 tokens
    assert 0 < made["seconds_per_step"] * made["steps"] == pytest.approx(made["seconds"])
    assert 0 < made["utilization"] < 1.5
    assert made["cost"] == pytest.approx(made["seconds"] / 1800)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(["gpt2-124m", "--on", "h100", "--gpus", "8", "--tokens", "10B", "--price-per-hour", "24"])
    out = capsys.readouterr().out
    for words in ("124,439,808", "optimizer", "949.4 MiB", "8 devices", "an estimate: 45%", "fits", "cost"):
        assert words in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--gpus", "3", "--on", "h100"], "must be a multiple of --gpus"),
        (["--tokens", "many"], "'many' is no number"),
        (["--price-per-hour", "-1"], "is no price"),
        (["--on", "tpu"], "no datasheet of 'tpu'"),
        (["--optimizer", "adamm"], "did you mean 'adamw'"),
        (["nonsense"], "no recipe 'nonsense'"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        main(flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "number"), [("10B", 10**10), ("500M", 5 * 10**8), ("1e9", 10**9), ("2,000", 2000)])
def test_budgets_as_people_write_them(text: str, number: int) -> None:
    assert _count(text) == number
