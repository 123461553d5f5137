"""Ranks for each file of tests that disturbs them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fault_launcher import RankForkServer


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[RankForkServer]:
    folder = tmp_path_factory.mktemp("nursery")
    (folder / "native").symlink_to(compiled)
    nursery = RankForkServer(folder)
    yield nursery
    nursery.close()
