"""The message for text that is not UTF-8: a guess of its encoding, and how to convert it."""

from pathlib import Path

_WINDOW_BYTES = 1 << 16  # around the first bad byte
_CANDIDATES = ["gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1252", "cp1251", "koi8_r"]
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf_32",
    b"\x00\x00\xfe\xff": "utf_32",
    b"\xff\xfe": "utf_16",
    b"\xfe\xff": "utf_16",
}


def encoding_hint(data: bytes | Path, offset: int = 0) -> str:
    """The tail of an error message for bytes that are not UTF-8; empty if there is no sound guess.

    offset: the position of the first bad byte.
    """
    encoding = guess_encoding(*_read_window(data, offset))
    if encoding is None:
        return ""
    name = encoding.replace("utf_16_", "utf_16").replace("_", "-").upper()  # as iconv spells it
    file = data if isinstance(data, Path) else "FILE"
    return f"; it may be {name}: convert it with `iconv -f {name} -t UTF-8 '{file}' > NEW`"


def guess_encoding(head: bytes, window: bytes) -> str | None:
    """Python's name of the probable encoding of a file that is not UTF-8, or None.

    head:   the first bytes of the file, for its byte order mark.
    window: the bytes around the first bad byte.
    """
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    zeros = [window[parity::2].count(0) * 4 > len(window) for parity in (0, 1)]  # over half of these bytes
    if zeros[0] != zeros[1]:
        return "utf_16_be" if zeros[0] else "utf_16_le"
    decoded = window.decode(errors="replace")
    damaged = decoded.count("\ufffd")
    if b"\0" in window or sum(character > "\x7f" for character in decoded) > 5 * damaged:
        return None  # binary, or UTF-8 with some damaged bytes
    from charset_normalizer import from_bytes

    best = from_bytes(window, cp_isolation=_CANDIDATES).best()
    return None if best is None else best.encoding


def _read_window(data: bytes | Path, offset: int) -> tuple[bytes, bytes]:
    """The first four bytes, and those around `offset`, from an even position on."""
    start = max(0, offset - _WINDOW_BYTES // 2) & ~1
    if isinstance(data, bytes):
        return data[:4], data[start : start + _WINDOW_BYTES]
    try:
        with data.open("rb") as file:
            head = file.read(4)
            file.seek(start)
            return head, file.read(_WINDOW_BYTES)
    except OSError:  # removed meanwhile
        return b"", b""
