"""gpt2 data list | prepare SOURCE OUT | inspect SHARDS"""

from pathlib import Path

from gpt2.cli import Parser
from gpt2.data.prepare import describe_shards, prepare, tokenizer_for
from gpt2.data.sources import SOURCES, open_source
from gpt2.files import path_of


def main(argv: list[str]) -> None:
    parser = Parser(prog="gpt2 data", description="Text to token shards, and what is in them.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|prepare|inspect", parser_class=Parser)
    verbs.add_parser("list", help="the corpora that have a name")
    prepare_parser = verbs.add_parser("prepare", help="tokenize a corpus into a folder of shards")
    prepare_parser.add_argument("source", metavar="SOURCE", help="a name, a text file, or a folder of them")
    prepare_parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    prepare_parser.flag("tokenizer", default="gpt2", help="gpt2, bytes, bpe:N or a folder [gpt2]")
    prepare_parser.flag("val-fraction", type=float, default=0.1, help="how much is held out [0.1]")
    inspect_parser = verbs.add_parser("inspect", help="check token shards and show how they begin")
    inspect_parser.add_argument("shards", metavar="SHARDS", type=Path, help="a folder of them, or one file")
    args = parser.parse_args(argv)

    if args.verb == "list":
        for name, about in SOURCES.items():
            print(f"{name:24}{about}")
    elif args.verb == "prepare":
        source = open_source(args.source)
        tokenizer = tokenizer_for(source, args.tokenizer, args.val_fraction)
        meta = prepare(source, tokenizer, path_of(args.out), val_fraction=args.val_fraction)
        for split, counts in meta.splits.items():
            print(f"{split}: {counts.tokens:,} tokens of {counts.bytes:,} bytes in {counts.documents} document(s)")
    else:
        print(describe_shards(path_of(args.shards)))
