"""Parameters, FLOPs and memory: the predictions compared with torch's counts and with a real process."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gpt2.config import TrainConfig
from gpt2.errors import UserError
from gpt2.lora import LoRAConfig, add_adapter, trainable_parameters
from gpt2.model import GPT, OPENAI_CONFIGS, GPTConfig
from gpt2.optimizers import build_optimizers
from gpt2.planning.costs import (
    StepSetup,
    block_activations,
    flops_per_token,
    num_parameters,
    num_trainable_parameters,
    optimizer_bytes,
    training_memory,
)
from gpt2.runtime import apply_activation_checkpointing, autocast

CPU = torch.device("cpu")
TINY = GPTConfig(vocab_size=101, block_size=32, n_layer=3, n_head=4, n_embd=64)
GPT2_PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", OPENAI_CONFIGS)
def test_num_parameters_of_openai_models(name: str) -> None:
    assert num_parameters(OPENAI_CONFIGS[name]) == GPT2_PARAMETERS[name]


@pytest.mark.parametrize(
    "config",
    [OPENAI_CONFIGS["gpt2-xl"], TINY, replace(TINY, tie_word_embeddings=False), replace(TINY, n_inner=100)],
    ids=["xl", "tiny", "untied", "inner"],
)
def test_num_parameters_equals_the_model(config: GPTConfig) -> None:
    with torch.device("meta"):
        model = GPT(config)
    assert num_parameters(config) == model.num_parameters()


PARTIAL_TRAINING: list[dict[str, Any]] = [
    {"lora": LoRAConfig(rank=3)},
    {"lora": LoRAConfig(rank=5, dropout=0.1, targets=("c_attn", "mlp.c_proj"))},
    {"freeze": 1},
    {"freeze": 3},
]


def with_partial_training(model: GPT, lora: LoRAConfig | None = None, freeze: int = 0) -> GPT:
    """Add an adapter, or freeze the embeddings and first blocks, as a run does."""
    if lora is not None:
        add_adapter(model, lora)
    if freeze:
        for part in (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:freeze]):
            part.requires_grad_(False)
    return model


@pytest.mark.parametrize("tuned", PARTIAL_TRAINING)
@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False}, {"n_inner": 100}])
def test_num_trainable_parameters_equals_the_model(tuned: dict[str, Any], change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    trainable = trainable_parameters(with_partial_training(GPT(config), **tuned))
    assert num_trainable_parameters(config, **tuned) == sum(p.numel() for p in trainable.values())


def test_invalid_lora_target_or_freeze_raises() -> None:
    with pytest.raises(UserError, match="the model has no 'c_atn' for an adapter"):
        num_trainable_parameters(TINY, LoRAConfig(targets=("c_atn",)))
    with pytest.raises(UserError, match="--freeze 4 is more than the model's 3 blocks"):
        num_trainable_parameters(TINY, freeze=4)


@pytest.mark.parametrize("tuned", PARTIAL_TRAINING)
@pytest.mark.parametrize("tie", [True, False])
def test_flops_with_frozen_weights_equal_torchs_count(tuned: dict[str, Any], tie: bool) -> None:
    config = replace(TINY, attention="plain", tie_word_embeddings=tie)
    model = with_partial_training(GPT(config), **tuned).train()
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    assert counter.get_total_flops() == tokens.numel() * flops_per_token(config, 8, **tuned)


@pytest.mark.parametrize("length", [8, 32])
def test_flops_equal_torchs_count_without_causal_mask(length: int) -> None:
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
@pytest.mark.parametrize("lora", [None, LoRAConfig(), LoRAConfig(rank=3, dropout=0.1), LoRAConfig(targets=("c_attn",))])
def test_block_activations_equal_the_saved_tensors(
    dtype: torch.dtype, dropout: float, attention: str, lora: LoRAConfig | None
) -> None:
    config = replace(TINY, dropout=dropout, attention=attention)
    block = with_partial_training(GPT(config), lora).train().transformer.h[1]
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
    measured = sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in weights and tensor.untyped_storage().nbytes() not in casts
    )
    setup = StepSetup(rows=10, length=config.block_size, dtype=dtype, lora=lora)
    predicted = sum(block_activations(config, setup).values())
    assert predicted == pytest.approx(measured, rel=0.03)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors, and their peak."""

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


LARGE_VOCAB = 8192  # with CHUNK_BYTES reduced to 16 MiB: logits in several chunks in float32, in one in bfloat16


@pytest.mark.parametrize(
    ("vocab_size", "change"),
    [
        (2000, {}),
        (2000, {"dtype": torch.bfloat16}),
        (LARGE_VOCAB, {}),
        (LARGE_VOCAB, {"dtype": torch.bfloat16}),
        (2000, {"micro_batches": 2}),
        (LARGE_VOCAB, {"micro_batches": 2, "dtype": torch.bfloat16}),
        (2000, {"activation_checkpointing": True}),
        (2000, {"activation_checkpointing": True, "dtype": torch.bfloat16}),
        (2000, {"optimizer": "muon"}),
        (2000, {"optimizer": "sgd"}),
        *((2000, tuned) for tuned in PARTIAL_TRAINING),
        (2000, {"lora": LoRAConfig(), "dtype": torch.bfloat16}),
        (LARGE_VOCAB, {"lora": LoRAConfig()}),
        (LARGE_VOCAB, {"lora": LoRAConfig(), "micro_batches": 2, "dtype": torch.bfloat16}),
        (2000, {"lora": LoRAConfig(), "activation_checkpointing": True}),
        (2000, {"lora": LoRAConfig(), "activation_checkpointing": True, "dtype": torch.bfloat16}),
        (2000, {"lora": LoRAConfig(rank=16), "optimizer": "muon"}),
        (LARGE_VOCAB, {"freeze": 1, "dtype": torch.bfloat16}),
        (2000, {"freeze": 2, "optimizer": "muon"}),
    ],
)
def test_peak_memory_matches_the_tensors_of_real_steps(
    vocab_size: int, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2.loss.CHUNK_BYTES", 2**24)
    monkeypatch.setattr("gpt2.planning.costs.CHUNK_BYTES", 2**24)
    config = GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=3, n_head=4, n_embd=64)
    setup = replace(StepSetup(rows=16, length=64), **change)
    model = with_partial_training(GPT(config), setup.lora, setup.freeze).train()
    if setup.activation_checkpointing:
        apply_activation_checkpointing(model.transformer.h)
    optimizers = build_optimizers(model, TrainConfig(optimizer=setup.optimizer))
    tokens = torch.zeros(setup.rows, setup.length, dtype=torch.int64)
    with LiveBytes(list(model.parameters())) as counted:
        for _ in range(2):
            _step(model, optimizers, tokens, setup)
    memory = training_memory(config, setup)
    assert memory.step - memory.allocator == pytest.approx(counted.peak, rel=0.08)


def _step(model: GPT, optimizers: list[Any], tokens: Tensor, setup: StepSetup) -> None:
    for _ in range(setup.micro_batches):
        with autocast(CPU, setup.dtype):
            loss = model.loss(tokens, tokens, 100.0)
        loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


MEASURE_SCRIPT = """
import json
import sys
import torch
from gpt2.planning.costs import StepSetup, training_memory
from gpt2.hardware import peak_memory, reset_peak_memory
from gpt2.lora import LoRAConfig, add_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import configure_malloc
from gpt2.config import TrainConfig
from gpt2.optimizers import build_optimizers
from gpt2.planning.step_timing import process_memory

cpu = torch.device("cpu")
block = torch.ones(2**25)
before = peak_memory(cpu)
del block
dropped = reset_peak_memory(cpu) and before - peak_memory(cpu)
configure_malloc(keep_freed=True)
program = process_memory(TrainConfig())
config = GPTConfig(vocab_size=1024, block_size=256, n_layer=5, n_head=4, n_embd=256)
setup = StepSetup(rows=8, length=256, lora=LoRAConfig() if sys.argv[1] == "lora" else None)
reset_peak_memory(cpu)
model = GPT(config)
if setup.lora:
    add_adapter(model, setup.lora)
(optimizer,) = build_optimizers(model, TrainConfig())
tokens = torch.zeros(setup.rows, setup.length, dtype=torch.int64)
for _ in range(2):
    model.loss(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps([dropped, program, training_memory(config, setup, program).step, peak_memory(cpu)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("trained", ["all", "lora"])
def test_peak_memory_matches_a_process(trained: str) -> None:
    """The least of up to five processes: the fragmentation of the heap varies, and the prediction contains none."""
    command = [sys.executable, "-c", MEASURE_SCRIPT, trained]
    least, predicted, program = float("inf"), 0, 0
    for _ in range(5):
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        dropped, program, predicted, measured = json.loads(run.stdout)
        if dropped is False:
            pytest.skip("this system cannot reset a process's peak memory")
        assert dropped >= 2**26  # of the 128 MiB that were freed
        assert predicted <= 1.15 * measured
        least = min(least, measured)
        if predicted >= 0.85 * least:
            break
    assert predicted == pytest.approx(least, rel=0.15)
    assert predicted - program == pytest.approx(least - program, rel=0.3)


def test_optimizer_bytes_equal_the_optimizer_state() -> None:
    for name in ("adamw", "muon", "sgd"):
        model = GPT(TINY)
        optimizers = build_optimizers(model, TrainConfig(optimizer=name))
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        _step(model, optimizers, tokens, StepSetup(rows=1, length=8))
        tensors = [
            value
            for each in optimizers
            for state in each.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.dim()
        ]
        assert optimizer_bytes(TINY, name) == sum(t.untyped_storage().nbytes() for t in tensors)


def test_activation_checkpointing_saves_memory() -> None:
    setup = StepSetup(rows=16, length=1024, dtype=torch.bfloat16, device="cuda")
    kept = training_memory(OPENAI_CONFIGS["gpt2"], setup)
    again = training_memory(OPENAI_CONFIGS["gpt2"], replace(setup, activation_checkpointing=True))
    assert again.activations < 0.2 * kept.activations
    assert kept.peak > again.peak > again.weights + again.gradients + again.optimizer
