"""Model folders: load and save weights in the Hugging Face format.

A model folder has `config.json`, `model.safetensors` (or shards with an index), tokenizer files and
`generation_config.json`, as `transformers` writes and reads them. Its attention and MLP matrices are (in, out), as in
OpenAI's TensorFlow code ("Conv1D"); in memory they are `nn.Linear`'s (out, in).
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt2.checks import check_path
from gpt2.end_tokens import format_eos_token_id, read_end_tokens
from gpt2.errors import UserError
from gpt2.files import check_inside_folder, expand_path, similar_model_folder, staging_folder
from gpt2.lora import merge_adapter, read_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import DTYPE_NAMES, parse_dtype, pick_device
from gpt2.templates import ChatTemplate, save_template
from gpt2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer

_log = logging.getLogger("gpt2")

HUB_ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
TOKENIZER_FILES = [  # the tokenizer and the chat template
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
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
GPT2_VOCAB_SIZE = 50257
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
LEGACY_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks in old files
MAX_CONFIG_NUMBER = 1e30  # JSON has integers that no float holds
MAX_SHARD_BYTES = 5 * 10**9


def load(
    ref: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = torch.float32,
    adapter: str | Path | None = None,
) -> tuple[GPT, Tokenizer | None]:
    """Load a model, in evaluation mode, and its tokenizer.

    ref:     a model folder, a run folder, or a hub name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "owner/name".
    device:  a device, or a name for `pick_device`, which raises ConfigError for a missing device.
    dtype:   the dtype of the weights, or its name: "bfloat16"; None keeps that of the file.
    adapter: the folder of a LoRA adapter, or of the run that made it, merged into the weights in float32.

    The tokenizer is the folder's own; without tokenizer files it is GPT-2's for a vocabulary of 50,257, else None.
    Raises UserError when nothing is found under `ref`, a file is broken or does not fit its config, or the adapter is
    for another model.
    """
    check_path("ref", ref)
    dtype = None if dtype is None else parse_dtype(dtype)
    if not isinstance(device, torch.device) or device.type == "cuda":
        device = pick_device(str(device))
    added = None if adapter is None else read_adapter(adapter)  # so a wrong name fails before gigabytes are read
    folder = find_model_folder(ref)
    config = read_config(folder)
    tensors = _read_tensors(folder, dtype if added is None or dtype is None else torch.float32)
    if config.tie_word_embeddings and _has_untied_head(tensors):
        _log.warning("%s: lm_head differs from the token embedding, so the two are not tied", folder)
        config = replace(config, tie_word_embeddings=False)
    _check_shapes(
        _size_defining_shapes(config), tensors, folder
    )  # or a mistyped config would build a model of any size
    expected = {name: tuple(p.shape) for name, p in _meta_model(config).named_parameters()}
    _check_shapes(expected, tensors, folder)
    for name in tensors:
        if name not in expected and name != "lm_head.weight":
            raise UserError(f"{folder}: the weights hold {name}, which config.json does not call for")
    model = model_from_state_dict(config, tensors)
    if added is not None:
        merge_adapter(model, added)
        model = model.to(dtype or model.transformer.wte.weight.dtype)
    return model.to(device).eval(), load_model_tokenizer(folder, config)


def model_from_state_dict(config: GPTConfig, state_dict: dict[str, Tensor]) -> GPT:
    """A model whose parameters are these tensors, by name. Other tensors are ignored.

    Nothing is copied, and no random numbers are drawn.
    """
    model = _meta_model(config)
    model.load_state_dict(state_dict, strict=False, assign=True)
    model.tie_weights()
    return model


def _meta_model(config: GPTConfig) -> GPT:
    with torch.device("meta"), _SkipInit():
        return GPT(config)


class _SkipInit(TorchFunctionMode):
    """Skips parameter initialization, for which torch would import its compiler on the meta device (one second)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def save(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    template: ChatTemplate | None = None,
) -> Path:
    """Write `model` and `tokenizer` as a model folder that `transformers.GPT2LMHeadModel.from_pretrained` reads.

    dtype:    the dtype of the weights on disk, or its name; None keeps theirs.
    template: the chat template that the model was fine-tuned with, if any.

    The files are written beside `folder` first and moved when complete.
    Raises UserError if the folder cannot be written.
    """
    check_path("folder", folder)
    folder = expand_path(folder)
    dtype = model.transformer.wte.weight.dtype if dtype is None else parse_dtype(dtype)
    try:
        with staging_folder(folder.resolve()) as written:
            _write_tensors(model, written, dtype)
            _write_json(written / "generation_config.json", _generation_config(tokenizer, template))
            if tokenizer is not None:
                tokenizer.save(written)
            if template is not None:
                save_template(template, written)
            _write_json(written / "config.json", hf_config(model.config, tokenizer, dtype))
            _replace_files(written, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model folder {folder}: {error}") from error
    return folder


def find_model_folder(ref: str | Path) -> Path:
    """The model folder that `ref` names; a hub name is downloaded to the Hugging Face cache if it is not there."""
    path = expand_path(ref)
    for folder in (path, path / "model"):  # a model folder, a run folder
        if (folder / "config.json").is_file():
            return folder
    if path.exists():
        raise UserError(f"{path} is no model folder: it has no config.json (nor model/config.json, as a run has)")
    name = str(ref)
    similar = None if name in HUB_ALIASES else similar_model_folder(name)
    if similar is not None:
        raise UserError(f"there is no model folder {path} (did you mean '{similar}'?)")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {path}")
    return _download_from_hub(HUB_ALIASES.get(name, name))


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a folder's `config.json`. Raises UserError if it is not a GPT-2."""
    path = folder / "config.json"
    check_inside_folder(path, folder)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type", "gpt2") != "gpt2":
        raise UserError(f"{path} does not describe a GPT-2 model")
    unsupported = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for key, usual in unsupported.items():
        if raw.get(key, usual) != usual:
            raise UserError(f"{path}: {key}={raw[key]} is not supported")
    sizes = {
        "vocab_size": raw.get("vocab_size"),
        "n_positions": raw.get("n_positions", raw.get("n_ctx")),
        **{name: raw.get(name) for name in ("n_layer", "n_head", "n_embd")},
        **({"n_inner": raw["n_inner"]} if raw.get("n_inner") is not None else {}),
    }
    for key, value in sizes.items():
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"{path}: {key} is missing or no integer that a size can be")
    kinds: dict[str, type | tuple[type, ...]] = {
        "activation_function": str,
        "layer_norm_epsilon": (int, float),
        "tie_word_embeddings": bool,
        "resid_pdrop": (int, float),
        "embd_pdrop": (int, float),
        "attn_pdrop": (int, float),
    }
    others = {key: raw[key] for key in kinds if raw.get(key) is not None}
    for key, value in others.items():
        if not isinstance(value, kinds[key]) or (not isinstance(value, str) and not abs(value) < MAX_CONFIG_NUMBER):
            raise UserError(f"{path}: {key} cannot be {value!r:.100}")
    context, dropout = sizes.pop("n_positions"), others.pop("resid_pdrop", 0.0)
    for name in ("embd", "attn"):  # set in the config only if they differ
        rate = others.pop(f"{name}_pdrop", dropout)
        others |= {} if rate == dropout else {f"{name}_dropout": rate}
    try:
        return GPTConfig(block_size=context, dropout=dropout, **sizes, **others)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def hf_config(config: GPTConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json` for `transformers`, with `n_ctx` for llama.cpp's converter."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": config.activation_function,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        "embd_pdrop": config.dropout if config.embd_dropout is None else config.embd_dropout,
        "attn_pdrop": config.dropout if config.attn_dropout is None else config.attn_dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],  # its name in transformers before 5
        **_bos_eos_token_ids(tokenizer),
    }


def _bos_eos_token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """For config.json, where some programs read numbers only. All end tokens are in generation_config.json."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    return {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_tokens[0]}


def _generation_config(tokenizer: Tokenizer | None, template: ChatTemplate | None) -> dict[str, Any]:
    """`generation_config.json`: `eos_token_id` is every token that ends a text, or an answer of the template."""
    ids: dict[str, Any] = {**_bos_eos_token_ids(tokenizer)}
    if tokenizer is None:
        return {"_from_model_config": True, **ids}
    ends = dict.fromkeys((*tokenizer.end_tokens, *(template.end_tokens(tokenizer) if template else ())))
    return ids | {"eos_token_id": format_eos_token_id(tuple(ends))}


def _download_from_hub(repository: str) -> Path:
    where = f"'{repository}' is no folder here and could not be fetched from the hub"
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_ALLOW_PATTERNS))
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


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of the index if it is sharded."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / Path(name).name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{index} is broken: {error!r}") from error
        for file in files:
            if not file.is_file():
                raise UserError(f"{folder} is not complete: {file.name} is named in {index.name} and missing")
        return files
    hint = "; pickled weights are not loaded" if list(folder.glob("*.bin")) else ""
    raise UserError(f"{folder} has no model.safetensors{hint}")


def _read_tensors(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All weights with the names and layouts of `GPT`, copied from the files."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        check_inside_folder(path, folder)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if key.endswith(LEGACY_BUFFERS):
                        continue
                    name = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
                    tensor = file.get_tensor(key)
                    if tensor.dtype not in DTYPE_NAMES:
                        raise UserError(f"{path}: {key} is {tensor.dtype}, which is not read here")
                    if name.endswith(CONV1D_WEIGHTS) and tensor.dim() == 2:
                        tensor = tensor.t()
                    tensors[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no whole safetensors file: {error}") from error
    return tensors


def _has_untied_head(tensors: dict[str, Tensor]) -> bool:
    """Return whether there is an output head that differs from the token embedding."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight")
    return head is not None and embedding is not None and not torch.equal(head, embedding)


def _size_defining_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes that determine all sizes of a config."""
    return {
        "transformer.wte.weight": (config.vocab_size, config.n_embd),
        "transformer.wpe.weight": (config.block_size, config.n_embd),
        f"transformer.h.{config.n_layer - 1}.mlp.c_fc.weight": (config.n_inner or 4 * config.n_embd, config.n_embd),
    }


def _check_shapes(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], folder: Path) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{folder}: the weights lack {name}, which config.json calls for")
        if tensors[name].shape != shape:
            raise UserError(f"{folder}: {name} is {tuple(tensors[name].shape)} in the weights, {shape} by config.json")


def load_model_tokenizer(folder: Path, config: GPTConfig) -> Tokenizer | None:
    """The tokenizer of a model folder: its own, GPT-2's for a vocabulary of 50,257, else None."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None and config.vocab_size == GPT2_VOCAB_SIZE:
        tokenizer = get_tokenizer("gpt2")
        tokenizer.end_tokens = read_end_tokens(folder, tokenizer.vocab_size, tokenizer.end_of_text)
        return tokenizer
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    return tokenizer


def _write_tensors(model: GPT, folder: Path, dtype: torch.dtype) -> None:
    tensors = {
        name: (p.detach().t() if name.endswith(CONV1D_WEIGHTS) else p.detach()).to("cpu", dtype).contiguous()
        for name, p in model.named_parameters()
    }
    plan = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=MAX_SHARD_BYTES)
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
