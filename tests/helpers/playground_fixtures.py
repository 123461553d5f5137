"""A browser and a server for each file of tests of the playground, and a reader for each test."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.playground_app import MODELS, TOKENIZER, Reader, browsing, playing


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with playing(MODELS, TOKENIZER) as address:
        yield address


@pytest.fixture
def reader(browser: Any, address: str) -> Iterator[Reader]:
    reader = Reader(browser, address)
    yield reader
    reader.context.close()
    assert [trouble for trouble in reader.troubles if not trouble.startswith(tuple(reader.expected))] == []
