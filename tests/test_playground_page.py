"""The playground's page in a real browser. What it shows is compared with what the model says without it."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playground_app import CONFIG, MODELS, PROMPT, TOKENIZER, SlowGPT, browsing, playing

import gpt2
from gpt2.generation.engine import Engine, Request
from gpt2.generation.sampling import Sampling
from gpt2.serve.inspect import attention, lens, perplexity, score
from gpt2.serve.limits import Limits

pytestmark = pytest.mark.slow  # a minute or more with a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with playing(MODELS, TOKENIZER) as address:
        yield address


class Reader:
    """Somebody with a browser, who writes down what goes wrong in it."""

    def __init__(self, browser: Any, address: str, **how: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        self.context.set_default_timeout(30_000)
        self.page, self.troubles, self.expected = self.context.new_page(), [], ()
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.troubles.append(said.text))
        self.page.on("request", lambda request: self._check_origin(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector("#next li")

    def _check_origin(self, url: str, address: str) -> None:
        if not url.startswith((address, "blob:", "data:")):
            self.troubles.append(f"asked {url}")

    def set(self, name: str, value: Any) -> None:
        """Type a setting."""
        if not self.page.is_visible(f"#set-{name}"):
            self.page.click("summary:has-text('More')")
            self.page.click("summary:has-text('How it ends')")
        self.page.fill(f"#set-{name}", str(value))

    def write(self, text: str, key: str | None = None) -> str:
        """Type a text, let the model go on, and give all of it."""
        self.page.fill("#text", text)
        return self.go_on(key)

    def go_on(self, key: str | None = None) -> str:
        self.page.keyboard.press(key) if key else self.page.click("#go")
        return self.wait()

    def wait(self) -> str:
        """Until nothing is written any more."""
        self.page.wait_for_selector("body:not(.running) #status:has-text('a second')")
        return self.text

    @property
    def text(self) -> str:
        return self.page.input_value("#text")

    def click_token(self, number: int) -> str:
        """Click on a token that was said; gives it."""
        token = self.page.locator("#backdrop > span:has(> span)").nth(number)
        box = token.locator("span").bounding_box()
        self.page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
        self.page.wait_for_selector("#alternatives:not([hidden])")
        return token.text_content()

    def violations(self) -> list[str]:
        """What axe finds wrong for those who cannot see, point or hear."""
        reason = "no axe: pip install axe-playwright-python"
        module = pytest.importorskip("axe_playwright_python.sync_playwright", reason=reason)
        found = module.Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {node['html'][:120]} {node['any'][:1]}" for one in found for node in one["nodes"]]


@pytest.fixture
def reader(browser: Any, address: str) -> Iterator[Reader]:
    reader = Reader(browser, address)
    yield reader
    reader.context.close()
    assert [trouble for trouble in reader.troubles if not trouble.startswith(tuple(reader.expected))] == []


def said(prompt: str = PROMPT, model: str = "one", **settings: Any) -> str:
    settings = {"max_new_tokens": 12, "top_k": 50, "seed": 42, **settings}
    return gpt2.generate(MODELS[model], TOKENIZER, prompt, **settings)[0]


def test_it_says_what_the_model_says(reader: Reader) -> None:
    reader.set("max_tokens", 12)
    assert reader.write(PROMPT) == said()
    words = reader.page.locator("#backdrop > span:has(> span)").all_text_contents()
    assert PROMPT + "".join(words) == said()
    shades = reader.page.locator("#backdrop > span > span").evaluate_all("all => all.map((one) => one.className)")
    ids = TOKENIZER.encode(said())
    bits = [-token.logprob / math.log(2) for token in score(MODELS["one"], TOKENIZER, ids)][-len(shades) :]
    assert shades == [f"p{min(5, int(each // 2))}" for each in bits]


def test_it_goes_on_from_what_was_edited(reader: Reader) -> None:
    reader.set("max_tokens", 5)
    first = reader.write(PROMPT)
    reader.page.locator("#text").press("Control+End")
    reader.page.keyboard.type(" and")
    assert reader.text == first + " and"
    assert reader.page.locator("#backdrop > span > span").count() == 5
    assert reader.go_on().startswith(first + " and")
    reader.page.fill("#text", "a bird" + first[len(PROMPT) :])
    assert reader.page.locator("#backdrop > span > span").count() == 0


def test_a_text_that_the_model_begins(reader: Reader) -> None:
    reader.set("max_tokens", 8)
    reader.page.wait_for_selector("#next-note:has-text('50 tokens')")
    assert reader.write("") == said("", max_new_tokens=8)
    reader.click_token(1)
    reader.page.click("#tab-tokens")
    reader.page.wait_for_selector(".tokens button")
    assert "".join(reader.page.locator(".tokens button").all_text_contents()).replace("␣", " ") == reader.text
    end = TOKENIZER.end_of_text
    scored = score(MODELS["one"], TOKENIZER, [end, *said_ids([end])])
    ranks = reader.page.locator(".tokens button").evaluate_all("all => all.map((one) => one.title.split('rank ')[1])")
    assert [token.rank for token in scored] == list(map(int, ranks))


def test_it_can_be_stopped(browser: Any) -> None:
    slow = SlowGPT(CONFIG)
    slow.load_state_dict(MODELS["one"].state_dict())
    with playing({"slow": slow}, TOKENIZER, Limits(slots=1, max_waiting=0)) as address:
        reader = Reader(browser, address)
        reader.set("max_tokens", 400)
        reader.page.fill("#text", PROMPT)
        reader.page.click("#go")
        reader.page.wait_for_selector("#backdrop > span:nth-of-type(4) > span")
        other = Reader(browser, address)  # the only place is taken
        other.page.fill("#text", PROMPT)
        other.page.click("#go")
        other.page.wait_for_selector("#notice:has-text('The server is busy')")
        assert "Try again in" in other.page.text_content("#notice")
        assert reader.page.is_visible("#stop")
        reader.page.keyboard.press("Escape")
        reader.page.wait_for_selector("#status:has-text('Stopped after')")
        length = len(reader.text)
        assert length < len(said(max_new_tokens=400))
        other.set("max_tokens", 3)
        other.page.click("#retry")
        assert other.wait().startswith(PROMPT)
        assert other.page.is_hidden("#notice")
        assert len(reader.text) == length
        assert reader.troubles == []
        reader.context.close()
        other.context.close()


def test_a_server_that_is_gone_is_told_plainly(browser: Any) -> None:
    with playing(MODELS, TOKENIZER) as address:
        reader = Reader(browser, address)
        reader.page.fill("#text", PROMPT)
        reader.page.wait_for_timeout(300)
    reader.page.click("#go")
    reader.page.wait_for_selector("#notice:has-text('The server does not answer. Is gpt2 serve still running?')")
    assert reader.text == PROMPT
    assert reader.page.is_enabled("#go")
    reader.context.close()


def test_sliders_redraw_the_chances(reader: Reader) -> None:
    reader.page.fill("#text", PROMPT)
    reader.page.wait_for_selector("#next-note:has-text('50 tokens have a chance')")
    before = reader.page.locator("#next .number").all_text_contents()
    reader.page.locator("[aria-label='Temperature, slider']").fill("0.3")
    reader.page.wait_for_selector(f"#next li:first-child .number:not(:text-is('{before[0]}'))")
    assert reader.page.input_value("#set-temperature") == "0.3"
    reader.set("temperature", 0)
    reader.page.wait_for_selector("#next-note:has-text('1 token has a chance')")
    assert reader.page.locator("#next .number").all_text_contents() == ["100.0 %", *["0 %"] * 11]
    reader.set("seed", 7)
    for slider in reader.page.locator("input[type=range]").all():
        assert slider.get_attribute("aria-label")
        slider.press("ArrowRight")
    assert reader.page.input_value("#set-top_k") == "51"
    reader.page.click("#reset")
    reader.page.wait_for_selector("#next-note:has-text('50 tokens have a chance')")


def test_another_token_makes_a_branch_that_one_can_leave_again(reader: Reader) -> None:
    reader.set("max_tokens", 6)
    first = reader.write(PROMPT)
    token = reader.click_token(2)
    card = reader.page.locator("#alternatives")
    current = card.locator("[aria-current] .word").text_content()
    assert current.replace("␣", " ") == token
    other = card.locator("button:not([aria-current]):not(.out) .word").first
    word = other.text_content().replace("␣", " ")
    other.click()
    second = reader.wait()
    kept = PROMPT + "".join(reader.page.locator("#backdrop > span:has(> span)").all_text_contents()[:2])
    assert first.startswith(kept)
    assert second.startswith(kept + word)
    reader.page.click("#tab-tree")
    reader.page.wait_for_selector(".tree .tree button")
    assert reader.page.locator(".tree .tree button").count() == 2
    assert reader.page.locator(".tree [aria-current]").count() == 1
    reader.page.locator(".tree .tree button:not([aria-current])").click()
    assert reader.text == first
    reader.page.wait_for_selector(".tree .tree li:first-child [aria-current]")


def test_a_token_can_be_looked_into(reader: Reader) -> None:
    reader.set("max_tokens", 8)
    text = reader.write(PROMPT)
    reader.click_token(4)
    reader.page.click("#alternatives button:has-text('Attention')")
    heads = reader.page.locator(".heads button")
    heads.first.wait_for()
    assert heads.count() == CONFIG.n_layer * CONFIG.n_head
    heads.first.focus()
    reader.page.keyboard.press("ArrowDown")
    assert reader.page.locator(".heads [aria-pressed=true]").get_attribute("aria-label") == "Layer 2, head 1"
    looked = reader.page.locator(".looked span").all_text_contents()
    assert text.startswith("".join(looked))
    prompt = TOKENIZER.encode(PROMPT)
    ids = [*prompt, *said_ids(prompt)[:4]]
    assert "".join(looked) == TOKENIZER.decode(ids)
    strongest = max(attention(MODELS["one"], ids, len(ids) - 1)[1, 0].tolist())
    assert reader.page.locator("#panel-attention .bars .number").first.text_content() == f"{100 * strongest:.1f} %"
    reader.page.click("#tab-layers")
    reader.page.wait_for_selector(".lens tbody tr")
    assert reader.page.locator(".lens tbody th").all_text_contents() == ["3", "2", "1", "in"]
    best = [layer.tokens[0][1] for layer in lens(MODELS["one"], TOKENIZER, ids, len(ids) - 1, 1)][::-1]
    shown = [cell.replace("␣", " ") for cell in reader.page.locator(".lens td:nth-child(2)").all_text_contents()]
    assert shown == best


def said_ids(prompt: list[int]) -> list[int]:
    """The eight tokens that follow a prompt, as the model says them."""
    engine = Engine(MODELS["one"], 1)
    new = engine.submit(Request(prompt, Sampling(top_k=50), 8, 42, 0, (TOKENIZER.end_of_text,)))
    while not engine.idle:
        engine.step()
    return new.new_tokens


def test_every_token_of_a_text_with_its_perplexity(reader: Reader) -> None:
    text = "the dog ran to\nthe barn, naïvely"
    reader.page.fill("#text", text)
    reader.page.click("#tab-tokens")
    reader.page.wait_for_selector(".tokens button")
    ids = TOKENIZER.encode(text)
    scored = score(MODELS["one"], TOKENIZER, ids)
    assert float(reader.page.text_content(".big").split()[0]) == pytest.approx(perplexity(scored), rel=1e-3)
    assert reader.page.locator(".tokens button").count() == len(ids)
    reader.page.locator(".tokens button").first.focus()
    reader.page.keyboard.press("ArrowRight")
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_selector("#alternatives:not([hidden])")
    assert f"rank {scored[0].rank}" in reader.page.text_content("#alternatives .head")
    word = reader.page.locator("#alternatives .bars .word").first.text_content().replace("␣", " ")
    reader.page.locator("#alternatives .bars button").first.press("Enter")
    assert reader.wait().startswith(TOKENIZER.decode(ids[:1]) + word)


def test_two_models_and_two_settings_side_by_side(reader: Reader) -> None:
    reader.set("max_tokens", 12)
    reader.page.fill("#text", PROMPT)
    reader.page.click("#compare")
    reader.set("max_tokens", 12)
    reader.set("temperature", 1)
    first = reader.go_on()
    other = reader.page.text_content("#other")
    assert (first, other) == (said(), said(model="two"))
    reader.page.select_option("#model-b", "one")
    reader.page.fill("#text", PROMPT)
    assert reader.go_on() == reader.page.text_content("#other") == said()
    reader.set("temperature", 0)
    reader.page.fill("#text", PROMPT)
    reader.go_on()
    assert reader.page.text_content("#other") == said(temperature=0)
    reader.page.click("#adopt")
    assert reader.text == said(temperature=0)


def test_it_can_be_used_from_the_keyboard(reader: Reader) -> None:
    reader.set("max_tokens", 4)
    reader.page.focus("#text")
    reader.page.keyboard.type(PROMPT)
    text = reader.go_on("Control+Enter")
    assert len(text) > len(PROMPT)
    reader.page.keyboard.press("Control+End")
    reader.page.keyboard.press("Alt+Enter")
    reader.page.wait_for_selector("#alternatives:not([hidden])")
    assert reader.page.evaluate("document.activeElement.closest('#alternatives') !== null")
    reader.page.keyboard.press("Escape")
    assert reader.page.evaluate("document.activeElement.id") == "text"
    reader.page.focus("#tab-settings")
    for name in ("attention", "layers", "tokens", "tree", "settings"):
        reader.page.keyboard.press("ArrowRight")
        assert reader.page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert reader.page.locator("[role=tabpanel]:not([hidden])").get_attribute("id") == f"panel-{name}"


def test_texts_are_kept_shared_and_taken_away(reader: Reader, browser: Any, address: str, tmp_path: Path) -> None:
    reader.set("max_tokens", 6)
    text = reader.write(PROMPT)
    reader.page.reload()
    reader.page.wait_for_selector("#next li")
    assert reader.text == text
    reader.page.fill("#text", "")
    reader.page.click("#open-history")
    reader.page.locator("#entries button").first.click()
    assert reader.text == text
    reader.page.click("#open-share")
    for name, part in {"curl": "v1/completions", "Python": "OpenAI(", "Command line": "gpt2 sample"}.items():
        reader.page.click(f"#choices button:has-text('{name}')")
        reader.page.wait_for_selector(f"#preview:has-text('{part}')")
    with reader.page.expect_download() as download:
        reader.page.click("text=Save as JSON")
    download.value.save_as(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert (saved["text"], saved["model"], saved["settings"]["max_tokens"]) == (text, "one", 6)
    reader.page.click("text=Copy link")
    reader.page.wait_for_selector("#preview:has-text('#s=')")
    link = reader.page.text_content("#preview")
    other = browser.new_context().new_page()
    other.goto(link)
    other.wait_for_selector("#next li")
    assert other.input_value("#text") == text
    assert other.input_value("#set-max_tokens") == "6"
    assert other.locator("#backdrop > span > span").count() == 6
    other.context.close()


@pytest.mark.parametrize("fragment", ["#s=!", "#s=e30", "#s=bnVsbA", "#s=eyJwYXRoIjpbMSx7fSxbXSxudWxsXX0"])
def test_a_broken_link_is_an_empty_page(reader: Reader, address: str, fragment: str) -> None:
    reader.page.goto("about:blank")
    reader.page.goto(address + fragment)
    reader.page.wait_for_selector("#next li")
    assert reader.text == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_everybody_can_use_it(browser: Any, address: str, scheme: str, width: int) -> None:
    reader = Reader(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800})
    paper = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")
    reader.set("max_tokens", 8)
    reader.write(PROMPT)
    reader.click_token(3)
    assert reader.violations() == []
    reader.page.keyboard.press("Escape")
    for name in ("attention", "layers", "tokens", "tree"):
        reader.page.click(f"#tab-{name}")
        reader.page.wait_for_selector(f"#panel-{name} > :nth-child(2)")
        assert reader.violations() == [], name
        assert reader.page.evaluate("document.documentElement.scrollWidth") == width, name
    reader.page.click("#compare")
    reader.go_on()
    assert reader.violations() == []
    for name in ("history", "share"):
        reader.page.click(f"#open-{name}")
        assert reader.violations() == [], name
        reader.page.keyboard.press("Escape")
    assert reader.page.evaluate("document.documentElement.scrollWidth") == width
    assert reader.troubles == []
    reader.context.close()
