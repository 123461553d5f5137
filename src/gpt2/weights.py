"""Models in and out: every known checkpoint format in, the model folder of `transformers` out.

A model folder holds `config.json`, `model.safetensors` (or shards with an index), tokenizer files and
`generation_config.json`. There the matrices of the blocks are kept (in, out), a habit of OpenAI's TensorFlow code
("Conv1D"); in memory ours are `nn.Linear`'s (out, in). The other formats are in `gpt2.formats`.
"""

import logging
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError

from gpt2.errors import UserError
from gpt2.files import path_of, work_folder
from gpt2.formats import gguf_file, huggingface
from gpt2.formats.config import hf_config, text_ends
from gpt2.formats.names import TRANSPOSED
from gpt2.formats.stored import build, model_of, read_json, write_json
from gpt2.formats.table import format_of, recognize
from gpt2.lora import merge_into, read_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import pick_device
from gpt2.templates import Template, save_template
from gpt2.tokenizer import Tokenizer, ending_with, fitted, get_tokenizer

__all__ = ["HUB_NAMES", "TRANSPOSED", "find_model", "hf_config", "load", "model_of", "read_config", "save"]

log = logging.getLogger("gpt2")

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
WORD_FILES = [  # how text becomes tokens
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
]
HUB_FILES = [  # the repositories also hold TensorFlow, Flax, ONNX and pickled copies, which nobody here needs
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    *WORD_FILES,
]
OTHER_HUB_FILES = [  # where there are no safetensors: one after another, until there are weights
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"],
    ["flax_model.msgpack"],
]
GPT2_VOCABULARY = 50257
SHARD_BYTES = huggingface.SHARD_BYTES


def load(
    ref: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    adapter: str | Path | None = None,
) -> tuple[GPT, Tokenizer | None]:
    """Load a model, in evaluation mode, and its tokenizer.

    ref:     a model folder, a run folder, a file or folder of another known format (docs/formats.md), or a hub name:
             "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "owner/name".
    device:  a name that `pick_device` knows, so one that this machine lacks becomes the CPU, with a warning.
    dtype:   what the weights become; None keeps that of the file's token embedding.
    adapter: the folder of a LoRA adapter, or of the run that made it, merged into the weights in float32.

    The tokenizer is the model's own; without one it is GPT-2's for a vocabulary of 50,257, else None.
    Raises UserError when nothing is found under `ref`, a file is broken or does not fit its config, or the adapter is
    for another model.
    """
    if isinstance(device, str) or device.type == "cuda":
        device = pick_device(str(device))
    added = None if adapter is None else read_adapter(adapter)  # a wrong name is known before gigabytes are read
    path = find_model(ref)
    config, stored = format_of(path).read(path)
    model = build(config, stored, dtype if added is None or dtype is None else torch.float32, path)
    if added is not None:
        merge_into(model, added)
        model = model.to(dtype or model.transformer.wte.weight.dtype)
    return model.to(device).eval(), _tokenizer_of(path, config)


def save(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    template: Template | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write `model` and `tokenizer` as a model folder that `transformers.GPT2LMHeadModel.from_pretrained` reads.

    dtype:          what the weights become on disk; None keeps theirs.
    template:       how the model was taught to write a conversation, if it was.
    max_shard_size: of a weight file, in bytes or as "5GB", which is the default.

    The files are written beside `folder` first and moved in when they are whole.
    Raises UserError when the folder cannot be written.
    """
    folder = path_of(folder)
    try:
        with work_folder(folder.resolve()) as written:
            write_model_folder(model, tokenizer, written, dtype, template, max_shard_size or SHARD_BYTES)
            _move_in(written, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model folder {folder}: {error}") from error
    return folder


def write_model_folder(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: Path,
    dtype: torch.dtype | None = None,
    template: Template | None = None,
    max_shard_size: int | str = SHARD_BYTES,
) -> None:
    """The files of `save`, into an empty folder."""
    dtype = dtype or model.transformer.wte.weight.dtype
    huggingface.write_weights(model, folder, dtype, max_shard_size)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **text_ends(tokenizer)})
    if tokenizer is not None:
        tokenizer.save(folder)
    if template is not None:
        save_template(template, folder)
    write_json(folder / "config.json", hf_config(model.config, tokenizer, dtype))


def find_model(ref: str | Path) -> Path:
    """The file or folder `ref` stands for; a hub name is fetched into Hugging Face's cache if it is not there."""
    path = path_of(ref)
    known = recognize(path)
    if known is not None:
        return known[1]
    if path.exists():
        what = "model folder: it has no config.json (nor model/config.json, as a run has)"
        raise UserError(f"{path} is no {what if path.is_dir() else 'model of a format that gpt2 convert --list names'}")
    name = str(ref)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {path}")
    return _fetch(HUB_NAMES.get(name, name))


def read_config(path: Path) -> GPTConfig:
    """The GPTConfig of what `find_model` found. Raises UserError for what is not a GPT-2."""
    return format_of(path).read_config(path)


def _fetch(repository: str) -> Path:
    where = f"'{repository}' is no folder here and could not be fetched from the hub"
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES))
        for patterns in OTHER_HUB_FILES:
            if not any(folder.glob("model*.safetensors*")) and not any(folder.glob("pytorch_model*")):
                huggingface_hub.snapshot_download(repository, allow_patterns=patterns)
    except RepositoryNotFoundError as error:
        raise UserError(f"{where}: there is no such repository, or it is private") from error
    except HFValidationError as error:
        raise UserError(f"'{repository}' is neither a folder nor a name the hub could have") from error
    except OSError as error:  # offline, timed out, refused, not in the cache
        reason = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "no connection"
        raise UserError(
            f"{where} ({reason}): download config.json, model.safetensors, vocab.json and merges.txt from "
            f"{huggingface_hub.constants.ENDPOINT}/{repository} into a folder and give that folder instead"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: it has no config.json")
    return folder


def _tokenizer_of(path: Path, config: GPTConfig) -> Tokenizer | None:
    tokenizer = format_of(path).read_tokenizer(path)
    if tokenizer is None:
        return get_tokenizer("gpt2") if config.vocab_size == GPT2_VOCABULARY else None
    try:
        fit = fitted(tokenizer, config.vocab_size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if fit is not tokenizer:
        names = ", ".join(name for name, i in tokenizer.special_tokens.items() if i >= config.vocab_size)
        log.warning("%s: the model has no embedding for %s of its tokenizer, left out", path, names)
    end = _end_of_text(path)
    if end is None or end == fit.end_of_text or end not in fit.special_tokens.values():
        return fit
    return ending_with(fit, end)


def _end_of_text(path: Path) -> int | None:
    """The token that ends a text by generation_config.json, config.json or the GGUF file; the first of several."""
    if path.is_file():
        return gguf_file.end_of_text(path) if path.suffix == ".gguf" else None
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            end = read_json(path / name).get("eos_token_id")
            end = end[0] if isinstance(end, list) and end else end
            if type(end) is int:
                return end
    return None


def _move_in(written: Path, folder: Path) -> None:
    """Move whole files into place, config.json last, and take away an older model's files that no longer belong."""
    folder.mkdir(exist_ok=True)
    names = sorted((file.name for file in written.iterdir()), key=lambda name: (name == "config.json", name))
    mode = (written / "config.json").stat().st_mode  # safetensors lets nobody else read what it writes
    for name in names:
        (written / name).chmod(mode)
        (written / name).replace(folder / name)
    for stale in [*folder.glob("model*.safetensors*"), *(folder / name for name in WORD_FILES)]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
