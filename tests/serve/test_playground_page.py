"""The page of the playground in a real browser. What it shows is compared with the model run directly."""

import codecs
import math
from typing import Any

import pytest

from gpt2.commands.generation_args import encode_bad_words
from gpt2.generation.engine import Engine, GenerationRequest
from gpt2.generation.filters import History
from gpt2.generation.sampling import Sampling
from gpt2.model import GPT, GPTConfig
from gpt2.serve.inspect import attention_weights, logit_lens, next_logits, perplexity, score_tokens, top_candidates
from gpt2.tokenizer import Tokenizer
from tests.helpers.playground_browser import (
    BYTE_TOKENIZER,
    CONFIG,
    MODELS,
    PROMPT,
    TOKENIZER,
    PlaygroundPage,
    generated_text,
    run_playground,
)
from tests.helpers.transformers_reference import random_model

pytest_plugins = "tests.helpers.playground_fixtures"


def test_the_text_and_its_colours_are_those_of_the_model(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 12)
    assert reader.generate(PROMPT) == generated_text()
    words = reader.page.locator("#backdrop > span:has(> span)").all_text_contents()
    assert PROMPT + "".join(words) == generated_text()
    shades = reader.page.locator("#backdrop > span > span").evaluate_all("all => all.map((one) => one.className)")
    ids = TOKENIZER.encode(generated_text())
    bits = [-token.logprob / math.log(2) for token in score_tokens(MODELS["one"], TOKENIZER, ids)][-len(shades) :]
    assert shades == [f"p{min(5, int(each // 2))}" for each in bits]


def test_generation_continues_an_edited_text(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 5)
    first = reader.generate(PROMPT)
    reader.page.locator("#text").press("Control+End")
    reader.page.keyboard.type(" and")
    assert reader.text == first + " and"
    assert reader.page.locator("#backdrop > span > span").count() == 5
    assert reader.continue_text().startswith(first + " and")
    reader.page.fill("#text", "a bird")
    assert reader.page.locator("#backdrop > span > span").count() == 0


def test_generation_from_an_empty_text(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 8)
    reader.page.wait_for_selector("#next-note:has-text('50 tokens')")
    assert reader.generate("") == generated_text("", max_new_tokens=8)
    reader.click_token(1)
    reader.page.click("#tab-tokens")
    reader.page.wait_for_selector(".tokens button")
    assert "".join(reader.page.locator(".tokens button").all_text_contents()).replace("␣", " ") == reader.text
    end = TOKENIZER.end_of_text
    scored = score_tokens(MODELS["one"], TOKENIZER, [end, *generated_ids([end])])
    ranks = reader.page.locator(".tokens button").evaluate_all("all => all.map((one) => one.title.split('rank ')[1])")
    assert [token.rank for token in scored] == list(map(int, ranks))


def test_sliders_update_the_probabilities(reader: PlaygroundPage) -> None:
    reader.page.fill("#text", PROMPT)
    reader.page.wait_for_selector("#next-note:has-text('50 tokens have a probability above 0')")
    before = reader.page.locator("#next .number").all_text_contents()
    reader.page.locator("[aria-label='Temperature, slider']").fill("0.3")
    reader.page.wait_for_selector(f"#next li:first-child .number:not(:text-is('{before[0]}'))")
    assert reader.page.input_value("#set-temperature") == "0.3"
    reader.fill_setting("temperature", 0)
    reader.page.wait_for_selector("#next-note:has-text('1 token has a probability above 0')")
    assert reader.page.locator("#next .number").all_text_contents() == ["100.0 %", *["0 %"] * 9]
    reader.fill_setting("seed", 7)
    for slider in reader.page.locator("input[type=range]").all():
        assert slider.get_attribute("aria-label")
        slider.press("ArrowRight")
    assert reader.page.input_value("#set-top_k") == "51"
    reader.page.click("#reset")
    reader.page.wait_for_selector("#next-note:has-text('50 tokens have a probability above 0')")


def test_an_alternative_token_starts_a_branch(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 6)
    first = reader.generate(PROMPT)
    token = reader.click_token(2)
    card = reader.page.locator("#alternatives")
    current = card.locator("[aria-current] .word").text_content()
    assert current.replace("␣", " ") == token
    other = card.locator("button:not([aria-current]):not(.out) .word").first
    word = other.text_content().replace("␣", " ")
    other.click()
    second = reader.wait_until_done()
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


def test_attention_and_layers_of_a_token(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 8)
    text = reader.generate(PROMPT)
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
    ids = [*prompt, *generated_ids(prompt)[:4]]
    assert "".join(looked) == TOKENIZER.decode(ids)
    strongest = max(attention_weights(MODELS["one"], ids, len(ids) - 1)[1, 0].tolist())
    assert reader.page.locator("#panel-attention .bars .number").first.text_content() == f"{100 * strongest:.1f} %"
    reader.page.click("#tab-layers")
    reader.page.wait_for_selector("#one-lens tbody tr")
    assert reader.page.locator("#one-lens tbody th").all_text_contents() == ["3", "2", "1", "in"]
    best = [layer.tokens[0].text for layer in logit_lens(MODELS["one"], TOKENIZER, ids, len(ids) - 1, 1)][::-1]
    shown = [cell.replace("␣", " ") for cell in reader.page.locator("#one-lens td:nth-child(2)").all_text_contents()]
    assert shown == best


def generated_ids(
    prompt: list[int], model: GPT = MODELS["one"], tokenizer: Tokenizer = TOKENIZER, **how: Any
) -> list[int]:
    """The eight token ids that the model generates after a prompt."""
    engine = Engine(model, 1)
    sampling = Sampling(**{"top_k": 50, **how})
    new = engine.submit(GenerationRequest(prompt, sampling, 8, 42, 0, (tokenizer.end_of_text,)))
    while not engine.idle:
        engine.step()
    return new.new_tokens


def test_tokens_and_perplexity_of_a_text(reader: PlaygroundPage) -> None:
    text = "the dog ran to\nthe barn, naïvely"
    reader.page.fill("#text", text)
    reader.page.click("#tab-tokens")
    reader.page.wait_for_selector(".tokens button")
    ids = TOKENIZER.encode(text)
    scored = score_tokens(MODELS["one"], TOKENIZER, ids)
    assert float(reader.page.text_content(".big").split()[0]) == pytest.approx(perplexity(scored), rel=1e-3)
    assert reader.page.locator(".tokens button").count() == len(ids)
    reader.page.locator(".tokens button").first.focus()
    reader.page.keyboard.press("ArrowRight")
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_selector("#alternatives:not([hidden])")
    assert f"rank {scored[0].rank}" in reader.page.text_content("#alternatives .head")
    word = reader.page.locator("#alternatives .bars .word").first.text_content().replace("␣", " ")
    reader.page.locator("#alternatives .bars button").first.press("Enter")
    assert reader.wait_until_done().startswith(TOKENIZER.decode(ids[:1]) + word)


def test_two_models_and_two_settings_are_compared(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 12)
    reader.page.fill("#text", PROMPT)
    reader.page.click("#compare")
    first = reader.continue_text()
    other = reader.page.text_content("#other")
    assert (first, other) == (generated_text(), generated_text(model="two"))
    reader.page.select_option("#model-b", "one")
    reader.page.fill("#text", PROMPT)
    assert reader.continue_text() == reader.page.text_content("#other") == generated_text()
    reader.fill_setting("temperature", 0)
    reader.page.fill("#text", PROMPT)
    reader.continue_text()
    assert reader.page.text_content("#other") == generated_text(temperature=0)
    assert reader.page.text_content("#side-B") == "one, temperature 0"
    reader.page.click("#adopt")
    assert reader.text == generated_text(temperature=0)


def test_the_page_can_be_used_with_the_keyboard(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 4)
    reader.page.focus("#text")
    reader.page.keyboard.type(PROMPT)
    text = reader.continue_text("Control+Enter")
    assert len(text) > len(PROMPT)
    reader.page.keyboard.press("Control+End")
    reader.page.keyboard.press("Alt+Enter")
    reader.page.wait_for_selector("#alternatives:not([hidden])")
    assert reader.page.evaluate("document.activeElement.closest('#alternatives') !== null")
    reader.page.keyboard.press("Escape")
    assert reader.page.evaluate("document.activeElement.id") == "text"
    reader.page.focus("#tab-settings")
    for name in ("attention", "layers", "contributions", "whatif", "tokens", "tree", "settings"):
        reader.page.keyboard.press("ArrowRight")
        assert reader.page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert reader.page.locator("[role=tabpanel]:not([hidden])").get_attribute("id") == f"panel-{name}"


def test_bad_words_and_logit_bias(reader: PlaygroundPage) -> None:
    reader.fill_setting("max_tokens", 8)
    usual = reader.generate(PROMPT)
    first = usual[len(PROMPT) :].split()[0]
    reader.page.fill("#text", PROMPT)
    reader.fill_setting("bad_words", f"{first}\nnever\n\n")
    reader.fill_setting("logit_bias", '7 = 2.5\n"the dog"=3\nfoo')
    assert reader.page.get_attribute("#set-logit_bias", "aria-invalid") == "true"
    assert reader.page.text_content("#set-logit_bias-about") == 'not id=bias or "text"=bias: foo'
    words = encode_bad_words(TOKENIZER, [first, "never"])
    biases = {7: 2.5} | dict.fromkeys(TOKENIZER.encode("the dog"), 3.0)
    text = reader.continue_text()
    assert text == generated_text(max_new_tokens=8, bad_words=words, logit_bias=biases) != usual
    sampling = Sampling(top_k=50, bad_words=words, logit_bias=biases)
    ids = TOKENIZER.encode(PROMPT)
    likely = top_candidates(next_logits(MODELS["one"], ids), TOKENIZER, sampling, History(ids, len(ids), ()), 10)
    reader.page.fill("#text", PROMPT)
    reader.page.wait_for_selector(f"#next li:first-child .number:text-is('{100 * likely.tokens[0].probability:.1f} %')")
    shown = [word.replace("␣", " ") for word in reader.page.locator("#next .word").all_text_contents()]
    assert shown == [token.text for token in likely.tokens]


def complete_characters(ids: list[int]) -> str:
    """The text of byte tokens without the incomplete character at the length limit, which is not shown."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(b"".join(BYTE_TOKENIZER.token_bytes(token) for token in ids))


def test_partial_characters_keep_their_token_ids(browser: Any) -> None:
    model = random_model(
        GPTConfig(vocab_size=BYTE_TOKENIZER.vocab_size, block_size=96, n_layer=2, n_head=2, n_embd=32), 1
    )
    with run_playground({"bytes": model}, BYTE_TOKENIZER) as address:
        reader = PlaygroundPage(browser, address)
        reader.fill_setting("max_tokens", 8)
        reader.fill_setting("top_k", 0)
        for bias in ({}, {0xE2: 100}):  # with the second every token is the first byte of a character
            reader.fill_setting("logit_bias", "\n".join(f"{token}={bias[token]}" for token in bias))
            for start in ("naïve", "naïve", "€"):  # the same text again, and another one
                ids, text = BYTE_TOKENIZER.encode(start), start
                reader.page.fill("#text", start)
                for _ in range(2):  # the generated tokens are part of the next prompt
                    with reader.page.expect_request("**/v1/completions") as request:
                        reader.page.click("#go")
                    new = generated_ids(ids, model, BYTE_TOKENIZER, top_k=0, logit_bias=bias)
                    text += complete_characters(new)
                    assert reader.wait_until_done() == text
                    assert request.value.post_data_json["prompt"] == ids
                    ids += new
        assert text == "€" + 14 * "\ufffd"
        assert reader.errors == []
        reader.context.close()


def test_a_token_after_a_character_of_many_tokens_can_be_replaced(reader: PlaygroundPage) -> None:
    text = "the cat 😀 sat"
    before = TOKENIZER.decode(TOKENIZER.encode(text)[:-1])
    reader.fill_setting("max_tokens", 2)
    reader.page.fill("#text", text)
    reader.page.click("#tab-tokens")
    reader.page.locator(".tokens button").last.click()
    choice = reader.page.locator("#alternatives .bars button").first
    word = choice.locator(".word").text_content().replace("␣", " ")
    choice.click()
    assert reader.wait_until_done().startswith(before + word)
