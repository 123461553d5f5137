"""The texts of the perplexity sets, from their files in whichever form they come."""

from collections.abc import Callable

from gpt2.errors import UserError
from gpt2.evaluation.detokenize import Detokenized, harness_wikitext
from gpt2.evaluation.perplexity import Text
from gpt2.evaluation.records import Row, is_parquet, rows_of, text_field, text_of

CHUNK = 5_000_000  # bytes or characters of enwik8 and text8 that are their customary test set: the last ones


def wikitext_text(content: bytes, where: str) -> str:
    """A WikiText file as it was published, from itself, from rows with `page`, or from rows with `text`, its lines."""
    if not (is_parquet(content) or content.lstrip()[:2] in (b'{"', b"[{")):
        return text_of(content, where)
    rows = list(rows_of(content, where))
    if rows and "page" in rows[0][1]:
        return "\n".join(text_field(row, "page") for row in rows)
    # on the hub an empty line is an empty row, and the others keep their line end
    lines = [_field_text(row) or " \n" for row in rows]
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _field_text(row: Row) -> str:
    return "" if row[1].get("text") == "" else text_field(row, "text")


def wikitext_pages(content: bytes, where: str) -> list[str]:
    """The pages of a WikiText file, as EleutherAI/wikitext_document_level divides it; rows with `page` are pages."""
    if content.lstrip()[:2] in (b'{"', b"[{") or is_parquet(content):
        rows = list(rows_of(content, where))
        if rows and "page" in rows[0][1]:
            return [text_field(row, "page") for row in rows]
    pages: list[list[str]] = [[]]
    for line in wikitext_text(content, where).split("\n"):
        folded = line.replace("= = =", "===").replace("= =", "==").strip()
        if folded.startswith("= ") and folded.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    found = [page for page in map("\n".join, pages) if page.strip()]
    if not found:
        raise UserError(f"{where} is empty")
    return found


def guide_text(text: str) -> str:
    """The text that Hugging Face's guide to perplexity tokenizes: the hub's rows joined by two line ends."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def harness_pages(pages: list[str], where: str) -> list[Text]:
    """Pages as the harness scores them: de-tokenized; words and bytes are counted in the original."""
    return [Text(harness_wikitext(page), page, f"{where} page {i}") for i, page in enumerate(pages, 1)]


def detokenized(text: str, detokenize: Callable[[str], Detokenized], where: str) -> Text:
    """A whole corpus as one text without artifacts."""
    return Text(detokenize(text).text, text, where)


def lines_of(content: bytes, where: str) -> list[str]:
    """The lines of a text file or the `text`, `sentence` fields of rows, without line ends, empty ones left out."""
    if is_parquet(content) or content.lstrip()[:2] in (b'{"', b"[{"):
        rows = rows_of(content, where)
        return [text_field(row, "sentence" if "sentence" in row[1] else "text").rstrip("\n") for row in rows]
    lines = [line for line in text_of(content, where).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{where} is empty")
    return lines


def last_part(content: bytes, where: str, size: int = CHUNK) -> str:
    """The last 5 million bytes of enwik8 or text8, the customary test set; a smaller file is taken whole."""
    tail = content[-size:] if len(content) > 2 * size else content
    begin = next((i for i in range(min(4, len(tail))) if tail[i] & 0xC0 != 0x80), 0)  # at a whole character
    return text_of(tail[begin:], where)
