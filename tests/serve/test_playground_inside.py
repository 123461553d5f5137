"""The panels that look inside a model, in a real browser: what they show is what `gpt2.interpret` computes."""

import math
from typing import Any

import pytest
import torch

import gpt2
import gpt2.interpret
from tests.helpers.known_heads import previous_token_model
from tests.helpers.playground_browser import CONFIG, MODELS, PROMPT, TOKENIZER, PlaygroundPage, run_playground

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest_plugins = "tests.helpers.playground_fixtures"
MODEL = MODELS["one"]
TEXT = f"{PROMPT} the mat and the dog ran"
# The opacity of a pixel of a canvas, between 0 and 1.
ALPHA = """([canvas, row, column]) => {
  const all = document.querySelectorAll(canvas), one = all[all.length - 1];
  return one.getContext("2d").getImageData(column, row, 1, 1).data[3] / 255; }"""


def pattern(layer: int, head: int, text: str = TEXT, model: Any = MODEL) -> torch.Tensor:
    name = f"blocks.{layer}.attn.hook_pattern"
    return gpt2.trace(model, torch.tensor([TOKENIZER.encode(text)]), [name])[name][0, head]


def open_heads(page: Any, text: str = TEXT) -> None:
    page.fill("#text", text)
    page.click("#tab-attention")
    page.click("#view-heads")
    page.wait_for_selector(".one-head h2:has-text('Layer')")


def show_head(page: Any, layer: int, head: int) -> None:
    page.click(f".thumbs button[aria-label='Layer {layer}, head {head}']")
    page.wait_for_selector(f".one-head h2:text-is('Layer {layer}, head {head}')")


def test_the_whole_matrix_of_a_head(reader: PlaygroundPage) -> None:
    page = reader.page
    open_heads(page)
    assert page.locator(".thumbs button").count() == CONFIG.n_layer * CONFIG.n_head
    show_head(page, 2, 2)
    weights, size = pattern(1, 1), len(TOKENIZER.encode(TEXT))
    for row, column in ((size - 1, 3), (4, 4), (3, 7), (5, 0)):
        alpha = page.evaluate(ALPHA, [".matrix canvas", row, column])
        assert alpha == pytest.approx(math.sqrt(weights[row, column]) if column else 0, abs=0.01), (row, column)
    page.check("#first-token")
    assert page.evaluate(ALPHA, [".matrix canvas", 5, 0]) == pytest.approx(math.sqrt(weights[5, 0]), abs=0.01)
    # The sliders read every field with the keyboard.
    rows, columns = page.locator(".axis input").all()
    rows.press("Home")
    for _ in range(6):
        rows.press("ArrowRight")
    columns.press("Home")
    for _ in range(2):
        columns.press("ArrowRight")
    assert page.text_content(".readout").endswith(f" 3: {100 * weights[6, 2]:.1f} %")
    assert page.locator(".matrix").evaluate("one => getComputedStyle(one.children[1]).top") != "0px"


def test_pointing_reads_rows_and_columns(reader: PlaygroundPage) -> None:
    page = reader.page
    open_heads(page)
    show_head(page, 3, 1)
    weights, size = pattern(2, 0), len(TOKENIZER.encode(TEXT))
    page.locator(".matrix").scroll_into_view_if_needed()
    box = page.locator(".matrix").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 2.5 / size, box["y"] + box["height"] * 5.5 / size)
    assert page.text_content(".readout").endswith(f"3: {100 * weights[5, 2]:.1f} %")
    relative = weights[5].clone()
    relative[0] = 0
    shown = page.locator(".one-head .looked span").evaluate_all(
        "all => all.map((one) => +one.style.getPropertyValue('--weight'))"
    )
    assert shown == [pytest.approx(float(w / relative.max()), abs=2e-3) for w in relative]
    assert page.locator(".heated").count() == 1  # and on the text itself
    page.click("text=What attends to a token")
    page.locator(".one-head .looked span").nth(4).hover()
    shown = page.locator(".one-head .looked span").evaluate_all(
        "all => all.map((one) => +one.style.getPropertyValue('--weight'))"
    )
    column = weights[:, 4]
    assert shown == [pytest.approx(float(w / column.max()), abs=2e-3) for w in column]
    assert page.locator(".one-head .looked .here").count() == 1


def test_heads_have_kinds(browser: Any) -> None:
    model = previous_token_model(TOKENIZER.vocab_size, 64)
    with run_playground({"one": model}, TOKENIZER) as address:
        reader = PlaygroundPage(browser, address)
        page = reader.page
        open_heads(page)
        label = page.get_attribute(".thumbs button", "aria-label")
        assert label == "Layer 1, head 1: previous token 1.00"
        assert page.get_attribute(".thumbs button", "data-kind") == "P"
        assert page.locator(".kinds dd").all_text_contents() == ["1.1", "none above 0.4", "none above 0.4"]
        assert "Previous token head: score 1.00" in page.text_content(".one-head")
        weights = pattern(0, 0, model=model)
        assert page.evaluate(ALPHA, [".matrix canvas", 5, 4]) == pytest.approx(math.sqrt(weights[5, 4]), abs=0.01)
        assert reader.errors == []
        reader.context.close()


def test_contributions_of_heads_and_mlps(reader: PlaygroundPage) -> None:
    page = reader.page
    page.fill("#text", TEXT)
    page.click("#tab-contributions")
    page.wait_for_selector(".heads.effect")
    ids = TOKENIZER.encode(TEXT)
    order = MODEL(torch.tensor([ids]))[0, -1].argsort(descending=True).tolist()
    assert page.input_value("#alternative") == str(order[1])
    check_contributions(page, gpt2.logit_attribution(MODEL, torch.tensor([ids]), order[0], order[1]))
    page.select_option("#alternative", "")
    page.wait_for_selector("#panel-contributions .quiet:has-text('= heads'):not(:has-text('minus'))")
    check_contributions(page, gpt2.logit_attribution(MODEL, torch.tensor([ids]), order[0]))
    page.locator(".heads.effect button").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.text_content("#panel-contributions .readout").startswith("Layer 2, head 1: ")
    page.keyboard.press("Enter")  # shows its attention
    page.wait_for_selector(".one-head h2:text-is('Layer 2, head 1')")


def check_contributions(page: Any, expected: gpt2.interpret.LogitAttribution) -> None:
    rows = torch.cat([expected.heads, expected.mlps[:, None]], 1).flatten().tolist()
    labels = page.locator(".heads.effect button").evaluate_all("all => all.map((one) => one.ariaLabel)")
    shown = [float(label.split(": ")[1].replace("−", "-")) for label in labels]
    assert shown == pytest.approx(rows, abs=0.006)
    against = page.locator(".heads.effect button").evaluate_all("all => all.map((one) => one.matches('.against'))")
    assert against == [value < 0 for value in rows]
    assert f"{abs(expected.total):.2f} = heads" in page.text_content("#panel-contributions .quiet:has-text('heads')")
    largest = page.locator(".bars.effect .number").first.text_content()
    assert abs(float(largest.replace("−", "-"))) == pytest.approx(max(map(abs, rows)), abs=0.006)


def test_the_logit_lens_by_position(reader: PlaygroundPage) -> None:
    page = reader.page
    page.fill("#text", TEXT)
    page.click("#tab-layers")
    page.wait_for_selector("#lens-map .map")
    ids = TOKENIZER.encode(TEXT)
    assert page.locator("#lens-map thead th").count() == 1 + min(24, len(ids))
    run = gpt2.trace(MODEL, torch.tensor([ids]))
    after_layer_2 = MODEL.lm_head(MODEL.transformer.ln_f(run["blocks.1.hook_resid_post"]))[0].softmax(-1)  # (T, V)
    row = page.locator("#lens-map tbody tr").nth(1).locator("button")
    shown = [word.replace("␣", " ") for word in row.all_text_contents()]
    assert shown == [TOKENIZER.decode([int(i)]) for i in after_layer_2.argmax(-1)][-24:]
    weights = row.evaluate_all("all => all.map((one) => +one.style.getPropertyValue('--weight'))")
    assert weights == pytest.approx(after_layer_2.max(-1).values.tolist()[-24:], abs=1e-4)
    page.click("text=The token that follows")
    weights = row.evaluate_all("all => all.map((one) => +one.style.getPropertyValue('--weight'))")[:-1]
    own = [float(after_layer_2[i, ids[i + 1]]) for i in range(len(ids) - 1)][-23:]
    assert weights == pytest.approx(own, abs=1e-4)
    row.first.focus()
    assert page.text_content("#lens-map .readout").startswith("Layer 2, after ")


def bars(page: Any, where: str) -> dict[str, float]:
    """{token: probability} of the bars after an experiment."""
    page.wait_for_selector(f"{where}[aria-busy=false] .bars li")
    names = [word.replace("␣", " ") for word in page.locator(f"{where} .bars .word").all_text_contents()]
    numbers = page.locator(f"{where} .bars .number").all_text_contents()
    return {name: float(number.split()[0]) / 100 for name, number in zip(names, numbers, strict=True)}


def check_bars(page: Any, where: str, logits: torch.Tensor) -> None:
    probs = logits.softmax(-1)
    shown = bars(page, where)
    assert len(shown) >= 8
    for token, probability in shown.items():
        assert probability == pytest.approx(float(probs[TOKENIZER.encode(token)[0]]), abs=6e-4), token


@torch.no_grad()
def test_heads_and_mlps_are_switched_off(reader: PlaygroundPage) -> None:
    page, row = reader.page, torch.tensor([TOKENIZER.encode(TEXT)])
    page.fill("#text", TEXT)
    page.click("#tab-whatif")
    where = "#panel-whatif .section:has(.switches) > .view"
    check_bars(page, where, MODEL(row)[0, -1])
    page.locator(".switches button").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    with page.expect_response("**/inspect/ablate"):
        page.keyboard.press("Enter")
    assert page.text_content("#panel-whatif [role=status]") == "1 heads and 1 MLPs are off."
    check_bars(page, where, gpt2.ablate(MODEL, row, [(0, 0)], [0])[0, -1])
    with page.expect_response("**/inspect/ablate"):
        page.select_option("#off-mode", "mean")
    check_bars(page, where, gpt2.ablate(MODEL, row, [(0, 0)], [0], "mean")[0, -1])
    with page.expect_response("**/inspect/ablate"):
        page.click("text=Switch all on")
    check_bars(page, where, MODEL(row)[0, -1])


@torch.no_grad()
def test_steering_moves_the_distribution(reader: PlaygroundPage) -> None:
    page, row, name = reader.page, torch.tensor([TOKENIZER.encode(TEXT)]), "blocks.2.hook_resid_pre"
    page.fill("#text", TEXT)
    page.click("#tab-whatif")
    page.click("summary:text-is('Steer')")
    page.fill("#steer-plus", "a bird")
    page.fill("#steer-minus", "the dog")
    page.locator("#steer-layer").fill("3")
    with page.expect_response("**/inspect/steer"):
        page.locator("#steer-strength").fill("6.5")

    def last(text: str) -> torch.Tensor:
        return gpt2.trace(MODEL, torch.tensor([TOKENIZER.encode(text)]), [name])[name][0, -1]

    vector = 6.5 * (last("a bird") - last("the dog"))
    check_bars(page, ".section:has(#steer-plus) > .view", gpt2.patch(MODEL, row, {name: lambda x: x + vector})[0, -1])


@torch.no_grad()
def test_patching_between_the_sides(reader: PlaygroundPage) -> None:
    page, (text, other) = reader.page, ("the cat sat on the mat", "the dog sat on the mat")
    ids, source = TOKENIZER.encode(text), TOKENIZER.encode(other)
    assert len(ids) == len(source)
    page.fill("#text", text)
    page.click("#tab-whatif")
    page.click("summary:text-is('Patch')")
    page.fill("#patch-source", "the dog")
    page.click("#patch-run")
    page.wait_for_selector("text=they must have the same number")
    page.fill("#patch-source", other)
    page.select_option("#patch-part", "mlp")
    page.click("#patch-run")
    first = next(i for i in range(len(ids)) if ids[i] != source[i])
    page.wait_for_selector(f".patched tbody tr:first-child button >> nth={len(ids) - first - 1}")
    runs = [MODEL(torch.tensor([each]))[0, -1] for each in (ids, source)]
    target, base = int(runs[1].argmax()), runs[0].argsort(descending=True).tolist()
    against = next(i for i in base if i != target)
    low, high = (float(run[target] - run[against]) for run in runs)
    for layer in range(CONFIG.n_layer):
        name = f"blocks.{layer}.hook_mlp_out"
        given = gpt2.trace(MODEL, torch.tensor([source]), [name])[name]
        cells = page.locator(".patched tbody tr").nth(CONFIG.n_layer - 1 - layer).locator("button").all_text_contents()
        for at, cell in zip(range(first, len(ids)), cells, strict=True):
            change = {
                name: lambda x, at=at, given=given: torch.cat([x[:, :at], given[:, at : at + 1], x[:, at + 1 :]], 1)
            }
            logits = gpt2.patch(MODEL, torch.tensor([ids]), change)[0, -1]
            effect = (float(logits[target] - logits[against]) - low) / (high - low)
            assert float(cell) == pytest.approx(effect, abs=0.02)


def test_compare_gives_the_other_text(reader: PlaygroundPage) -> None:
    page = reader.page
    reader.fill_setting("max_tokens", 3)
    page.fill("#text", PROMPT)
    page.click("#compare")
    reader.continue_text()
    page.click("#tab-whatif")
    page.click("summary:text-is('Patch')")
    other = page.text_content("#other")
    assert other
    sync_api.expect(page.locator("#patch-source")).to_have_value(other)
