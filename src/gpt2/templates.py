"""Chat templates: a conversation as one text, and as tokens with a loss mask.

    plain    User: Who's there?        raw    Who's there?A ghost.        chatml    <|im_start|>user
             Assistant: A ghost.                                                    Who's there?<|im_end|>
                                                                                    <|im_start|>assistant
                                                                                    A ghost.<|im_end|>

These are built in. Any other is a Jinja template, as `transformers` keeps it in `chat_template.jinja`.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from gpt2.errors import ConfigError, ModelFilesError, RequestError, UserError, did_you_mean
from gpt2.files import check_inside_folder, expand_path
from gpt2.template_process import TemplateLimitError, TemplateProcess
from gpt2.tokenizer import Tokenizer
from gpt2.vocabulary import END_OF_TEXT

USER_PREFIX, ASSISTANT_PREFIX = "User:", "Assistant:"
MAX_SEGMENTED_MESSAGES = 64  # finding where answers start and end takes time quadratic in the number of messages

_SPECIAL_TOKEN_PATTERN = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>")

Messages = Sequence[tuple[str, str]]
Segment = tuple[str, bool]
"""A text, and whether it is an answer, which the loss counts."""

PLAIN_TEMPLATE = """\
{%- set speakers = {'user': 'User: ', 'assistant': 'Assistant: '} -%}
{%- for message in messages -%}
    {{- '' if loop.first else '\\n' -}}
    {{- speakers.get(message['role'], '') + message['content'] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\nAssistant:' if messages else 'Assistant:' -}}
{%- endif -%}
"""
RAW_TEMPLATE = """\
{%- for message in messages -%}
    {{- message['content'] -}}
{%- endfor -%}
"""
CHATML_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def _render_plain(messages: Messages, add_generation_prompt: bool) -> str:
    speakers = {"user": f"{USER_PREFIX} ", "assistant": f"{ASSISTANT_PREFIX} "}
    return "\n".join(
        [speakers.get(role, "") + text for role, text in messages] + [ASSISTANT_PREFIX] * add_generation_prompt
    )


def _render_raw(messages: Messages, add_generation_prompt: bool) -> str:
    return "".join(text for _, text in messages)


def _render_chatml(messages: Messages, add_generation_prompt: bool) -> str:
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
    return turns + "<|im_start|>assistant\n" * add_generation_prompt


BUILTIN_TEMPLATES = {"plain": PLAIN_TEMPLATE, "raw": RAW_TEMPLATE, "chatml": CHATML_TEMPLATE}
_RENDERERS = {
    PLAIN_TEMPLATE: _render_plain,
    RAW_TEMPLATE: _render_raw,
    CHATML_TEMPLATE: _render_chatml,
}  # renders the built-in templates without jinja2


class ChatTemplate:
    """Renders and encodes messages, (role, text) each, as the input of a model.

    source:             a Jinja template, run in a process of its own under limits. The built-in ones need no jinja2.
    special_tokens_map: variables of the template, such as `eos_token`.

    Text in a message is never encoded as a special token: only text of the template is.
    Raises ModelFilesError for a source that is not a template.
    """

    def __init__(self, source: str = PLAIN_TEMPLATE, special_tokens_map: dict[str, str] | None = None) -> None:
        self.source, self.special_tokens_map = source, special_tokens_map or {}
        self._builtin = _RENDERERS.get(source)
        self._process = None if self._builtin else TemplateProcess(source, self.special_tokens_map)

    def render(self, messages: Messages) -> str:
        """The whole conversation. Raises RequestError if the template fails."""
        return self._render_all(messages, [(len(messages), False)])[0]

    def render_prompt(self, messages: Messages) -> str:
        """The conversation up to the start of the next answer. Raises RequestError if the template fails."""
        return self._render_all(messages, [(len(messages), True)])[0]

    def _render_all(self, messages: Messages, renders: Sequence[tuple[int, bool]]) -> list[str]:
        """The texts of the first messages, so many, with or without the start of the next answer."""
        if self._process is not None:
            return self._process.render(messages, renders)
        assert self._builtin is not None
        return [self._builtin(messages[:count], prompt) for count, prompt in renders]

    def segments(self, messages: Messages) -> list[Segment]:
        """The conversation in segments (text, is_answer). An answer includes the end-of-turn token.

        The segments before an answer, concatenated, equal `render_prompt` of the messages before it; all equal
        `render`. Raises RequestError for a template that renders a message differently when others follow.
        """
        return [segment for segment in self._split_segments(messages, add_generation_prompt=False) if segment[0]]

    def encode(self, tokenizer: Tokenizer, messages: Messages) -> list[tuple[list[int], bool]]:
        """`segments` as token ids, each encoded separately."""
        escaped = _EscapedMessages(tokenizer, messages)
        return [(escaped.encode(text), is_answer) for text, is_answer in self.segments(escaped.messages)]

    def encode_prompt(
        self, tokenizer: Tokenizer, messages: Messages, answer_tokens: Sequence[Sequence[int]] = ()
    ) -> list[int]:
        """The tokens of `render_prompt`, equal to those that `encode` has before the next answer.

        answer_tokens: the tokens of the assistant's messages so far, used as they are if they decode to the text.

        A template that cannot be segmented is encoded as a whole, and so are more than 64 messages without
        `answer_tokens`. Raises RequestError if the template fails.
        """
        escaped = _EscapedMessages(tokenizer, messages)
        segments: list[Segment] | None = None
        if answer_tokens or len(messages) <= MAX_SEGMENTED_MESSAGES:
            try:
                segments = self._split_segments(escaped.messages, add_generation_prompt=True)
            except TemplateLimitError:
                raise
            except RequestError:
                segments = None
        if segments is None:
            return escaped.encode(self.render_prompt(escaped.messages))
        ids, answers = [], iter(answer_tokens)
        for text, is_answer in segments:
            known = list(next(answers, ())) if is_answer else []
            prefix = escaped.escape(tokenizer.decode(known))
            ids += [*known, *escaped.encode(text[len(prefix) :])] if text.startswith(prefix) else escaped.encode(text)
        return ids

    def missing_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """Those of `special_tokens` that the tokenizer lacks."""
        return [text for text in self.special_tokens if text not in tokenizer.special_tokens]

    @cached_property
    def special_tokens(self) -> list[str]:
        """The special tokens that the template writes, such as ``<|im_start|>`` and ``<|im_end|>``."""
        found = [match[0] for text in self._probe_layout for match in _SPECIAL_TOKEN_PATTERN.finditer(text)]
        return [text for text in dict.fromkeys(found) if text != END_OF_TEXT]

    @cached_property
    def answer_prefix(self) -> str:
        """The text between the prompt and an answer: in the plain template the space after the colon."""
        return self._probe_layout[1]

    @cached_property
    def stop_strings(self) -> list[str]:
        """The texts that end an answer: the end-of-turn token, or the start of the user's turn."""
        between = self._probe_layout[2].rstrip()
        found = ((between.find(special), special) for special in self._special_strings if special in between)
        start, special = min(found, default=(0, ""))
        if special == END_OF_TEXT or not between:  # generation stops at END_OF_TEXT in any case
            return []
        return list(dict.fromkeys([between[: start + len(special)], special])) if special else [between]

    def end_tokens(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids of the special tokens that end an answer."""
        ids = tokenizer.special_tokens
        return tuple(ids[text] for text in self.stop_strings if text in ids)

    @cached_property
    def _special_strings(self) -> tuple[str, ...]:
        return tuple(filter(None, [END_OF_TEXT, *self.special_tokens, *self.special_tokens_map.values()]))

    @cached_property
    def _probe_layout(self) -> tuple[str, str, str, str]:
        """A prompt, the start of its answer, the text between the answer and the user's next message, and the rest."""
        question, answer, next_question = "\ue000", "\ue001", "\ue002"
        turns = [("user", question), ("assistant", answer), ("user", next_question)]
        for system in ([("system", "\ue003")], []):  # some templates refuse a system message
            try:
                prompt, text = self.render_prompt([*system, *turns[:1]]), self.render_prompt([*system, *turns])
            except TemplateLimitError:
                break
            except UserError:
                continue
            before, found, after = text.partition(answer)
            between, found_next, rest = after.partition(next_question)
            if found and found_next and before.startswith(prompt):
                return prompt, before[len(prompt) :], between, rest
        return "", "", "", ""

    def _split_segments(self, messages: Messages, add_generation_prompt: bool) -> list[Segment]:
        """`segments`, including empty ones; with `add_generation_prompt`, of `render_prompt`."""
        answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
        renders = [(len(messages), add_generation_prompt)]
        for i in answers:
            renders += [(i, True), (i + 1, False)]
        (whole, *texts), segments, end = self._render_all(messages, renders), [], 0
        for before, after in zip(texts[::2], texts[1::2], strict=True):
            if len(before) < end or not after.startswith(before) or not whole.startswith(after):
                raise RequestError("the chat template renders a message differently when others follow it")
            answer = self._strip_after_end_of_turn(after[len(before) :])
            segments += [(whole[end : len(before)], False), (answer, True)]
            end = len(before) + len(answer)
        return [*segments, (whole[end:], False)]

    def _strip_after_end_of_turn(self, answer: str) -> str:
        """An answer without the whitespace after the end-of-turn token, which is never generated."""
        stripped = answer.rstrip()
        return stripped if stripped.endswith(self._special_strings) else answer


class _EscapedMessages:
    """Messages with an escape character, which no message contains, inside the text of every special token."""

    def __init__(self, tokenizer: Tokenizer, messages: Messages) -> None:
        self._tokenizer = tokenizer
        texts = sorted(map(re.escape, tokenizer.special_tokens), key=len, reverse=True)
        self._special_token_pattern = re.compile(f"({'|'.join(texts)})")
        all_text = "".join(text for message in messages for text in message)
        used = set(all_text)
        candidates = chain(
            range(0xE000, 0xF900), range(0xF0000, 0x110000), range(0x10000, 0xF0000)
        )  # private use first
        self._escape_character = next((chr(i) for i in candidates if chr(i) not in used), "")
        if not self._escape_character:
            raise RequestError("the messages use every character that could mark the special tokens in them")
        self.messages = [(self.escape(role), self.escape(text)) for role, text in messages]

    def escape(self, text: str) -> str:
        return self._special_token_pattern.sub(lambda match: match[0][:1] + self._escape_character + match[0][1:], text)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text rendered from these messages; special tokens are those that the template wrote."""
        if self._escape_character not in text:
            return self._tokenizer.encode(text, allow_special=True)
        ids, special = [], self._tokenizer.special_tokens
        for i, part in enumerate(self._special_token_pattern.split(text)):
            ids += [special[part]] if i % 2 else self._tokenizer.encode(part.replace(self._escape_character, ""))
        return ids


def get_template(ref: str | Path) -> ChatTemplate:
    """The built-in template of a name (plain, raw, chatml), or the one in a file. Raises UserError if there is none."""
    if ref in BUILTIN_TEMPLATES:
        return ChatTemplate(BUILTIN_TEMPLATES[str(ref)])
    path = expand_path(ref)
    if not path.is_file():
        hint = did_you_mean(str(ref), BUILTIN_TEMPLATES)
        raise ConfigError(
            f"no chat template '{ref}'{hint}: name {', '.join(BUILTIN_TEMPLATES)}, or a file with a Jinja template",
            field="template",
        )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"the chat template {path} cannot be read: {error}") from error
    return ChatTemplate(source, dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT))


def save_template(template: ChatTemplate, folder: Path) -> None:
    """Write `chat_template.jinja` into a model folder. Raises ModelFilesError if it cannot be written."""
    path = folder / "chat_template.jinja"
    try:
        path.write_text(template.source, encoding="utf-8")
    except OSError as error:
        raise ModelFilesError(f"cannot write {path}: {error.strerror}") from error


def load_template(folder: Path) -> ChatTemplate | None:
    """The template in `chat_template.jinja` of a model folder, else in `tokenizer_config.json`; None for neither.

    Raises ModelFilesError for files that cannot be read.
    """
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    for path in (config_file, template_file):
        check_inside_folder(path, folder)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        source = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFilesError(f"the chat template of {folder} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelFilesError(f"{config_file} is not a JSON object")
    source = source or _default_template(config.get("chat_template"))
    return ChatTemplate(source, _special_tokens_map(config)) if source else None


def _default_template(value: Any) -> str | None:
    """The default template of a `chat_template` setting, which may be a list of named templates."""
    if isinstance(value, list):
        named = (item.get("template") for item in value if isinstance(item, dict) and item.get("name") == "default")
        value = next(named, None)
    return value if isinstance(value, str) else None


def _special_tokens_map(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and similar settings, each a text, or an object with the text in `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
