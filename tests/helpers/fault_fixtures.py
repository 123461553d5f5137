"""The fork server for tests of rank errors and faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fault_launcher import RankForkServer


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[RankForkServer]:
    folder = tmp_path_factory.mktemp("fork_server")
    (folder / "native").symlink_to(compiled)
    fork_server = RankForkServer(folder)
    yield fork_server
    fork_server.close()
