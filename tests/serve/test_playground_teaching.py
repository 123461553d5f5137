"""What the page explains: examples, the tour, the question marks, and the chat."""

from typing import Any

import httpx

from gpt2.templates import CHATML_TEMPLATE, ChatTemplate
from tests.helpers.playground_browser import MODELS, PROMPT, TOKENIZER, PlaygroundPage, run_playground

pytest_plugins = "tests.helpers.playground_fixtures"


def test_an_empty_page_has_three_examples(reader: PlaygroundPage) -> None:
    page = reader.page
    assert page.locator("#examples [data-text]").count() == 3
    page.locator("#examples [data-text]").nth(1).click()
    assert reader.text.startswith("When Mary and John")
    assert page.is_hidden("#examples")


def test_the_tour_has_six_steps_and_is_offered_once(reader: PlaygroundPage) -> None:
    page = reader.page
    reader.fill_setting("max_tokens", 5)
    page.focus("#take-tour")
    page.keyboard.press("Enter")
    titles = []
    for number in range(1, 7):
        page.wait_for_selector(f"#tour:has-text('{number} of 6')")
        titles.append(page.text_content("#tour h2"))
        assert page.locator(".toured").count() == 1
        assert page.evaluate("document.activeElement.closest('#tour') !== null")
        box = page.locator("#tour").bounding_box()
        assert box["x"] >= 0
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 900
        if number == 3:
            reader.wait_until_done()
            page.keyboard.press("ArrowLeft")
            page.wait_for_selector("#tour:has-text('2 of 6')")
            page.keyboard.press("ArrowRight")
            page.wait_for_selector("#tour:has-text('3 of 6')")
        if number == 4:
            assert reader.accessibility_violations() == []
        page.keyboard.press("ArrowRight")
    assert len(set(titles)) == 6
    assert page.is_hidden("#tour")
    assert page.locator("#backdrop > .model").count() == 5  # the tour has continued the text
    page.click("#new")
    page.reload()
    page.wait_for_selector("#next li")
    assert page.is_hidden("#invite")
    page.click("#open-tour")  # but it can be taken again
    page.keyboard.press("Escape")
    assert page.is_hidden("#tour")
    assert page.evaluate("document.activeElement.id") == "open-tour"


def test_a_declined_tour_is_not_offered_again(reader: PlaygroundPage) -> None:
    page = reader.page
    assert page.is_visible("#invite")
    page.click("#skip-tour")
    page.reload()
    page.wait_for_selector("#next li")
    assert page.is_visible("#examples")
    assert page.is_hidden("#invite")


def test_each_panel_has_a_sentence_and_a_formula(reader: PlaygroundPage) -> None:
    page = reader.page
    page.focus("#help")
    page.keyboard.press("Enter")
    seen = set()
    for tab in page.locator("[role=tab]:visible").all():
        tab.click()
        assert page.get_attribute("#help", "aria-expanded") == "true"
        seen.add(page.text_content("#help-text"))
        assert page.locator("#help-text p:not(.formula)").count() == page.locator("#help-text .formula").count() > 0
    assert len(seen) == 7
    page.click("#help")
    assert page.is_hidden("#help-text")


def test_own_and_generated_words_differ_by_more_than_color(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 4)
    reader.generate(PROMPT)
    line = "one => getComputedStyle(one).textDecorationLine"
    assert reader.page.locator("#backdrop > .model").first.evaluate(line) == "underline"
    assert reader.page.locator("#backdrop > .own").first.evaluate(line) == "none"
    assert "underlined" in reader.page.text_content("#hint")


def test_chat_with_a_model_that_has_a_template(browser: Any, reader: PlaygroundPage) -> None:
    assert reader.page.is_hidden("#tab-chat")  # this one has none
    with run_playground({"one": MODELS["one"]}, TOKENIZER, template=ChatTemplate(CHATML_TEMPLATE)) as address:
        other = PlaygroundPage(browser, address)
        page = other.page
        other.fill_setting("max_tokens", 6)
        page.click("#tab-chat")
        messages: list[dict[str, str]] = []
        for content in ("the cat", "and the dog"):
            messages.append({"role": "user", "content": content})
            page.fill("#chat-text", content)
            page.press("#chat-text", "Enter")
            page.wait_for_selector("#panel-chat [type=submit]:not([disabled])")
            body = {"model": "one", "messages": messages, "max_tokens": 6, "temperature": 1, "top_k": 50, "seed": 42}
            answer = httpx.post(f"{address}v1/chat/completions", json=body, trust_env=False).json()
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            shown = page.locator(".chat li > span").all_text_contents()
            assert shown == [message["content"] for message in messages]
        assert page.locator(".chat b").all_text_contents() == ["You", "Model"] * 2
        assert other.accessibility_violations() == []
        page.click("text=New conversation")
        assert page.locator(".chat li").count() == 0
        assert other.errors == []
        other.context.close()
