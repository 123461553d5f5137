"""Five pages of the built site in a browser, in light and dark mode and on a phone: axe finds no violation."""

from pathlib import Path

import pytest

from tests.docs.test_site import pytestmark, site  # noqa: F401
from tests.helpers.playground_browser import launch_browser, require_chromium

PAGES = (
    "index.html",
    "learn/03-attention.html",
    "reference/commands/train.html",
    "reference/python.html",
    "explanation/comparison.html",
)
VIEWS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}


@pytest.mark.parametrize("view", VIEWS)
def test_pages_are_accessible(site: Path, view: str, tmp_path: Path) -> None:  # noqa: F811
    require_chromium()
    from axe_playwright_python.sync_playwright import Axe

    violations = []
    with launch_browser() as browser:
        for name in PAGES:
            page = browser.new_page(**VIEWS[view])
            requests: list[str] = []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.goto((site / name).as_uri())
            page.wait_for_load_state()
            page.wait_for_selector("[data-md-color-scheme]")
            found = Axe().run(page).response["violations"]
            violations += [(name, v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in found]
            assert all(url.startswith(("file:", "data:", "blob:")) for url in requests), requests
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"{name} is wider than the {view}"
            )
            page.screenshot(path=tmp_path / f"{view}-{Path(name).stem}.png")
            page.close()
    assert violations == []
