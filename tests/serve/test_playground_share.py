"""History, links and exports; the copied commands generate the text of the page."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
from gpt2.cli import main
from tests.helpers.playground_browser import MODELS, PROMPT, TOKENIZER, PlaygroundPage

pytest_plugins = "tests.helpers.playground_fixtures"
PROMPT_WITH_QUOTES = 'the cat\'s "mat"\n$HOME `sat` \\ on é 😀 '


def test_history_links_and_files(reader: PlaygroundPage, browser: Any, address: str, tmp_path: Path) -> None:
    reader.fill_setting("max_tokens", 6)
    reader.fill_setting("bad_words", "barn")
    reader.fill_setting("logit_bias", "3=-1")
    text = reader.generate(PROMPT)
    reader.page.reload()
    reader.page.wait_for_selector("#next li")
    assert reader.text == text
    reader.page.fill("#text", "")
    reader.page.click("#reset")
    reader.page.click("#open-history")
    reader.page.locator("#entries button").first.click()
    assert reader.text == text
    assert reader.page.input_value("#set-bad_words") == "barn"
    reader.page.click("#open-share")
    for name, part in {"curl": "v1/completions", "Python": "OpenAI(", "command line": "gpt2 sample"}.items():
        reader.page.click(f"#choices button:has-text('{name}')")
        reader.page.wait_for_selector(f"#preview:has-text('{part}')")
    with reader.page.expect_download() as download:
        reader.page.click("text=Save as JSON")
    download.value.save_as(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert (saved["text"], saved["model"], saved["settings"]["max_tokens"]) == (text, "one", 6)
    assert "".join(token["text"] for token in saved["tokens"]) == text
    assert [token["by"] for token in saved["tokens"][-7:]] == ["you", *["model"] * 6]
    reader.page.click("text=Copy link")
    reader.page.wait_for_selector("#preview:has-text('#z=')")
    link = reader.page.text_content("#preview")
    other = browser.new_context().new_page()
    other.goto(link)
    other.wait_for_selector("#next li")
    assert other.input_value("#text") == text
    shown = [other.input_value(f"#set-{name}") for name in ("max_tokens", "bad_words", "logit_bias")]
    assert shown == ["6", "barn", "3=-1"]
    assert other.locator("#backdrop > span > span").count() == 6
    other.context.close()


def test_an_invalid_link_gives_an_empty_page(reader: PlaygroundPage, address: str) -> None:
    for fragment in ("#s=!", "#s=e30", "#s=bnVsbA", "#s=eyJwYXRoIjpbMSx7fSxbXSxudWxsXX0"):
        reader.page.goto("about:blank")
        reader.page.goto(address + fragment)
        reader.page.wait_for_selector("#next li")
        assert reader.text == "", fragment


def copied(reader: PlaygroundPage, name: str) -> str:
    """The text that the page copies as `name`."""
    reader.page.click("#open-share")
    reader.page.click(f"text=Copy as {name}")
    reader.page.wait_for_selector("#copied:has-text('Copied')")
    snippet = reader.page.text_content("#preview")
    reader.page.click("#share .close")
    return snippet


def run_bash(command: str) -> str:
    """The output of a command."""
    return subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True).stdout.decode()


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="bash or curl is not installed")
def test_copied_commands_generate_the_same_text(
    reader: PlaygroundPage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="the openai client is not installed")
    reader.context.grant_permissions(["clipboard-read", "clipboard-write"])
    settings = {"max_tokens": 12, "top_k": 0, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.1}
    settings |= {"presence_penalty": 0.2, "no_repeat_ngram_size": 3, "seed": 7, "stop": "zz\nit's $(never)"}
    settings |= {"bad_words": "bird's\ndog", "logit_bias": '7=1.5\n"mat"=-2'}
    for name, value in settings.items():
        reader.fill_setting(name, value)
    text = reader.generate(PROMPT_WITH_QUOTES)

    reader.page.click("#open-share")
    offered = [f"Copy {what}" for what in ("link", "as curl", "as Python", "as command line")]
    assert reader.page.locator("#choices button").all_text_contents() == offered  # all of which are tried in this file
    reader.page.click("#share .close")
    exec(copied(reader, "Python"), {})
    assert PROMPT_WITH_QUOTES + capsys.readouterr().out == f"{text}\n"
    response = json.loads(run_bash(f"{copied(reader, 'curl')} --silent"))
    assert PROMPT_WITH_QUOTES + response["choices"][0]["text"] == text

    command = copied(reader, "command line")
    arguments = run_bash(f"gpt2() {{ printf '%s\\0' \"$@\"; }}\n{command}").split("\0")[:-1]
    gpt2.save(MODELS["one"], TOKENIZER, tmp_path / "one")
    monkeypatch.chdir(tmp_path)  # so that the name of the model is the path of its folder
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert capsys.readouterr().out == f"{text}\n"

    more = reader.continue_text()  # the prompt now has generated token ids
    response = json.loads(run_bash(f"{copied(reader, 'curl')} --silent"))
    assert text + response["choices"][0]["text"] == more


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="bash or curl is not installed")
def test_copied_commands_of_a_text_beyond_the_context(
    reader: PlaygroundPage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reader.fill_setting("max_tokens", 8)
    start = "the dog ran to the barn and a bird sang " * 12
    text = reader.generate(start)
    response = json.loads(run_bash(f"{copied(reader, 'curl')} --silent"))
    assert start + response["choices"][0]["text"] == text
    arguments = run_bash(f"gpt2() {{ printf '%s\\0' \"$@\"; }}\n{copied(reader, 'command line')}").split("\0")[:-1]
    gpt2.save(MODELS["one"], TOKENIZER, tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert text.endswith(capsys.readouterr().out.rstrip("\n"))


def save_as(reader: PlaygroundPage, what: str, path: Path) -> Path:
    reader.page.click("#open-share")
    with reader.page.expect_download() as download:
        reader.page.click(f"text=Save as {what}")
    download.value.save_as(path)
    reader.page.click("#share .close")
    return path


def test_the_exported_page_needs_no_server(reader: PlaygroundPage, browser: Any, tmp_path: Path) -> None:
    page, start = reader.page, "the cat </script><b>sat</b> & 😀 on"
    reader.fill_setting("max_tokens", 6)
    text = reader.generate(start)
    page.click("#tab-attention")
    page.click("#view-heads")
    page.click(".thumbs button[aria-label='Layer 2, head 1']")
    page.wait_for_selector(".one-head h2:text-is('Layer 2, head 1')")
    page.click("text=Add to the export")
    path = save_as(reader, "page", tmp_path / "text.html")
    data = json.loads(save_as(reader, "JSON", tmp_path / "text.json").read_text())

    other, requests = browser.new_context(offline=True).new_page(), list[str]()
    errors = list[str]()
    other.on("request", lambda request: requests.append(request.url))
    other.on("pageerror", lambda error: errors.append(str(error)))
    other.goto(path.as_uri())
    assert requests == [path.as_uri()]
    assert other.text_content("#text") == text
    assert other.locator("#text b").count() == 0
    assert other.locator("#text .model").count() == 6
    ids = [token["id"] for token in data["tokens"]]
    probs = MODELS["one"](torch.tensor([ids]))[0].softmax(-1)  # (T, V)
    given = [token["probability"] for token in data["tokens"]]
    assert given[1:] == [pytest.approx(float(probs[i, token]), rel=1e-3) for i, token in enumerate(ids[1:])]
    other.focus("#text")
    for _ in range(len(ids) - 1):
        other.keyboard.press("ArrowRight")
    best, token = probs[len(ids) - 2].max(-1)
    assert other.text_content("#card li >> nth=0") == f"{TOKENIZER.decode([int(token)])} {100 * float(best):.1f} %"
    assert other.locator("#card li").count() == 8
    other.select_option("#head", label="Attention: layer 2, head 1")
    name = "blocks.1.attn.hook_pattern"
    row = gpt2.trace(MODELS["one"], torch.tensor([ids]), [name])[name][0, 0, -1]
    weights = other.locator("#text span").evaluate_all(
        "all => all.map((one) => +one.style.getPropertyValue('--weight'))"
    )
    assert weights == [pytest.approx(min(1, float(weight / row[1:].max())), abs=5e-3) for weight in row]
    assert errors == []
    other.context.close()


def test_the_exported_image_shows_the_text(reader: PlaygroundPage, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    reader.fill_setting("max_tokens", 12)
    reader.generate(PROMPT)
    with pillow.open(save_as(reader, "image", tmp_path / "text.png")) as image:
        assert image.size[0] == 2000
        colors = image.convert("RGB").getcolors(2**24)
        small = image.size
    assert (255, 255, 255) in {color for _, color in colors}
    assert any(red - blue > 30 for _, (red, _, blue) in colors)  # the shade of an unlikely token
    reader.page.fill("#text", "the cat\n" * 6)
    with pillow.open(save_as(reader, "image", tmp_path / "long.png")) as image:
        assert image.size[1] > small[1]
