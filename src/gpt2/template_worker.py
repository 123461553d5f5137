"""The process that compiles and renders one untrusted Jinja template: a script, started by `template_process`.

It imports nothing of this package, has no more memory than `MAX_MEMORY_BYTES`, and can write no file. Each line of its
input and output is a JSON document:

    it writes   {}                                                      when it is ready
    it reads    {"source": TEXT, "seconds": CPU_TIME}                   it writes {} or {"error": TEXT}
    it reads    {"messages": [[ROLE, TEXT], ...], "variables": {...}, "seconds": CPU_TIME,
                 "renders": [[COUNT, ADD_GENERATION_PROMPT], ...]}
    it writes   {"texts": [TEXT, ...]} or {"error": TEXT}, for the first COUNT messages each
"""

import json
import sys
from datetime import datetime
from typing import Any, Never

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 2**30
MAX_OUTPUT_CHARACTERS = 2**20  # of a rendered text, and 10 for each character of its messages
ORPHAN_SECONDS = 3600  # a request never takes so long: the process that asked was killed


class _Generation(Extension):
    """``{% generation %}``, which marks the assistant's text, renders its contents only."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """A Jinja environment with the settings of `transformers`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format_: datetime.now().strftime(format_),
    }
    return environment


def _render(template: jinja2.Template, request: dict[str, Any], count: int, add_generation_prompt: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in request["messages"][:count]]
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    room = MAX_OUTPUT_CHARACTERS + 10 * sum(len(text) for message in messages for text in message.values())
    parts: list[str] = []
    for part in template.generate(**(request["variables"] | variables)):
        room -= len(part)
        if room < 0:
            raise ValueError("its output is too long")
        parts.append(part)
    return "".join(parts)


def _describe(error: BaseException) -> str:
    known = {MemoryError: "it needs too much memory", RecursionError: "it is nested too deeply"}
    return known.get(type(error)) or str(error) or type(error).__name__


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in (("RLIMIT_AS", MAX_MEMORY_BYTES), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        resource.setrlimit(getattr(resource, kind), (limit, limit))


def _set_alarm(seconds: int) -> None:
    import signal

    if hasattr(signal, "alarm"):
        signal.alarm(seconds)  # without a handler it ends the process


def _limit_cpu_time(seconds: float) -> None:
    """End the process after so many seconds of CPU time; 0 for no limit."""
    import signal

    if hasattr(signal, "ITIMER_PROF"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # without a handler it ends the process


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Answer requests until the input ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads the answers
    _limit_resources()
    _write("{}")
    template: jinja2.Template | None = None
    for line in sys.stdin:
        _set_alarm(ORPHAN_SECONDS)
        try:
            request, answer = json.loads(line), {}
            _limit_cpu_time(request["seconds"])
            if template is None:
                template = _environment().from_string(request["source"])
            else:
                answer["texts"] = [_render(template, request, count, prompt) for count, prompt in request["renders"]]
            text = json.dumps(answer)
        except Exception as error:  # whatever a template raises is its own failure
            text = json.dumps({"error": _describe(error)[:1000]})
        _limit_cpu_time(0)
        _write(text)
        _set_alarm(0)


if __name__ == "__main__":
    main()
