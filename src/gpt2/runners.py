"""Converted models, run by the program that they are for where it is installed, else read back by this package."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gpt2.formats import ctranslate, onnx_graph
from gpt2.formats.parity import Runner
from gpt2.weights import load

Programs = list[tuple[str, Runner]]  # what can run a model, by name

MAX_TOP_LOGPROBS = 1000  # per position, in llama.cpp


def read_back(path: Path) -> Programs:
    """The model as this package reads it, in float32."""
    model = load(path)[0]

    def run(ids: list[int], start: int) -> Tensor:
        return model(torch.tensor([ids]))[0, start:]

    return [("gpt2 (read back)", run)]


def hf(folder: Path) -> Programs:
    """transformers."""
    if not _installed("transformers"):
        return read_back(folder)
    from transformers import GPT2LMHeadModel  # pyright: ignore[reportMissingImports]
    from transformers.utils import logging as their_logging  # pyright: ignore[reportMissingImports]

    their_logging.disable_progress_bar()
    model = cast(Any, GPT2LMHeadModel.from_pretrained(folder, dtype="auto")).eval()

    def run(ids: list[int], start: int) -> Tensor:
        return model(torch.tensor([ids])).logits[0, start:]

    return [("transformers", run)]


def gguf(path: Path) -> Programs:
    """llama.cpp, by xllamacpp, which decodes greedily and returns the log-probabilities of the likeliest tokens.

    Positions after the first token that differs from the original are not compared.
    """
    model, tokenizer = load(path)
    if tokenizer is None or not _installed("xllamacpp"):  # without a vocabulary its server aborts the process
        return read_back(path)
    import xllamacpp  # pyright: ignore[reportMissingImports]

    config = model.config
    del model
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(path), config.block_size, 1, 0
    params.warmup, params.fit_params, params.verbosity = False, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    num_logprobs = min(config.vocab_size, MAX_TOP_LOGPROBS)

    def run(ids: list[int], start: int) -> Tensor:
        logits = torch.full((len(ids) - start, config.vocab_size), torch.nan)
        settings = {"n_predict": len(logits), "n_probs": num_logprobs, "temperature": 0.0}
        (choice,) = server.handle_completions({"prompt": ids[: start + 1], **settings})["choices"]
        for row, token in enumerate(choice["logprobs"]["content"][: len(logits)]):
            for each in token["top_logprobs"]:
                logits[row, each["id"]] = each["logprob"]
            if ids[start + 1 + row : start + 2 + row] != [token["id"]]:
                break  # from here on it continues another text
        return logits

    return [("llama.cpp", run)]


def onnx(folder: Path) -> Programs:
    """ONNX Runtime, or the reference evaluator of the onnx package, with each of the two graphs.

    The one with a cache is given the first half of the tokens, and then the rest.
    """
    whole, cached, program = _onnx_sessions(folder)
    names = [each for each in cached.inputs if each != "input_ids"]

    def run(ids: list[int], start: int) -> Tensor:
        return torch.from_numpy(whole.run({"input_ids": np.array([ids], np.int64)})[0][0, start:])

    def run_with_cache(ids: list[int], start: int) -> Tensor:
        tokens, half = np.array([ids], np.int64), len(ids) // 2
        past = {name: np.zeros((1, cached.heads, 0, cached.size), np.float32) for name in names}
        parts = []
        for part in (tokens[:, :half], tokens[:, half:]):
            if part.shape[1]:
                logits, *present = cached.run({"input_ids": part, **past})
                past = dict(zip(names, present, strict=True))
                parts.append(logits[0])
        return torch.from_numpy(np.concatenate(parts)[start:])

    return [(program, run), (f"{program} with a KV cache", run_with_cache)]


class _Session:
    def __init__(self, run: Callable[[dict[str, np.ndarray]], list[np.ndarray]], proto: Any) -> None:
        self.run = run
        self.inputs = [each.name for each in proto.graph.input]
        shape = [d.dim_value for d in proto.graph.input[-1].type.tensor_type.shape.dim]
        self.heads, self.size = (shape[1], shape[3]) if len(shape) == 4 else (0, 0)


def _onnx_sessions(folder: Path) -> tuple[_Session, _Session, str]:
    package = onnx_graph.package("checking ONNX")
    sessions, program = [], "ONNX Runtime" if _installed("onnxruntime") else "the reference evaluator of onnx"
    for name in onnx_graph.FILES:
        proto = package.load(folder / name, load_external_data=False)
        if _installed("onnxruntime"):
            import onnxruntime  # pyright: ignore[reportMissingImports]

            session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        else:
            from onnx.reference import ReferenceEvaluator  # pyright: ignore[reportMissingImports]

            session = ReferenceEvaluator(str(folder / name))
        sessions.append(_Session(partial(cast(Any, session).run, None), proto))
    return sessions[0], sessions[1], program


def ctranslate2(folder: Path) -> Programs:
    """CTranslate2."""
    package = ctranslate.package("checking a model for CTranslate2")
    generator = package.Generator(str(folder), device="cpu")

    def run(ids: list[int], start: int) -> Tensor:
        logits = generator.forward_batch([ids], return_log_probs=False)
        array = (
            np.array(logits)
            if logits.dtype == package.DataType.float32
            else np.array(logits.to(package.DataType.float32))
        )
        return torch.from_numpy(array)[0, start:].clone()

    return [("CTranslate2", run)]


def exported(path: Path) -> Programs:
    """torch.export."""
    program = torch.export.load(path).module()

    def run(ids: list[int], start: int) -> Tensor:
        return program(torch.tensor([ids]))[0, start:]

    return [("torch.export", run)]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
