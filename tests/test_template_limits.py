"""Hostile chat templates: each fails with one UserError in one line, within its time, and the next one works."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt2 import template_process
from gpt2.errors import ModelFilesError, RequestError, UserError
from gpt2.template_process import MAX_SOURCE_CHARACTERS
from gpt2.templates import ChatTemplate, load_template
from gpt2.tokenizer import get_tokenizer
from tests.helpers.tokenizer_samples import SENTENCES

CHAT = [("user", "a"), ("assistant", "b")]
THREE_LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{{ ns.x }}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% break %}",
        "{% for x in messages %}" * 30 + "{% endfor %}" * 30,
        "{% if true %}" * 200 + "{% endif %}" * 200,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "x" * (MAX_SOURCE_CHARACTERS + 1),
    ],
    ids=["if", "break", "30 for", "200 if", "parentheses", "5000 digits", "long"],
)
def test_a_template_that_cannot_be_compiled_is_one_line(source: str) -> None:
    with pytest.raises(ModelFilesError, match="chat template cannot be read") as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set n = 10 %}{{ (n ** 5000) }}",
        "{{ messages | tojson(cls=dict) }}",
        "{{ 'x' * 10 ** 7 }}",
        "{% set n = 10 ** 10 %}{{ 'x' * n }}",
        DOUBLING,
        "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}",
        "{% set n = [] %}{{ n.append(1) }}",
        "{{ raise_exception('a\\nb') }}",
    ],
    ids=["macro", "power", "tojson", "output", "memory", "doubling", "classes", "append", "own"],
)
def test_a_template_that_fails_is_one_line(source: str) -> None:
    template = ChatTemplate("{% if messages[0].content == 'fine' %}ok{% else %}" + source + "{% endif %}")
    with pytest.raises(RequestError, match="chat template cannot be used") as caught:
        template.render(CHAT)
    assert "\n" not in str(caught.value)
    assert template.render([("user", "fine")]) == "ok"


@pytest.mark.parametrize("source", [THREE_LOOPS, "{% set n = 9 ** 9 %}{{ range(9) | batch(n) | list }}{{ n ** n }}"])
def test_a_template_is_stopped_after_its_time_and_works_again(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% if messages[0].content == 'fine' %}ok{% else %}" + source + "{% endif %}")
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 0.3)
    with pytest.raises(RequestError, match=r"it takes more than 0.3 s"):
        template.render(CHAT)
    monkeypatch.undo()
    assert template.render([("user", "fine")]) == "ok"


def test_a_prompt_is_not_rendered_again_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that cannot be segmented is rendered as a whole, but not one that was stopped."""
    renders = []
    render = template_process.TemplateProcess.render

    def counted(self: template_process.TemplateProcess, *given: Any) -> list[str]:
        renders.append(given)
        return render(self, *given)

    template = ChatTemplate(THREE_LOOPS)
    monkeypatch.setattr(template_process.TemplateProcess, "render", counted)
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 0.3)
    with pytest.raises(RequestError, match=r"it takes more than 0.3 s"):
        template.encode_prompt(get_tokenizer("bytes"), CHAT)
    assert len(renders) == 1
    assert template.stop_strings == []
    assert len(renders) == 2


def test_a_template_sees_no_environment_and_no_file() -> None:
    with pytest.raises(RequestError):
        ChatTemplate("{% include '/etc/passwd' %}").render(CHAT)
    assert ChatTemplate("{{ environ }}{{ self.__init__ }}").render(CHAT) == ""


def test_a_list_of_templates_with_a_list_for_a_name(tmp_path: Path) -> None:
    templates = [{"name": [1], "template": "A"}, {"name": "default", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    loaded = load_template(tmp_path)
    assert loaded is not None
    assert loaded.render(CHAT) == "B"


def test_messages_may_use_every_private_character() -> None:
    tokenizer = get_tokenizer("bytes")
    text = "".join(map(chr, range(0xE000, 0xF900))) + "<|endoftext|>"
    ids = ChatTemplate().encode_prompt(tokenizer, [("user", text)])
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == f"User: {text}\nAssistant:"


def test_an_ordinary_long_conversation_has_time() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    chat = [(role, text) for text in SENTENCES for role in ("user", "assistant")] * 20
    assert template.render(chat) == "".join(f"[{text}]" for _, text in chat)
    assert sum(is_answer for _, is_answer in template.segments(chat)) > 0


def test_a_template_that_links_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "chat_template.jinja").symlink_to("../secret")
    with pytest.raises(UserError, match=r"chat_template\.jinja is a link to a file outside its folder"):
        load_template(folder)


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{{ messages[0].content }}")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/123")
    loaded = load_template(snapshot)
    assert loaded is not None
    assert loaded.render(CHAT) == "a"
