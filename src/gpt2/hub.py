"""Data sets on the Hugging Face hub: their files at a commit, and downloads of them that are verified.

The address and the token are those of `huggingface_hub` (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2.downloads import download
from gpt2.errors import DataError
from gpt2.files import cache_home, file_digest

LOCAL_COMMIT = "local"  # of a data set whose files were put there by hand
_UNREACHABLE = "hub_unreachable"


@dataclass(frozen=True)
class HubFile:
    """A file of a data set: its path there, its bytes, and its digest (SHA-256, or git's SHA-1 of a small file)."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class HubDataset:
    """A data set at one commit. configs: the `configs` of its card, as they are written there."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    configs: Sequence[Any] = field(default=())


def dataset_url(repo: str, revision: str, path: str) -> str:
    """The download URL of a file of a data set."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/datasets/{repo}/resolve/{revision}/{path}"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_headers() -> dict[str, str]:
    """The headers of a request to the hub: the user's token, if there is one."""
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers()
    return {"Authorization": headers["authorization"]} if "authorization" in headers else {}


def manual_path(repo: str, path: str) -> Path:
    """Where a user can put a file of a data set by hand. It is never overwritten or removed."""
    return cache_home() / "datasets" / repo / path


def get_dataset(repo: str, revision: str | None = None) -> HubDataset:
    """The files of a data set at a revision (None: main), whose commit is looked up.

    Without network it has the files that were put below `manual_path` by hand, and its commit is "local". Raises
    DataError for a data set or revision that does not exist, for one whose terms have to be accepted first, and without
    network.
    """
    try:
        return _list_dataset(repo, revision)
    except DataError as error:
        found = _local_dataset(repo) if error.code == _UNREACHABLE else None
        if found is None:
            raise
        return found


def _list_dataset(repo: str, revision: str | None) -> HubDataset:
    from huggingface_hub import HfApi, RepoFile

    with _hub_errors(repo, revision):
        if is_offline():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        api = HfApi()
        info = api.dataset_info(repo, revision=revision, timeout=30)
        commit = str(info.sha)
        tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        files = tuple(
            HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile)
        )
        card = info.card_data.to_dict() if info.card_data else {}
        return HubDataset(repo, commit, files, card.get("configs") or ())


def _local_dataset(repo: str) -> HubDataset | None:
    """The files below `manual_path`, as a data set whose commit is "local"; None without files."""
    folder = manual_path(repo, "")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = tuple(HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, "") for path in paths)
    return HubDataset(repo, LOCAL_COMMIT, files) if files else None


def fetch_dataset_file(
    data: HubDataset,
    file: HubFile,
    path: Path,
    *,
    show_progress: bool = True,
    is_cancelled: Callable[[], bool] | None = None,
) -> Path:
    """The path of a file of a data set: the one that was put by hand, or `path`, to which it is downloaded.

    A file at `path` with another digest is downloaded again. Raises DataError as `download` does.
    """
    by_hand = manual_path(data.repo, file.path)
    if by_hand.is_file():
        return by_hand
    if path.is_file() and file_digest(path, file.digest) != file.digest:
        path.unlink()
    return download(
        dataset_url(data.repo, data.commit, file.path),
        path,
        file.digest,
        headers=hub_headers(),
        by_hand=by_hand,
        show_progress=show_progress,
        is_cancelled=is_cancelled,
    )


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Raise DataError, with one line that says what to do, for what the client raises."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/datasets/{repo}"
    try:
        yield
    except HFValidationError:
        raise DataError(f"'{repo}' is not the name of a data set: names are owner/name") from None
    except GatedRepoError:
        raise DataError(
            f"the data set {repo} is gated: accept its terms at {page}, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"the data set {repo} has no revision '{revision or 'main'}': see {page}/tree/main") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"there is no data set {repo} at {constants.ENDPOINT}, or it is private: check the name, or set HF_TOKEN"
        ) from None
    except (HTTPError, OSError) as error:  # of the client's own HTTP library, whose name has changed
        response = getattr(error, "response", None)
        reason = f"HTTP {response.status_code}" if response is not None else str(error).splitlines()[0]
        raise DataError(
            f"cannot list the files of {page} ({reason}): download the files by hand, to the same paths below "
            f"{manual_path(repo, '')}",
            code=_UNREACHABLE,
        ) from None
