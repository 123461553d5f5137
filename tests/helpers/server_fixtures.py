"""Fixtures for tests of the server over HTTP: one per module, with the module's `SERVER_LIMITS` if it has some."""

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.helpers.live_server import SMALL_LIMITS, LiveServer, run_server, temporary_home


@pytest.fixture(scope="module")
def home(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with temporary_home(compiled, tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, home: None) -> Iterator[LiveServer]:
    with run_server(getattr(request.module, "SERVER_LIMITS", SMALL_LIMITS)) as served:
        yield served


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as one:
        yield one


@pytest.fixture
def server_still_works(server: LiveServer, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After each test all slots are free, a request succeeds, and the log has no traceback."""
    with caplog.at_level(logging.INFO):
        yield
        server.wait_until_idle()
        with server.client() as client:
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert not [record for record in caplog.records if record.exc_info or "\n" in record.getMessage()]
