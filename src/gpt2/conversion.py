"""Conversion: every format that is written, with its tolerance, and the check of the result against the original."""

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt2 import runners
from gpt2.errors import ConfigError, UserError, did_you_mean
from gpt2.files import RUN_FOLDER_FILES, expand_path, known_folder_kind, staging_folder
from gpt2.formats import ctranslate, exported, gguf_writer, llmc, nanogpt, onnx_graph
from gpt2.formats.parity import Parity, Runner, compare
from gpt2.formats.stored import model_from_state_dict
from gpt2.model import GPT, scaled_queries
from gpt2.runtime import DTYPE_NAMES
from gpt2.templates import ChatTemplate
from gpt2.tokenizer import Tokenizer
from gpt2.weights import HUB_ALLOW_PATTERNS, TOKENIZER_FILES, load, read_config, write_model_folder

_log = logging.getLogger("gpt2")

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Job:
    """What a conversion writes, and how."""

    model: GPT
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    dtype: str
    max_shard_size: int | str = "5GB"

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True)
class Target:
    """A format that is written.

    tolerances: for each dtype, the largest accepted difference of a logit, relative to the largest logit. The first
        dtype is the default if the format does not have the model's own.
    run:        the programs that run the result, for the check.
    files:      patterns of the files that such a folder may hold; () for a format of one file.
    file:       the usual name of the one file, whose suffix OUT must have; "" for a folder.
    scaled:     whether it has scale_attn_weights and scale_attn_by_inverse_layer_idx; else the queries are scaled.
    """

    name: str
    about: str
    tolerances: dict[str, float]
    write: Callable[[Job, Path], None]
    run: Callable[[Path], list[tuple[str, Runner]]]
    files: tuple[str, ...] = ()
    file: str = ""
    scaled: bool = False


def _write_hf(job: Job, out: Path) -> None:
    if not job.model.config.tie_word_embeddings:
        _log.warning("SGLang ties the head to the token embedding whatever config.json says: this model is not for it")
    write_model_folder(job.model, job.tokenizer, out, job.torch_dtype, job.template, job.max_shard_size)


def _write_gguf(job: Job, out: Path) -> None:
    precision = {"float32": "f32", "float16": "f16"}.get(job.dtype, job.dtype)
    gguf_writer.write(job.model, job.tokenizer, out, precision, job.template.source if job.template else None)


def _write_onnx(job: Job, out: Path) -> None:
    onnx_graph.write(job.model, out)
    if job.dtype == "int8":
        onnx_graph.quantize(out)
    _write_tokenizer(job, out)


def _write_ctranslate2(job: Job, out: Path) -> None:
    ctranslate.write(job.model, job.tokenizer, out, job.dtype)
    _write_tokenizer(job, out)


def _write_tokenizer(job: Job, out: Path) -> None:
    """The tokenizer, beside the model."""
    if job.tokenizer is not None:
        job.tokenizer.save(out)


_HALVES = {"float16": 1e-2, "bfloat16": 5e-2}
_FLOATS = {"float32": 1e-4, **_HALVES}

TARGETS = {
    target.name: target
    for target in (
        Target(
            "hf",
            "model folder of transformers, vLLM, mlx-lm and others",
            _FLOATS,
            _write_hf,
            runners.hf,
            (*HUB_ALLOW_PATTERNS, "README.md", "loss.png"),
            scaled=True,
        ),
        Target(
            "gguf",
            "llama.cpp and ollama: one file, tokenizer and chat template inside",
            {"float16": 1e-2, "float32": 1e-3, "q8_0": 5e-2, "q4_0": 3e-1},
            _write_gguf,
            runners.gguf,
            file="model.gguf",
        ),
        Target(
            "onnx",
            "ONNX Runtime: graphs with and without KV cache",
            {"float32": 1e-4, "int8": 2e-1},
            _write_onnx,
            runners.onnx,
            ("*.onnx", "*.onnx_data", "*.onnx.data", *TOKENIZER_FILES),
        ),
        Target(
            "llmc",
            "llm.c: gpt2_124M.bin and its like",
            {"float32": 1e-4, "bfloat16": 5e-2},
            lambda job, out: llmc.write(job.model, out, job.torch_dtype),
            runners.read_back,
            file="model.bin",
        ),
        Target(
            "nanogpt",
            "nanoGPT: ckpt.pt",
            _FLOATS,
            lambda job, out: nanogpt.write(job.model, out, job.torch_dtype),
            runners.read_back,
            file="ckpt.pt",
        ),
        Target(
            "ctranslate2",
            "CTranslate2: a folder",
            {"float32": 1e-4, **_HALVES, "int8": 2e-1},
            _write_ctranslate2,
            runners.ctranslate2,
            ("model.bin", "config.json", "vocabulary.*", *TOKENIZER_FILES),
        ),
        Target(
            "torch",
            "a torch.export program: one .pt2 file",
            _FLOATS,
            lambda job, out: exported.write(job.model, out, job.torch_dtype),
            runners.exported,
            file="model.pt2",
        ),
    )
}


def target_of(name: str) -> Target:
    """The format of this name. Raises UserError for an unknown name."""
    if name not in TARGETS:
        names = ", ".join(TARGETS)
        raise ConfigError(f"there is no format '{name}'{did_you_mean(name, TARGETS)}: there are {names}", field="to")
    return TARGETS[name]


def dtype_for(target: Target, dtype: str | None, model: GPT | None = None) -> str:
    """`dtype`, by default the model's own if the format has it. Raises ConfigError for one that it does not have."""
    if dtype is not None and dtype not in target.tolerances:
        names = ", ".join(target.tolerances)
        raise ConfigError(f"{target.name} has no dtype '{dtype}': there are {names}", field="dtype")
    own = DTYPE_NAMES[model.transformer.wte.weight.dtype] if model is not None else None
    return dtype or (own if own in target.tolerances else next(iter(target.tolerances)))


def check_output(target: Target, out: Path, source: Path) -> None:
    """Raise UserError for an `out` of the wrong kind, in a run folder, or that holds anything but a model."""
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the model itself: name another {'file' if target.file else 'folder'}")
    for folder in (out.resolve(), *out.resolve().parents):
        if known_folder_kind([name for name in RUN_FOLDER_FILES if (folder / name).exists()]):
            raise UserError(f"{out} is in the run folder {folder}, which training writes: name a folder elsewhere")
    if target.file:
        if out.is_dir():
            raise UserError(f"{out} is a folder, and {target.name} is one file: name {out / target.file}")
        if out.suffix != Path(target.file).suffix:
            raise UserError(f"{out} must have the suffix {Path(target.file).suffix}, as {target.name} files do")
    elif out.is_dir():
        names = [path.name for path in out.iterdir()]
        unknown = any(not any(Path(name).match(pattern) for pattern in target.files) for name in names)
        if unknown or (target.name == "hf" and names and not _is_gpt2_folder(out)):
            raise UserError(f"{out} is not empty and holds no exported model: name a new folder")


def check_replaceable(out: Path, model: GPT) -> None:
    """Raise UserError if `out` holds anything but these weights, as an earlier conversion of the model does."""
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not _holds_same_model(out, model):
        raise UserError(f"{out} holds another model: --overwrite replaces it")


def _holds_same_model(path: Path, model: GPT) -> bool:
    """Return whether the weights at `path` are those of `model`, in the coarser of the two dtypes."""
    try:
        found, _ = load(path, dtype=None)
    except UserError:
        return False
    new, old = model.state_dict(), found.state_dict()
    dtypes = {next(one.parameters()).dtype for one in (model, found)}
    if dtypes == {torch.float16, torch.bfloat16}:  # neither has the other's values
        return False
    dtype = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    same_shapes = {name: t.shape for name, t in new.items()} == {name: t.shape for name, t in old.items()}
    return same_shapes and all(torch.equal(new[name].to(dtype), old[name].to(dtype)) for name in new)


def _is_gpt2_folder(folder: Path) -> bool:
    """Return whether the folder's `config.json` describes a GPT-2."""
    try:
        return (folder / "config.json").is_file() and read_config(folder) is not None
    except UserError:
        return False


def convert(target: Target, job: Job, out: str | Path) -> Parity:
    """Write a model to `out`, if the result is equal to it within the format's tolerance; else nothing is left there.

    Raises UserError if the format does not support the model, the two differ by more than the tolerance, or `out`
    cannot be written.
    """
    out = expand_path(out)
    job = job if target.scaled else replace(job, model=without_scales(job.model))
    reference = copy.deepcopy(job.model).float() if job.model.lm_head.weight.dtype != torch.float32 else job.model
    try:
        with staging_folder(out.resolve()) as work:
            written = work / target.file if target.file else work
            target.write(job, written)
            tolerance = target.tolerances[job.dtype]
            found = [compare(reference, job.tokenizer, run, name, tolerance) for name, run in target.run(written)]
            parity = max(found, key=lambda each: each.difference / each.scale)
            if not parity.passed:
                raise UserError(f"the {target.name} model is not equal to the original and was not kept: {parity}")
            _move(written, out, target)
    except OSError as error:
        raise UserError(f"cannot write the model {'' if target.file else 'folder '}{out}: {error}") from error
    return parity


def _move(written: Path, out: Path, target: Target) -> None:
    """Move the result into place, `config.json` last, and remove the other files of a folder of the format."""
    mode = 0o666 & ~_umask()
    if target.file:
        written.chmod(mode)
        written.replace(out)
        return
    out.mkdir(exist_ok=True)
    names = sorted((path.name for path in written.iterdir()), key=lambda name: (name == "config.json", name))
    for name in names:
        (written / name).chmod(mode)
        (written / name).replace(out / name)
    for path in out.iterdir():
        if path.name not in names:
            path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def without_scales(model: GPT) -> GPT:
    """A model of the same function with GPT-2's own attention scale: another scale is multiplied into the queries."""
    c = model.config
    if c.scale_attn_weights and not c.scale_attn_by_inverse_layer_idx:
        return model
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for i in range(c.n_layer):
        for kind in ("weight", "bias"):
            name = f"transformer.h.{i}.attn.c_attn.{kind}"
            tensors[name] = scaled_queries(tensors[name], c.query_factor(i))
    plain = replace(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return model_from_state_dict(plain, tensors).train(model.training)
