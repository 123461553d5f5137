"""The documentation: every page runs as written, and the generated reference has every command and flag."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gpt2.cli import COMMANDS, command_module
from gpt2.commands.completion import subcommand_parsers
from gpt2.config import TrainConfig

DOCS = Path(__file__).parents[2] / "docs"
RUN_PAGES = [*sorted((DOCS / "learn").glob("*.md")), DOCS / "reference" / "files.md"]
SLOW_PAGES: tuple[str, ...] = ()


def load_hook(name: str) -> ModuleType:
    """A module of docs/hooks/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in SLOW_PAGES), id=page.stem) for page in RUN_PAGES],
)
def test_page_runs_as_written(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert load_hook("run_page").run_page(page) == []
    pictures = re.findall(r"\(images/([\w-]+\.png)\)", page.read_text(encoding="utf-8"))
    for name in pictures:
        assert (tmp_path / name).is_file(), "the page does not make its picture"
        assert (DOCS / "learn" / "images" / name).stat().st_size < 40_000
    assert pictures or page.parent.name != "learn" or page.stem == "index"


def test_runner_reports_another_output(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('loss', 2.0)\n```\n\n```text\nloss 2.3\n```\n")
    assert len(load_hook("run_page").run_page(page)) == 1
    page.write_text("```python\nprint('loss', 2.0)\n```\n\n```text\nloss 2.03\n```\n")
    assert load_hook("run_page").run_page(page) == []


def test_reference_has_every_command_and_flag() -> None:
    pages = load_hook("generated_pages")
    for verb in COMMANDS:
        text = pages.command_page(verb)
        parsers = list(subcommand_parsers(command_module(verb).make_parser()))
        for flag in {flag for parser in parsers for action in parser._actions for flag in _shown_flags(action)}:
            assert f"`{flag}" in text or f", {flag}" in text, (verb, flag)
    settings = pages.settings_page()
    assert all(f"| `{name}` |" in settings for name in TrainConfig.__dataclass_fields__)


def _shown_flags(action: argparse.Action) -> list[str]:
    return [] if action.help == argparse.SUPPRESS else list(action.option_strings)


def test_http_reference_has_every_route_and_field() -> None:
    pages = load_hook("generated_pages")
    schema = pages.openapi_schema()
    text = pages.http_page(schema)
    assert all(f" {path}\n" in text for path in schema["paths"])
    assert all(f"| `{name}` |" in text for name in schema["components"]["schemas"]["ChatRequest"]["properties"])


def test_environment_page_has_every_variable_of_the_source() -> None:
    page = (DOCS / "reference" / "environment.md").read_text(encoding="utf-8")
    found = re.compile(r"""environ(?:\.get\(|\[)["']([A-Z0-9_]+)["']""")
    sources = (DOCS.parent / "src" / "gpt2").rglob("*.py")
    names = {name for path in sources for name in found.findall(path.read_text(encoding="utf-8"))}
    assert {"GPT2_HOME", "CXX"} <= names
    assert {name for name in names if f"`{name}`" not in page} == set()
