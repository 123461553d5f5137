"""The hook of mkdocs.yml: adds the generated reference pages, and resolves links to files outside docs/.

Everything here runs when the site is built, so a reference page cannot differ from the code.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from generated_pages import generated_pages
from gpt2.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?\[[^\]]*\])\(((?!https?:|mailto:|#|<)[^)\s]+)\)")
SOURCES = "files"  # the folder of the site that has copies of files of the repository


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the commands into the navigation, and pages of docs/ that it does not name under "How to"."""
    nav = config.nav or []
    how_to = next(section["How to"] for section in nav if "How to" in section)
    how_to += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f"'{path.name}'" not in str(nav)]
    reference = next(section["Reference"] for section in nav if "Reference" in section)
    commands = next(entry["Commands"] for entry in reference if isinstance(entry, dict) and "Commands" in entry)
    commands += [{f"gpt2 {verb}": f"reference/commands/{verb}.md"} for verb in COMMANDS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and a copy of every file outside docs/ that a page links to."""
    for name, text in generated_pages().items():
        files.append(File.generated(config, name, content=text))
    for file in list(files.documentation_pages()):
        for path in sorted(_outside_links(file.content_string, file.src_uri)):
            if path.is_file():
                target = f"{SOURCES}/{path.relative_to(ROOT).as_posix()}"
                name = target if _is_shown_as_is(path) else target + ".txt"  # browsers show text, and save the rest
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files of the repository at their copies; a link to a folder becomes its name.

    A page without a description in its front matter gets its first sentence as one.
    """
    page.meta.setdefault("description", _first_sentence(markdown))

    def replace(match: re.Match[str]) -> str:
        path = _outside(match[2], page.file.src_uri)
        if path is None or not path.exists():
            return match[0]
        relative = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            return f"{match[1][1:-1]} (`{relative}/`)"
        target = f"{SOURCES}/{relative}" + ("" if _is_shown_as_is(path) else ".txt")
        return f"{match[1]}({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')})"

    return LINK.sub(replace, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Code that can be scrolled with the keyboard, and no empty table headers."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", output.replace("<pre>", '<pre tabindex="0">'))


def _first_sentence(markdown: str) -> str:
    paragraphs = (part.strip() for part in markdown.split("\n\n"))
    text = next((part for part in paragraphs if part and not part.startswith(("#", "!", "|", "`", "-", "<"))), "")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", " ".join(text.split()))
    return re.split(r"(?<=[.:]) ", plain)[0]


def _outside_links(markdown: str, src_uri: str) -> set[Path]:
    return {path for match in LINK.finditer(markdown) if (path := _outside(match[2], src_uri)) is not None}


def _outside(link: str, src_uri: str) -> Path | None:
    """The file of the repository outside docs/ that a link of a page points to; None for other links."""
    path = Path(os.path.normpath(ROOT / "docs" / posixpath.dirname(src_uri) / link.partition("#")[0]))
    inside = not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "docs")
    return None if inside else path


def _is_shown_as_is(path: Path) -> bool:
    return path.suffix in (".png", ".svg", ".json", ".txt")
