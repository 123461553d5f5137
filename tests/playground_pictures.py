"""Pictures of the playground for the docs: python tests/playground_pictures.py MODEL PROMPT OUT"""

import sys
from pathlib import Path
from typing import Any

import torch
from playground_app import browsing, playing

import gpt2

WIDE, PHONE = {"width": 1320, "height": 820}, {"width": 360, "height": 760}
MOST_BYTES = 250_000


def picture(browser: Any, address: str, prompt: str, path: Path, tab: str, **how: Any) -> None:
    """One picture: a text, one of its tokens chosen, and a tab of the inspector; "" for the alternatives."""
    context = browser.new_context(**how)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#next li")
    page.fill("#set-temperature", "0.6")
    page.fill("#set-repetition_penalty", "1.15")
    page.fill("#text", prompt)
    page.click("#go")
    page.wait_for_selector("body:not(.running) #status:has-text('a second')")
    said = page.locator("#backdrop > span > span")
    box = said.nth(24 if tab else 8).bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#alternatives:not([hidden])")
    if tab:
        page.click(f"#alternatives button:has-text('{tab}')")
        page.wait_for_selector(".heads, .lens")
    page.wait_for_timeout(400)
    page.screenshot(path=path)
    context.close()
    assert path.stat().st_size < MOST_BYTES, f"{path} is too large"


def main(model: str, prompt: str, out: str) -> None:
    plain, tokenizer = gpt2.load(model, device=torch.device("cpu"), dtype=torch.float32)
    assert tokenizer is not None
    with playing({Path(model).name: plain}, tokenizer) as address, browsing() as browser:
        for name, tab, how in (
            ("light", "", {"viewport": WIDE, "color_scheme": "light"}),
            ("dark", "Attention", {"viewport": WIDE, "color_scheme": "dark"}),
            ("layers", "Layers", {"viewport": WIDE, "color_scheme": "dark"}),
            ("phone", "", {"viewport": PHONE, "color_scheme": "light", "device_scale_factor": 2}),
        ):
            picture(browser, address, prompt, Path(out) / f"playground-{name}.png", tab, **how)


if __name__ == "__main__":
    main(*sys.argv[1:])
