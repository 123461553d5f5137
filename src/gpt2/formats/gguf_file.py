"""GGUF, the file of llama.cpp and ggml: settings, tokenizer and tensors in one, quantized or not.

The outline of a file is read here, with every length checked against the size of the file. Quantized tensors are
read and written through the `gguf` package. Source: docs/gguf.md of ggml, version 3.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from gpt2.errors import ModelFilesError, UserError, missing_extra
from gpt2.files import check_inside_folder, check_regular_file
from gpt2.formats.stored import Stored, Weights, read_part, sizes_of
from gpt2.formats.tokenizer_files import tokenizer_from_merges
from gpt2.model import GPTConfig
from gpt2.templates import ChatTemplate
from gpt2.terminal import shorten
from gpt2.tokenizer import Tokenizer

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
MODULES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
PARTS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens


class _Info(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    offset: int


def find(path: Path) -> Path | None:
    """`path` if it begins as a GGUF file does, or the only such file of the folder `path`."""
    if path.is_dir():
        found = list(path.glob("*.gguf"))
        if len(found) != 1:
            return None
        check_inside_folder(found[0], path)
        return found[0]
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(4) == b"GGUF" else None


def read(path: Path) -> tuple[GPTConfig, Weights]:
    """Config and weights. Raises ModelFilesError for a broken file, or one that is no GPT-2."""
    settings, infos, begin = _outline(path)
    config = _config(settings, infos, path)
    weights: Weights = {}
    for name, info in infos.items():
        ours = _our_name(name)
        if ours is None:
            raise ModelFilesError(f"{path}: llama.cpp's GPT-2 has no tensor {shorten(name)}")
        weights[ours] = _stored(path, name, info, begin)
    return config, weights


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer in the file, if there is one. Raises ModelFilesError for one that is no byte-level BPE."""
    settings, _, _ = _outline(path)
    model = settings.get("tokenizer.ggml.model", "no_vocab")
    if model == "no_vocab":
        return None
    tokens, kinds = settings.get("tokenizer.ggml.tokens"), settings.get("tokenizer.ggml.token_type", [])
    merges = settings.get("tokenizer.ggml.merges", [])
    if model != "gpt2" or tokens is None or not _are(tokens, str) or not _are(merges, str):
        raise ModelFilesError(f"{path}: its tokenizer '{shorten(model)}' is no byte-level BPE")
    kinds = kinds if _are(kinds, int) and len(kinds) == len(tokens) else [NORMAL] * len(tokens)
    special = [i for i, kind in enumerate(kinds) if kind in (CONTROL, UNUSED)]
    symbols = [i for i, kind in enumerate(kinds) if kind == USER_DEFINED]
    try:
        tokenizer = tokenizer_from_merges(tokens, [merge.partition(" ")[::2] for merge in merges], special, symbols)
    except ValueError as error:
        raise ModelFilesError(f"{path}: cannot use its tokenizer: {error}") from error
    ends = [settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    valid = dict.fromkeys(end for end in ends if type(end) is int and 0 <= end < tokenizer.vocab_size)
    tokenizer.end_tokens = tuple(valid) or tokenizer.end_tokens
    return tokenizer


def read_template(path: Path) -> ChatTemplate | None:
    """The chat template in the file, None without one."""
    settings = _outline(path)[0]
    source, tokens = settings.get("tokenizer.chat_template"), settings.get("tokenizer.ggml.tokens")
    if not isinstance(source, str):
        return None
    texts_by_id: list[str] = tokens if _are(tokens, str) else []
    texts: dict[str, str] = {}
    for name in ("bos", "eos", "unknown"):
        token = settings.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int and 0 <= token < len(texts_by_id):
            texts["unk_token" if name == "unknown" else f"{name}_token"] = texts_by_id[token]
    return ChatTemplate(source, texts)


def _are(values: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _our_name(name: str) -> str | None:
    module, _, kind = name.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{kind}"
    match module.split("."):
        case ["blk", number, part] if part in PARTS and number.isdecimal():
            return f"transformer.h.{number}.{PARTS[part]}.{kind}"
    return None


def _config(settings: dict[str, Any], infos: dict[str, _Info], path: Path) -> GPTConfig:
    architecture = settings.get("general.architecture")
    if architecture != "gpt2":
        raise ModelFilesError(f"{path} is no GPT-2: its architecture is {shorten(architecture)}")
    embedding = infos.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFilesError(f"{path} has no token_embd.weight")
    names = ("context_length", "block_count", "attention.head_count", "embedding_length", "feed_forward_length")
    sizes = sizes_of(settings, [f"gpt2.{name}" for name in names], path)
    epsilon = settings.get("gpt2.attention.layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, float):
        raise ModelFilesError(f"{path}: gpt2.attention.layer_norm_epsilon is no number")
    epsilon = float(f"{epsilon:.7g}")  # it is float32 there
    context, layers, heads, channels, inner = sizes.values()
    width = None if inner == 4 * channels else inner
    try:
        return GPTConfig(embedding.shape[0], context, layers, heads, channels, width, layer_norm_epsilon=epsilon)
    except UserError as error:
        raise ModelFilesError(f"{path}: {error}") from error


def _stored(path: Path, name: str, info: _Info, begin: int) -> Stored:
    if info.kind in _PLAIN:
        dtype = _PLAIN[info.kind]
        return Stored(name, info.shape, lambda: read_part(path, begin + info.offset, info.shape, dtype))
    return Stored(name, info.shape, lambda: _dequantized(path, name, info, begin))


def _dequantized(path: Path, name: str, info: _Info, begin: int) -> Tensor:
    gguf = package(f"reading {path}, which is quantized,")
    try:
        kind = gguf.GGMLQuantizationType(info.kind)
        bytes_shape = gguf.quants.quant_shape_to_byte_shape(info.shape, kind)
        raw = read_part(path, begin + info.offset, tuple(bytes_shape), torch.uint8)
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind))
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ModelFilesError(f"{path}: {shorten(name)} cannot be read: {error}") from error


def package(purpose: str) -> Any:
    """The `gguf` package. Raises ModelFilesError when it is not installed."""
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("gguf", "gguf", purpose) from None
    return gguf


def _outline(path: Path) -> tuple[dict[str, Any], dict[str, _Info], int]:
    """Settings, tensors by name, and where their data begins."""
    check_regular_file(path)
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).outline()
    except (OSError, ValueError, struct.error) as error:
        raise ModelFilesError(f"{path} is no whole GGUF file: {error}") from error


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def outline(self) -> tuple[dict[str, Any], dict[str, _Info], int]:
        magic, version = self._take(4), self._number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"version {version} is not read: 2 and 3 are")
        tensors, count = self._count(), self._count()
        settings: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            settings[key] = self._value(self._number("<I"))
        infos: dict[str, _Info] = {}
        for _ in range(tensors):
            name = self._string()
            infos[name] = self._info()
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16:
            raise ValueError("its alignment is broken")
        return settings, infos, -(-self.file.tell() // alignment) * alignment

    def _info(self) -> _Info:
        dimensions = self._number("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        if any(not 0 < size < 2**31 for size in shape) or offset > self.size:
            raise ValueError("a tensor is outside the file")
        return _Info(shape, kind, offset)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"a setting has the type {kind}, which there is not")
        inner, count = self._number("<I"), self._count()
        if inner == _ARRAY:
            raise ValueError("a setting is an array of arrays")
        if inner in _SCALARS and inner != 7:
            letter = _SCALARS[inner][1]
            return list(struct.unpack(f"<{count}{letter}", self._take(count * struct.calcsize(f"<{letter}"))))
        return [self._value(inner) for _ in range(count)]

    def _string(self) -> str:
        return self._take(self._count()).decode("utf-8")

    def _count(self) -> int:
        """A number of things that take a byte at least."""
        count = self._number("<Q")
        if count > self.size - self.file.tell():
            raise ValueError("it is cut short")
        return count

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError("it is cut short")
        return self.file.read(count)
