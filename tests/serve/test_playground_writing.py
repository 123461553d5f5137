"""Writing in the page: edits, undo, long texts, the next token, the edge of the context, and links."""

from typing import Any

import pytest

from gpt2.serve.inspect import attention_weights, score_tokens
from tests.helpers.playground_browser import (
    CONFIG,
    MODELS,
    PROMPT,
    TOKENIZER,
    PlaygroundPage,
    generated_text,
    run_playground,
)

pytest_plugins = "tests.helpers.playground_fixtures"
GENERATED = "#backdrop > .model"
WEIGHTS = "all => all.map((one) => +one.style.getPropertyValue('--weight'))"
# The part of an element that can be seen, between 0 and 1.
IN_VIEW = """one => { const { top, bottom } = one.getBoundingClientRect();
  let low = Math.max(top, 0), high = Math.min(bottom, innerHeight);
  for (let at = one.parentElement; at; at = at.parentElement) {
    if (getComputedStyle(at).overflowY === "visible") continue;
    const box = at.getBoundingClientRect();
    [low, high] = [Math.max(low, box.top), Math.min(high, box.bottom)];
  }
  return (high - low) / (bottom - top); }"""


def shades(reader: PlaygroundPage) -> list[str]:
    return reader.page.locator(f"{GENERATED} > span").evaluate_all("all => all.map((one) => one.className)")


def test_an_edit_keeps_the_tokens_and_undo_brings_all_back(reader: PlaygroundPage) -> None:
    page = reader.page
    reader.fill_setting("max_tokens", 12)
    first = reader.generate(PROMPT)
    before = shades(reader)
    page.locator("#text").press("Control+Home")
    with page.expect_response("**/inspect/score"):
        page.keyboard.type("oh ")
    assert reader.text == f"oh {first}"
    assert len(shades(reader)) == len(before)
    ids = TOKENIZER.encode(f"oh {PROMPT}") + generated_ids(first)
    bits = [-token.logprob / 0.6931471805599453 for token in score_tokens(MODELS["one"], TOKENIZER, ids)]
    expected = [f"p{min(5, int(each // 2))}" for each in bits[-len(before) :]]
    page.wait_for_function(
        "([all, expected]) => [...document.querySelectorAll(all)].map((one) => one.className).join() === expected",
        arg=[f"{GENERATED} > span", ",".join(expected)],
    )
    reader.click_token(3)  # the card is still there, and the token is marked
    assert page.locator("#backdrop > .chosen").count() == 1
    page.keyboard.press("Escape")
    page.focus("#text")
    page.keyboard.press("Control+z")
    assert (reader.text, shades(reader)) == (first, before)
    page.keyboard.press("Control+z")
    assert reader.text == PROMPT  # the generation is undone
    page.keyboard.press("Control+Shift+Z")
    assert (reader.text, shades(reader)) == (first, before)
    page.click("#new")
    assert reader.text == ""
    assert page.is_visible("#examples")
    page.click("#undo")
    assert (reader.text, shades(reader)) == (first, before)
    page.click("#open-history")
    page.fill("#save-name", "The cat")
    page.click("#save")
    assert page.locator("#entries b").text_content() == "The cat"
    assert page.is_hidden("#forget")  # there are none without a name
    assert page.locator("#entries li").count() == 1
    page.click("#history .close")


def test_a_card_stays_when_new_colors_arrive(reader: PlaygroundPage) -> None:
    page, held = reader.page, []
    reader.fill_setting("max_tokens", 6)
    reader.generate(PROMPT)
    page.wait_for_selector("#panel-settings[aria-busy=false]")
    page.route("**/inspect/score", lambda route: held.append(route))
    page.locator("#text").press("Control+Home")
    with page.expect_request("**/inspect/score"):
        page.keyboard.type("oh ")
    reader.click_token(2)
    with page.expect_response("**/inspect/score"):
        held[0].continue_()
    page.wait_for_selector("#panel-settings[aria-busy=false]")
    assert page.is_visible("#alternatives")
    page.locator("#text").press("Control+Home")
    page.keyboard.type("x")
    assert page.is_hidden("#alternatives")


def generated_ids(text: str) -> list[int]:
    """The ids of the tokens that the model generated after the prompt: no text has them by encoding alone."""
    from gpt2.generation.engine import Engine, GenerationRequest
    from gpt2.generation.sampling import Sampling

    engine = Engine(MODELS["one"], 1)
    request = GenerationRequest(TOKENIZER.encode(PROMPT), Sampling(top_k=50), 12, 42, 0, (TOKENIZER.end_of_text,))
    sequence = engine.submit(request)
    while not engine.idle:
        engine.step()
    assert TOKENIZER.decode([*TOKENIZER.encode(PROMPT), *sequence.new_tokens]) == text
    return list(sequence.new_tokens)


@pytest.mark.parametrize("viewport", [{"width": 1440, "height": 900}, {"width": 375, "height": 780}])
def test_a_long_text_is_followed_while_it_streams(browser: Any, address: str, viewport: dict[str, int]) -> None:
    reader = PlaygroundPage(browser, address, viewport=viewport)
    page = reader.page
    if viewport["width"] > 1000:  # all of it is in view at once: bars and sliders
        for part in ("#next li:first-child", "#next li:last-child", "#set-max_tokens"):
            assert page.locator(part).evaluate(IN_VIEW) == 1, part
    reader.fill_setting("max_tokens", 30)
    page.fill("#text", "the cat\n" * 60)
    page.wait_for_selector("#window:not([hidden])")
    page.click("#go")
    reader.wait_until_done()
    assert page.locator("#backdrop > :last-child").evaluate(IN_VIEW) > 0.9
    for part in ("#go", "#status"):
        assert page.locator(part).evaluate(IN_VIEW) == 1, part
    # The attention of a head is painted onto the text, and its strongest token is scrolled into view.
    page.click("#tab-attention")
    heads = page.locator(".heads button")
    heads.first.wait_for()
    weights: list[float] = []
    for i in range(2):
        heads.nth(i).hover()
        page.wait_for_selector(".heated")
        weights = page.locator("#heat-A span").evaluate_all(
            "all => all.map((one) => +one.style.getPropertyValue('--weight'))"
        )
        strongest = page.locator("#heat-A span").nth(weights.index(max(weights[1:]), 1))
        if viewport["width"] > 1000:
            assert strongest.evaluate(IN_VIEW) > 0.9
            assert page.locator("#tab-attention").evaluate(IN_VIEW) == 1
    ids = TOKENIZER.encode("the cat\n" * 60)
    assert len(weights) < CONFIG.block_size < len(ids)
    assert reader.errors == []
    reader.context.close()


def test_attention_is_painted_onto_the_text(reader: PlaygroundPage) -> None:
    page = reader.page
    reader.fill_setting("max_tokens", 12)
    text = reader.generate(PROMPT)
    reader.click_token(4)
    page.click("#alternatives button:has-text('Attention')")
    page.locator(".heads button").nth(3).hover()
    page.wait_for_selector(".heated")
    assert page.text_content("#heat-A") == f"{text}\u200b"
    ids = [*TOKENIZER.encode(PROMPT), *generated_ids(text)[:4]]
    row = attention_weights(MODELS["one"], ids, len(ids) - 1)[1, 1].tolist()
    expected = [pytest.approx(min(1, weight / max(row[1:])), abs=2e-3) for weight in row]
    spans = page.locator("#heat-A span")
    assert spans.evaluate_all(WEIGHTS) == expected
    assert "".join(spans.all_text_contents()) == TOKENIZER.decode(ids)
    page.mouse.move(0, 0)
    assert page.locator(".heated").count() == 0


def test_a_likely_token_is_inserted(reader: PlaygroundPage) -> None:
    page = reader.page
    page.fill("#text", PROMPT)
    page.wait_for_selector("#panel-settings[aria-busy=false]")
    second = page.locator("#next button").nth(1)
    word = second.locator(".word").text_content().replace("␣", " ")
    second.click()
    assert reader.text == PROMPT + word
    assert page.locator(GENERATED).count() == 1
    page.wait_for_selector("#panel-settings[aria-busy=false]")
    page.click("#undo")
    assert reader.text == PROMPT


def test_the_edge_of_the_context_is_shown(reader: PlaygroundPage) -> None:
    page, text = reader.page, "the dog ran " * 40
    page.fill("#text", text)
    page.wait_for_selector("#window:not([hidden])")
    ids = TOKENIZER.encode(text)
    step = CONFIG.block_size // 4
    start = -(-(len(ids) - CONFIG.block_size + 1) // step) * step
    hidden = TOKENIZER.decode(ids[:start])
    assert f"The first {start} tokens (hatched)" in page.text_content("#window")
    assert "".join(page.locator("#backdrop .outside").all_text_contents()) == hidden
    with page.expect_request("**/v1/completions") as request:
        page.click("#go")
    assert request.value.post_data_json["prompt"] == ids[start:]
    reader.wait_until_done()
    page.fill("#text", PROMPT)
    page.wait_for_selector("#window", state="hidden")


def test_invalid_numbers_are_explained_and_not_sent(reader: PlaygroundPage) -> None:
    page = reader.page
    for name, value, message in (
        ("top_p", "3", "must be at most 1"),
        ("temperature", "-1", "must be at least 0"),
        ("top_k", "1.5", "a whole number is required"),
    ):
        page.fill(f"#set-{name}", value)
        assert page.get_attribute(f"#set-{name}", "aria-invalid") == "true"
        assert page.text_content(f"#set-{name}-about") == message
    reader.fill_setting("max_tokens", 5)
    assert reader.generate(PROMPT) == generated_text(max_new_tokens=5)
    assert page.is_hidden("#notice")


def test_both_sides_of_a_comparison_are_equal(reader: PlaygroundPage) -> None:
    page = reader.page
    reader.fill_setting("max_tokens", 6)
    page.fill("#text", PROMPT)
    page.click("#compare")
    assert page.text_content("#side-A") == "one, temperature 1, top-k 50"
    assert page.text_content("#side-B") == "two, temperature 1, top-k 50"  # the model is the only difference
    reader.continue_text()
    text = page.text_content("#other")
    assert text == generated_text(model="two", max_new_tokens=6)
    page.click("#show-b")
    with page.expect_request("**/inspect/next") as request:
        page.fill("#set-top_k", "20")
    assert page.text_content("#side-B") == "two, top-k 20"
    assert request.value.post_data_json["model"] == "two"
    assert TOKENIZER.decode(request.value.post_data_json["tokens"]) == text
    page.locator("#other > .model").nth(2).click()
    page.wait_for_selector("#alternatives:not([hidden])")
    assert page.locator("#other > .chosen").count() == 1
    word = page.locator("#alternatives button:not([aria-current]) .word").first.text_content().replace("␣", " ")
    kept = "".join(page.locator("#other > span").all_text_contents()[:3])
    page.locator("#alternatives .bars button:not([aria-current])").first.click()
    reader.wait_until_done()
    assert page.text_content("#other").startswith(kept + word)
    assert reader.text == generated_text(max_new_tokens=6)  # A is as before


def test_characters_of_many_bytes(browser: Any) -> None:
    model = MODELS["one"]
    text = "é😀 日本"
    with run_playground({"one": model}, TOKENIZER) as address:
        reader = PlaygroundPage(browser, address)
        page = reader.page
        page.fill("#text", text)
        page.click("#tab-tokens")
        page.wait_for_selector(".tokens .character")
        assert page.locator(".tokens .character b").all_text_contents() == ["é", "😀", "日", "本"]
        pieces = page.locator(".tokens .character").nth(1).locator("button").all_text_contents()
        assert " ".join(pieces) == "😀".encode().hex(" ").upper()
        titles = page.locator(".tokens button").evaluate_all("all => all.map((one) => one.title)")
        ids = [int(title.split()[1].rstrip(",")) for title in titles]
        assert ids == TOKENIZER.encode(text)
        assert "\ufffd" not in page.inner_text("main")
        assert "e+" not in page.text_content(".big")
        reader.context.close()


def test_a_link_is_short_and_says_the_same(reader: PlaygroundPage, browser: Any) -> None:
    page = reader.page
    reader.fill_setting("max_tokens", 70)
    reader.generate(PROMPT)
    text = reader.continue_text()
    count = page.locator(GENERATED).count()
    assert count == 140
    page.click("#open-share")
    page.click("text=Copy link")
    page.wait_for_selector("#preview:has-text('#z=')")
    link = page.text_content("#preview")
    assert len(link) < 2000
    other = browser.new_context().new_page()
    other.goto(link)
    other.wait_for_selector("#next li")
    assert other.input_value("#text") == text
    assert other.locator(GENERATED).count() == count
    other.context.close()
