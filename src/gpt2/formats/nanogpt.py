"""nanoGPT's `ckpt.pt` and build-nanogpt's `model_*.pt`: pickles with a state dict and the shape of the model.

nanoGPT trains with the exact GELU, build-nanogpt ("Let's reproduce GPT-2") with its tanh approximation. Both pad the
vocabulary to 50,304. Characters, as nanoGPT's `shakespeare_char` has them, are in a `meta.pkl` beside the checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt2.characters import read_meta_pkl
from gpt2.errors import ModelFilesError, UserError
from gpt2.files import check_inside_folder
from gpt2.formats.names import by_our_names, with_zero_biases
from gpt2.formats.pickled import Settings, read_pickle, stored_tensors
from gpt2.formats.stored import HEAD, WTE, Weights, first_rows, sizes_of
from gpt2.model import GPT, GPTConfig
from gpt2.terminal import shorten
from gpt2.tokenizer import Tokenizer, load_tokenizer

GPT2_VOCAB_SIZE, PADDED_VOCABULARY = 50257, 50304
_SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
_OURS = "gpt2_config"  # what nanoGPT has no setting for, in checkpoints that this program wrote


def find(path: Path) -> Path | None:
    """The checkpoint that `path` is, or that is in the folder `path`."""
    if path.suffix in (".pt", ".pth") and path.is_file():
        return path
    if not (path / "ckpt.pt").is_file():
        return None
    check_inside_folder(path / "ckpt.pt", path)
    return path / "ckpt.pt"


def read(path: Path) -> tuple[GPTConfig, Weights]:
    """Config and weights. Raises ModelFilesError for what neither program wrote."""
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, Mapping) or "model" not in checkpoint:
        raise ModelFilesError(f"{path} is no checkpoint of nanoGPT: it has no 'model'")
    config = _config(checkpoint, path)
    weights = with_zero_biases(by_our_names(stored_tensors(checkpoint["model"], path), path, conv1d=False))
    for name in (WTE, HEAD):
        if name in weights:
            weights[name] = first_rows(weights[name], config.vocab_size)
    return config, weights


def _config(checkpoint: Mapping[str, Any], path: Path) -> GPTConfig:
    args, own = checkpoint.get("model_args"), checkpoint.get(_OURS)
    activation = "gelu"
    if args is None and isinstance(checkpoint.get("config"), Settings):
        args, activation = vars(checkpoint["config"]), "gelu_new"  # build-nanogpt
    if not isinstance(args, Mapping):
        raise ModelFilesError(f"{path} is no checkpoint of nanoGPT: it has no 'model_args'")
    sizes = sizes_of(args, _SIZES, path)
    if GPT2_VOCAB_SIZE < sizes["vocab_size"] <= PADDED_VOCABULARY and not path.with_name("meta.pkl").exists():
        sizes["vocab_size"] = GPT2_VOCAB_SIZE
    dropout = args.get("dropout") or 0.0
    if not isinstance(dropout, (int, float)):
        raise ModelFilesError(f"{path}: dropout cannot be {shorten(dropout)}")
    if isinstance(own, Mapping) and isinstance(own.get("activation_function"), str):
        activation = own["activation_function"]
    try:
        return GPTConfig(*sizes.values(), dropout=float(dropout), activation_function=activation)
    except UserError as error:
        raise ModelFilesError(f"{path}: {error}") from error


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The characters in the `meta.pkl` beside a checkpoint, else the tokenizer files there, None for neither."""
    return read_meta_pkl(path.parent) or load_tokenizer(path.parent)


def write(model: GPT, path: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint that nanoGPT's `sample.py` reads. Raises ModelFilesError for a model that it cannot run."""
    c = model.config
    if not c.tie_word_embeddings:
        raise ModelFilesError("nanoGPT ties the head to the token embedding, and this model has a head of its own")
    if c.n_inner not in (None, 4 * c.n_embd) or c.layer_norm_epsilon != 1e-5:
        raise ModelFilesError("nanoGPT has only an MLP of 4 * n_embd and a layer_norm_epsilon of 1e-5")
    args = {name: getattr(c, name) for name in _SIZES} | {"bias": True, "dropout": c.dropout}
    state = {name: parameter.detach().to("cpu", dtype) for name, parameter in model.named_parameters()}
    checkpoint = {
        "model": state | {HEAD: state[WTE]},
        "model_args": args,
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {},
        _OURS: {"activation_function": c.activation_function},
    }
    torch.save(checkpoint, path)
