"""The cost of training a GPT-2, computed without running it: parameters, FLOPs, and memory by part.

Covers full training, LoRA (`gpt2.lora`), and training with frozen embeddings and first blocks. The bytes are those of
the tensors that `gpt2.model` and `gpt2.loss` keep; tests/planning/test_costs.py compares them with torch.
Names: x = rows * length positions, C = n_embd, inner = width of the MLP, V = vocab_size, H = heads, e = bytes of dtype.
"""

import platform
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from gpt2.errors import ConfigError
from gpt2.lora import LoRAConfig, match_target_modules
from gpt2.loss import CHUNK_BYTES, CPU_CACHE_ELEMENTS, VOCAB_PAD_MULTIPLE
from gpt2.model import GPTConfig
from gpt2.muon import batch_length

FLOAT32_BYTES = 4  # the dtype of weights, gradients, optimizer state and the residual stream
HEAP_FRAGMENTATION = 0.28  # glibc: lost share of the bytes allocated and freed in a step (measured: 0.23 to 0.34)


def num_parameters(config: GPTConfig) -> int:
    """The number of parameters, as `GPT(config).num_parameters()` counts them: a tied head once."""
    C, V = config.n_embd, config.vocab_size
    head = 0 if config.tie_word_embeddings else V * C
    return V * C + config.block_size * C + config.n_layer * sum(block_tensor_sizes(config)) + 2 * C + head


def num_trainable_parameters(config: GPTConfig, lora: LoRAConfig | None = None, freeze: int = 0) -> int:
    """The number of trainable parameters: all, the adapters', or all but the embeddings and first `freeze` blocks.

    Raises UserError for a LoRA target that the model does not have, and for more frozen blocks than it has.
    """
    if lora is not None:
        return sum(lora.rank * (rows + columns) for rows, columns in _adapted_matrices(config, lora).values())
    if not freeze:
        return num_parameters(config)
    if freeze > config.n_layer:
        raise ConfigError(f"--freeze {freeze} is more than the model's {config.n_layer} blocks", field="freeze")
    embeddings = (config.vocab_size + config.block_size) * config.n_embd
    return num_parameters(config) - embeddings - freeze * sum(block_tensor_sizes(config))


def block_matrices(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """The shapes (out, in) of a block's matrices by name."""
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    return {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (inner, C), "mlp.c_proj": (C, inner)}


def _num_matrix_weights(config: GPTConfig) -> int:
    return sum(rows * columns for rows, columns in block_matrices(config).values())


def _adapted_matrices(config: GPTConfig, lora: LoRAConfig) -> dict[str, tuple[int, int]]:
    """The shapes (out, in) of all matrices with an adapter by name."""
    block = block_matrices(config).items()
    shapes = {f"transformer.h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block}
    return {name: shapes[name] for name in match_target_modules(shapes, lora)}


def flops_per_token(
    config: GPTConfig, length: int, *, backward: bool = True, lora: LoRAConfig | None = None, freeze: int = 0
) -> float:
    """FLOPs per token in rows of `length` tokens: forward and backward pass, or the forward pass alone.

    The convention of PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT: 6 per weight of a matrix product (2 forward,
    4 backward), including the head, excluding embedding look-ups; 12 * n_layer * n_embd * length for attention, without
    the causal mask. Causal kernels and activation checkpointing do not change the count, so that MFU compares across
    programs.

    A frozen weight that gradients pass through counts 4; in a frozen block that they do not reach, 2, and attention
    a third. With LoRA, gradients pass through all blocks down to the first one's c_attn.
    """
    block, head = _num_matrix_weights(config), config.vocab_size * config.n_embd
    attention = 4 * config.n_embd * length
    forward = 2 * (config.n_layer * block + head) + config.n_layer * attention
    if lora is not None:
        forward += 2 * num_trainable_parameters(config, lora)
    if not backward:
        return float(forward)
    if lora is not None:
        first = _adapted_matrices(config, lora).get("transformer.h.0.attn.c_attn")
        # the input of the first c_attn needs no gradient
        unneeded = 0 if first is None else 2 * first[0] * first[1] + 2 * lora.rank * first[1]
        frozen = config.n_layer * block + head
        return 3.0 * forward - 2 * frozen - unneeded
    head_frozen = 2 * head if freeze and config.tie_word_embeddings else 0
    return 3.0 * forward - head_frozen - freeze * (4 * block + 2 * attention)


@dataclass(frozen=True)
class StepSetup:
    """The settings of a training step on one device that its memory depends on."""

    rows: int  # sequences in a micro-batch
    length: int  # tokens in a sequence
    micro_batches: int = 1  # gradient accumulation steps
    dtype: torch.dtype = torch.float32  # of matrix products; weights are always float32
    activation_checkpointing: bool = False  # activation checkpointing
    optimizer: str = "adamw"
    device: str = "cpu"  # the kind: "cpu", "cuda" or "mps"
    saves_midway: bool = True  # whether training continues while a checkpoint is written
    lora: LoRAConfig | None = None
    freeze: int = 0  # number of frozen first blocks; if not 0, the embeddings are frozen too
    buckets: bool = False  # whether DDP's buckets hold all gradients from the start
    shards: int = 1  # devices that share weights, gradients and optimizer state (FSDP)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number in the dtype of the matrix products."""
        return FLOAT32_BYTES if self.dtype == torch.float32 else 2

    @property
    def trains_embeddings(self) -> bool:
        """Return whether the embeddings, and with them a tied head, are trainable."""
        return self.lora is None and not self.freeze


@dataclass(frozen=True)
class Memory:
    """Bytes on one device during training: the maximum of each part. The maxima do not occur at the same time.

    program:     Python, torch and their libraries (on a CPU; a GPU's context is not counted, as torch does not).
    weights, gradients, optimizer: float32; gradients and optimizer state of trainable parameters. With FSDP: the shard.
    gathered:    with FSDP: gathered parameters outside the blocks and of two blocks, and gradients not yet scattered.
    casts:       autocast's copies of the matrices.
    activations: tensors saved for the backward pass.
    logits:      head and loss: a chunk of logits, the head's cast and its gradient.
    working:     temporaries of a single operation.
    allocator:   fragmentation of glibc's heap, estimated (on a CPU).
    snapshot:    host memory while a checkpoint is written: copies of weights and optimizer, and the file read back.
    step:        the peak of a step.
    peak:        the peak of the run: on a CPU including the snapshot, on a GPU that of a step.
    """

    program: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    casts: int
    activations: int
    logits: int
    working: int
    allocator: int
    snapshot: int
    step: int
    peak: int

    def parts(self) -> dict[str, int]:
        """The parts by name, without `step` and `peak`."""
        return {name: value for name, value in asdict(self).items() if name not in ("step", "peak")}


def training_memory(config: GPTConfig, setup: StepSetup, program: int = 0) -> Memory:
    """The memory of training steps by part, and its peak.

    The peak is the maximum over four moments: the loss (all activations are alive), the backward pass of the last
    block, the end of the backward pass, and the update.
    """
    learned = num_trainable_parameters(config, setup.lora, setup.freeze)
    x, C, e = setup.rows * setup.length, config.n_embd, setup.dtype_bytes
    adapters = learned if setup.lora is not None else 0
    weights, gradients = FLOAT32_BYTES * (num_parameters(config) + adapters), FLOAT32_BYTES * learned
    optimizer = optimizer_bytes(config, setup.optimizer, setup.lora, setup.freeze)
    layers = config.n_layer - setup.freeze  # frozen first blocks save nothing
    casts = e * (layers * _num_matrix_weights(config) + adapters) if e < FLOAT32_BYTES else 0
    block = block_activations(config, setup)
    stream = FLOAT32_BYTES * x * C  # one state of the residual stream
    kept = stream if setup.activation_checkpointing else sum(block.values())
    outside = 2 * stream + 16 * x + 8 * x  # ln_f's input and output, its statistics, tokens and targets
    activations = layers * kept + outside
    logits, from_loss = _loss_bytes(config, setup)
    # activations of the block that is in its backward pass
    recomputed = sum(block.values()) - stream if setup.activation_checkpointing else 0
    working = recomputed + 2 * stream + _workspace_bytes(config, setup)
    if setup.device != "cpu":
        working += from_loss  # the loss's gradients scaled by the incoming gradient; on a CPU it is known to be 1
    embedding = FLOAT32_BYTES * config.vocab_size * C if setup.trains_embeddings else 0
    accumulated = gradients if setup.micro_batches > 1 or setup.buckets else 0  # not sharded, with FSDP neither
    own_weights, own_gradients, own_optimizer = (-(-size // setup.shards) for size in (weights, gradients, optimizer))
    fsdp = _fsdp_buffers(config, setup)
    always = own_weights + own_optimizer + fsdp.root
    one_cast = casts // config.n_layer if setup.activation_checkpointing else casts
    moments = (
        always + accumulated + fsdp.block + (casts if setup.lora is None else one_cast) + activations + logits,
        always + accumulated + fsdp.backward + one_cast + activations + working + from_loss,
        always + max(own_gradients, accumulated) + fsdp.end + (2 if setup.micro_batches > 1 else 1) * embedding,
        always + own_gradients + _update_workspace_bytes(config, setup),
    )
    allocator = 0
    if setup.device == "cpu" and platform.libc_ver()[0] == "glibc" and not setup.activation_checkpointing:
        transient = activations + own_gradients + fsdp.backward + logits + working
        allocator = int(HEAP_FRAGMENTATION * transient)  # see runtime.configure_malloc
    step = program + max(moments) + allocator
    copies, read_back = (weights if setup.lora is None else gradients) + optimizer, optimizer  # see `train.checkpoint`
    peak = step
    if setup.device == "cpu":  # the snapshot is in the same memory
        merged = 0 if setup.lora is None else weights  # the merged model, at the end of a LoRA run
        at_the_end = max(step, program + always + max(copies, merged)) + read_back  # the heap keeps what steps freed
        peak = max(step + copies + read_back, at_the_end) if setup.saves_midway else at_the_end
    return Memory(
        program=program if setup.device == "cpu" else 0,
        weights=own_weights,
        gradients=own_gradients,
        optimizer=own_optimizer,
        gathered=fsdp.root + max(fsdp.block, fsdp.backward, fsdp.end),
        casts=casts,
        activations=activations,
        logits=logits,
        working=working,
        allocator=allocator,
        snapshot=copies + read_back,
        step=step,
        peak=peak,
    )


class _FSDPBuffers(NamedTuple):
    """Bytes that FSDP needs on a device besides its shards; all 0 without sharding.

    root:     the parameters outside the blocks: gathered once a pass and kept until its end.
    block:    one block's gathered parameters, and those of the prefetched next block.
    backward: the same, with one block's gradients, and those of the previous one in the reduce-scatter's buffer.
    end:      the root's gradients in that buffer.
    """

    root: int = 0
    block: int = 0
    backward: int = 0
    end: int = 0


def _fsdp_buffers(config: GPTConfig, setup: StepSetup) -> _FSDPBuffers:
    if setup.shards == 1:
        return _FSDPBuffers()
    block = FLOAT32_BYTES * sum(block_tensor_sizes(config))
    root = FLOAT32_BYTES * num_parameters(config) - config.n_layer * block
    adapters, learning = 0, block
    if setup.lora is not None:
        adapters = learning = FLOAT32_BYTES * num_trainable_parameters(config, setup.lora) // config.n_layer
    gathered = 2 * (block + adapters)
    return _FSDPBuffers(root, gathered, gathered + 2 * learning, root if setup.trains_embeddings else 0)


def block_tensor_sizes(config: GPTConfig) -> list[int]:
    """The number of elements of each tensor of a block, in the order of its parameters."""
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    norm, attention = [C, C], [3 * C * C, 3 * C, C * C, C]
    return [*norm, *attention, *norm, inner * C, inner, C * inner, C]


def _workspace_bytes(config: GPTConfig, setup: StepSetup) -> int:
    """Bytes of the gradients inside the MLP at their peak; with LoRA the adapters add as many."""
    x, inner = setup.rows * setup.length, config.n_inner or 4 * config.n_embd
    narrow = setup.dtype_bytes * x * config.n_embd if setup.dtype != torch.float32 else 0
    return setup.dtype_bytes * x * inner * (1 if setup.lora is None else 2) + narrow


def optimizer_bytes(config: GPTConfig, optimizer: str, lora: LoRAConfig | None = None, freeze: int = 0) -> int:
    """Bytes of optimizer state: per trainable parameter AdamW keeps two numbers, SGD one, Muon one for matrices."""
    learned = num_trainable_parameters(config, lora, freeze)
    if optimizer == "sgd":
        return FLOAT32_BYTES * learned
    muon_weights = (config.n_layer - freeze) * _num_matrix_weights(config) if lora is None else learned
    return 2 * FLOAT32_BYTES * learned - (FLOAT32_BYTES * muon_weights if optimizer == "muon" else 0)


def block_activations(config: GPTConfig, setup: StepSetup) -> dict[str, int]:
    """Bytes by name of the tensors that one block saves for its backward pass, including its input.

    Compiled blocks save about as much: one or two fewer of size x * C, and none of the larger ones.
    """
    x, C, inner = setup.rows * setup.length, config.n_embd, config.n_inner or 4 * config.n_embd
    e = setup.dtype_bytes
    kept = {
        "input": FLOAT32_BYTES * x * C,
        "statistics": 4 * FLOAT32_BYTES * x,  # mean and deviation of two layer norms
        "ln_1": e * x * C,
        **_attention_activations(config, setup),
        "residual": FLOAT32_BYTES * x * C,  # the input of ln_2
        "ln_2": e * x * C,
        "c_fc": e * x * inner,
        "gelu": e * x * inner,
    }
    if config.dropout:
        mask = 1 if setup.device == "cuda" else e
        kept |= {"attn_dropout": mask * x * C, "mlp_dropout": mask * x * C}
    return kept if setup.lora is None else _lora_activations(kept, config, setup, setup.lora)


INPUT_ACTIVATIONS = {"attn.c_attn": "ln_1", "attn.c_proj": "attention", "mlp.c_fc": "ln_2", "mlp.c_proj": "gelu"}


def _lora_activations(kept: dict[str, int], config: GPTConfig, setup: StepSetup, lora: LoRAConfig) -> dict[str, int]:
    """`kept` with LoRA: a frozen matrix's input is saved only for lora_A, and lora_A's output for lora_B."""
    x, e, kept = setup.rows * setup.length, setup.dtype_bytes, dict(kept)
    adapted = {name.split(".", 3)[3] for name in _adapted_matrices(config, lora)}
    for name, read in INPUT_ACTIVATIONS.items():
        if name in adapted:
            kept[f"{name}.lora"] = e * x * lora.rank
            if lora.dropout:
                narrow = read == "gelu" or (read == "attention" and config.attention == "plain")
                mask = 1 if setup.device == "cuda" else e if narrow else FLOAT32_BYTES
                kept[f"{name}.lora_dropout"] = mask * x * block_matrices(config)[name][1]
        elif read == "attention" and "logsumexp" in kept:
            kept.pop("to_bfloat16", None)  # fused attention saves its result itself
        else:
            del kept[read]
    if lora.dropout and "attn.c_proj" in adapted and "logsumexp" in kept and "to_bfloat16" not in kept:
        kept["attention_dropped"] = e * x * config.n_embd
    return kept


def _attention_activations(config: GPTConfig, setup: StepSetup) -> dict[str, int]:
    rows, T, C, H = setup.rows, setup.length, config.n_embd, config.n_head
    x, e, square = rows * T, setup.dtype_bytes, rows * H * T * T
    if config.attention == "plain":
        scores = square * (3 if config.dropout else 1)  # weights; with dropout also the mask and the product
        return {"q": e * x * C, "k": e * x * C, "v": e * x * C, "scores": e * scores + T * T, "attention": e * x * C}
    if config.dropout and setup.device != "cuda":  # torch has no fused kernel: plain attention in float32
        one = FLOAT32_BYTES * x * C
        return {"q": one, "k": one, "v": one, "scores": 3 * FLOAT32_BYTES * square, "attention": e * x * C}
    if setup.device == "cpu" and e < FLOAT32_BYTES:  # in float32, as bfloat16 is slow: see model.sdpa_attention
        return {
            "qkv": 12 * x * C,
            "logsumexp": FLOAT32_BYTES * x * H,
            "attention": FLOAT32_BYTES * x * C,
            "to_bfloat16": e * x * C,
        }
    return {"qkv": 3 * e * x * C, "logsumexp": FLOAT32_BYTES * x * H, "attention": e * x * C}


def _loss_bytes(config: GPTConfig, setup: StepSetup) -> tuple[int, int]:
    """Bytes of head and loss, as `gpt2.loss` computes them: at their peak, and what remains until the step ends."""
    x, C, V = setup.rows * setup.length, config.n_embd, config.vocab_size
    if setup.device == "cuda":
        V += -V % VOCAB_PAD_MULTIPLE
    e = setup.dtype_bytes
    rows = min(x, max(1, CHUNK_BYTES // (V * e)))  # of a chunk of logits
    in_float = min(rows * V, max(V, CPU_CACHE_ELEMENTS)) if setup.device == "cpu" else rows * V
    softmax = FLOAT32_BYTES * in_float * (1 if e == FLOAT32_BYTES else 2)  # its result, and its input cast to float32
    learns = setup.lora is None and not (setup.freeze and config.tie_word_embeddings)
    head_gradient, hidden_gradient = FLOAT32_BYTES * V * C if learns else 0, FLOAT32_BYTES * x * C
    cast = e * V * C if e < FLOAT32_BYTES else 0
    product = cast if learns else 0  # one chunk's part of the head's gradient, before it is added
    temporary = head_gradient + max(softmax, product) if rows < x else max(softmax, head_gradient + product)
    return hidden_gradient + cast + rows * V * e + temporary, head_gradient + hidden_gradient


def _update_workspace_bytes(config: GPTConfig, setup: StepSetup) -> int:
    """Bytes of the optimizer's temporaries: none for the fused AdamW."""
    if setup.optimizer == "sgd" and setup.device == "cuda":  # gradients with the weight decay added
        return FLOAT32_BYTES * num_trainable_parameters(config, setup.lora, setup.freeze)
    if setup.optimizer == "muon" and setup.lora is None:
        return max(
            min(config.n_layer - setup.freeze, batch_length(*shape)) * _newton_schulz_bytes(shape, setup.device)
            for shape in block_matrices(config).values()
        )
    return 0


def _newton_schulz_bytes(shape: tuple[int, int], device: str) -> int:
    """Bytes of Muon's temporaries for one matrix: its direction, two iterates, and two Gram matrices."""
    elements, width = shape[0] * shape[1], min(shape)
    size = FLOAT32_BYTES // 2 if device == "cuda" else FLOAT32_BYTES
    return FLOAT32_BYTES * elements + size * (2 * elements + 2 * width**2)
