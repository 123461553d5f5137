"""How fast a model writes: time to the first token, tokens/s after it, and how near that is to what memory allows.

A lane is one contestant in one precision, in a process of its own. All continue the same prompts, with the most likely
token always, and nothing ends a text. Our own lanes are here, those of others in `decode_peers`; the race of all is in
`decode_race`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gpt2.errors import UserError, did_you_mean
from gpt2.generation.engine import Engine, GenerationRequest, LanguageModel
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.log_likelihood import token_log_likelihoods
from gpt2.generation.sampling import Sampling
from gpt2.hardware import peak_memory, reset_peak_memory
from gpt2.model import GPT, GPTConfig
from gpt2.native.quantization import BITS, GROUP_SIZES
from gpt2.runtime import DTYPES
from gpt2.weights import load

OURS = "gpt2"  # this program's name among the contestants
NUM_CHECKED_TOKENS = 8  # so many tokens of the first row have to be ours, in float32; the warm-up makes no more
TIE_LOGIT_GAP = (
    5e-3  # logits nearer to each other than this may change places: by rounding, or in nanoGPT by its exact GELU
)


PRECISION_FAMILIES = {  # precisions, and what they are to be compared in
    "float32": "float32",
    **dict.fromkeys(("bfloat16", "float16", "f16"), "16 bits"),
    **dict.fromkeys(("int8", "int8_bfloat16", "q8_0"), "8 bits"),
    **dict.fromkeys(("int4", "q4_0"), "4 bits"),
}
OUR_VARIANTS = ("float32", "bfloat16", "int8", "int4", "float32-torch", "bfloat16-torch")


@dataclass(frozen=True)
class DecodeWorkload:
    """What is timed: a model, prompts of random tokens, and how many tokens are to follow them.

    model: where its weights are (see `gpt2.load`); None for random ones of the shape of `config`.
    pause: seconds of rest before every run, as the threads of some libraries spin for 200 ms after their work.
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
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(f"batch sizes are at least 1, not {', '.join(map(str, self.batch_sizes)) or 'none at all'}")
        if self.sequence_length > self.config.block_size:
            raise UserError(f"{self.sequence_length} tokens do not fit the model's context of {self.config.block_size}")

    @property
    def sequence_length(self) -> int:
        """Tokens in a row at the end: its prompt and what follows."""
        return self.prompt_tokens + max(self.new_tokens, NUM_CHECKED_TOKENS)

    def prompts(self, round_index: int, batch_size: int) -> list[list[int]]:
        """The first `rows` prompts of round `number`, the same in every batch size; round 0 is the warm-up."""
        generator = torch.Generator().manual_seed(self.seed + round_index)
        shape = (max(self.batch_sizes), self.prompt_tokens)
        return torch.randint(self.config.vocab_size, shape, generator=generator)[:batch_size].tolist()

    def build_model(self) -> GPT:
        """The model, in float32 on the CPU.

        Random weights keep the scale of what they multiply, so that the next token depends on all of them. As training
        begins, with small weights and the head tied to the embedding, every token would be followed by itself.
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
    """One batch of texts written: seconds until each row had one new token, seconds in all, and the new tokens."""

    first_token_seconds: float
    total_seconds: float
    tokens: list[list[int]]


class Decoder(Protocol):
    """A contestant, ready to write."""

    @property
    def version(self) -> str | None:
        """Of the program; for ours, what runs the model."""
        ...

    @property
    def weight_bytes(self) -> int:
        """What every step has to read of the weights, the head among them."""
        ...

    @property
    def cache_width(self) -> int:
        """Bytes of a number in its key/value cache; 0 when it has none."""
        ...

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """Continue each of the prompts, which are equally long, by as many tokens: always the most likely one."""
        ...


@dataclass(frozen=True)
class VariantSpec:
    """A lane of the race: ``make(work, precision, *arguments)`` is the decoder, in the lane's own process.

    most_rows, most_tokens: what it is not asked to go beyond, as it would take too long.
    reason: why it need not be tried at all.
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
    """Bytes of weights that a step reads: all matrices, at so many bits a number, with those of their scales.

    The head is read once. Embeddings, of which a step needs a row or two, norms and biases are negligible.
    """
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    blocks = config.n_layer * (4 * C * C + 2 * C * inner)
    return round((blocks * bits + config.vocab_size * C * (head_bits or bits)) / 8)


def bytes_per_step(
    workload: DecodeWorkload, weight_bytes: int, cache_width: int, batch_size: int, new_tokens: int
) -> float:
    """Bytes that the mean decoding step reads: the weights, and the keys and values of every row as long as it is."""
    positions = workload.prompt_tokens + new_tokens / 2
    return weight_bytes + batch_size * positions * 2 * workload.config.n_layer * workload.config.n_embd * cache_width


class GPT2Decoder:
    """This program: the real engine over a model."""

    def __init__(self, workload: DecodeWorkload, precision: str, torch_only: bool) -> None:
        """plain: the model of `gpt2.model` as it is, without the fast path."""
        self._work, model = workload, workload.build_model().to(workload.device, DTYPES.get(precision))
        self.model: LanguageModel = model if torch_only else prepare_for_inference(model, precision)
        self.version = type(self.model).__name__
        self.cache_width = self.model.make_cache(1, 1).data.element_size()
        if isinstance(self.model, GPT):  # torch runs it, whatever its weights were rounded to
            self.weight_bytes = weight_bytes(workload.config, 8 * self.model.lm_head.weight.element_size())
        else:  # int4 has an int8 head: see `NativeGPT`
            head = "int8" if precision == "int4" else precision
            self.weight_bytes = weight_bytes(workload.config, _bits_per_weight(precision), _bits_per_weight(head))

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`. The engine is new, so that making room for the cache counts, as it does for others."""
        requests = [GenerationRequest(prompt, Sampling(temperature=0), max_new_tokens=new_tokens) for prompt in prompts]
        began = time.perf_counter()
        everything = sum(map(len, prompts))  # all prompts are read in the first step, and then all rows go in step
        engine = Engine(self.model, slots=len(prompts), max_length=self._work.sequence_length, prefill_chunk=everything)
        texts = [engine.submit(request) for request in requests]
        engine.step()
        first = time.perf_counter() - began
        while not engine.idle:
            engine.step()
        total = time.perf_counter() - began
        if error := next((text.error for text in texts if text.error is not None), None):
            raise error
        return DecodeResult(first, total, [text.new_tokens for text in texts])


def _bits_per_weight(precision: str) -> float:
    """Of a weight of ours, with its share of a 16-bit scale."""
    return BITS[precision] + 16 / GROUP_SIZES[precision] if precision in GROUP_SIZES else 8 * DTYPES[precision].itemsize


def our_variants(names: str) -> list[VariantSpec]:
    """The lanes of a comma list, or "all". Raises UserError for one that there is not."""
    chosen = OUR_VARIANTS if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise UserError(f"--lanes names none: {', '.join(OUR_VARIANTS)}")
    entries = []
    for name in dict.fromkeys(chosen):
        if name not in OUR_VARIANTS:
            raise UserError(
                f"there is no lane '{name}'{did_you_mean(name, OUR_VARIANTS)}: there are {', '.join(OUR_VARIANTS)}"
            )
        precision = name.removesuffix("-torch")
        entries.append(VariantSpec(OURS, name, precision, GPT2Decoder, (precision != name,)))
    return entries


def perplexity(model: LanguageModel, tokens: Sequence[int]) -> float:
    """exp of the mean loss over all tokens but the first, in windows of the context that do not overlap."""
    return math.exp(-token_log_likelihoods(model, tokens).logprobs.double().mean().item())


class ReferenceDecoder:
    """What has to come out in float32: the plain model, with no cache and no engine."""

    def __init__(self, workload: DecodeWorkload) -> None:
        self._work = workload

    @torch.inference_mode()
    def greedy_tokens(self) -> tuple[list[int], list[float]]:
        """The first tokens of the warm-up's first row, and how far each was ahead of the second best, in logits."""
        model = self._work.build_model().to(self._work.device)
        tokens, leads = self._work.prompts(0, 1)[0], []
        for _ in range(NUM_CHECKED_TOKENS):
            best = model(torch.tensor([tokens], device=model.device))[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            leads.append(float(best.values[0] - best.values[1]))
        return tokens[-NUM_CHECKED_TOKENS:], leads


class DecodeVariant:
    """One contestant in one precision, in the process that it is made in."""

    def __init__(self, spec: VariantSpec, workload: DecodeWorkload) -> None:
        self._work, self._device = workload, torch.device(workload.device)
        self._decoder = spec.make_decoder(workload, spec.precision, *spec.arguments)

    def info(self) -> dict[str, Any]:
        """Its version, and what it reads in a step."""
        decoder = self._decoder
        return {name: getattr(decoder, name) for name in ("version", "weight_bytes", "cache_width")}

    def run(self, round_index: int, batch_size: int, new_tokens: int) -> tuple[float, float, list[int], int | None]:
        """Write a batch: seconds to the first tokens, seconds after them, the first row, and bytes at the peak."""
        prompts = self._work.prompts(round_index, batch_size)
        time.sleep(self._work.pause)
        reset_peak_memory(self._device)
        run = self._decoder.run(prompts, new_tokens)
        if [len(row) for row in run.tokens] != [new_tokens] * batch_size:
            raise UserError(f"it did not write {new_tokens} tokens in each of {batch_size} rows")
        peak = peak_memory(self._device) or None  # on a GPU, nothing is known of what is not torch's
        return run.first_token_seconds, run.total_seconds - run.first_token_seconds, run.tokens[0], peak

    def perplexity(self, tokens: list[int]) -> float:
        """Of one of our own lanes: see `perplexity`."""
        assert isinstance(self._decoder, GPT2Decoder)
        return perplexity(self._decoder.model, tokens)
