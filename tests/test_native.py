"""The CPU kernel equals the model, and is batch invariant bit for bit."""

import ctypes
import hashlib
import logging
import math
import os
import platform
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.generation import inference
from gpt2.generation.engine import Engine, GenerationRequest, SampledToken
from gpt2.generation.inference import prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.model import ACTIVATIONS, GPT, GPTConfig
from gpt2.native import build, structs
from gpt2.native.model import NativeGPT
from gpt2.native.quantization import GROUP_SIZES, dequantize, pack, quantize
from tests.helpers.transformers_reference import ODD_CONFIGS, random_batch, random_model, relative_error

WIDE = GPTConfig(vocab_size=501, block_size=300, n_layer=2, n_head=2, n_embd=192)
ALL = [*ODD_CONFIGS, WIDE]
PRECISIONS = ["float32", "bfloat16", "int8", "int4"]
# tolerances relative to the model with the same (quantized) weights: rounding of activations
TOLERANCE = {"float32": 3e-6, "bfloat16": 1.5e-2, "int8": 3e-2, "int4": 3e-2}


@pytest.fixture(scope="module")
def kernel() -> ctypes.CDLL:
    found = build.load_library()
    if found is None:
        pytest.skip("the kernel cannot be compiled here")
    return found


@pytest.fixture(scope="module")
def plain_kernel(kernel: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel compiled for a processor without AVX-512."""
    if platform.machine() != "x86_64":
        pytest.skip("other processors have one kernel only")
    path = tmp_path_factory.mktemp("plain") / "kernel.so"
    flags = [flag.replace("native", "x86-64-v3") for flag in build.COMPILER_FLAGS]
    subprocess.run(["g++", *flags, str(build.KERNEL_SOURCE), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def all_logits(native: NativeGPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits at all positions."""
    return native.lm_head(native.hidden_states(tokens))


def expected(model: GPT, tokens: torch.Tensor, precision: str) -> torch.Tensor:
    with torch.inference_mode():
        return (inference._fake_quantized(model, precision) if precision in GROUP_SIZES else model)(tokens)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.n_layer}x{c.n_embd}")
def test_logits_equal_the_model(kernel: ctypes.CDLL, config: GPTConfig, precision: str) -> None:
    model = random_model(config)
    tokens, _ = random_batch(config)
    got = all_logits(NativeGPT(model, precision, kernel), tokens)
    assert got.shape == (*tokens.shape, config.vocab_size)
    assert relative_error(got, expected(model, tokens, precision)) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_kernel_without_avx512_gives_the_same_logits(
    plain_kernel: ctypes.CDLL, kernel: ctypes.CDLL, precision: str
) -> None:
    for config in ALL[1:3] + ALL[-1:]:
        model = random_model(config)
        tokens, _ = random_batch(config)
        got = all_logits(NativeGPT(model, precision, plain_kernel), tokens)
        assert relative_error(got, all_logits(NativeGPT(model, precision, kernel), tokens)) < TOLERANCE[precision] / 3


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(kernel: ctypes.CDLL, activation: str) -> None:
    model = random_model(replace(ODD_CONFIGS[1], activation_function=activation))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.c_fc.weight"):
                weight.mul_(30)  # far into both tails
    tokens, _ = random_batch(model.config)
    got = all_logits(NativeGPT(model, "float32", kernel), tokens)
    assert relative_error(got, expected(model, tokens, "float32")) < 3e-6


def test_bfloat16_weights_are_not_copied(kernel: ctypes.CDLL) -> None:
    model = random_model(WIDE).to(torch.bfloat16)
    native = NativeGPT(model, "bfloat16", kernel)
    assert model.lm_head.weight.data_ptr() == native._head.weight
    tokens, _ = random_batch(WIDE)
    assert relative_error(all_logits(native, tokens), model.float()(tokens).detach()) < TOLERANCE["bfloat16"]


@cache
def native_models(precision: str) -> Any:
    model = random_model(replace(WIDE, block_size=40))
    library = build.load_library()
    assert library is not None
    return model if precision == "torch" else NativeGPT(model, precision, library)


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_results_are_batch_invariant_bit_for_bit_and_independent_of_chunks(
    kernel: ctypes.CDLL, precision: str, data: st.DataObject
) -> None:
    native = native_models(precision)
    tokens, _ = random_batch(native.config, rows=data.draw(st.integers(1, 9)), seed=data.draw(st.integers(0, 99)))
    whole = all_logits(native, tokens)
    row = data.draw(st.integers(0, len(tokens) - 1))
    assert torch.equal(all_logits(native, tokens[row : row + 1])[0], whole[row])
    cache, parts = native.make_cache(len(tokens)), []
    while cache.length < native.config.block_size:
        end = data.draw(st.integers(cache.length + 1, native.config.block_size))
        parts.append(native.hidden_states(tokens[:, cache.length : end], cache))
    assert torch.equal(native.lm_head(torch.cat(parts, 1)), whole)


SAMPLINGS = [Sampling(0), Sampling(), Sampling(0.8, top_k=20), Sampling(top_p=0.9, repetition_penalty=1.3)]
one_request = st.tuples(
    st.lists(st.integers(0, 500), min_size=1, max_size=30),
    st.sampled_from(SAMPLINGS),
    st.integers(1, 25),
    st.integers(0, 3),
)


def check_continuous_batching(request_args: list, slots: int, chunk: int, events: list[int], precision: str) -> None:
    """Requests are submitted and cancelled at any time; each has the tokens that it has alone.

    With the kernel the log-probabilities are equal bit for bit; torch's matrix products may round differently.
    """
    if build.load_library() is None:
        pytest.skip("the kernel cannot be compiled here")
    native = native_models(precision)

    def comparable(token: SampledToken) -> tuple:
        return (token.id,) if precision == "torch" else (token.id, token.logprob, token.top_logprobs)

    requests = [GenerationRequest(*each, sample_index=0, top_logprobs=2) for each in request_args]
    together = Engine(native, slots, prefill_chunk=chunk)
    pending, sent, results = list(requests), [], {}
    for step, event in enumerate([*events, *[3] * 2000]):
        if event == 0 and pending:
            sent.append(together.submit(pending.pop(0)))
        elif event == 1 and sent:
            together.cancel(sent[step % len(sent)])
        for token in together.step():
            results.setdefault(id(token.sequence), []).append(comparable(token))
        if event == 3 and pending:
            sent.append(together.submit(pending.pop(0)))
        if together.idle and not pending:
            break
    for sequence in sent:
        alone = Engine(native, 1)
        only = alone.submit(sequence.request)
        expected_tokens = []
        while not alone.idle:
            expected_tokens += [comparable(token) for token in alone.step()]
        got = results.get(id(sequence), [])
        assert got == expected_tokens[: len(got)]
        assert sequence.finish_reason == "cancelled" or sequence.new_tokens == only.new_tokens
        assert only.finish_reason == "length"


any_schedule = given(
    request_args=st.lists(one_request, min_size=1, max_size=9),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 12),
    events=st.lists(st.integers(0, 3), max_size=60),
    precision=st.sampled_from(["float32", "int8", "torch"]),
)
test_continuous_batching_never_changes_a_request = settings(deadline=None, max_examples=12)(
    any_schedule(check_continuous_batching)
)
test_continuous_batching_never_changes_a_request_in_many_schedules = pytest.mark.slow(
    settings(deadline=None, max_examples=80)(any_schedule(check_continuous_batching))
)


@pytest.mark.parametrize("precision", list(GROUP_SIZES))
@pytest.mark.parametrize("shape", [(16, 128), (5, 3), (50, 200), (33, 129)])
def test_packed_weights_are_a_permutation_of_the_quantized_ones(precision: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    numbers, scale = quantize(weight, precision)
    steps = {"int8": 127, "int4": 8}[precision]
    error = (dequantize(numbers, scale, precision, shape[1]) - weight).abs()
    assert error.max() <= weight.abs().max() / steps
    packed, scales = pack(weight, precision)
    group, blocks = GROUP_SIZES[precision], -(-shape[0] // 16)
    assert scales.shape == (blocks, -(-shape[1] // group), 16)
    unpacked = packed if precision == "int8" else torch.stack([packed & 15, packed >> 4], 2).flatten(1, 2)
    rows = unpacked.transpose(1, 2).flatten(0, 1).flatten(1)[: shape[0]]
    assert torch.equal(rows, numbers.flatten(1))
    assert torch.equal(scales.transpose(1, 2).flatten(0, 1)[: shape[0]], scale)


def test_quantization_of_zeros_and_of_equal_values() -> None:
    for precision in GROUP_SIZES:
        for weight in (torch.zeros(16, 64), torch.full((16, 64), -3.0), torch.eye(32) * 7):
            numbers, scale = quantize(weight, precision)
            assert torch.allclose(dequantize(numbers, scale, precision, weight.size(1)), weight, rtol=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_are_detected_in_every_precision(kernel: ctypes.CDLL, precision: str, value: float) -> None:
    model = random_model(WIDE)
    with torch.no_grad():
        dict(model.named_parameters())["transformer.h.0.mlp.c_proj.bias"][5] = value
    engine = Engine(NativeGPT(model, precision, kernel), 1)
    broken = engine.submit(GenerationRequest([1, 2]))
    engine.step()
    assert broken.finish_reason == "error"
    assert "nan or inf" in str(broken.error)


def test_invalid_arguments_are_refused(kernel: ctypes.CDLL) -> None:
    native = NativeGPT(random_model(WIDE), "float32", kernel)
    with pytest.raises(UserError, match="301 tokens do not fit the model's context of 300"):
        native.hidden_states(torch.zeros(1, 301, dtype=torch.long))
    with pytest.raises(UserError, match="token id 501, and the model's ids are 0 to 500"):
        native.hidden_states(torch.tensor([[501]]))
    with pytest.raises(ValueError, match="do not fit a cache of 1 x 5"):
        native.hidden_states(torch.zeros(1, 6, dtype=torch.long), native.make_cache(1, 5))
    with pytest.raises(UserError, match="no precision 'int3'"):
        NativeGPT(random_model(WIDE), "int3", kernel)
    with pytest.raises(UserError, match="no precision 'int-8'"):
        prepare_for_inference(random_model(WIDE), "int-8")


@pytest.mark.parametrize("precision", [*PRECISIONS, "float16"])
def test_without_a_compiler_torch_uses_the_same_weights(
    kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    model = random_model(WIDE)
    tokens, _ = random_batch(WIDE, length=20)
    wanted = (
        model(tokens).detach() if precision == "float16" else all_logits(NativeGPT(model, precision, kernel), tokens)
    )
    monkeypatch.setattr(inference, "load_library", lambda: None)
    slow = prepare_for_inference(model, precision)
    assert isinstance(slow, GPT)
    assert model.lm_head.weight.dtype == torch.float32  # the given model is unchanged
    with torch.inference_mode():
        got = slow.lm_head(slow.hidden_states(tokens)).float()
    assert relative_error(got, wanted) < TOLERANCE["bfloat16"]


def test_a_warning_says_why_there_is_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gpt2"):
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert build.load_library.__wrapped__() is None
        assert "there is no C++ compiler" in caplog.text
        monkeypatch.setenv("CXX", "false")  # a compiler that always fails
        assert build.load_library.__wrapped__() is None
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("GPT2_HOME", "/proc/nowhere")
        assert build.load_library.__wrapped__() is None
    assert caplog.text.count("torch's own operations") == 3


def test_struct_sizes_are_checked_when_the_library_is_loaded(
    kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    structs.check_struct_sizes(kernel)

    class Layer(structs.Layer):
        _fields_ = (("extra", ctypes.c_int32),)

    monkeypatch.setattr(structs, "Layer", Layer)
    monkeypatch.setattr(build, "_compile", lambda compiler, path: None)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: kernel)
    size = ctypes.sizeof(structs.Layer)
    with pytest.raises(RuntimeError, match=f"struct Layer has [0-9]+ bytes in kernel.cpp and {size} in structs.py"):
        build.load_library.__wrapped__()


def test_a_truncated_library_is_compiled_again(kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it would end the process with SIGBUS."""
    home = Path(os.environ["GPT2_HOME"])
    (home / "native").unlink()
    compiled = []

    def compile_(compiler: str, path: Path) -> None:
        compiled.append(path)
        path.write_bytes(b"library")
        path.with_suffix(".sha256").write_text(hashlib.sha256(b"library").hexdigest())

    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: kernel)
    for _ in range(2):
        build.load_library.__wrapped__()
    assert len(compiled) == 1
    assert (home / "native").stat().st_mode & 0o777 == 0o700
    compiled[0].write_bytes(b"libr")
    build.load_library.__wrapped__()
    assert len(compiled) == 2


def test_a_folder_that_others_can_write_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(os.environ["GPT2_HOME"], "native")
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    assert build.load_library.__wrapped__() is None
    assert "other users can write" in caplog.text
