"""Fixtures for the tests of the playground: a browser and a server per module, and a page per test."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.playground_browser import MODELS, TOKENIZER, PlaygroundPage, launch_browser, run_playground


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with run_playground(MODELS, TOKENIZER) as address:
        yield address


@pytest.fixture
def reader(browser: Any, address: str) -> Iterator[PlaygroundPage]:
    reader = PlaygroundPage(browser, address)
    yield reader
    reader.context.close()
    assert [error for error in reader.errors if not error.startswith(tuple(reader.expected_errors))] == []
