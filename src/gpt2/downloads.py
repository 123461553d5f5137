"""Downloads: a file is complete and has the expected digest, or it is not there."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from gpt2.errors import DataError
from gpt2.files import check_regular_file, file_digest, read_error, staging_folder, write_error
from gpt2.progress import ProgressBar
from gpt2.units import format_bytes

_MAX_FAILURES, _RETRY_SECONDS = 3, 5.0  # of a connection that breaks without a byte; seconds more each time


def download(
    url: str,
    path: Path,
    digest: str,
    timeout: float = 30.0,
    *,
    headers: dict[str, str] | None = None,
    by_hand: Path | None = None,
    show_progress: bool = True,
    is_cancelled: Callable[[], bool] | None = None,
) -> Path:
    """Fetch `url` to `path`, unless the file is there already; returns `path`.

    The file is complete and has this digest (see `file_digest`), or is not there. An existing file is never
    overwritten. A connection that breaks is continued where it broke, if the server can.
    timeout:      seconds without a byte from the server.
    headers:      of the request.
    by_hand:      where the error says that the file can be put; None for `path`.
    is_cancelled: whether to give up, which raises KeyboardInterrupt.

    Raises DataError that names the file, the address and where to put the file by hand.
    """
    import requests

    if path.exists():
        _check_digest(path, digest, url)
        return path
    try:
        with staging_folder(path) as folder:
            partial = folder / path.name
            with partial.open("xb") as file:  # never through a link that is there
                _fetch(url, file, timeout, headers or {}, show_progress, is_cancelled or (lambda: False))
            found = file_digest(partial, digest)
            if found != digest:
                reason = f"its {_digest_name(digest)} is {found[:12]}…, not {digest[:12]}…"
                raise _download_error(url, by_hand or path, reason)
            partial.replace(path)
    except requests.RequestException as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # "Connection refused", under three layers of wrappers
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise _download_error(url, by_hand or path, reason) from error
    except OSError as error:
        raise write_error(path, error) from None
    return path


def _fetch(
    url: str,
    out: BinaryIO,
    timeout: float,
    headers: dict[str, str],
    show_progress: bool,
    is_cancelled: Callable[[], bool],
) -> None:
    """Stream `url` into `out`, with a progress bar on a terminal."""
    import requests

    with ProgressBar(_url_filename(url)) as bar:
        failures = 0
        while True:
            start, can_continue = out.tell(), False
            resumed = {"Range": f"bytes={start}-"} if start else {}
            request = {"Accept-Encoding": "identity", **headers, **resumed}
            try:
                with requests.get(url, stream=True, timeout=timeout, headers=request) as response:
                    if not response.ok or (start and response.status_code != 206):
                        raise requests.HTTPError(f"HTTP {response.status_code} {response.reason}")
                    can_continue = response.headers.get("Accept-Ranges") == "bytes" or response.status_code == 206
                    length = int(response.headers.get("Content-Length") or 0)
                    total = start + length if length else None
                    for block in response.iter_content(1 << 16):
                        out.write(block)
                        if show_progress:
                            _show(bar, out.tell(), total)
                        if is_cancelled():
                            raise KeyboardInterrupt
                return
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                failures = 1 if out.tell() > start else failures + 1
                if not can_continue or failures > _MAX_FAILURES:
                    raise
                time.sleep(_RETRY_SECONDS * (failures - 1))


def _show(bar: ProgressBar, done: int, total: int | None) -> None:
    if total is None:
        bar.update(status=format_bytes(done))
    else:
        bar.update(done / total, f"{format_bytes(done)} of {format_bytes(total)}")


def _url_filename(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _download_error(url: str, path: Path, reason: str) -> DataError:
    return DataError(f"cannot download {_url_filename(url)} from {url} ({reason}): put it at {path} by hand")


def _digest_name(digest: str) -> str:
    return "git hash" if len(digest) == 40 else "sha256"


def _check_digest(path: Path, digest: str, url: str) -> None:
    check_regular_file(path)
    try:
        found = file_digest(path, digest)
    except OSError as error:
        raise read_error(path, error) from None
    if found != digest:
        difference = f"its {_digest_name(digest)} is {found[:12]}…, not {digest[:12]}…"
        raise DataError(f"{path} is not the file from {url} ({difference}): remove it to download that file")
