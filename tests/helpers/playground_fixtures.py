"""A browser and a server for each file of tests of the playground, and a reader for each test."""

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
    assert [trouble for trouble in reader.errors if not trouble.startswith(tuple(reader.expected_errors))] == []
