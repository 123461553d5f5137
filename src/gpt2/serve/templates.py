"""A conversation as one text: by the model folder's own template, or as the plain transcript of `gpt2 chat`."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Never

from gpt2.errors import UserError
from gpt2.generation.chat import ASSISTANT, USER


class ChatTemplate:
    """Messages (role, text) to a prompt.

    source:  a Jinja template as `transformers` keeps it, run in a sandbox; None for the plain transcript.
    special: what the template knows by name, such as `eos_token`.
    """

    def __init__(self, source: str | None = None, special: dict[str, str] | None = None) -> None:
        self.source, self.special = source, special or {}

    @property
    def stops(self) -> list[str]:
        """What the model must not begin to say itself."""
        return [] if self.source is not None else [f"\n{USER}"]

    def prompt(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text that the model goes on with. Raises UserError for a template that fails."""
        if self.source is None:
            return transcript(messages)
        import jinja2

        named = [{"role": role, "content": text} for role, text in messages]
        try:
            return self._compiled.render(messages=named, add_generation_prompt=True, **self.special)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f"the model's chat template cannot be used for these messages: {error}") from error

    def check(self) -> None:
        """Raise UserError for a template that is no template."""
        if self.source is not None:
            import jinja2

            try:
                _ = self._compiled
            except jinja2.TemplateError as error:
                raise UserError(f"the model's chat template cannot be read: {error}") from error

    @cached_property
    def _compiled(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        return environment.from_string(self.source or "")


def transcript(messages: Sequence[tuple[str, str]]) -> str:
    """As `gpt2 chat` writes it: system texts as they are, the others in lines that begin with who speaks."""
    lines = [text if role not in SPEAKERS else f"{SPEAKERS[role]} {text}" for role, text in messages]
    return "\n".join([*lines, ASSISTANT])


SPEAKERS = {"user": USER, "assistant": ASSISTANT}


def load_template(folder: Path) -> ChatTemplate:
    """The template of a model folder: `chat_template.jinja`, or the one in `tokenizer_config.json`; else the plain one.

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
    template = ChatTemplate(source or _named(config.get("chat_template")), _special(config))
    template.check()
    return template


def _named(given: Any) -> str | None:
    """Some folders hold several templates by name."""
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _special(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, which are texts, or objects with the text in `content`."""
    found = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _raise(message: str) -> Never:
    import jinja2

    raise jinja2.TemplateError(message)
