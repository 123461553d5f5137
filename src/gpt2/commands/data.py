"""gpt2 data list | prepare SOURCE OUT | inspect SOURCE"""

import os
from argparse import BooleanOptionalAction, Namespace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2.cli import FlagRule, Parser, SubcommandParser, parse_count, positive_int, reject_unused_flags
from gpt2.data.corpora import HUB_CORPORA, HUB_PREFIX, HubCorpus
from gpt2.data.rows import BAD_ROWS_CHOICES
from gpt2.data.sources import BUILTIN_SOURCES
from gpt2.errors import DataError
from gpt2.files import expand_path
from gpt2.terminal import escape_controls, single_line
from gpt2.units import align_columns, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from gpt2.data.instruct import InstructDataset
    from gpt2.data.resolve import Rows
    from gpt2.data.sources import Texts
    from gpt2.tokenizer import Tokenizer

COLUMNS_HELP = "columns of rows to read [by their names]: text=NAME, prompt=NAME,answer=NAME or messages=NAME"
BAD_ROWS_HELP = "rows that cannot be used: error, or skip to count and skip them [error]"
CORPUS_FLAGS = ("max_tokens", "shuffle", "dedup")
CORPUS_RULES = (FlagRule(CORPUS_FLAGS, lambda args: False, "{} is for corpora on the hub"),)
CORE_TOKENS_PER_SECOND = 3_400_000  # of tiktoken on English text; see benchmarks/prepare_race.py
SHARD_TOKENS = 100_000_000
MAX_SHOWN_TOKENS = 400  # of a document


def main(argv: list[str]) -> None:
    """Run `gpt2 data`: reports on standard output."""
    args = make_parser().parse_args(argv)
    if args.verb == "list":
        print_corpora()
        return
    from gpt2.data.mixture import Mixture
    from gpt2.data.prepare import describe_shards
    from gpt2.data.resolve import Rows, Shards, resolve_data

    if args.verb == "prepare":
        _prepare(args)
    elif isinstance(data := resolve_data(args.source, args.columns, args.bad_rows), Shards):
        print(escape_controls(describe_shards(data.path)))
    elif isinstance(data, Mixture):
        raise DataError(f"{args.source} is a mixture: inspect its parts")
    elif isinstance(data, HubCorpus):
        print(escape_controls(describe_corpus(data)))
    elif isinstance(data, Rows):
        _inspect_rows(args, data)
    else:
        _inspect_texts(args, data)


def print_corpora() -> None:
    """Print a table of the corpora with tokens, disk, time and licence, and the references that are not names."""
    cores = os.cpu_count() or 1
    rows = [("NAME", "TOKENS", "DOWNLOAD", "SHARDS", "TIME", "LICENCE", "")]
    for name, corpus in HUB_CORPORA.items():
        seconds = 0.0 if corpus.is_tokens else corpus.tokens / (CORE_TOKENS_PER_SECOND * cores)
        time = format_duration(seconds) if seconds else "-"
        download, shards = format_bytes(corpus.download), format_bytes(2 * corpus.tokens)
        rows.append((name, format_count(corpus.tokens), download, shards, time, corpus.licence, corpus.description))
    rows += [(name, "", "", "", "", "", text) for name, text in BUILTIN_SOURCES.items()]
    rows.append((f"{HUB_PREFIX}owner/name", "", "", "", "", "", "any text of the hub: [/config][@revision][:split]"))
    print("\n".join(align_columns(rows)))
    print(
        f"\nTIME: tokenizing on the {cores} cores of this machine, at {CORE_TOKENS_PER_SECOND / 1e6:.1f}M tokens/s each"
    )


def describe_corpus(corpus: HubCorpus) -> str:
    """What is known about a corpus on the hub without looking it up."""
    layout = (
        "as its shards are" if corpus.is_tokens else corpus.layout.describe() if corpus.layout else "its own splits"
    )
    lines = [f"{corpus.name}: {corpus.description or 'a corpus on the hub'}", f"source:   {corpus.ref}"]
    lines += [f"licence:  {corpus.licence}"] if corpus.licence else []
    return "\n".join([*lines, f"layout:   {layout}", f"it is not here: gpt2 data prepare {corpus.name} FOLDER"])


def _prepare(args: Namespace) -> None:
    """Write token shards, and print what they have."""
    from gpt2.data.prepare import corpus_tokenizer, make_tokenizer, prepare
    from gpt2.data.prepare_corpus import CorpusOptions, prepare_corpus
    from gpt2.data.resolve import resolve_data, resolve_texts

    out = expand_path(args.out)
    data = resolve_data(args.source, args.columns, args.bad_rows)
    if isinstance(data, HubCorpus):
        options = CorpusOptions(args.max_tokens, args.shuffle, args.dedup, args.shard_tokens)
        meta = prepare_corpus(data, corpus_tokenizer(data, args.tokenizer), out, options)
    else:
        reject_unused_flags([name for name in CORPUS_FLAGS if getattr(args, name)], args, CORPUS_RULES)
        texts = resolve_texts(args.source, args.columns, args.bad_rows)
        tokenizer = make_tokenizer(texts, args.tokenizer, args.val_fraction)
        meta = prepare(texts, tokenizer, out, val_fraction=args.val_fraction, shard_tokens=args.shard_tokens)
    for split, counts in meta.splits.items():
        size = f" of {counts.bytes:,} bytes in {counts.documents:,} document(s)" if counts.bytes else ""
        print(f"{split}: {counts.tokens:,} tokens{size}")


def make_parser() -> Parser:
    """The parser of `gpt2 data`."""
    parser = Parser(
        prog="gpt2 data",
        description="Tokenize text into shards, and show what a model would train on.",
        examples=(
            "gpt2 data inspect questions.jsonl --template chatml",
            "gpt2 data prepare my-notes/ shards --tokenizer gpt2",
            "gpt2 data prepare fineweb-edu-10B shards --max-tokens 1B",
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=SubcommandParser)
    verbs.add_parser(
        "list",
        help="list the corpora with size, time and licence",
        examples=("gpt2 data list", "gpt2 data list | grep wiki"),
    )
    shards = verbs.add_parser(
        "prepare",
        help="tokenize a corpus into a folder of shards",
        examples=(
            "gpt2 data prepare my-notes/ shards --tokenizer bpe:4096",
            "gpt2 data prepare fineweb-edu-10B shards --max-tokens 1B",
        ),
    )
    shards.add_argument("source", metavar="SOURCE", help="a name, a text file, a folder of them, or rows of text")
    shards.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    shards.add_flag("tokenizer", default="gpt2", metavar="NAME|FOLDER", help="gpt2, bytes, bpe:N or a folder [gpt2]")
    shards.add_flag("val-fraction", type=float, default=0.1, help="fraction held out for validation [0.1]")
    shards.add_flag(
        "max-tokens", type=parse_count, metavar="COUNT", help="train on the first tokens only, such as 1B [all]"
    )
    shards.add_flag("shuffle", type=int, metavar="SEED", help="shuffle the documents of a corpus on the hub, on disk")
    shards.add_flag("dedup", action="store_true", help="drop documents of a corpus on the hub that occurred before")
    shards.add_flag(
        "shard-tokens",
        type=parse_count,
        default=SHARD_TOKENS,
        metavar="COUNT",
        help=f"tokens in a shard [{SHARD_TOKENS:,}]",
    )
    shards.add_flag("columns", metavar="COLUMNS", help=COLUMNS_HELP)
    shards.add_flag("bad-rows", choices=BAD_ROWS_CHOICES, default="error", metavar="NAME", help=BAD_ROWS_HELP)
    inspect = verbs.add_parser(
        "inspect",
        help="show the tokens that would be trained on; check token shards",
        examples=("gpt2 data inspect questions.jsonl --template chatml", "gpt2 data inspect shards"),
    )
    inspect.add_argument("source", metavar="SOURCE", help="as for --data: text, rows, or a folder of shards")
    inspect.add_flag("tokenizer", metavar="NAME|FOLDER", help="gpt2, bytes, bpe:N (for text) or a folder [gpt2]")
    inspect.add_flag(
        "template", default="plain", metavar="NAME|FILE", help="chat template: plain, raw, chatml or a file [plain]"
    )
    inspect.add_flag("mask-prompt", action=BooleanOptionalAction, default=True, help="train on answers only [yes]")
    inspect.add_flag("columns", metavar="COLUMNS", help=COLUMNS_HELP)
    inspect.add_flag("bad-rows", choices=BAD_ROWS_CHOICES, default="error", metavar="NAME", help=BAD_ROWS_HELP)
    inspect.add_flag("block-size", type=positive_int, default=1024, help="tokens in a row of a batch [1024]")
    inspect.add_flag("rows", type=int, default=3, metavar="INT", help="how many documents to show [3]")
    return parser


def _inspect_rows(args: Namespace, rows: "Rows") -> None:
    """Print statistics of rows of prompts and answers, and the tokens of the first rows."""
    from rich.console import Console

    from gpt2.data.instruct import open_instruct
    from gpt2.data.prepare import bpe_vocab_size
    from gpt2.templates import get_template
    from gpt2.tokenizer import get_tokenizer, with_special_tokens

    if args.tokenizer and bpe_vocab_size(args.tokenizer):
        message = "for rows of prompts and answers, --tokenizer is gpt2, bytes, or a folder of a tokenizer"
        raise DataError(message, field="tokenizer")
    template, tokenizer = get_template(args.template), get_tokenizer(args.tokenizer or "gpt2")
    if missing := template.missing_tokens(tokenizer):
        tokenizer = with_special_tokens(tokenizer, missing)
    data = open_instruct(rows, tokenizer, template, mask_prompt=args.mask_prompt)
    for name, value in instruct_stats(data, args.block_size).items():
        print(f"{name + ':':12}{value}")
    console = Console(highlight=False)
    documents = data.documents
    for index in range(min(args.rows, len(documents))):
        span = slice(*documents.offsets[index : index + 2])
        held_out = ", held out" if index in data.val_indices else ""
        print(f"\n--- row {index + 1:,}{held_out}")
        print_tokens(console, tokenizer, documents.tokens[span].tolist(), documents.loss_mask[span].tolist())


def _inspect_texts(args: Namespace, texts: "Texts") -> None:
    """Print statistics of text, and the tokens of the first documents. The loss covers all tokens of text."""
    from rich.console import Console

    from gpt2.data.prepare import open_data

    data = open_data(texts, args.tokenizer)
    held_out = f"{data.val_tokens:,} held out" if data.val_tokens else "none held out"
    print(f"{'documents:':12}{len(texts.documents):,}, {sum(document.size for document in texts.documents):,} bytes")
    print(f"{'tokens:':12}{data.train_tokens:,} for training, {held_out}")
    print(f"{'tokenizer:':12}{data.tokenizer.name}, {data.tokenizer.vocab_size:,} ids")
    console = Console(highlight=False)
    for document in texts.documents[: max(0, args.rows)]:
        print(f"\n--- {single_line(document.name)}")
        text = ""
        for chunk in document.iter_chunks(chunk_bytes=4 * MAX_SHOWN_TOKENS):
            text += chunk
            if len(text) >= 4 * MAX_SHOWN_TOKENS:
                break
        tokens = data.tokenizer.encode(text)
        ends = len(tokens) < MAX_SHOWN_TOKENS and len(texts.documents) > 1 and len(text.encode()) == document.size
        tokens += [data.tokenizer.end_of_text] * ends
        print_tokens(console, data.tokenizer, tokens, [True] * len(tokens))
        if (rest := document.size - len(text.encode())) > 0:
            print(f"… and {rest:,} more bytes of {document.size:,}")


def instruct_stats(data: "InstructDataset", block_size: int) -> dict[str, str]:
    """Counts of rows, tokens and loss targets, and how they pack into rows of `block_size` tokens, as text by name."""
    documents, packed, cut = data.documents, data.packed_rows(block_size), data.truncation(block_size)
    targets, all_tokens = int(documents.loss_mask.sum()), len(documents.tokens)
    padding = packed.num_padding / (len(packed) * block_size)
    truncated = f"{cut.documents:,} of the training rows lose {cut.tokens:,} tokens, {cut.targets:,} of them targets"
    return {
        "rows": f"{len(documents):,}: {len(data.train_indices):,} for training, {len(data.val_indices):,} held out",
        "tokens": f"{all_tokens:,}, of which {targets:,} are loss targets ({targets / all_tokens:.1%})",
        "packed": f"into {len(packed):,} rows of {block_size:,}, {padding:.1%} of them padding",
        "truncated": truncated if cut.documents else "none",
        "tokenizer": f"{data.tokenizer.name}, {data.tokenizer.vocab_size:,} ids",
    }


def print_tokens(console: "Console", tokenizer: "Tokenizer", tokens: list[int], loss_mask: list[bool]) -> None:
    """Print tokens separated by lines: loss targets in green, or in ⟦ ⟧ on a console without colors."""
    from rich.text import Text

    colored = console.is_terminal and not console.no_color
    shown = list(zip(tokens, loss_mask, strict=True))[:MAX_SHOWN_TOKENS]
    text = Text()
    for is_target, run in groupby(shown, key=lambda pair: pair[1]):
        words = "│".join(_printable(tokenizer.token_bytes(token)) for token, _ in run)
        if colored:
            text.append(words + "│", "green" if is_target else "dim")
        else:
            text.append(f"⟦{words}⟧" if is_target else words)
    hidden = len(tokens) - len(shown)
    text.append(f" … and {hidden:,} more tokens" if hidden else "", "dim")
    console.print(text, soft_wrap=True)


def _printable(token: bytes) -> str:
    """The text of a token, with control characters escaped."""
    text = token.decode("utf-8", "backslashreplace").replace("\n", "⏎\n")
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
