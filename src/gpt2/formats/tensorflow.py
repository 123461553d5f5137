"""OpenAI's original download, a TensorFlow checkpoint, read without TensorFlow.

The folder holds `hparams.json`, `encoder.json`, `vocab.bpe` and `model.ckpt.{index,data-00000-of-00001}`;
gpt-2-simple's run folders are the same with `model-1000.index`. The index is a table of LevelDB's format whose values
are protocol buffers (`BundleEntryProto`: dtype, shape, shard, offset, size). Source: LevelDB's table_format.md and
TensorFlow's tensor_bundle.proto.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from gpt2.errors import ModelFilesError, UserError
from gpt2.files import check_inside_folder, check_regular_file
from gpt2.formats.stored import Stored, Weights, read_json, read_part, sizes_of, transposed
from gpt2.model import GPTConfig

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER, _LARGEST_INDEX = 48, 2**26
_DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}
_NAMES = {
    "ln_1/g": "ln_1.weight",
    "ln_1/b": "ln_1.bias",
    "ln_2/g": "ln_2.weight",
    "ln_2/b": "ln_2.bias",
    "attn/c_attn/w": "attn.c_attn.weight",
    "attn/c_attn/b": "attn.c_attn.bias",
    "attn/c_proj/w": "attn.c_proj.weight",
    "attn/c_proj/b": "attn.c_proj.bias",
    "mlp/c_fc/w": "mlp.c_fc.weight",
    "mlp/c_fc/b": "mlp.c_fc.bias",
    "mlp/c_proj/w": "mlp.c_proj.weight",
    "mlp/c_proj/b": "mlp.c_proj.bias",
}
_OUTER = {
    "wte": "transformer.wte.weight",
    "wpe": "transformer.wpe.weight",
    "ln_f/g": "transformer.ln_f.weight",
    "ln_f/b": "transformer.ln_f.bias",
}


def find(path: Path) -> Path | None:
    """The folder, if it is one of OpenAI's downloads or of gpt-2-simple's runs."""
    if path.is_file() and path.name in ("hparams.json", "checkpoint", "model.ckpt.index"):
        path = path.parent
    return path if (path / "hparams.json").is_file() and any(path.glob("*.index")) else None


def read(folder: Path) -> tuple[GPTConfig, Weights]:
    """Config and weights. Raises ModelFilesError for a broken file."""
    check_inside_folder(folder / "hparams.json", folder)
    raw = read_json(folder / "hparams.json")
    sizes = sizes_of(raw, ("n_vocab", "n_ctx", "n_layer", "n_head", "n_embd"), folder / "hparams.json")
    try:
        vocabulary, context, layers, heads, channels = sizes.values()
        config = GPTConfig(vocabulary, context, layers, heads, channels)
    except UserError as error:
        raise ModelFilesError(f"{folder / 'hparams.json'}: {error}") from error
    index = _index_of(folder)
    weights: Weights = {}
    for key, (dtype, shape, offset) in _entries(index):
        name = _our_name(key)
        if name is None:
            continue  # the optimizer's, or the step
        stored = _stored(index.with_suffix(".data-00000-of-00001"), key, dtype, shape, offset)
        weights[name] = transposed(stored) if key.endswith("/w") else stored
    return config, weights


def _our_name(key: str) -> str | None:
    if not key.startswith("model/"):
        return None
    name = key.removeprefix("model/")
    block = re.fullmatch(r"h([0-9]+)/(.+)", name)
    if block and block[2] in _NAMES:
        return f"transformer.h.{block[1]}.{_NAMES[block[2]]}"
    return _OUTER.get(name)


def _stored(path: Path, key: str, dtype: int, shape: tuple[int, ...], offset: int) -> Stored:
    if dtype not in _DTYPES:
        raise ModelFilesError(f"{path}: {key} has TensorFlow's dtype {dtype}, which is not read here")
    kind = _DTYPES[dtype]
    inner = shape[1:] if key.endswith("/w") and len(shape) == 3 and shape[0] == 1 else shape  # a 1-wide convolution
    return Stored(key, inner, lambda: read_part(path, offset, inner, kind))


def _index_of(folder: Path) -> Path:
    """The index that the file `checkpoint` names, or the only one."""
    found = sorted(folder.glob("*.index"))
    named = folder / "checkpoint"
    check_inside_folder(named, folder)
    if named.is_file() and named.stat().st_size < 2**20:
        latest = re.search(r'^model_checkpoint_path: "([^"]*)"', named.read_text(errors="replace"), re.MULTILINE)
        found = [path for path in found if latest and path.stem == Path(latest[1]).name] or found
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise ModelFilesError(
            f"{folder} has several checkpoints ({names}) and no file 'checkpoint' that names the latest"
        )
    if not found[0].with_suffix(".data-00000-of-00001").is_file():
        raise ModelFilesError(f"{folder} is not complete: {found[0].stem}.data-00000-of-00001 is missing")
    for path in (found[0], found[0].with_suffix(".data-00000-of-00001")):
        check_inside_folder(path, folder)
    return found[0]


def _entries(path: Path) -> Iterator[tuple[str, tuple[int, tuple[int, ...], int]]]:
    """Name, and (dtype, shape, offset in the data file), of every tensor in an index."""
    check_regular_file(path)
    size = path.stat().st_size
    if not _FOOTER <= size <= _LARGEST_INDEX:
        raise ModelFilesError(f"{path} is no index of a TensorFlow checkpoint: it has {size:,} bytes")
    content = path.read_bytes()
    try:
        if content[-8:] != _MAGIC:
            raise ValueError("it does not end as one")
        _, at = _varint(content, size - _FOOTER)  # the meta index: offset and size, unused
        _, at = _varint(content, at)
        index_block = _block(content, at)
        for _, handle in _pairs(index_block):
            for key, value in _pairs(_block(content, 0, handle)):
                if key:
                    yield key.decode("utf-8"), _entry(value)
    except (ValueError, IndexError) as error:
        raise ModelFilesError(f"{path} is no whole index of a TensorFlow checkpoint: {error}") from error


def _block(content: bytes, at: int, handle: bytes | None = None) -> bytes:
    """The block that a handle (offset, size) at `at` names, without its trailer: compression and checksum."""
    offset, at = _varint(content if handle is None else handle, at)
    size, _ = _varint(content if handle is None else handle, at)
    if offset + size + 5 > len(content):
        raise ValueError("a block is outside the file")
    if content[offset + size] != 0:
        raise ValueError("its blocks are compressed, which TensorFlow does not do")
    return content[offset : offset + size]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key has the beginning of the one before it in common."""
    end = len(block) - 4 * (1 + int.from_bytes(block[-4:], "little"))
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + unshared + length > end:
            raise ValueError("a block is broken")
        key = key[:shared] + block[at : at + unshared]
        at += unshared + length
        yield key, block[at - length : at]


def _entry(value: bytes) -> tuple[int, tuple[int, ...], int]:
    """A BundleEntryProto: dtype = 1, shape = 2, shard_id = 3, offset = 4, size = 5."""
    fields = dict(_fields(value))
    if fields.get(3, 0) != 0:
        raise ValueError("it has several data files, which is not supported")
    shape = fields.get(2, b"")
    if not isinstance(shape, bytes):
        raise ValueError("a shape is broken")
    sizes = []
    for number, each in _fields(shape):
        size = dict(_fields(each)).get(1, 0) if number == 2 and isinstance(each, bytes) else 0
        if number != 2 or not isinstance(size, int) or size >= 2**31:
            raise ValueError("a shape is broken")
        sizes.append(size)
    return int(fields.get(1, 0)), tuple(sizes), int(fields.get(4, 0))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: number, and an integer or the bytes of a nested message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        elif kind == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a message is cut short")
            yield tag >> 3, message[at : at + length]
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("a message is broken")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = content[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("an integer is too long")
