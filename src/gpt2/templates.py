"""A conversation as one text, and as tokens of which some are learned: by name, or by a model folder's own template.

    plain    User: Who's there?        raw    Who's there?A ghost.        chatml    <|im_start|>user
             Assistant: A ghost.                                                    Who's there?<|im_end|>
                                                                                    <|im_start|>assistant
                                                                                    A ghost.<|im_end|>

All others are Jinja templates, as `transformers` keeps them in `chat_template.jinja`; so are these, written out.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Never

from gpt2.errors import UserError, did_you_mean, missing_extra
from gpt2.files import expand_path
from gpt2.tokenizer import Tokenizer
from gpt2.vocabulary import END_OF_TEXT

USER_PREFIX, ASSISTANT_PREFIX = "User:", "Assistant:"
MAX_SEGMENTED_MESSAGES = 64  # messages; to find where answers begin and end costs the square of their number

_SPECIAL_TOKEN_PATTERN = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>")

Messages = Sequence[tuple[str, str]]
Segment = tuple[str, bool]

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
}  # the same without jinja2


class ChatTemplate:
    """Messages, (role, text) each, to the text and the tokens that a model reads.

    source:  a Jinja template, run in a sandbox. The three above are known by what they hold and need no jinja2.
    special: what the template knows by name, such as `eos_token`.

    A text in a message never becomes a special token, whatever it says: only the template's own marks do.
    Raises UserError for a source that is no template.
    """

    def __init__(self, source: str = PLAIN_TEMPLATE, special_tokens_map: dict[str, str] | None = None) -> None:
        self.source, self.special_tokens_map = source, special_tokens_map or {}
        self._render: Callable[[Messages, bool], str] = _RENDERERS.get(source) or _JinjaRenderer(
            source, self.special_tokens_map
        )

    def render(self, messages: Messages) -> str:
        """The whole conversation. Raises UserError for a template that fails."""
        return self._render(messages, False)

    def render_prompt(self, messages: Messages) -> str:
        """The text that the model goes on with. Raises UserError for a template that fails."""
        return self._render(messages, True)

    def segments(self, messages: Messages) -> list[Segment]:
        """The conversation cut into (text, is it learned): the assistant's words are, with the mark that ends a turn.

        The pieces before an answer, joined, are `prompt` of the messages before it; all, joined, are `text`.
        Raises UserError for a template under which that cannot be, as what comes later changes what came before.
        """
        return [piece for piece in self._split_segments(messages, add_generation_prompt=False) if piece[0]]

    def encode(self, tokenizer: Tokenizer, messages: Messages) -> list[tuple[list[int], bool]]:
        """`pieces` as token ids, each encoded by itself; otherwise as `pieces`."""
        veiled = _EscapedMessages(tokenizer, messages)
        return [
            (veiled.encode(text), learned)
            for text, learned in self._split_segments(veiled.messages, add_generation_prompt=False)
            if text
        ]

    def encode_prompt(
        self, tokenizer: Tokenizer, messages: Messages, answer_tokens: Sequence[Sequence[int]] = ()
    ) -> list[int]:
        """The tokens of `prompt`, the very ones that `encode` has before the next answer.

        said: tokens of the assistant's messages so far, which are used as they are where they spell the text.

        A template whose pieces cannot be found is encoded as a whole, and so are more than 64 messages unless their
        tokens are given. Raises UserError for a template that fails.
        """
        veiled = _EscapedMessages(tokenizer, messages)
        try:
            pieces = (
                self._split_segments(veiled.messages, add_generation_prompt=True)
                if answer_tokens or len(messages) <= MAX_SEGMENTED_MESSAGES
                else None
            )
        except UserError:
            pieces = None
        if pieces is None:
            return veiled.encode(self.render_prompt(veiled.messages))
        ids, spoken = [], iter(answer_tokens)
        for text, learned in pieces:
            known = list(next(spoken, ())) if learned else []
            words = veiled.escape(tokenizer.decode(known))
            ids += [*known, *veiled.encode(text[len(words) :])] if text.startswith(words) else veiled.encode(text)
        return ids

    def missing_tokens(self, tokenizer: Tokenizer) -> list[str]:
        """Those of `special_tokens` that have to be added to the tokenizer."""
        return [text for text in self.special_tokens if text not in tokenizer.special_tokens]

    @cached_property
    def special_tokens(self) -> list[str]:
        """The marks that the template sets, which want to be tokens: ``<|im_start|>``, ``<|im_end|>``."""
        found = [mark[0] for text in self._probe_layout for mark in _SPECIAL_TOKEN_PATTERN.finditer(text)]
        return [text for text in dict.fromkeys(found) if text != END_OF_TEXT]

    @cached_property
    def answer_prefix(self) -> str:
        """What stands between the prompt and an answer: the space after the colon of the plain transcript."""
        return self._probe_layout[1]

    @cached_property
    def stop_strings(self) -> list[str]:
        """What the model must not begin to say itself: the mark that ends a turn, or what begins the user's."""
        between = self._probe_layout[2].rstrip()
        at, mark = min(
            ((between.find(mark), mark) for mark in self._special_strings if mark in between), default=(0, "")
        )
        if mark == END_OF_TEXT or not between:  # the end of a text is an end anyhow
            return []
        return list(dict.fromkeys([between[: at + len(mark)], mark])) if mark else [between]

    @cached_property
    def _special_strings(self) -> tuple[str, ...]:
        return tuple(filter(None, [END_OF_TEXT, *self.special_tokens, *self.special_tokens_map.values()]))

    @cached_property
    def _probe_layout(self) -> tuple[str, str, str, str]:
        """A prompt, what opens its answer, what stands between that and what the user says next, and the rest."""
        asked, answer, more = "\ue000", "\ue001", "\ue002"
        turns = [("user", asked), ("assistant", answer), ("user", more)]
        for opening in ([("system", "\ue003")], []):  # which some templates refuse
            try:
                prompt, text = self.render_prompt([*opening, *turns[:1]]), self.render_prompt([*opening, *turns])
            except UserError:
                continue
            before, found, after = text.partition(answer)
            between, found_more, rest = after.partition(more)
            if found and found_more and before.startswith(prompt):
                return prompt, before[len(prompt) :], between, rest
        return "", "", "", ""

    def _split_segments(self, messages: Messages, add_generation_prompt: bool) -> list[Segment]:
        """`pieces`, the empty ones too; with `ask`, up to the answer that is asked for."""
        whole, pieces, end = self._render(messages, add_generation_prompt), [], 0
        for i, (role, _) in enumerate(messages):
            if role == "assistant":
                before, after = self.render_prompt(messages[:i]), self.render(messages[: i + 1])
                if len(before) < end or not after.startswith(before) or not whole.startswith(after):
                    raise UserError("the chat template writes a message in another way when others follow it")
                words = self._strip_after_end_of_turn(after[len(before) :])
                pieces += [(whole[end : len(before)], False), (words, True)]
                end = len(before) + len(words)
        return [*pieces, (whole[end:], False)]

    def _strip_after_end_of_turn(self, answer: str) -> str:
        """Less the white space after the mark that ends a turn, for which nobody waits."""
        words = answer.rstrip()
        return words if words.endswith(self._special_strings) else answer


class _JinjaRenderer:
    """A template as `transformers` runs it."""

    def __init__(self, source: str, special_tokens_map: dict[str, str]) -> None:
        try:
            import jinja2
        except ImportError as error:
            raise missing_extra("jinja2", "serve", "the model's chat template") from error
        self._special_tokens_map = special_tokens_map
        try:
            self._compiled = _jinja_environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template cannot be read: {error}") from error

    def __call__(self, messages: Messages, add_generation_prompt: bool) -> str:
        import jinja2

        named = [{"role": role, "content": text} for role, text in messages]
        given = {"messages": named, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render(**(self._special_tokens_map | given))
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f"the model's chat template cannot be used for these messages: {error}") from error


def _jinja_environment() -> Any:
    """Jinja as `transformers` sets it up."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` stands around what the assistant says; it writes nothing itself."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


def _raise_exception(message: str) -> Never:
    import jinja2

    raise jinja2.TemplateError(message)


class _EscapedMessages:
    """Messages in which whatever spells a special token has a character in its midst that is in no message."""

    def __init__(self, tokenizer: Tokenizer, messages: Messages) -> None:
        self._tokenizer = tokenizer
        texts = sorted(map(re.escape, tokenizer.special_tokens), key=len, reverse=True)
        self._special_token_pattern = re.compile(f"({'|'.join(texts)})")
        said = "".join(text for message in messages for text in message)
        self._escape_character = next(chr(i) for i in range(0xE000, 0xF900) if chr(i) not in said)
        self.messages = [(self.escape(role), self.escape(text)) for role, text in messages]

    def escape(self, text: str) -> str:
        return self._special_token_pattern.sub(lambda found: found[0][:1] + self._escape_character + found[0][1:], text)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that was made of these messages: special ones are those the template set."""
        if self._escape_character not in text:
            return self._tokenizer.encode(text, allow_special=True)
        ids, special = [], self._tokenizer.special_tokens
        for i, part in enumerate(self._special_token_pattern.split(text)):
            ids += [special[part]] if i % 2 else self._tokenizer.encode(part.replace(self._escape_character, ""))
        return ids


def get_template(ref: str | Path) -> ChatTemplate:
    """The template of that name (plain, raw, chatml), or in that file. Raises UserError when there is none."""
    if ref in BUILTIN_TEMPLATES:
        return ChatTemplate(BUILTIN_TEMPLATES[str(ref)])
    path = expand_path(ref)
    if not path.is_file():
        hint = did_you_mean(str(ref), BUILTIN_TEMPLATES)
        raise UserError(
            f"no chat template '{ref}'{hint}: there are {', '.join(BUILTIN_TEMPLATES)}, and files with a Jinja template"
        )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the chat template {path} cannot be read: {error}") from error
    return ChatTemplate(source, dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT))


def save_template(template: ChatTemplate, folder: Path) -> None:
    """Write `chat_template.jinja` into a model folder, where this program and `transformers` look for it.

    Raises UserError when it cannot be written.
    """
    path = folder / "chat_template.jinja"
    try:
        path.write_text(template.source, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load_template(folder: Path) -> ChatTemplate | None:
    """What a model folder has in `chat_template.jinja`, else in `tokenizer_config.json`; None for neither.

    Raises UserError for files that cannot be read.
    """
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        source = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the chat template of {folder} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{config_file} does not hold settings")
    source = source or _default_template(config.get("chat_template"))
    return ChatTemplate(source, _special_tokens_map(config)) if source else None


def _default_template(value: Any) -> str | None:
    """Some folders hold several templates by name."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _special_tokens_map(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, which are texts, or objects with the text in `content`."""
    found = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
