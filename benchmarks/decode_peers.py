"""Peers in decoding: transformers, CTranslate2, llama.cpp and nanoGPT, each with the weights of our model.

Each is used as its documentation says, with as many threads as torch uses. This program writes the files that they
need, into a folder that the caller removes.
"""

import ctypes
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.train_peers import build_model, parse_peers
from gpt2.bench.common import BenchmarkError, InProcessRunner, ProgressFn, Workload, no_progress
from gpt2.bench.decode import Decoder, DecodeResult, DecodeWorkload, VariantSpec, weight_bytes
from gpt2.errors import ConfigError, UserError, did_you_mean
from gpt2.formats import gguf_writer
from gpt2.runtime import DTYPES, synchronize
from gpt2.weights import save

LLAMA_FILE_TYPES = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


class Transformers:
    """`generate` of transformers, with its default KV cache."""

    def __init__(self, workload: DecodeWorkload, precision: str, folder: str) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.GPT2LMHeadModel.from_pretrained(Path(folder, "model"), dtype=DTYPES[precision])
        self._model = model.to(workload.device).eval()
        self.version = transformers.__version__
        self.cache_width = DTYPES[precision].itemsize
        self.weight_bytes = weight_bytes(workload.config, 8 * self.cache_width)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`."""
        timer = _TokenTimer()
        tokens = torch.tensor(prompts, device=self._model.device)
        out = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            cache_implementation=None,
            eos_token_id=None,
            pad_token_id=0,
            streamer=timer,
        )
        return timer.result(1, out[:, tokens.size(1) :].tolist())  # call 0 passes the prompt


class _TokenTimer:
    """Records when `put` is called. It has the interface of a streamer of transformers."""

    def __init__(self) -> None:
        self._start, self._times = time.perf_counter(), []

    def put(self, value: object = None) -> None:
        """Record the time."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do at the end of a stream."""

    def result(self, first_call: int, tokens: list[list[int]]) -> DecodeResult:
        """The result of a batch that ends now, and that had its first tokens at call number `first_call` of `put`."""
        return DecodeResult(self._times[first_call] - self._start, time.perf_counter() - self._start, tokens)


class CTranslate2:
    """`Generator.generate_batch` on a float32 model, which it converts to the compute type at load."""

    def __init__(self, workload: DecodeWorkload, precision: str, folder: str) -> None:
        import ctranslate2  # pyright: ignore[reportMissingImports]

        device, _, index = workload.device.partition(":")
        supported = ctranslate2.get_supported_compute_types(device)
        if precision not in supported:
            raise UserError(f"CTranslate2 has no {precision} on this device, only {', '.join(sorted(supported))}")
        self._generator = ctranslate2.Generator(
            str(Path(folder, "ctranslate2")),
            device=device,
            device_index=int(index or 0),
            compute_type=precision,
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )
        self.version = ctranslate2.__version__
        self.weight_bytes = weight_bytes(workload.config, {"float32": 32, "bfloat16": 16}.get(precision, 8))
        self.cache_width = 2 if precision.endswith("bfloat16") else 4

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`."""
        timer = _TokenTimer()

        def on_token(_: object) -> bool:
            timer.put()
            return False  # do not stop

        results = self._generator.generate_batch(
            [list(map(str, prompt)) for prompt in prompts],
            max_length=new_tokens,
            include_prompt_in_result=False,
            end_token=[],
            beam_size=1,
            sampling_topk=1,
            callback=on_token,
        )
        return timer.result(len(prompts) - 1, [result.sequences_ids[0] for result in results])


class LlamaCpp:
    """llama.cpp through the low-level API of llama-cpp-python: each row is a sequence of one batch."""

    def __init__(self, workload: DecodeWorkload, precision: str, folder: str) -> None:
        import gguf  # pyright: ignore[reportMissingImports]
        import llama_cpp  # pyright: ignore[reportMissingImports]

        if torch.device(workload.device).type != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise UserError("this llama-cpp-python was built without GPU support")
        self._llama, self._work = llama_cpp, workload
        _silence_llama_log(llama_cpp)
        file = Path(folder, f"{precision}.gguf")
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0 if workload.device == "cpu" else workload.config.n_layer + 1
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {file.name}")
        self._rows, self._context, self._batch = 0, None, None
        self.version = llama_cpp.__version__
        tensors = gguf.GGUFReader(file).tensors
        self.weight_bytes = sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "position_embd.weight")
        self.cache_width = 2

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`. The KV cache is allocated before the time starts."""
        batch_size, length = len(prompts), self._work.prompt_tokens
        if batch_size != self._rows:
            self._create_context(batch_size)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        timer = _TokenTimer()
        new = [self._decode_batch(prompts, 0)]
        timer.put()
        for position in range(length, length + new_tokens - 1):
            new.append(self._decode_batch([[token] for token in new[-1]], position))
        return timer.result(0, [list(row) for row in zip(*new, strict=True)])

    def _create_context(self, batch_size: int) -> None:
        llama, work = self._llama, self._work
        if self._context is not None:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch_size * max(256, work.sequence_length), batch_size
        params.n_batch = batch_size * work.prompt_tokens
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(f"llama.cpp cannot allocate a context for {batch_size} sequences")
        self._rows, self._batch = batch_size, llama.llama_batch_init(params.n_batch, 0, 1)

    def _decode_batch(self, tokens: list[list[int]], position: int) -> list[int]:
        """Append tokens to each row, starting at `position`; returns the most likely next token of each."""
        batch, index = self._batch, 0
        assert batch is not None
        for row, new in enumerate(tokens):
            for i, token in enumerate(new):
                batch.token[index], batch.pos[index] = token, position + i
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = i == len(new) - 1
                index += 1
        batch.n_tokens = index
        if self._llama.llama_decode(self._context, batch) != 0:
            raise UserError("llama_decode failed")
        shape = (len(tokens), self._work.config.vocab_size)
        return np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), shape).argmax(1).tolist()


class NanoGPT:
    """nanoGPT's own `generate`, which has no KV cache: every token recomputes the whole sequence."""

    def __init__(self, workload: DecodeWorkload, precision: str, checkout: str) -> None:
        with redirect_stdout(sys.stderr):
            shape = Workload("cpu", workload.config, batch_size=1, block_size=1)
            built = build_model("nanogpt", checkout, shape, compiled=False)
        built.model.load_state_dict(workload.build_model().state_dict(), strict=False)
        self._model: Any = built.model.to(workload.device, DTYPES[precision]).eval()
        self.version = built.version
        self.weight_bytes = weight_bytes(workload.config, 8 * DTYPES[precision].itemsize)
        self.cache_width = 0

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`."""
        tokens = torch.tensor(prompts, device=next(self._model.parameters()).device)
        timer = _TokenTimer()

        def before_forward(*_: object) -> None:
            synchronize(tokens.device)
            timer.put()

        hook = self._model.register_forward_pre_hook(before_forward)
        try:
            out = self._model.generate(tokens, new_tokens, top_k=1)[:, tokens.size(1) :].tolist()
        finally:
            hook.remove()
        return timer.result(1, out)  # the second forward pass starts when the first token is done


@dataclass(frozen=True)
class Peer:
    """A peer: its packages (module name to pip name), precisions, decoder and limits (see `VariantSpec`)."""

    packages: Mapping[str, str]
    precisions: tuple[str, ...]
    make_decoder: Callable[..., Decoder]
    max_batch_size: int | None = None
    max_new_tokens: int | None = None


PEERS = {
    "transformers": Peer({"transformers": "transformers"}, ("float32", "bfloat16"), Transformers),
    "ctranslate2": Peer(
        {"ctranslate2": "ctranslate2", "transformers": "transformers"},
        ("float32", "bfloat16", "int8", "int8_bfloat16"),
        CTranslate2,
    ),
    "llamacpp": Peer({"llama_cpp": "llama-cpp-python", "gguf": "gguf"}, ("f16", "q8_0", "q4_0"), LlamaCpp),
    "nanogpt": Peer({}, ("float32", "bfloat16"), NanoGPT, max_batch_size=8, max_new_tokens=16),
}


def parse_decode_peers(given: Iterable[str]) -> dict[str, str | None]:
    """Parse ``["nanogpt=PATH", "llamacpp"]`` into names and checkouts.

    Raises UserError for a peer that is unknown, or whose packages are not installed.
    """
    peers: dict[str, str | None] = {}
    for text in given:
        name = text.partition("=")[0]
        if name == "nanogpt":
            peers |= parse_peers([text])
        elif text in PEERS:
            if missing := missing_packages(name):
                raise ConfigError(f"--peer {name} is not installed: pip install {' '.join(missing)}", field="peer")
            peers[name] = None
        else:
            raise ConfigError(f"there is no peer '{text}'{did_you_mean(name, PEERS)}: there are {', '.join(PEERS)}")
    return peers


def missing_packages(peer: str) -> list[str]:
    """What to install with pip for a peer."""
    return [pip for module, pip in PEERS[peer].packages.items() if importlib.util.find_spec(module) is None]


def peer_variants(
    workload: DecodeWorkload,
    peers: Mapping[str, str | None],
    folder: Path,
    runner_class: type[InProcessRunner],
    progress: ProgressFn = no_progress,
) -> list[VariantSpec]:
    """The variants of the peers. Writes their model files into `folder`; variants that cannot run have a reason."""
    specs = []
    for name, checkout in peers.items():
        peer = PEERS[name]
        missing = missing_packages(name)
        reason = f"not installed: pip install {' '.join(missing)}" if missing else None
        if reason is None and checkout is None:
            progress(f"{name}: writing its model files")
            try:
                with runner_class(PeerModelWriter, workload, folder) as files:
                    files.call("write", name)
            except BenchmarkError as failure:
                reason = str(failure)
        limits = {"max_batch_size": peer.max_batch_size, "max_new_tokens": peer.max_new_tokens, "reason": reason}
        arguments = (checkout or str(folder),)
        specs += [VariantSpec(name, p, p, peer.make_decoder, arguments, **limits) for p in peer.precisions]
    return specs


class PeerModelWriter:
    """Writes our model in the formats of the peers, in its own process, because it imports their packages."""

    def __init__(self, workload: DecodeWorkload, folder: Path) -> None:
        self._model, self._folder = workload.build_model(), folder

    def write(self, peer: str) -> None:
        """Write the files that `peer` loads."""
        if peer == "llamacpp":
            gguf_writer.write(self._model, None, self._folder / "f16.gguf", "f16")
            for precision in LLAMA_FILE_TYPES:
                quantize_gguf(self._folder / "f16.gguf", self._folder / f"{precision}.gguf", precision)
            return
        if not (self._folder / "model").exists():
            save(self._model, None, self._folder / "model")
        if peer == "ctranslate2":
            _convert_to_ctranslate2(self._folder / "model", self._folder / "ctranslate2", self._model.config.vocab_size)


def _convert_to_ctranslate2(folder: Path, converted: Path, vocab_size: int) -> None:
    """Convert a model folder for CTranslate2, whose tokens are strings: each is the decimal form of its id."""
    import transformers
    from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    numbers = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "0")

    class Converter(TransformersConverter):
        def load_tokenizer(self, *args: object, **kwargs: object) -> Any:
            return transformers.PreTrainedTokenizerFast(tokenizer_object=numbers, **special)

    transformers.utils.logging.disable_progress_bar()
    Converter(str(folder)).convert(str(converted))


def quantize_gguf(source: Path, target: Path, precision: str) -> None:
    """Quantize a float16 GGUF file with llama.cpp. Raises UserError if that fails."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    _silence_llama_log(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, LLAMA_FILE_TYPES[precision])
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.pointer(params)) != 0:
        raise UserError(f"llama.cpp cannot quantize to {precision}")


def _silence_llama_log(llama_cpp: Any) -> None:
    """Turn off its log on standard error."""
    llama_cpp.llama_log_set(_IGNORE_LOG, None)


_IGNORE_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
