"""Screenshots of the playground for docs/: python -m tests.helpers.playground_screenshots runs/quickstart"""

import sys
from pathlib import Path
from typing import Any

import torch

import gpt2
from gpt2.serve.models import served_model_name
from tests.helpers.playground_browser import launch_browser, run_playground

WIDE, PHONE = {"width": 1320, "height": 820}, {"width": 375, "height": 780}
PROMPT = "The with statement is used to"
SCREENSHOTS = {  # name: (index of the selected token, tab, options of the browser)
    "light": (6, "alternatives", {"viewport": WIDE, "color_scheme": "light"}),
    "dark": (12, "Attention", {"viewport": WIDE, "color_scheme": "dark"}),
    "contributions": (6, "contributions", {"viewport": WIDE, "color_scheme": "light"}),
    "phone": (6, "alternatives", {"viewport": PHONE, "color_scheme": "light", "device_scale_factor": 2}),
}
SETTINGS = {"temperature": 0.7, "repetition_penalty": 1.1, "max_tokens": 44}
MAX_SCREENSHOT_BYTES = 250_000


def take_screenshot(
    browser: Any, address: str, prompt: str, path: Path, token_index: int, tab: str, context_options: dict[str, Any]
) -> None:
    """One screenshot: a text, a selected token, and its alternatives or a tab of the inspector."""
    context = browser.new_context(reduced_motion="reduce", **context_options)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#next li")
    for name, value in SETTINGS.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#text", prompt)
    page.click("#go")
    page.wait_for_selector("body:not(.running) #status:has-text('a second')")
    page.evaluate("document.getElementById('status').textContent = ''")  # throughput of this machine
    page.wait_for_load_state("networkidle")
    token = page.locator("#backdrop > span > span").nth(token_index)
    token.scroll_into_view_if_needed()
    box = token.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#alternatives:not([hidden])")
    if tab == "alternatives":
        page.wait_for_selector("#panel-settings[aria-busy=false]")
    elif tab == "Attention":
        page.click(f"#alternatives button:has-text('{tab}')")
        page.click("#view-heads")
        page.wait_for_selector(".one-head h2:has-text('Layer')")
        page.locator(".thumbs button").nth(5).click()
        page.wait_for_selector(".one-head h2:has-text('Layer 2, head 2')")
        page.locator(".thumbs button").nth(8).evaluate("one => one.scrollIntoView({ block: 'start' })")
        box = page.locator(".matrix").bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.7 * box["height"])
    else:
        page.keyboard.press("Escape")
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#panel-{tab} .bars li")
        page.locator(f"#panel-{tab} .heads button").nth(6).hover()
    page.screenshot(path=path)
    context.close()
    if path.stat().st_size > MAX_SCREENSHOT_BYTES:
        sys.exit(
            f"{path} has {path.stat().st_size:,} bytes: screenshots for docs/ have at most {MAX_SCREENSHOT_BYTES:,}"
        )


def main(model: str, prompt: str = PROMPT, folder: str = "docs/images") -> None:
    """Write playground-NAME.png for each of `SCREENSHOTS`."""
    plain, tokenizer = gpt2.load(model, device=torch.device("cpu"), dtype=torch.float32)
    assert tokenizer is not None
    with run_playground({served_model_name(model): plain}, tokenizer) as address, launch_browser() as browser:
        for name, (number, tab, how) in SCREENSHOTS.items():
            take_screenshot(browser, address, prompt, Path(folder) / f"playground-{name}.png", number, tab, how)


if __name__ == "__main__":
    main(*sys.argv[1:])
