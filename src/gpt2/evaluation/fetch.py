"""The data files of tasks: a local file, the cache, or a download from the hub at a pinned revision or a publisher."""

import logging
from dataclasses import dataclass
from pathlib import Path

from gpt2.downloads import download
from gpt2.errors import DataError
from gpt2.evaluation.records import read_bytes
from gpt2.files import cache_home, expand_path, file_sha256
from gpt2.hub import dataset_url, hub_headers, is_offline

_log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class DatasetFile:
    """The data file of a task, and its download URL.

    name:     file name in the cache.
    sha256:   checksum of the download; None for a hub file, whose checksum the hub sends.
    url:      download URL at the publisher; or
    repo, revision, path: data set on the hub, commit, and file in it.
    member:   in an archive, the end of the path of the file to read.
    labels:   in an archive, a second file with one label per line (PIQA).
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
    def download_url(self) -> str:
        """The URL of the file."""
        return self.url or dataset_url(str(self.repo), str(self.revision), str(self.path))

    @property
    def cache_path(self) -> Path:
        """The path of the file in the cache."""
        return cache_home() / "evaluation" / self.name


@dataclass(frozen=True)
class TaskFile:
    """The uncompressed content of a task's file, its name in messages (`where`), and PIQA's `labels`."""

    content: bytes
    where: str
    labels: bytes | None = None


def open_task_file(data_file: DatasetFile, local_file: str | None) -> TaskFile:
    """The file of a task: the local file, or the one in the cache, downloaded if it is missing.

    Raises DataError with the file, its download URL, and its path in the cache.
    """
    if local_file is not None:
        path = expand_path(local_file)
        if not path.is_file():
            raise DataError(f"there is no file {path}; its download URL is {data_file.download_url}", field="task_data")
        archive = path.name.lower().endswith((".zip", ".tgz", ".tar.gz"))
        return _opened(path, data_file, archived=archive)
    path = fetch(data_file)
    return _opened(path, data_file, archived=data_file.member is not None)


def _opened(path: Path, data_file: DatasetFile, *, archived: bool) -> TaskFile:
    member = data_file.member if archived else None
    labels = read_bytes(path, data_file.labels) if archived and data_file.labels else None
    return TaskFile(read_bytes(path, member), str(path), labels)


def fetch(data_file: DatasetFile) -> Path:
    """The path of the file in the cache, downloaded if it is missing. The checksum is verified."""
    if data_file.cache_path.is_file():
        if data_file.sha256 is not None and file_sha256(data_file.cache_path) != data_file.sha256:
            raise DataError(
                f"{data_file.cache_path} is not the file from {data_file.download_url} (its sha256 differs): "
                "remove it, or name a local file with --task-data (gpt2 train: --eval-tasks-data)"
            )
        return data_file.cache_path
    if is_offline():
        raise DataError(
            f"{data_file.name} is not in the cache and HF_HUB_OFFLINE is set: download {data_file.download_url} "
            f"and save it as {data_file.cache_path}"
        )
    url, digest = data_file.download_url, data_file.sha256 or _hub_digest(data_file)
    _log.info("downloading %s", url)
    return download(url, data_file.cache_path, digest, headers=hub_headers() if data_file.url is None else None)


def _hub_digest(data_file: DatasetFile) -> str:
    """The digest that the hub sends of a file (see `file_digest`). Raises DataError if it sends none."""
    import requests

    problem = f"cannot download {data_file.name} from {data_file.download_url}"
    fix = f"save it as {data_file.cache_path}"
    try:
        response = requests.head(data_file.download_url, allow_redirects=False, timeout=30, headers=hub_headers())
        response.raise_for_status()
    except requests.RequestException as error:
        raise DataError(f"{problem} ({_short(error)}): {fix}") from None
    etag = response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
    digest = etag.removeprefix("W/").strip('"')
    if len(digest) not in (40, 64):
        raise DataError(f"{problem} (the hub sends no checksum): {fix}")
    return digest


def _short(error: Exception) -> str:
    """The HTTP status or the type of a connection error: the messages of `requests` are longer than a line."""
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__
