"""Load models of every known checkpoint format, and save model folders in the Hugging Face format.

A model folder has `config.json`, `model.safetensors` (or shards with an index), tokenizer files and
`generation_config.json`, as `transformers` writes and reads them. Its attention and MLP matrices are (in, out), as in
OpenAI's TensorFlow code ("Conv1D"); in memory they are `nn.Linear`'s (out, in). The other formats are in
`gpt2.formats`.
"""

import logging
import os
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError

from gpt2.checks import check_path
from gpt2.end_tokens import read_end_tokens
from gpt2.errors import UnsupportedTokenizer, UserError
from gpt2.files import expand_path, home, similar_model_folder, staging_folder
from gpt2.formats import huggingface
from gpt2.formats.config import generation_config, hf_config
from gpt2.formats.names import CONV1D_WEIGHTS
from gpt2.formats.stored import build, model_from_state_dict, write_json
from gpt2.formats.table import format_of, recognize
from gpt2.formats.tokenizer_files import fit_to_vocab_size
from gpt2.lora import read_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.peft_merge import merge_adapter
from gpt2.runtime import parse_dtype, pick_device
from gpt2.templates import ChatTemplate, save_template
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer

__all__ = [
    "CONV1D_WEIGHTS",
    "HUB_ALIASES",
    "find_model_folder",
    "hf_config",
    "load",
    "load_model_tokenizer",
    "model_from_state_dict",
    "read_config",
    "save",
]

_log = logging.getLogger("gpt2")

HUB_ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
TOKENIZER_FILES = [  # the tokenizer and the chat template
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
    "chat_template.jinja",
]
HUB_ALLOW_PATTERNS = [  # without the TensorFlow, Flax, ONNX and pickled copies
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    *TOKENIZER_FILES,
]
FALLBACK_ALLOW_PATTERNS = [  # without safetensors: tried in this order
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"],
    ["flax_model.msgpack"],
]
GPT2_VOCAB_SIZE = 50257
MAX_SHARD_BYTES = huggingface.MAX_SHARD_BYTES


def load(
    ref: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = torch.float32,
    adapter: str | Path | None = None,
) -> tuple[GPT, Tokenizer | None]:
    """Load a model, in evaluation mode, and its tokenizer.

    ref:     a model folder, a run folder, a file or folder of another known format (docs/formats.md), or a hub name:
             "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "owner/name".
    device:  a device, or a name for `pick_device`, which raises ConfigError for a missing device.
    dtype:   the dtype of the weights, or its name: "bfloat16"; None keeps that of the token embedding in the file.
    adapter: the folder of a LoRA adapter, or of the run that made it, merged into the weights in float32.

    The tokenizer is the model's own, or that in the folder of the adapter; without one it is GPT-2's for a vocabulary
    of 50,257, else None.
    Raises UserError when nothing is found under `ref`, a file is broken or does not fit its config, or the adapter is
    for another model.
    """
    check_path("ref", ref)
    dtype = None if dtype is None else parse_dtype(dtype)
    if not isinstance(device, torch.device) or device.type == "cuda":
        device = pick_device(str(device))
    added = None if adapter is None else read_adapter(adapter)  # so a wrong name fails before gigabytes are read
    path = find_model_folder(ref)
    config, stored = format_of(path).read(path)
    model = build(config, stored, dtype if added is None or dtype is None else torch.float32, path)
    if added is not None:
        merge_adapter(model, added)
        model = model.to(dtype or model.transformer.wte.weight.dtype)
    tokenizer = load_model_tokenizer(path, model.config, None if added is None else added.folder)
    return model.to(device).eval(), tokenizer


def save(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    template: ChatTemplate | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write `model` and `tokenizer` as a model folder that `transformers.GPT2LMHeadModel.from_pretrained` reads.

    dtype:          the dtype of the weights on disk, or its name; None keeps theirs.
    template:       the chat template that the model was fine-tuned with, if any.
    max_shard_size: of a weight file, in bytes or as "5GB", which is the default.

    The files are written beside `folder` first and moved when complete.
    Raises UserError if the folder cannot be written.
    """
    check_path("folder", folder)
    folder = expand_path(folder)
    dtype = None if dtype is None else parse_dtype(dtype)
    try:
        with staging_folder(folder.resolve()) as written:
            write_model_folder(model, tokenizer, written, dtype, template, max_shard_size or MAX_SHARD_BYTES)
            _replace_files(written, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model folder {folder}: {error}") from error
    return folder


def write_model_folder(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: Path,
    dtype: torch.dtype | None = None,
    template: ChatTemplate | None = None,
    max_shard_size: int | str = MAX_SHARD_BYTES,
) -> None:
    """The files of `save`, into an empty folder."""
    dtype = dtype or model.transformer.wte.weight.dtype
    huggingface.write_weights(model, folder, dtype, max_shard_size)
    write_json(folder / "generation_config.json", generation_config(tokenizer, template))
    if tokenizer is not None:
        tokenizer.save(folder)
    if template is not None:
        save_template(template, folder)
    write_json(folder / "config.json", hf_config(model.config, tokenizer, dtype))


def find_model_folder(ref: str | Path) -> Path:
    """The model folder that `ref` names, or the file of a format that has one file for a model.

    A hub name is downloaded to the Hugging Face cache if it is not there.
    """
    path = expand_path(ref)
    known = recognize(path)
    if known is not None:
        return known[1]
    if path.exists():
        what = "model folder: it has no config.json (nor model/config.json, as a run has)"
        error = f"{path} is no {what if path.is_dir() else 'model of a format that gpt2 convert --list names'}"
        if not path.is_dir() or str(ref) not in HUB_ALIASES:
            raise UserError(error)
        try:  # a folder without a model, such as the clone of a repository, does not hide the hub's model
            return _download_from_hub(HUB_ALIASES[str(ref)])
        except UserError as hub_error:
            raise UserError(f"{error}; {hub_error}") from None
    name = str(ref)
    similar = None if name in HUB_ALIASES else similar_model_folder(name)
    if similar is not None:
        raise UserError(f"there is no model folder {path} (did you mean '{similar}'?)")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {path}")
    return _download_from_hub(HUB_ALIASES.get(name, name))


def read_config(path: Path) -> GPTConfig:
    """The GPTConfig of a path from `find_model_folder`. Raises UserError if it is not a GPT-2."""
    return format_of(path).read_config(path)


def read_template(path: Path) -> ChatTemplate | None:
    """The chat template that comes with a model, else None. path: from `find_model_folder`."""
    return format_of(path).read_template(path)


def _download_from_hub(repository: str) -> Path:
    if not (os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE")):
        home("HF_HOME")  # for its error: the client would make a folder called "~"
    where = f"'{repository}' is no folder here and could not be fetched from the hub"
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_ALLOW_PATTERNS))
        for patterns in FALLBACK_ALLOW_PATTERNS:
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


def load_model_tokenizer(path: Path, config: GPTConfig, adapter: Path | None = None) -> Tokenizer | None:
    """The tokenizer of a model: its adapter's, its own, GPT-2's for a vocabulary of 50,257, or None.

    None, with a warning, for one that is not supported. path: from `find_model_folder`.
    """
    try:
        tokenizer = read_model_tokenizer(path, config, adapter)
    except UnsupportedTokenizer as error:
        _log.warning("the model is loaded without its tokenizer: %s", error)
        return None
    if tokenizer is None and config.vocab_size == GPT2_VOCAB_SIZE:
        tokenizer = get_tokenizer("gpt2")
        if path.is_dir():
            tokenizer.end_tokens = read_end_tokens(path, tokenizer.vocab_size, tokenizer.end_tokens)
    return tokenizer


def read_model_tokenizer(path: Path, config: GPTConfig, adapter: Path | None = None) -> Tokenizer | None:
    """The tokenizer of an adapter or a model, without the added tokens for which it has no embedding, else None.

    Raises UserError for broken files, and UnsupportedTokenizer for a tokenizer that is not supported, or that has
    ordinary tokens for which the model has no embedding. path: from `find_model_folder`.
    """
    tokenizer = None if adapter is None else load_tokenizer(adapter)
    if tokenizer is None:
        tokenizer = format_of(path).read_tokenizer(path)
    if tokenizer is None:
        return None
    try:
        fit = fit_to_vocab_size(tokenizer, config.vocab_size)
    except ValueError as error:
        raise UnsupportedTokenizer(f"{path}: {error}") from error
    if fit is not tokenizer:
        names = ", ".join(name for name, i in tokenizer.special_tokens.items() if i >= config.vocab_size)
        _log.warning("%s: the model has no embedding for %s of its tokenizer, left out", path, names)
    return fit


def _replace_files(staging: Path, folder: Path) -> None:
    """Move complete files into place, config.json last, and remove files of an older model."""
    folder.mkdir(exist_ok=True)
    names = sorted((file.name for file in staging.iterdir()), key=lambda name: (name == "config.json", name))
    mode = (staging / "config.json").stat().st_mode  # safetensors makes its files private
    for name in names:
        (staging / name).chmod(mode)
        (staging / name).replace(folder / name)
    for stale in [*folder.glob("model*.safetensors*"), *(folder / name for name in TOKENIZER_FILES)]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
