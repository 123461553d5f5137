"""Hostile folders: their files, and seeded mutations of valid ones."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Link(NamedTuple):
    """A symbolic link."""

    target: str


class Sparse(NamedTuple):
    """A file that starts with `head` and has `size` bytes, which take no space on the disk."""

    head: bytes
    size: int


Files = Mapping[str, "bytes | Link | Sparse"]
STRANGE_VALUES = [
    *(
        None,
        True,
        0,
        -1,
        1.5,
        2**31,
        2**63,
        10**400,
        1e308,
        "",
        "x" * 10_000,
        "\ud800",
        "\x1b[2J\n",
        "../../etc/passwd",
    ),
    *([], {}, [[]], [None], {"a": {}}, float("nan"), float("inf")),
]
STRANGE_BYTES = [
    b"",
    b"\0",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xed\xa0\x80",
    b"{",
    b"[" * 5000,
    b'"',
    b"\n",
    b"1e999",
]


def write_files(folder: Path, files: Files) -> None:
    """Write the files into a new folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        elif isinstance(content, Sparse):
            with path.open("wb") as file:
                file.write(content.head)
                file.truncate(content.size)
        else:
            path.write_bytes(content)


def mutate(files: Files, rng: random.Random) -> dict[str, Any]:
    """The files with one to three changes of one of them."""
    name = rng.choice(sorted(files))
    content = files[name]
    assert isinstance(content, bytes)
    for _ in range(rng.randint(1, 3)):
        content = _mutate_json(content, rng) if rng.random() < 0.6 else _mutate_bytes(content, rng)
    return {**files, name: content}


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice([0, 1, 2, 8, 100]))
    part = data[start:stop]
    flipped = bytes([part[0] ^ (1 << rng.randrange(8))]) + part[1:] if part else b""
    new = rng.choice([b"", part * 2, part * 1000, flipped, rng.choice(STRANGE_BYTES), rng.randbytes(4)])
    return data[:start] if rng.random() < 0.1 else data[:start] + new + data[stop:]


def _mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change one value of a JSON document, or of one line of JSON; bytes of any other file."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    index = rng.randrange(len(lines))
    try:
        document = json.loads(lines[index])
    except (ValueError, RecursionError):
        return _mutate_bytes(data, rng)
    lines[index] = json.dumps(_mutate_value(document, rng)).encode()
    return b"\n".join(lines)


def _mutate_value(value: Any, rng: random.Random) -> Any:
    """The value with one change in a random place of it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.2:
        return rng.choice([rng.choice(STRANGE_VALUES), [value], {"type": value}, [value] * 50])
    key, action = rng.choice(keys), rng.random()
    changed = value.copy()
    if action < 0.1:
        del changed[key]
    elif action < 0.2 and isinstance(changed, dict):
        changed[rng.choice([*keys, "\x1b", ""])] = changed.pop(key)
    elif action < 0.3 and isinstance(changed, list):
        changed.insert(rng.randrange(len(changed)), rng.choice(STRANGE_VALUES))
    else:
        changed[key] = _mutate_value(value[key], rng)
    return changed
