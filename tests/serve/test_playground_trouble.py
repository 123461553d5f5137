"""Errors in the page: API keys, a full queue, lost connections. The page reports each and can be used afterwards."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from gpt2.serve.limits import Limits
from gpt2.serve.middleware import AccessPolicy
from tests.helpers.playground_browser import (
    CONFIG,
    LIMITS,
    MODELS,
    PROMPT,
    TOKENIZER,
    BreakableProxy,
    PlaygroundPage,
    SlowGPT,
    generated_text,
    run_playground,
)

pytest_plugins = "tests.helpers.playground_fixtures"
KEY = "open sesame"


@pytest.fixture(scope="module")
def slow() -> SlowGPT:
    """The first model, with a delay for each step."""
    slow = SlowGPT(CONFIG)
    slow.load_state_dict(MODELS["one"].state_dict())
    return slow


@pytest.fixture
def proxy(slow: SlowGPT) -> Iterator[BreakableProxy]:
    with run_playground({"slow": slow}, TOKENIZER, LIMITS) as address:
        proxy = BreakableProxy(address)
        yield proxy
        proxy.close()


def test_generation_can_be_stopped(browser: Any, slow: SlowGPT) -> None:
    with run_playground({"slow": slow}, TOKENIZER, Limits(slots=1, max_waiting=0)) as address:
        reader = PlaygroundPage(browser, address)
        reader.fill_setting("max_tokens", 400)
        reader.page.fill("#text", PROMPT)
        reader.page.click("#go")
        reader.page.wait_for_selector("#backdrop > span:nth-of-type(4) > span", state="attached")
        other = PlaygroundPage(browser, address)  # the only slot is taken
        other.page.fill("#text", PROMPT)
        other.page.click("#go")
        other.page.wait_for_selector("#notice:has-text('The server is busy')")
        assert "Try again in" in other.page.text_content("#notice")
        assert reader.page.is_visible("#stop")
        reader.page.keyboard.press("Escape")
        reader.page.wait_for_selector("#status:has-text('Stopped after')")
        length = len(reader.text)
        assert length < len(generated_text(max_new_tokens=400))
        other.fill_setting("max_tokens", 3)
        other.page.click("#retry")
        assert other.wait_until_done().startswith(PROMPT)
        assert other.page.is_hidden("#notice")
        assert len(reader.text) == length
        assert reader.errors == []
        reader.context.close()
        other.context.close()


def test_an_unreachable_server_is_reported(browser: Any) -> None:
    with run_playground(MODELS, TOKENIZER) as address:
        reader = PlaygroundPage(browser, address)
        reader.page.fill("#text", PROMPT)
        reader.page.wait_for_timeout(300)
    reader.page.click("#go")
    reader.page.wait_for_selector("#notice:has-text('The server does not respond. Is gpt2 serve still running?')")
    assert reader.text == PROMPT
    assert reader.page.is_enabled("#go")
    reader.context.close()


def test_a_lost_connection_keeps_the_text(browser: Any, proxy: BreakableProxy) -> None:
    reader = PlaygroundPage(browser, proxy.address)
    reader.fill_setting("max_tokens", 80)
    reader.page.fill("#text", PROMPT)
    reader.page.click("#go")
    reader.page.wait_for_selector("#backdrop > span:nth-of-type(4) > span", state="attached")
    proxy.disconnect()
    reader.page.wait_for_selector("#notice:has-text('The connection was lost before the text was complete.')")
    reader.page.wait_for_selector("body:not(.running)")
    kept = reader.text
    assert len(PROMPT) < len(kept) < len(generated_text(max_new_tokens=80))
    assert generated_text(max_new_tokens=80).startswith(kept)
    reader.page.click("#retry")
    reader.page.wait_for_selector("#notice:has-text('The server does not respond')")
    assert reader.text == kept
    proxy.restore()
    reader.fill_setting("max_tokens", 3)
    reader.page.click("#retry")
    reader.page.wait_for_selector("#status:has-text('3 tokens')")
    assert reader.wait_until_done().startswith(kept)
    assert reader.page.is_hidden("#notice")
    reader.context.close()


def test_opening_another_text_stops_generation(browser: Any, proxy: BreakableProxy) -> None:
    reader = PlaygroundPage(browser, proxy.address)
    fragment = "#s=" + base64.b64encode(b'{"path": ["a bird"]}').decode()
    reader.fill_setting("max_tokens", 90)
    reader.page.fill("#text", PROMPT)
    reader.page.click("#go")
    reader.page.wait_for_selector("#backdrop > span:nth-of-type(3) > span", state="attached")
    reader.page.evaluate("fragment => (location.hash = fragment)", fragment)
    reader.page.wait_for_selector("#status:has-text('Stopped')")
    assert reader.text == "a bird"
    assert reader.page.is_hidden("#notice")
    assert reader.errors == []
    reader.context.close()


def test_the_api_key_is_kept_for_the_session(browser: Any) -> None:
    with run_playground(MODELS, TOKENIZER, access=AccessPolicy(api_keys=(KEY,))) as address:
        reader = PlaygroundPage(browser, address, ready="#key-form:not([hidden])")
        page = reader.page
        assert "no API key" in page.text_content("#notice")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("open barley")
        page.keyboard.press("Enter")
        page.wait_for_selector("#notice:has-text('the API key is wrong')")
        assert reader.accessibility_violations() == []
        page.fill("#key", KEY)
        page.click("#key-form button")
        page.wait_for_selector("#next li")
        assert page.is_hidden("#notice")
        assert page.is_hidden("#key-form")
        reader.fill_setting("max_tokens", 4)
        assert reader.generate(PROMPT) == generated_text(max_new_tokens=4)
        page.click("#open-share")
        for name in ("curl", "Python"):
            page.click(f"text=Copy as {name}")
            page.wait_for_selector("#preview:has-text('GPT2_API_KEY')")
            assert KEY not in page.text_content("#preview")
        page.reload()
        page.wait_for_selector("#next li")
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        other = reader.context.new_page()  # another session
        other.goto(address)
        other.wait_for_selector("#key-form:not([hidden])")
        reader.context.close()
