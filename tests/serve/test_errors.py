"""Error responses repeat a client's words in one line of bounded length."""

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
from gpt2.errors import MAX_MESSAGE_CHARACTERS, RequestError
from gpt2.serve.errors import APIError, to_api_error

WORDS = "na\nme\x1b[2J\x9b\u2028\u202e"
SHOWN = r"na me\x1b[2J\x9b \u202e"


def detail(error: APIError) -> dict[str, Any]:
    return json.loads(error.body)["error"]


@pytest.mark.parametrize(
    "error", [APIError(400, WORDS, param=WORDS), to_api_error(RequestError(WORDS, field=WORDS))], ids=["API", "user"]
)
def test_an_error_response_has_no_control_characters(error: APIError) -> None:
    assert (str(error), error.message, error.param) == (SHOWN, SHOWN, SHOWN)
    assert (detail(error)["message"], detail(error)["param"]) == (SHOWN, SHOWN)


def test_an_error_response_has_a_bounded_length() -> None:
    error = APIError(400, "\x9b" * 10**7, param="\x9b" * 10**7)
    assert len(detail(error)["message"]) == MAX_MESSAGE_CHARACTERS
    assert len(detail(error)["param"]) == 200
