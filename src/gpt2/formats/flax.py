"""Flax's `flax_model.msgpack`: nested dictionaries of arrays in MessagePack, read without Flax.

Arrays are of MessagePack's extension type 1, itself MessagePack: (shape, name of the dtype, bytes). Source:
`flax.serialization` and the MessagePack specification. `transformers` keeps the kernels of GPT-2's blocks as (out, in).
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from gpt2.errors import ModelFilesError
from gpt2.files import check_regular_file
from gpt2.formats.names import by_our_names
from gpt2.formats.stored import Stored, Weights, read_part

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_LAST_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_DEEPEST, _LONGEST_NAME = 16, 4096


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    offset: int


def read_weights(path: Path) -> Weights:
    """The tensors of the file; only its outline is read here. Raises ModelFilesError for a broken one."""
    check_regular_file(path)
    stored: list[Stored] = []

    def visit(name: str, array: _Array) -> None:
        if array.dtype not in _DTYPES:
            return  # integers, none of which the model has
        *parents, last = name.split("/")
        key = ".".join((*parents, _LAST_NAMES.get(last, last)))
        dtype = _DTYPES[array.dtype]
        stored.append(Stored(key, array.shape, lambda: read_part(path, array.offset, array.shape, dtype)))

    try:
        with path.open("rb") as file:
            _Reader(file, path.stat().st_size).walk(visit)
    except (OSError, ValueError, struct.error) as error:
        raise ModelFilesError(f"{path} is no whole Flax checkpoint: {error}") from error
    return by_our_names(stored, path, conv1d=False)


class _Reader:
    """As much of MessagePack as Flax writes: maps of strings, and arrays as extensions."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def walk(self, visit: Callable[[str, _Array], None], name: str = "", depth: int = 0) -> None:
        """Call `visit` with every array of the map that begins here, and its path of names."""
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        for _ in range(self._length_of_map()):
            key = self._value()
            if not isinstance(key, str):
                raise ValueError("a name is no string")
            path = f"{name}/{key}" if name else key
            if key == "__msgpack_chunked_array__":
                raise ValueError("an array of more than 1 GB is in chunks, which is not supported")
            tag = self._peek()
            if tag >> 4 == 0x8 or tag in (0xDE, 0xDF):
                self.walk(visit, path, depth + 1)
            elif isinstance(value := self._value(), _Array):
                visit(path, value)
        if depth == 0 and self.file.tell() != self.size:
            raise ValueError("there is something after its end")

    def _length_of_map(self) -> int:
        tag = self._take(1)[0]
        if tag >> 4 == 0x8:
            return tag & 0x0F
        if tag in (0xDE, 0xDF):
            return int.from_bytes(self._take(2 if tag == 0xDE else 4), "big")
        raise ValueError(f"a map was expected at byte {self.file.tell() - 1}")

    def _value(self) -> Any:
        """A string, a number, None, or an array; anything else is a ValueError."""
        tag = self._take(1)[0]
        if tag < 0x80:
            return tag
        if tag >> 5 == 0b101:
            return self._text(tag & 0x1F)
        sizes = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}
        if tag in (0xD9, 0xDA, 0xDB):
            return self._text(int.from_bytes(self._take(sizes[tag]), "big"))
        if tag in (0xC7, 0xC8, 0xC9):
            return self._array(int.from_bytes(self._take(sizes[tag]), "big"))
        fixed = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
        fixed |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
        if tag in fixed:
            content = self._take(fixed[tag])
            return int.from_bytes(content, "big") if 0xCC <= tag <= 0xCF else None
        raise ValueError(f"byte {self.file.tell() - 1} has the type {tag:#x}, which Flax does not write")

    def _array(self, length: int) -> _Array | None:
        kind, begin = self._take(1)[0], self.file.tell()
        if begin + length > self.size:
            raise ValueError("it is cut short")
        if kind != 1:
            self.file.seek(begin + length)
            return None
        count = self._take(1)[0]
        if count != 0x93:
            raise ValueError("an array is not made of shape, type and bytes")
        shape = self._shape()
        dtype, tag = self._value(), self._take(1)[0]
        if tag not in (0xC4, 0xC5, 0xC6):
            raise ValueError("an array has no bytes")
        held = int.from_bytes(self._take({0xC4: 1, 0xC5: 2, 0xC6: 4}[tag]), "big")
        offset, wanted = self.file.tell(), _DTYPES.get(str(dtype))
        numbers = 1
        for size in shape:
            numbers *= size
        if offset + held != begin + length or (wanted is not None and numbers * wanted.itemsize != held):
            raise ValueError("an array is not as long as its shape")
        self.file.seek(begin + length)
        return _Array(shape, str(dtype), offset)

    def _shape(self) -> tuple[int, ...]:
        tag = self._take(1)[0]
        if tag >> 4 != 0x9:
            raise ValueError("a shape is no list")
        sizes = [self._value() for _ in range(tag & 0x0F)]
        if not all(isinstance(size, int) for size in sizes):
            raise ValueError("a shape has no integers")
        return tuple(sizes)

    def _text(self, length: int) -> str:
        if length > _LONGEST_NAME:
            raise ValueError("a name is too long")
        return self._take(length).decode("utf-8")

    def _peek(self) -> int:
        byte = self._take(1)[0]
        self.file.seek(-1, 1)
        return byte

    def _take(self, count: int) -> bytes:
        content = self.file.read(count)
        if len(content) != count:
            raise ValueError("it is cut short")
        return content
