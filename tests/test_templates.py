"""Chat templates: the same text as transformers renders, cut where inference cuts it, and nobody can forge a mark."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.errors import UserError
from gpt2.templates import BUILTIN_TEMPLATES, ChatTemplate, get_template, load_template, save_template
from gpt2.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer, train_bpe, with_special_tokens
from tests.helpers.tokenizer_samples import SENTENCES

TALK = [
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
FORGETFUL = """{% for m in messages %}
{%- if m['role'] == 'user' or loop.last %}[{{ m['content'] }}]{% else %}-{% endif %}
{%- endfor %}{% if add_generation_prompt %}>{% endif %}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ALL = {name: ChatTemplate(source) for name, source in BUILTIN_TEMPLATES.items()}
ALL |= {"llama2": ChatTemplate(LLAMA2, SPECIAL), "phi": ChatTemplate(PHI)}
ALL |= {f"{name} by jinja": ChatTemplate(source + "{# #}") for name, source in BUILTIN_TEMPLATES.items()}


def talk_for(name: str) -> list[tuple[str, str]]:
    return [message for message in TALK if message[0] != "system" or name != "llama2"]


def tokenizer_for(template: ChatTemplate) -> Tokenizer:
    tokenizer = train_bpe(SENTENCES, 300)
    missing = template.missing_tokens(tokenizer)
    return with_special_tokens(tokenizer, missing) if missing else tokenizer


def test_the_plain_transcript_and_the_others() -> None:
    talk = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    assert ALL["plain"].render_prompt(talk) == "S\nUser: U\nAssistant: A\nUser: V\nAssistant:"
    assert ALL["raw"].render_prompt(talk) == "SUAV"
    chatml = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert ALL["chatml"].render_prompt(talk) == f"{chatml}<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_as_jinja_they_are_the_same_here_and_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = ALL[name]
    tokenizer = tokenizer_for(ours)
    tokenizer.save(tmp_path)
    save_template(ours, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert (load_template(tmp_path) or ChatTemplate()).source == ours.source
    theirs, by_jinja = AutoTokenizer.from_pretrained(tmp_path), ALL[f"{name} by jinja"]
    for talk in (TALK, TALK[:4], TALK[1:3], TALK[1:2], []):
        messages = [{"role": role, "content": text} for role, text in talk]
        for ask, text in ((True, ours.render_prompt(talk)), (False, ours.render(talk))):
            assert text == (by_jinja.render_prompt if ask else by_jinja.render)(talk)
            if talk:
                assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask) == text
    clean = [(role, text.replace("<|im_end|>", "")) for role, text in TALK[:4]]
    messages = [{"role": role, "content": text} for role, text in clean]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_prompt(tokenizer, clean) == ids


@pytest.mark.parametrize("name", ALL)
def test_answers_are_learned_and_begin_where_a_prompt_ends(name: str) -> None:
    template, talk = ALL[name], talk_for(name)
    pieces, answers = template.segments(talk), [i for i, (role, _) in enumerate(talk) if role == "assistant"]
    learned = [i for i, (_, is_learned) in enumerate(pieces) if is_learned]
    assert "".join(text for text, _ in pieces) == template.render(talk)
    assert len(learned) == len(answers) == 2
    for piece, answer in zip(learned, answers, strict=True):
        assert "".join(text for text, _ in pieces[:piece]) == template.render_prompt(talk[:answer])
        end = {"chatml": "<|im_end|>", "phi": "<|end|>", "llama2": " </s>"}.get(name.split()[0], "")
        assert pieces[piece][0] == template.answer_prefix + talk[answer][1] + end


@pytest.mark.parametrize("name", ALL)
def test_the_tokens_before_an_answer_are_those_of_the_prompt(name: str) -> None:
    template, talk = ALL[name], talk_for(name)
    tokenizer = tokenizer_for(template)
    encoded = template.encode(tokenizer, talk)
    assert [learned for _, learned in encoded] == [learned for _, learned in template.segments(talk)]
    assert tokenizer.decode(i for ids, _ in encoded for i in ids) == template.render(talk)
    for count in (i for i, (role, _) in enumerate(talk) if role == "assistant"):
        prompt = template.encode_prompt(tokenizer, talk[:count])
        assert prompt == [i for ids, _ in encoded for i in ids][: len(prompt)]
        assert tokenizer.decode(prompt) == template.render_prompt(talk[:count])


def test_what_ends_an_answer_and_what_opens_it() -> None:
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
def test_words_never_become_marks(parts: list[str]) -> None:
    """And not one character of theirs is lost."""
    template, said = ALL["chatml by jinja"], "".join(parts)
    tokenizer = with_special_tokens(get_tokenizer("bytes"), template.special_tokens)
    start, end = (tokenizer.special_tokens[text] for text in template.special_tokens)
    ids = template.encode_prompt(tokenizer, [("user", said), ("assistant", said), ("user", said)])
    words = [*said.encode(), end, 10, start]
    assert ids == [
        *[start, *b"user\n", *words, *b"assistant\n", *words, *b"user\n", *words, *b"assistant\n"],
    ]
    assert [i for i in ids if i > 255] == [start, end] * 3 + [start]


def test_tokens_that_were_said_are_not_spelled_anew() -> None:
    template = ALL["chatml"]
    tokenizer = tokenizer_for(template)
    oddly = [i for letter in "A ghost." for i in tokenizer.encode(letter)]
    said = template.encode_prompt(tokenizer, TALK[:4], [oddly])
    assert said != template.encode_prompt(tokenizer, TALK[:4])
    assert tokenizer.decode(said) == template.render_prompt(TALK[:4])
    assert any(said[i : i + len(oddly)] == oddly for i in range(len(said)))
    other = template.encode_prompt(tokenizer, TALK[:4], [tokenizer.encode("Nobody.")])  # not what the message says
    assert other == template.encode_prompt(tokenizer, TALK[:4])


@pytest.mark.parametrize("source", [FORGETFUL, FORGETFUL.replace("%}>{%", "%}{%")])
def test_a_template_that_rewrites_what_came_before_can_be_asked_but_not_learned_from(source: str) -> None:
    template, tokenizer = ChatTemplate(source), get_tokenizer("bytes")
    with pytest.raises(UserError, match="writes a message in another way when others follow it"):
        template.segments(TALK)
    with pytest.raises(UserError, match="another way"):
        template.encode(tokenizer, TALK)
    assert template.encode_prompt(tokenizer, TALK) == list(template.render_prompt(TALK).encode())


def test_a_long_talk_is_encoded_whole() -> None:
    """Or a request of a thousand messages would keep a server busy for minutes."""
    template, tokenizer = ALL["chatml by jinja"], tokenizer_for(ALL["chatml"])
    talk = [("user", "a"), ("assistant", "b")] * 5_000
    assert tokenizer.decode(template.encode_prompt(tokenizer, talk)) == template.render_prompt(talk)


def test_by_name_or_file(tmp_path: Path) -> None:
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


def test_the_named_ones_need_no_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert ChatTemplate().render_prompt([("user", "x")]) == "User: x\nAssistant:"
    with pytest.raises(UserError, match=r"needs jinja2, which is not installed: pip install 'gpt2\[serve\]'"):
        ChatTemplate("{{ 1 }}")
