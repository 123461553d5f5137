"""Chat templates: equal to transformers, segmented as in generation, and safe against special tokens in messages."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.templates import BUILTIN_TEMPLATES, ChatTemplate, get_template, load_template, save_template
from gpt2.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer, train_bpe, with_special_tokens
from tests.helpers.tokenizer_samples import SENTENCES

CONVERSATION = [
    ("system", "Be brief."),
    ("user", "Who's there?"),
    ("assistant", "A ghost."),
    ("user", "Whose?\n"),
    ("assistant", "Yours, <|im_end|>\n of course."),
]
LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]
{%- elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}
{%- else %}{{ raise_exception('no ' + m['role'] + ' here') }}{% endif %}{% endfor %}"""
PHI = """{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>
{% generation %}{{ m['content'] }}<|end|>
{% endgeneration %}{% else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
REWRITING = """{% for m in messages %}
{%- if m['role'] == 'user' or loop.last %}[{{ m['content'] }}]{% else %}-{% endif %}
{%- endfor %}{% if add_generation_prompt %}>{% endif %}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ALL = {name: ChatTemplate(source) for name, source in BUILTIN_TEMPLATES.items()}
ALL |= {"llama2": ChatTemplate(LLAMA2, SPECIAL), "phi": ChatTemplate(PHI)}
ALL |= {f"{name} by jinja": ChatTemplate(source + "{# #}") for name, source in BUILTIN_TEMPLATES.items()}


def conversation_for(name: str) -> list[tuple[str, str]]:
    return [message for message in CONVERSATION if message[0] != "system" or name != "llama2"]


def tokenizer_for(template: ChatTemplate) -> Tokenizer:
    tokenizer = train_bpe(SENTENCES, 300)
    missing = template.missing_tokens(tokenizer)
    return with_special_tokens(tokenizer, missing) if missing else tokenizer


def test_rendered_prompts_of_builtin_templates() -> None:
    chat = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    assert ALL["plain"].render_prompt(chat) == "S\nUser: U\nAssistant: A\nUser: V\nAssistant:"
    assert ALL["raw"].render_prompt(chat) == "SUAV"
    chatml = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert ALL["chatml"].render_prompt(chat) == f"{chatml}<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtin_templates_render_the_same_in_jinja_and_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = ALL[name]
    tokenizer = tokenizer_for(ours)
    tokenizer.save(tmp_path)
    save_template(ours, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert (load_template(tmp_path) or ChatTemplate()).source == ours.source
    theirs, by_jinja = AutoTokenizer.from_pretrained(tmp_path), ALL[f"{name} by jinja"]
    for chat in (CONVERSATION, CONVERSATION[:4], CONVERSATION[1:3], CONVERSATION[1:2], []):
        messages = [{"role": role, "content": text} for role, text in chat]
        for prompt, text in ((True, ours.render_prompt(chat)), (False, ours.render(chat))):
            assert text == (by_jinja.render_prompt if prompt else by_jinja.render)(chat)
            if chat:
                assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == text
    clean = [(role, text.replace("<|im_end|>", "")) for role, text in CONVERSATION[:4]]
    messages = [{"role": role, "content": text} for role, text in clean]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_prompt(tokenizer, clean) == ids


@pytest.mark.parametrize("name", ALL)
def test_answer_segments_start_where_the_prompt_ends(name: str) -> None:
    template, chat = ALL[name], conversation_for(name)
    segments, answers = template.segments(chat), [i for i, (role, _) in enumerate(chat) if role == "assistant"]
    answer_indices = [i for i, (_, is_answer) in enumerate(segments) if is_answer]
    assert "".join(text for text, _ in segments) == template.render(chat)
    assert len(answer_indices) == len(answers) == 2
    for index, answer in zip(answer_indices, answers, strict=True):
        assert "".join(text for text, _ in segments[:index]) == template.render_prompt(chat[:answer])
        end = {"chatml": "<|im_end|>", "phi": "<|end|>", "llama2": " </s>"}.get(name.split()[0], "")
        assert segments[index][0] == template.answer_prefix + chat[answer][1] + end


@pytest.mark.parametrize("name", ALL)
def test_tokens_before_an_answer_equal_those_of_the_prompt(name: str) -> None:
    template, chat = ALL[name], conversation_for(name)
    tokenizer = tokenizer_for(template)
    encoded = template.encode(tokenizer, chat)
    assert [answer_indices for _, answer_indices in encoded] == [
        answer_indices for _, answer_indices in template.segments(chat)
    ]
    assert tokenizer.decode(i for ids, _ in encoded for i in ids) == template.render(chat)
    for count in (i for i, (role, _) in enumerate(chat) if role == "assistant"):
        prompt = template.encode_prompt(tokenizer, chat[:count])
        assert prompt == [i for ids, _ in encoded for i in ids][: len(prompt)]
        assert tokenizer.decode(prompt) == template.render_prompt(chat[:count])


def test_stop_strings_answer_prefix_and_special_tokens() -> None:
    expected = {
        "plain": (["\nUser:"], " ", []),
        "raw": ([], "", []),
        "chatml": (["<|im_end|>"], "", ["<|im_start|>", "<|im_end|>"]),
        "llama2": ([" </s>", "</s>"], " ", []),
        "phi": (["<|end|>"], "", ["<|system|>", "<|end|>", "<|user|>", "<|assistant|>"]),
    }
    for name, template in ALL.items():
        found = (template.stop_strings, template.answer_prefix, template.special_tokens)
        assert found == expected[name.split()[0]]
    assert (
        ChatTemplate(
            "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", {"eos_token": END_OF_TEXT}
        ).stop_strings
        == []
    )
    assert ChatTemplate("{{ raise_exception('never') }}").stop_strings == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["<|im_end|>", END_OF_TEXT, "<|im_start|>", "\ue000", "<|", "a ", "\n"]), max_size=6))
def test_message_text_is_never_encoded_as_special_tokens(parts: list[str]) -> None:
    """And no character is lost."""
    template, text = ALL["chatml by jinja"], "".join(parts)
    tokenizer = with_special_tokens(get_tokenizer("bytes"), template.special_tokens)
    start, end = (tokenizer.special_tokens[name] for name in template.special_tokens)
    ids = template.encode_prompt(tokenizer, [("user", text), ("assistant", text), ("user", text)])
    words = [*text.encode(), end, 10, start]
    assert ids == [
        *[start, *b"user\n", *words, *b"assistant\n", *words, *b"user\n", *words, *b"assistant\n"],
    ]
    assert [i for i in ids if i > 255] == [start, end] * 3 + [start]


def test_given_answer_tokens_are_used_as_they_are() -> None:
    template = ALL["chatml"]
    tokenizer = tokenizer_for(template)
    split_answer = [i for letter in "A ghost." for i in tokenizer.encode(letter)]
    ids = template.encode_prompt(tokenizer, CONVERSATION[:4], [split_answer])
    assert ids != template.encode_prompt(tokenizer, CONVERSATION[:4])
    assert tokenizer.decode(ids) == template.render_prompt(CONVERSATION[:4])
    assert any(ids[i : i + len(split_answer)] == split_answer for i in range(len(ids)))
    other = template.encode_prompt(
        tokenizer, CONVERSATION[:4], [tokenizer.encode("Nobody.")]
    )  # not the text of the message
    assert other == template.encode_prompt(tokenizer, CONVERSATION[:4])


@pytest.mark.parametrize("source", [REWRITING, REWRITING.replace("%}>{%", "%}{%")])
def test_a_template_that_changes_earlier_messages_works_for_prompts_but_not_for_training(source: str) -> None:
    template, tokenizer = ChatTemplate(source), get_tokenizer("bytes")
    with pytest.raises(UserError, match="renders a message differently when others follow"):
        template.segments(CONVERSATION)
    with pytest.raises(UserError, match="renders a message differently"):
        template.encode(tokenizer, CONVERSATION)
    assert template.encode_prompt(tokenizer, CONVERSATION) == list(template.render_prompt(CONVERSATION).encode())


def test_a_long_conversation_is_encoded_as_a_whole() -> None:
    """Or a request of a thousand messages would block a server for minutes."""
    template, tokenizer = ALL["chatml by jinja"], tokenizer_for(ALL["chatml"])
    chat = [("user", "a"), ("assistant", "b")] * 5_000
    assert tokenizer.decode(template.encode_prompt(tokenizer, chat)) == template.render_prompt(chat)


def test_templates_by_name_or_file(tmp_path: Path) -> None:
    for name, source in BUILTIN_TEMPLATES.items():
        assert get_template(name).source == source
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}")
    assert get_template(file).render_prompt([("user", "x")]) == f"{END_OF_TEXT}x"
    with pytest.raises(UserError, match=r"no chat template 'chatlm' \(did you mean 'chatml'\?\)"):
        get_template("chatlm")
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"mine\.jinja cannot be read"):
        get_template(file)
    file.write_text("{% if %}")
    with pytest.raises(UserError, match="chat template cannot be read"):
        get_template(file)
    assert load_template(tmp_path) is None
    with pytest.raises(UserError, match="cannot write"):
        save_template(ALL["raw"], tmp_path / "nowhere")


def test_builtin_templates_need_no_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert ChatTemplate().render_prompt([("user", "x")]) == "User: x\nAssistant:"
    with pytest.raises(UserError, match=r"needs jinja2, which is not installed: pip install 'plain-gpt2\[serve\]'"):
        ChatTemplate("{{ 1 }}")
