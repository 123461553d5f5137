"""Accessibility of the page: light and dark colour schemes, small screens, and axe's rules."""

import re
from typing import Any

import pytest

from tests.helpers.playground_browser import PROMPT, PlaygroundPage

pytest_plugins = "tests.helpers.playground_fixtures"
PHONE_WIDTH = 375
# Each visible control that cannot be touched: outside the page, covered, or too small.
UNREACHABLE = """() => [...document.querySelectorAll("button, input, select, textarea, summary")].filter((one) => {
  if (!one.checkVisibility() || one.matches(":disabled")) return false;
  one.scrollIntoView({ block: "center" });
  const { left, right, top, bottom, width, height } = one.getBoundingClientRect();
  const hit = document.elementFromPoint((left + right) / 2, Math.min((top + bottom) / 2, innerHeight - 1));
  const small = Math.min(width, height) < (one.matches("[type=range]") ? 20 : 24);
  return left < 0 || right > innerWidth || small || !(one.contains(hit) || hit?.contains(one));
}).map((one) => one.id || one.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (PHONE_WIDTH, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(PHONE_WIDTH, "light", marks=pytest.mark.slow),
    ],
)
def test_the_page_is_accessible(browser: Any, address: str, scheme: str, width: int) -> None:
    reader = PlaygroundPage(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800})
    background = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    reader.fill_setting("max_tokens", 8)
    reader.generate(PROMPT)
    reader.click_token(3)
    assert reader.accessibility_violations() == []
    reader.page.keyboard.press("Escape")
    assert reader.page.evaluate(UNREACHABLE) == []
    reader.page.click("#help")
    for name in ("attention", "layers", "contributions", "whatif", "tokens", "tree"):
        reader.page.click(f"#tab-{name}")
        if name == "whatif":
            for summary in ("Patch", "Steer"):
                reader.page.click(f"summary:text-is('{summary}')")
            reader.page.fill("#patch-source", reader.text.replace("cat", "dog"))
            reader.page.click("#patch-run")
            reader.page.wait_for_selector(".patched tbody tr:first-child button")
            reader.page.wait_for_selector("#panel-whatif .view[aria-busy=false] .bars")
        elif name == "attention":
            reader.page.click("#view-heads")
            reader.page.wait_for_selector(".one-head h2:has-text('Layer')")
        reader.page.wait_for_selector(f"#panel-{name}[aria-busy=false]")
        assert reader.accessibility_violations() == [], name
        assert reader.page.evaluate("document.documentElement.scrollWidth") == width, name
        assert reader.page.evaluate(UNREACHABLE) == [], name
    reader.page.click("#compare")
    reader.fill_setting("min_p", 0.1)
    reader.continue_text()
    assert reader.accessibility_violations() == []
    assert reader.page.evaluate(UNREACHABLE) == []
    for name in ("history", "share"):
        reader.page.click(f"#open-{name}")
        assert reader.accessibility_violations() == [], name
        reader.page.keyboard.press("Escape")
    assert reader.page.evaluate("document.documentElement.scrollWidth") == width
    assert reader.errors == []
    reader.context.close()
