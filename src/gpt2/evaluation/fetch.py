"""Where task data comes from: the cache, the hub at a pinned revision, its publisher, or a file put there by hand."""

import logging
from dataclasses import dataclass
from pathlib import Path

from gpt2.errors import UserError
from gpt2.evaluation.records import read_bytes
from gpt2.files import cache_home, download, expand_path, file_sha256

_log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class Origin:
    """One file of a task, and where it is had.

    name:     what the file is called in the cache.
    sha256:   of the file as it is downloaded; None for a hub file whose checksum the hub itself states.
    url:      at its publisher's; or
    repo, revision, path: a data set of the hub, a commit of it, and a file in it.
    member:   of an archive, the file that is meant: its path ends so. labels: one more, a label a line (PIQA).
    """

    name: str
    sha256: str | None = None
    url: str | None = None
    repo: str | None = None
    revision: str | None = None
    path: str | None = None
    member: str | None = None
    labels: str | None = None

    @property
    def address(self) -> str:
        """Where a person could fetch the file."""
        return self.url or f"{_endpoint()}/datasets/{self.repo}/resolve/{self.revision}/{self.path}"

    @property
    def place(self) -> Path:
        """Where the file lies in the cache."""
        return cache_home() / "evaluation" / self.name


@dataclass(frozen=True)
class TaskFile:
    """The content of a task's file, uncompressed; `where` is how messages call it, `labels` are PIQA's."""

    content: bytes
    where: str
    labels: bytes | None = None


def open_task_file(origin: Origin, given: str | None) -> TaskFile:
    """The file of a task: `given` by hand, or from the cache, fetched into it first where it is missing.

    Raises UserError in one line that names the file, where it is had, and where to put it.
    """
    if given is not None:
        path = expand_path(given)
        if not path.is_file():
            raise UserError(f"there is no file {path}: it was to be had from {origin.address}")
        archive = path.name.lower().endswith((".zip", ".tgz", ".tar.gz"))
        return _opened(path, origin, archived=archive)
    path = fetch(origin)
    return _opened(path, origin, archived=origin.member is not None)


def _opened(path: Path, origin: Origin, *, archived: bool) -> TaskFile:
    member = origin.member if archived else None
    labels = read_bytes(path, origin.labels) if archived and origin.labels else None
    return TaskFile(read_bytes(path, member), str(path), labels)


def fetch(origin: Origin) -> Path:
    """The file in the cache, downloaded if it is not there: whole and with its checksum, or not at all."""
    if origin.place.is_file():
        if origin.sha256 is not None and file_sha256(origin.place) != origin.sha256:
            raise UserError(
                f"{origin.place} is not the file from {origin.address} (its sha256 differs): "
                "remove it, or name it with --task-data"
            )
        return origin.place
    if _offline():
        raise UserError(
            f"{origin.name} is not in the cache and HF_HUB_OFFLINE is set: download {origin.address} "
            f"and put it at {origin.place}"
        )
    address, sha256 = origin.address, origin.sha256 or _stated_sha256(origin)
    _log.info("downloading %s", address)
    return download(address, origin.place, sha256)


def is_at_hand(origin: Origin) -> bool:
    """Whether the file is in the cache."""
    return origin.place.is_file()


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _stated_sha256(origin: Origin) -> str:
    """The checksum that the hub states for a large file at a revision. Raises UserError where it states none."""
    import requests

    problem, mend = f"cannot download {origin.name} from {origin.address}", f"put it at {origin.place} by hand"
    try:
        response = requests.head(origin.address, allow_redirects=False, timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"{problem} ({_short(error)}): {mend}") from None
    stated = response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
    sha256 = stated.removeprefix("W/").strip('"')
    if len(sha256) != 64:
        raise UserError(f"{problem} (the hub states no sha256): {mend}")
    return sha256


def _short(error: Exception) -> str:
    """The kind of a connection error, or the HTTP status: what `requests` adds to it does not fit a line."""
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__
