"""nanoGPT's `ckpt.pt` and build-nanogpt's `model_*.pt`: pickles with a state dict and the shape of the model.

nanoGPT trains with the exact GELU, build-nanogpt ("Let's reproduce GPT-2") with its tanh approximation. Both pad the
vocabulary to 50,304. Characters, as nanoGPT's `shakespeare_char` has them, are in a `meta.pkl` beside the checkpoint.
"""

import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt2.characters import CharacterTokenizer
from gpt2.errors import ModelFilesError, UserError
from gpt2.files import check_inside_folder
from gpt2.formats.names import by_our_names, with_zero_biases
from gpt2.formats.pickled import Settings, read_pickle, stored_tensors
from gpt2.formats.stored import HEAD, WTE, Weights, first_rows, sizes_of
from gpt2.model import GPT, GPTConfig

GPT2_VOCAB_SIZE, PADDED_VOCABULARY = 50257, 50304
_SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
_OURS = "gpt2_config"  # what nanoGPT has no setting for, in checkpoints that this program wrote
_LARGEST_META = 2**24
_PLAIN_OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BININT",
        "BININT1",
        "BININT2",
    ]
)


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
        raise ModelFilesError(f"{path}: dropout cannot be {dropout!r}")
    if isinstance(own, Mapping) and isinstance(own.get("activation_function"), str):
        activation = own["activation_function"]
    try:
        return GPTConfig(*sizes.values(), dropout=float(dropout), activation_function=activation)
    except UserError as error:
        raise ModelFilesError(f"{path}: {error}") from error


def read_tokenizer(path: Path) -> CharacterTokenizer | None:
    """The characters in the `meta.pkl` beside a checkpoint, None without it. Raises ModelFilesError if broken."""
    meta = path.with_name("meta.pkl")
    check_inside_folder(meta, path.parent)
    return CharacterTokenizer(_characters(meta)) if meta.is_file() else None


def _characters(path: Path) -> list[str]:
    """`itos` of a `meta.pkl`. The pickle is not executed: only those of strings, integers and dictionaries are read."""
    try:
        content = path.read_bytes() if path.stat().st_size <= _LARGEST_META else b""
        for opcode, _, _ in pickletools.genops(content):
            if opcode.name not in _PLAIN_OPCODES:
                raise ValueError(f"it has the opcode {opcode.name}, which no vocabulary of characters needs")
        itos = _plain_value(content)["itos"]
        characters = [itos[i] for i in range(len(itos))]
    except Exception as error:  # pickletools raises anything for a broken file
        raise ModelFilesError(f"cannot use {path}: {error!r}") from error
    if not all(isinstance(each, str) and len(each) == 1 for each in characters) or not characters:
        raise ModelFilesError(f"cannot use {path}: its itos does not map 0, 1, 2, ... to characters")
    return characters


def _plain_value(content: bytes) -> Any:
    """The value of a pickle of strings, integers and dictionaries."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("SETITEM", "SETITEMS"):
            begin = marks.pop() if name == "SETITEMS" else len(stack) - 2
            pairs, stack = stack[begin:], stack[:begin]
            stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            stack.append(argument)
    return stack[-1]


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
