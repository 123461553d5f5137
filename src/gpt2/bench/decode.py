"""Decoding speed: time to first token, tokens/s after it, and the fraction of the memory-bandwidth limit.

A variant is one program (a contestant) in one precision, in its own process. All continue the same prompts greedily for
a fixed number of tokens. Our variants are here, the comparison is in `decode_comparison`, and
peers are in `benchmarks/decode_peers.py`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gpt2.bench.common import OURS, parse_names
from gpt2.errors import ConfigError, UserError
from gpt2.evaluation.scorer import score
from gpt2.evaluation.tree import Query
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel, Sequence
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.hardware import peak_memory, reset_peak_memory
from gpt2.model import GPT, GPTConfig
from gpt2.native.quantization import BITS, GROUP_SIZES
from gpt2.runtime import DTYPES
from gpt2.weights import load

NUM_CHECKED_TOKENS = 8  # tokens of the first row that are compared with the plain model; the warm-up generates these
TIE_LOGIT_GAP = 5e-3  # a smaller gap between two logits may be due to rounding, or to nanoGPT's exact GELU
PRECISION_FAMILIES = {  # precisions, and the family in which each is compared
    "float32": "float32",
    **dict.fromkeys(("bfloat16", "float16", "f16"), "16 bits"),
    **dict.fromkeys(("int8", "int8_bfloat16", "q8_0"), "8 bits"),
    **dict.fromkeys(("int4", "q4_0"), "4 bits"),
}
OUR_VARIANTS = ("float32", "bfloat16", "int8", "int4", "float32-torch", "bfloat16-torch")


@dataclass(frozen=True)
class DecodeWorkload:
    """What is timed: a model, prompts of random tokens, and the number of new tokens.

    model: where its weights are (see `gpt2.load`); None for random weights of the shape of `config`.
    pause: seconds to sleep before each run, because threads of some libraries spin for 200 ms after their work.
    """

    device: str
    config: GPTConfig
    model: str | None = None
    prompt_tokens: int = 64
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 8, 32, 128)
    rounds: int = 3
    seed: int = 1337
    pause: float = 0.25

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}", field=name)
        if not self.batch_sizes:
            raise ConfigError("there must be at least 1 batch size", field="batch_sizes")
        if self.sequence_length > self.config.block_size:
            context = self.config.block_size
            raise ConfigError(f"{self.sequence_length} tokens do not fit the model's context of {context}")

    @property
    def sequence_length(self) -> int:
        """The final length of a sequence: prompt and new tokens."""
        return self.prompt_tokens + max(self.new_tokens, NUM_CHECKED_TOKENS)

    def prompts(self, round_index: int, batch_size: int) -> list[list[int]]:
        """The first `batch_size` prompts of a round, the same in every batch size; round 0 is the warm-up."""
        generator = torch.Generator().manual_seed(self.seed + round_index)
        shape = (max(self.batch_sizes), self.prompt_tokens)
        return torch.randint(self.config.vocab_size, shape, generator=generator)[:batch_size].tolist()

    def build_model(self) -> GPT:
        """The model, in float32 on the CPU.

        Random weights preserve the scale of activations, so that the next token depends on all layers. With GPT-2's
        initialization, small weights and a tied head, every token would be followed by itself.
        """
        if self.model is not None:
            return load(self.model)[0]
        torch.manual_seed(self.seed)
        model = GPT(self.config).eval()
        for module in model.transformer.h.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        return model


@dataclass(frozen=True)
class DecodeResult:
    """One decoded batch: seconds until each row had one new token, seconds in total, and the new tokens."""

    first_token_seconds: float
    total_seconds: float
    tokens: list[list[int]]


class Decoder(Protocol):
    """A contestant with a loaded model."""

    @property
    def version(self) -> str | None:
        """The program's version; for ours, the class that runs the model."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that each step reads, including the head."""
        ...

    @property
    def cache_width(self) -> int:
        """Bytes per number in its KV cache; 0 without a cache."""
        ...

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """Greedily decode `new_tokens` tokens after each prompt. All prompts have the same length."""
        ...


@dataclass(frozen=True)
class VariantSpec:
    """A variant: ``make_decoder(workload, precision, *arguments)`` returns its decoder, in its own process.

    max_batch_size, max_new_tokens: limits for variants that would take too long beyond them.
    reason: why the variant cannot run, if that is known.
    """

    contestant: str
    name: str
    precision: str
    make_decoder: Callable[..., Decoder]
    arguments: tuple[Any, ...] = ()
    max_batch_size: int | None = None
    max_new_tokens: int | None = None
    reason: str | None = None


def weight_bytes(config: GPTConfig, bits: float, head_bits: float | None = None) -> int:
    """Bytes of weights that a step reads: all matrices, at `bits` per weight including its share of the scales.

    The head is read once. Embeddings (a step reads one row per sequence), norms and biases are negligible.
    """
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    blocks = config.n_layer * (4 * C * C + 2 * C * inner)
    return round((blocks * bits + config.vocab_size * C * (head_bits or bits)) / 8)


def bytes_per_step(
    workload: DecodeWorkload, weight_bytes: int, cache_width: int, batch_size: int, new_tokens: int
) -> float:
    """Bytes that the average decoding step reads: the weights, and the KV cache of every row at its mean length."""
    positions = workload.prompt_tokens + new_tokens / 2
    return weight_bytes + batch_size * positions * 2 * workload.config.n_layer * workload.config.n_embd * cache_width


class GPT2Decoder:
    """This program: the generation engine with a model."""

    def __init__(self, workload: DecodeWorkload, precision: str, torch_only: bool) -> None:
        """torch_only: run `gpt2.model` itself, not the result of `prepare_for_inference`."""
        self._work, model = workload, workload.build_model().to(workload.device, DTYPES.get(precision))
        self.model: LanguageModel = model if torch_only else prepare_for_inference(model, precision)
        self.version = type(self.model).__name__
        self.cache_width = self.model.make_cache(1, 1).data.element_size()
        if isinstance(self.model, GPT):  # torch reads weights of this dtype, even if they hold quantized values
            self.weight_bytes = weight_bytes(workload.config, 8 * self.model.lm_head.weight.element_size())
        else:  # the head of int4 is int8: see `NativeGPT`
            head = "int8" if precision == "int4" else precision
            self.weight_bytes = weight_bytes(workload.config, _bits_per_weight(precision), _bits_per_weight(head))

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`. The time includes making the engine and its KV cache, as it does for the peers."""
        requests = [GenerationRequest(prompt, Sampling(temperature=0), max_new_tokens=new_tokens) for prompt in prompts]
        start = time.perf_counter()
        prefill = sum(map(len, prompts))  # all prompts are prefilled in the first step, then all rows decode together
        engine = Engine(self.model, slots=len(prompts), max_length=self._work.sequence_length, prefill_chunk=prefill)
        sequences = [engine.submit(request) for request in requests]
        engine.step()
        first = time.perf_counter() - start
        run_until_idle(engine, sequences)
        return DecodeResult(first, time.perf_counter() - start, [sequence.new_tokens for sequence in sequences])


def run_until_idle(engine: Engine, sequences: list[Sequence]) -> None:
    """Step the engine until no sequence is left. Raises the error of the first one that failed."""
    while not engine.idle:
        engine.step()
    if error := next((sequence.error for sequence in sequences if sequence.error is not None), None):
        raise error


def _bits_per_weight(precision: str) -> float:
    """Bits per weight of our model, including its share of a 16-bit scale."""
    return BITS[precision] + 16 / GROUP_SIZES[precision] if precision in GROUP_SIZES else 8 * DTYPES[precision].itemsize


def our_variants(names: str) -> list[VariantSpec]:
    """Our variants in a comma-separated list, or all for "all". Raises UserError for an unknown name."""
    chosen = parse_names("variant", "--variants", names, OUR_VARIANTS)
    precisions = {name: name.removesuffix("-torch") for name in chosen}
    return [VariantSpec(OURS, name, p, GPT2Decoder, (p != name,)) for name, p in precisions.items()]


def perplexity(model: LanguageModel, tokens: list[int]) -> float:
    """exp of the mean loss over all tokens but the first, in non-overlapping windows of the context length."""
    context, last = model.config.block_size, len(tokens) - 1
    windows = [[Query(tokens[i : i + context + 1], min(context, last - i))] for i in range(0, last, context)]
    total = sum(one.log_likelihood for batch in score(model, windows) for _, (one,) in batch)
    return math.exp(-total / last)


class ReferenceDecoder:
    """The reference for float32: the plain model, without KV cache and engine."""

    def __init__(self, workload: DecodeWorkload) -> None:
        self._work = workload

    @torch.inference_mode()
    def greedy_tokens(self) -> tuple[list[int], list[float]]:
        """The first tokens of the warm-up's first row, and the gap between the two largest logits at each."""
        model = self._work.build_model().to(self._work.device)
        tokens, gaps = self._work.prompts(0, 1)[0], []
        for _ in range(NUM_CHECKED_TOKENS):
            best = model(torch.tensor([tokens], device=model.device))[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
        return tokens[-NUM_CHECKED_TOKENS:], gaps


class DecodeVariant:
    """One contestant in one precision, in its own process."""

    def __init__(self, spec: VariantSpec, workload: DecodeWorkload) -> None:
        self._work, self._device = workload, torch.device(workload.device)
        self._decoder = spec.make_decoder(workload, spec.precision, *spec.arguments)

    def info(self) -> dict[str, Any]:
        """Its version, weight bytes per step, and bytes per number in its KV cache."""
        return {name: getattr(self._decoder, name) for name in ("version", "weight_bytes", "cache_width")}

    def run(self, round_index: int, batch_size: int, new_tokens: int) -> tuple[float, float, list[int], int | None]:
        """Decode a batch: seconds to the first tokens, seconds after them, the first row, and peak memory in bytes."""
        prompts = self._work.prompts(round_index, batch_size)
        time.sleep(self._work.pause)
        reset_peak_memory(self._device)
        run = self._decoder.run(prompts, new_tokens)
        if [len(row) for row in run.tokens] != [new_tokens] * batch_size:
            raise UserError(f"it did not generate {new_tokens} tokens in each of {batch_size} rows")
        peak = peak_memory(self._device) or None  # on a GPU, memory that is not torch's is unknown
        return run.first_token_seconds, run.total_seconds - run.first_token_seconds, run.tokens[0], peak

    def perplexity(self, tokens: list[int]) -> float:
        """The perplexity of one of our variants: see `perplexity`."""
        assert isinstance(self._decoder, GPT2Decoder)
        return perplexity(self._decoder.model, tokens)
