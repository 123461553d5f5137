"""gpt2 info MODEL"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.cli import Parser
from gpt2.commands.generation_args import MODEL_HELP, add_adapter_flag
from gpt2.commands.json_output import add_json_flag, prints_json, write_json
from gpt2.files import safetensors_header
from gpt2.terminal import escape_controls, single_line
from gpt2.units import format_bytes

if TYPE_CHECKING:
    from gpt2.resolve import ResolvedModel


def main(argv: list[str]) -> None:
    """Run `gpt2 info`: what a model folder or a run holds, on standard output. Weights are not loaded."""
    args = make_parser().parse_args(argv)
    from gpt2.resolve import resolve_model

    facts = model_facts(resolve_model(args.model, args.adapter))
    write_json(args.json, facts)
    if prints_json(args.json):
        return
    for name, value in facts.items():
        print(f"{name + ':':16}{format_bytes(value) if name == 'size' else _shown(name, value)}")


def make_parser() -> Parser:
    """The parser of `gpt2 info`."""
    parser = Parser(
        prog="gpt2 info",
        description="Show a model's shape, parameters, tokenizer, end tokens, template, dtype and files.",
        examples=("gpt2 info runs/quickstart", "gpt2 info gpt2 --json -"),
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_json_flag(parser, "the facts")
    add_adapter_flag(parser)
    return parser


def model_facts(model: "ResolvedModel") -> dict[str, Any]:
    """The facts of a model by name: numbers, texts, or None for what it does not have."""
    import torch

    from gpt2.model import GPT

    config, tokenizer = model.config, model.tokenizer
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    end = None if tokenizer is None else tokenizer.end_of_text
    files = list(model.folder.iterdir()) if model.folder.is_dir() else [model.folder]
    facts: dict[str, Any] = {
        "folder": str(model.folder),
        "layers": config.n_layer,
        "heads": config.n_head,
        "width": config.n_embd,
        "context": config.block_size,
        "vocabulary": config.vocab_size,
        "parameters": parameters,
        "dtype": stored_dtypes(model.folder),
        "tokenizer": None if tokenizer is None else f"{tokenizer.name}, {tokenizer.vocab_size:,} ids",
        "end token": end,
        "end tokens": [] if tokenizer is None else list(tokenizer.end_tokens),
        "chat template": None if model.template is None else model.template.source,
        "adapter": None if model.adapter is None else str(model.adapter),
        "size": sum(path.stat().st_size for path in files if path.is_file()),
    }
    run = model.folder.parent
    if (run / "config.toml").is_file():
        metrics = run / "metrics.jsonl"
        facts["run"] = str(run)
        facts["steps"] = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.is_file() else 0
    return facts


def stored_dtypes(folder: Path) -> str:
    """The dtypes of the tensors in a folder's safetensors files, by their headers; "" without such files."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        header = safetensors_header(path)
        found |= {str(entry.get("dtype")) for entry in header.values()}
    return ", ".join(sorted(found))


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if name == "chat template":
        return escape_controls(value).strip().replace("\n", "\n" + " " * 16)
    return single_line(value)
