"""What a GPT-2 costs to train, by arithmetic alone: parameters, FLOPs, and bytes by part. Nothing is run here.

Wholly, with adapters beside its frozen matrices (`gpt2.lora`), or with its embeddings and first blocks frozen.

The bytes follow what `gpt2.model` and `gpt2.loss` really keep; tests/planning/test_plan.py holds them against torch.
Shapes in the comments: x = rows * length positions, C = n_embd, I = width of the MLP, V = vocab_size, H heads.
"""

import platform
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from gpt2.errors import UserError
from gpt2.lora import LoRAConfig, match_target_modules
from gpt2.loss import CHUNK_BYTES, CPU_CACHE_ELEMENTS, VOCAB_PAD_MULTIPLE
from gpt2.model import GPTConfig

FLOAT32_BYTES = 4  # bytes of a float32: weights, gradients, the optimizer's moments and the residual stream
HEAP_FRAGMENTATION = 0.28  # of what comes and goes in each step, lost in holes of glibc's heap (measured: 0.23 to 0.34)


def num_parameters(config: GPTConfig) -> int:
    """How many numbers are learned, as `GPT(config).num_parameters()` counts them: the tied head once."""
    C, V, inner = config.n_embd, config.vocab_size, config.n_inner or 4 * config.n_embd
    biases_and_norms = (3 * C + C) + (inner + C) + 4 * C
    block = _num_matrix_weights(config) + biases_and_norms
    head = 0 if config.tie_word_embeddings else V * C
    return V * C + config.block_size * C + config.n_layer * block + 2 * C + head


def num_trainable_parameters(config: GPTConfig, lora: LoRAConfig | None = None, freeze: int = 0) -> int:
    """How many numbers learn: all, those of adapters alone, or all but the embeddings and the first `freeze` blocks.

    Raises UserError when the model has no such target, or not so many blocks.
    """
    if lora is not None:
        return sum(lora.rank * (rows + columns) for rows, columns in _adapted_matrices(config, lora).values())
    if not freeze:
        return num_parameters(config)
    if freeze > config.n_layer:
        raise UserError(f"--freeze {freeze} is more than the model's {config.n_layer} blocks")
    embeddings = (config.vocab_size + config.block_size) * config.n_embd
    without = replace(config, n_layer=1)  # a frozen block, as the difference of two models
    block = num_parameters(replace(config, n_layer=2)) - num_parameters(without)
    return num_parameters(config) - embeddings - freeze * block


def block_matrices(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """The matrices of a block, (out, in), by name."""
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    return {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (inner, C), "mlp.c_proj": (C, inner)}


def _num_matrix_weights(config: GPTConfig) -> int:
    return sum(rows * columns for rows, columns in block_matrices(config).values())


def _adapted_matrices(config: GPTConfig, lora: LoRAConfig) -> dict[str, tuple[int, int]]:
    """The matrices of all blocks that have an adapter, (out, in), by name."""
    block = block_matrices(config).items()
    shapes = {f"transformer.h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block}
    return {name: shapes[name] for name in match_target_modules(shapes, lora)}


def flops_per_token(
    config: GPTConfig, length: int, *, backward: bool = True, lora: LoRAConfig | None = None, freeze: int = 0
) -> float:
    """Floating-point operations per token of rows of `length` tokens: forward and backward, or forward alone.

    The convention of PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT: 6 for every weight of a matrix product
    (2 forward, 4 backward), with the head as one and the look-ups of the embeddings as none, and 12 * n_layer * n_embd
    * length for attention, as if every position saw the whole row. A causal kernel does half of that half-empty square,
    and recomputed activations are done twice; neither changes the count, so rates and MFU compare across programs.

    A frozen weight counts 4, as it has no gradient, a tied head among them; in a block below all that learns, 2, and
    attention a third. With adapters the gradients still go through all blocks, but for the first one's c_attn.
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
        below = 0 if first is None else 2 * first[0] * first[1] + 2 * lora.rank * first[1]  # its input asks for none
        frozen = config.n_layer * block + head
        return 3.0 * forward - 2 * frozen - below
    head_frozen = 2 * head if freeze and config.tie_word_embeddings else 0
    return 3.0 * forward - head_frozen - freeze * (4 * block + 2 * attention)


@dataclass(frozen=True)
class StepSetup:
    """How a step is done on one device, as far as memory depends on it."""

    rows: int  # sequences at once: the micro-batch
    length: int  # tokens in each
    micro_batches: int = 1  # how many make a step
    dtype: torch.dtype = torch.float32  # of matrix products; weights are float32 always
    activation_checkpointing: bool = False
    optimizer: str = "adamw"
    device: str = "cpu"  # the kind: "cpu", "cuda" or "mps"
    saves_midway: bool = True  # do steps go on while a checkpoint is written?
    lora: LoRAConfig | None = None  # what learns in place of the model
    freeze: int = 0  # first blocks that do not learn, nor then the embeddings
    buckets: bool = False  # are gradients kept where DDP sends them from, all of them from the start?
    shards: int = 1  # how many devices divide weights, gradients and optimizer among them (FSDP)

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number in the dtype of the matrix products."""
        return FLOAT32_BYTES if self.dtype == torch.float32 else 2

    @property
    def trains_embeddings(self) -> bool:
        """Do the embeddings learn, and with them a tied head?"""
        return self.lora is None and not self.freeze


@dataclass(frozen=True)
class Memory:
    """Bytes on the device while training, by part, each at its largest; they are not all so at once.

    program:     Python, torch and their libraries (on a CPU; a GPU's context is not counted, as torch does not).
    weights, gradients, optimizer: of the parameters, in float32; the latter two of those that learn. With FSDP a share.
    gathered:    with FSDP what a device borrows of the others: the parameters outside of the blocks, two blocks, and
                 gradients that are not divided yet.
    casts:       the matrices' copies in autocast's dtype.
    activations: what the forward pass keeps for the backward pass.
    logits:      the head and the loss: a chunk of logits, the head's cast and its gradient.
    working:     what only one operation needs.
    allocator:   what glibc's heap loses in holes: an estimate (on a CPU).
    snapshot:    copies of weights and optimizer in the host's memory while a checkpoint is written, and the
                 file that is read back to check it.
    step:        the most at any moment of a step.
    peak:        the most in the whole run: on a CPU with the snapshot, on a GPU that of a step.
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
        """The parts by name, without what they come to."""
        return {name: value for name, value in asdict(self).items() if name not in ("step", "peak")}


def training_memory(config: GPTConfig, setup: StepSetup, program: int = 0) -> Memory:
    """The memory of training steps, by part and at its peak: the largest of four moments.

    They are the loss, with all activations, the last block's backward pass, the end of it all, and the update.
    """
    learned, half = num_trainable_parameters(config, setup.lora, setup.freeze), setup.dtype != torch.float32
    x, C, e = setup.rows * setup.length, config.n_embd, setup.dtype_bytes
    adapters = learned if setup.lora is not None else 0
    weights, gradients = FLOAT32_BYTES * (num_parameters(config) + adapters), FLOAT32_BYTES * learned
    optimizer = optimizer_bytes(config, setup.optimizer, setup.lora, setup.freeze)
    layers = config.n_layer - setup.freeze  # that keep anything
    casts = e * (layers * _num_matrix_weights(config) + adapters) if half else 0
    block = block_activations(config, setup)
    stream = FLOAT32_BYTES * x * C  # one state of the residual stream
    kept = stream if setup.activation_checkpointing else sum(block.values())
    outside = 2 * stream + 16 * x + 8 * x  # what ln_f reads and gives, its statistics, the tokens with their targets
    activations = layers * kept + outside
    logits, from_loss = _loss_bytes(config, setup)
    again = (
        sum(block.values()) - stream if setup.activation_checkpointing else 0
    )  # of the block whose backward pass it is
    working = again + 2 * stream + _workspace_bytes(config, setup)
    if setup.device != "cpu":
        working += from_loss  # multiplied by what came from above, which on a CPU is known to be one
    embedding = FLOAT32_BYTES * config.vocab_size * C if setup.trains_embeddings else 0
    before = gradients if setup.micro_batches > 1 or setup.buckets else 0  # of other micro-batches; whole with FSDP too
    own_weights, own_gradients, own_optimizer = (-(-size // setup.shards) for size in (weights, gradients, optimizer))
    borrowed = _fsdp_buffers(config, setup)
    always = own_weights + own_optimizer + borrowed.root
    one_cast = casts // config.n_layer if setup.activation_checkpointing else casts
    moments = (
        always + before + borrowed.block + (casts if setup.lora is None else one_cast) + activations + logits,
        always + before + borrowed.backward + one_cast + activations + working + from_loss,
        always + max(own_gradients, before) + borrowed.end + (2 if setup.micro_batches > 1 else 1) * embedding,
        always + own_gradients + _update_workspace_bytes(config, setup),
    )
    allocator = 0
    if setup.device == "cpu" and platform.libc_ver()[0] == "glibc" and not setup.activation_checkpointing:
        coming_and_going = activations + own_gradients + borrowed.backward + logits + working
        allocator = int(HEAP_FRAGMENTATION * coming_and_going)  # see runtime.manage_freed_memory
    step = program + max(moments) + allocator
    copies, read_back = (weights if setup.lora is None else gradients) + optimizer, optimizer  # see `train.checkpoint`
    peak = step
    if setup.device == "cpu":  # there the host's memory is the device's
        merged = 0 if setup.lora is None else weights  # with the adapters, once they are done
        at_the_end = max(step, program + always + max(copies, merged)) + read_back  # the heap keeps what steps freed
        peak = max(step + copies + read_back, at_the_end) if setup.saves_midway else at_the_end
    return Memory(
        program=program if setup.device == "cpu" else 0,
        weights=own_weights,
        gradients=own_gradients,
        optimizer=own_optimizer,
        gathered=borrowed.root + max(borrowed.block, borrowed.backward, borrowed.end),
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
    """Bytes that FSDP has on a device besides its shards; nothing where nothing is divided.

    root:     the parameters outside of the blocks: gathered once a pass, and kept to the end of it.
    block:    one block's parameters, and those of the next, on their way.
    backward: the same, with one block's gradients, and those of the one before in the buffer that sends them.
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
    adapters = (
        FLOAT32_BYTES * num_trainable_parameters(config, setup.lora) // config.n_layer if setup.lora is not None else 0
    )
    learning = block if setup.lora is None else adapters
    at_once = 2 * (block + adapters)
    return _FSDPBuffers(root, at_once, at_once + 2 * learning, root if setup.trains_embeddings else 0)


def block_tensor_sizes(config: GPTConfig) -> list[int]:
    """How many numbers each tensor of a block has, in the order of its parameters."""
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    norm, attention = [C, C], [3 * C * C, 3 * C, C * C, C]
    return [*norm, *attention, *norm, inner * C, inner, C * inner, C]


def _workspace_bytes(config: GPTConfig, setup: StepSetup) -> int:
    """Bytes of the gradients inside the MLP, at their height; an adapter has its own of what its matrix has."""
    x, inner = setup.rows * setup.length, config.n_inner or 4 * config.n_embd
    narrow = setup.dtype_bytes * x * config.n_embd if setup.dtype != torch.float32 else 0
    return setup.dtype_bytes * x * inner * (1 if setup.lora is None else 2) + narrow


def optimizer_bytes(config: GPTConfig, optimizer: str, lora: LoRAConfig | None = None, freeze: int = 0) -> int:
    """What the optimizer remembers: AdamW two numbers for each that learns, SGD one, Muon one of blocks' matrices."""
    learned = num_trainable_parameters(config, lora, freeze)
    if optimizer == "sgd":
        return FLOAT32_BYTES * learned
    of_muon = (config.n_layer - freeze) * _num_matrix_weights(config) if lora is None else learned
    return 2 * FLOAT32_BYTES * learned - (FLOAT32_BYTES * of_muon if optimizer == "muon" else 0)


def block_activations(config: GPTConfig, setup: StepSetup) -> dict[str, int]:
    """Bytes of the tensors one block keeps for its backward pass, its input among them, by name.

    Compiled blocks keep about as much: they leave out one or two of (x, C) and gain nothing on the large ones.
    """
    x, C, inner = setup.rows * setup.length, config.n_embd, config.n_inner or 4 * config.n_embd
    e = setup.dtype_bytes
    kept = {
        "input": FLOAT32_BYTES * x * C,
        "statistics": 4 * FLOAT32_BYTES * x,  # mean and deviation, twice
        "ln_1": e * x * C,
        **_attention_activations(config, setup),
        "residual": FLOAT32_BYTES * x * C,  # what ln_2 reads
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
    """The same beside frozen matrices: what one reads is kept only for its A, and what that gives, for its B."""
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
            kept.pop("to_bfloat16", None)  # fused attention needs its result itself
        else:
            del kept[read]
    if lora.dropout and "attn.c_proj" in adapted and "logsumexp" in kept and "to_bfloat16" not in kept:
        kept["attention_dropped"] = e * x * config.n_embd
    return kept


def _attention_activations(config: GPTConfig, setup: StepSetup) -> dict[str, int]:
    rows, T, C, H = setup.rows, setup.length, config.n_embd, config.n_head
    x = rows * T
    e = setup.dtype_bytes
    square = rows * H * T * T
    if config.attention == "plain":
        scores = square * (3 if config.dropout else 1)  # weights; with dropout also the mask and the product
        return {"q": e * x * C, "k": e * x * C, "v": e * x * C, "scores": e * scores + T * T, "attention": e * x * C}
    if config.dropout and setup.device != "cuda":  # torch has no fused kernel for it there: plain, in float32
        one = FLOAT32_BYTES * x * C
        return {"q": one, "k": one, "v": one, "scores": 3 * FLOAT32_BYTES * square, "attention": e * x * C}
    if setup.device == "cpu" and e < FLOAT32_BYTES:  # in float32 there, as bfloat16 is slow: see model.sdpa_attention
        return {
            "qkv": 12 * x * C,
            "logsumexp": FLOAT32_BYTES * x * H,
            "attention": FLOAT32_BYTES * x * C,
            "to_bfloat16": e * x * C,
        }
    return {"qkv": 3 * e * x * C, "logsumexp": FLOAT32_BYTES * x * H, "attention": e * x * C}


def _loss_bytes(config: GPTConfig, setup: StepSetup) -> tuple[int, int]:
    """Bytes of head and loss, as `gpt2.loss` does them: at their height, and what stays until the step ends."""
    x, C, V = setup.rows * setup.length, config.n_embd, config.vocab_size
    if setup.device == "cuda":
        V += -V % VOCAB_PAD_MULTIPLE
    e = setup.dtype_bytes
    rows = min(x, max(1, CHUNK_BYTES // (V * e)))  # whose logits are held at a time
    in_float = min(rows * V, max(V, CPU_CACHE_ELEMENTS)) if setup.device == "cpu" else rows * V
    softmax = (
        FLOAT32_BYTES * in_float * (1 if e == FLOAT32_BYTES else 2)
    )  # in float32: its result, and a copy of what it is given
    learns = setup.lora is None and not (setup.freeze and config.tie_word_embeddings)
    of_head, of_hidden = FLOAT32_BYTES * V * C if learns else 0, FLOAT32_BYTES * x * C  # gradients
    product = (
        e * V * C if e < FLOAT32_BYTES and learns else 0
    )  # one chunk's part of the head's gradient, before it is added
    at_once = of_head + max(softmax, product) if rows < x else max(softmax, of_head + product)
    cast = e * V * C if e < FLOAT32_BYTES else 0
    return of_hidden + cast + rows * V * e + at_once, of_head + of_hidden


def _update_workspace_bytes(config: GPTConfig, setup: StepSetup) -> int:
    """Bytes that the optimizer's own arithmetic needs: nothing for the fused AdamW."""
    if setup.optimizer == "sgd" and setup.device == "cuda":
        return FLOAT32_BYTES * num_trainable_parameters(
            config, setup.lora, setup.freeze
        )  # gradients with the weight decay added
    if setup.optimizer == "muon" and setup.lora is None:
        return 16 * config.n_embd * (config.n_inner or 4 * config.n_embd)  # Newton-Schulz on the largest matrix
    return 0
