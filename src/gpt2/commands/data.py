"""gpt2 data list | prepare SOURCE OUT | inspect SOURCE"""

from argparse import BooleanOptionalAction, Namespace
from itertools import groupby, islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gpt2.cli import Parser, positive_int
from gpt2.data.instruct import InstructDataset, open_instruct
from gpt2.data.prepare import bpe_vocab_size, describe_shards, make_tokenizer, open_data, prepare
from gpt2.data.resolve import Rows, Shards, resolve_data, resolve_texts
from gpt2.data.sources import BUILTIN_SOURCES, Texts
from gpt2.errors import UserError
from gpt2.files import expand_path
from gpt2.templates import get_template
from gpt2.tokenizer import Tokenizer, get_tokenizer, with_special_tokens

COLUMNS_HELP = (
    "which columns of rows to read, if their names do not say: text=NAME, prompt=NAME,answer=NAME or messages=NAME"
)
MAX_SHOWN_TOKENS = 400  # of a document, so that a book does not run past


def main(argv: list[str]) -> None:
    parser = Parser(prog="gpt2 data", description="Text to token shards, and what a model would learn from data.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|prepare|inspect", parser_class=Parser)
    verbs.add_parser("list", help="the corpora that have a name")
    prepare_parser = verbs.add_parser("prepare", help="tokenize a corpus into a folder of shards")
    prepare_parser.add_argument(
        "source", metavar="SOURCE", help="a name, a text file, a folder of them, or rows of text"
    )
    prepare_parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    prepare_parser.add_flag("tokenizer", default="gpt2", help="gpt2, bytes, bpe:N or a folder [gpt2]")
    prepare_parser.add_flag("val-fraction", type=float, default=0.1, help="how much is held out [0.1]")
    prepare_parser.add_flag("columns", help=COLUMNS_HELP)
    inspect_parser = verbs.add_parser("inspect", help="show what would be learned; check token shards")
    inspect_parser.add_argument("source", metavar="SOURCE", help="as for --data: text, rows, or a folder of shards")
    inspect_parser.add_flag("tokenizer", help="gpt2, bytes, bpe:N (for text) or a folder [gpt2]")
    inspect_parser.add_flag(
        "template", default="plain", help="of prompts and answers: plain, raw, chatml or a file [plain]"
    )
    inspect_parser.add_flag(
        "mask-prompt", action=BooleanOptionalAction, default=True, help="learn the answers alone [yes]"
    )
    inspect_parser.add_flag("columns", help=COLUMNS_HELP)
    inspect_parser.add_flag("block-size", type=positive_int, default=1024, help="tokens in a row of a batch [1024]")
    inspect_parser.add_flag("rows", type=int, default=3, metavar="N", help="how many documents to show [3]")
    args = parser.parse_args(argv)

    if args.verb == "list":
        for name, about in BUILTIN_SOURCES.items():
            print(f"{name:24}{about}")
    elif args.verb == "prepare":
        texts = resolve_texts(args.source, args.columns)
        tokenizer = make_tokenizer(texts, args.tokenizer, args.val_fraction)
        meta = prepare(texts, tokenizer, expand_path(args.out), val_fraction=args.val_fraction)
        for split, counts in meta.splits.items():
            print(f"{split}: {counts.tokens:,} tokens of {counts.bytes:,} bytes in {counts.documents} document(s)")
    elif isinstance(data := resolve_data(args.source, args.columns), Shards):
        print(describe_shards(data.path))
    elif isinstance(data, Rows):
        _inspect_rows(args, data)
    else:
        _inspect_texts(args, data)


def _inspect_rows(args: Namespace, rows: Rows) -> None:
    """What rows of prompts and answers come to as tokens, in numbers and to look at."""
    if args.tokenizer and bpe_vocab_size(args.tokenizer):
        raise UserError("for rows of prompts and answers, --tokenizer is gpt2, bytes, or a folder that holds one")
    template, tokenizer = get_template(args.template), get_tokenizer(args.tokenizer or "gpt2")
    if missing := template.missing_tokens(tokenizer):
        tokenizer = with_special_tokens(tokenizer, missing)
    data = open_instruct(rows, tokenizer, template, mask_prompt=args.mask_prompt)
    for name, said in instruct_stats(data, args.block_size).items():
        print(f"{name + ':':12}{said}")
    console = Console(highlight=False)
    documents = data.documents
    for index in range(min(args.rows, len(documents))):
        some = slice(*documents.offsets[index : index + 2])
        held_out = ", held out" if index in data.val_indices else ""
        print(f"\n--- row {index + 1:,}{held_out}")
        print_tokens(console, tokenizer, documents.tokens[some].tolist(), documents.loss_mask[some].tolist())


def _inspect_texts(args: Namespace, texts: Texts) -> None:
    """What text comes to as tokens, all of which are learned."""
    data = open_data(texts, args.tokenizer)
    held_out = f"{data.val_tokens:,} held out" if data.val_tokens else "none held out"
    print(f"{'documents:':12}{len(texts.documents):,}, {sum(document.size for document in texts.documents):,} bytes")
    print(f"{'tokens:':12}{data.train_tokens:,} to learn from, {held_out}")
    print(f"{'tokenizer:':12}{data.tokenizer.name}, {data.tokenizer.vocab_size:,} ids")
    console = Console(highlight=False)
    for document in texts.documents[: max(0, args.rows)]:
        print(f"\n--- {document.name}")
        text = "".join(islice(document.iter_chunks(chunk_bytes=4 * MAX_SHOWN_TOKENS), 1))
        tokens = data.tokenizer.encode(text)
        ends = len(tokens) < MAX_SHOWN_TOKENS and len(texts.documents) > 1 and len(text.encode()) == document.size
        tokens += [data.tokenizer.end_of_text] * ends
        print_tokens(console, data.tokenizer, tokens, [True] * len(tokens))


def instruct_stats(data: InstructDataset, block_size: int) -> dict[str, str]:
    """What there is to learn, and how it fits into rows of `block_size` tokens, line by line for a person."""
    documents, packed, cut = data.documents, data.packed_rows(block_size), data.truncation(block_size)
    learned, all_tokens = int(documents.loss_mask.sum()), len(documents.tokens)
    filling = packed.num_padding / (len(packed) * block_size)
    truncated = (
        f"{cut.documents:,} of the training rows lose {cut.tokens:,} tokens, {cut.targets:,} of them to be learned"
    )
    return {
        "rows": f"{len(documents):,}: {len(data.train_indices):,} to learn from, {len(data.val_indices):,} held out",
        "tokens": f"{all_tokens:,}, of which {learned:,} are learned ({learned / all_tokens:.1%})",
        "packed": f"into {len(packed):,} rows of {block_size:,}, {filling:.1%} of them filling",
        "truncated": truncated if cut.documents else "none",
        "tokenizer": f"{data.tokenizer.name}, {data.tokenizer.vocab_size:,} ids",
    }


def print_tokens(console: Console, tokenizer: Tokenizer, tokens: list[int], learned: list[bool]) -> None:
    """Print tokens with a line between each two: what is learned in green, or in ⟦ ⟧ where there are no colours."""
    coloured = console.is_terminal and not console.no_color
    shown = list(zip(tokens, learned, strict=True))[:MAX_SHOWN_TOKENS]
    text = Text()
    for counts, run in groupby(shown, key=lambda pair: pair[1]):
        said = "│".join(_printable(tokenizer.token_bytes(token)) for token, _ in run)
        if coloured:
            text.append(said + "│", "green" if counts else "dim")
        else:
            text.append(f"⟦{said}⟧" if counts else said)
    left = len(tokens) - len(shown)
    text.append(f" … and {left:,} tokens more" if left else "", "dim")
    console.print(text, soft_wrap=True)


def _printable(token: bytes) -> str:
    """What a token stands for, with nothing in it that a terminal could obey."""
    text = token.decode("utf-8", "backslashreplace").replace("\n", "⏎\n")
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
