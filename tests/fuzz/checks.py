"""What the program does with each kind of folder. A check raises UserError for a folder that it refuses, or returns."""

from itertools import islice
from pathlib import Path

import torch

from gpt2.commands.info import model_facts
from gpt2.data.instruct import open_instruct
from gpt2.data.prepare import describe_shards
from gpt2.data.resolve import Rows, Shards, resolve_data
from gpt2.data.sources import Texts
from gpt2.lora import read_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.peft_merge import merge_adapter
from gpt2.reporting.metrics import read_metrics
from gpt2.reporting.task_metrics import task_rows
from gpt2.resolve import resolve_model
from gpt2.templates import ChatTemplate, load_template
from gpt2.tokenizer import ByteTokenizer, load_tokenizer

SHAPE = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=8)
TEXTS = [
    "",
    "It's <|endoftext|> 1,234 words\n\n  so.",
    "a" * 5000,
    " " * 5000,
    "\U0001f600\u202e\0" * 500,
    "Aa1" * 2000,
]
MESSAGES = [("system", "s"), ("user", "<|endoftext|>"), ("assistant", "b"), ("user", "c")]


def check_model(folder: Path) -> None:
    """`gpt2 info`, and loading the weights, the tokenizer and the template."""
    resolved = resolve_model(folder)
    model_facts(resolved)
    model, tokenizer = resolved.load()
    model(torch.zeros(1, 2, dtype=torch.long))
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("text"))


def check_tokenizer(folder: Path) -> None:
    """Loading a tokenizer, encoding and decoding."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text, allow_special=True))
        tokenizer.decode(range(tokenizer.vocab_size))


def check_template(folder: Path) -> None:
    """Loading a template, and all that is done with it for a request and for training."""
    template = load_template(folder)
    if template is not None:
        tokenizer = ByteTokenizer()
        template.encode_prompt(tokenizer, MESSAGES)
        template.encode(tokenizer, MESSAGES)
        _ = template.stop_strings, template.answer_prefix


def check_adapter(folder: Path) -> None:
    """Reading an adapter and merging it into a model."""
    merge_adapter(GPT(SHAPE), read_adapter(folder))


def check_data(folder: Path, pattern: str = "") -> None:
    """Reading rows or text of a folder."""
    data = resolve_data(f"{folder}{pattern}")
    if isinstance(data, Shards):
        describe_shards(data.path)
    elif isinstance(data, Rows):
        open_instruct(data, ByteTokenizer(), ChatTemplate())
    elif isinstance(data, Texts):
        for document in data.documents:
            for text in islice(document.iter_texts(), 10_000):
                assert text is None or len(text) < 2**22


def check_pattern(folder: Path) -> None:
    """Reading the text that a pattern names."""
    check_data(folder, "/**")


def check_metrics(folder: Path) -> None:
    """What a resumed run and its report read of metrics.jsonl."""
    records = read_metrics(folder / "metrics.jsonl")
    task_rows(records, {})
    for record in records:
        assert record["tokens"] / record["step"] + record["loss"] is not None


CHECKS = {
    "model": check_model,
    "tokenizer": check_tokenizer,
    "template": check_template,
    "adapter": check_adapter,
    "rows": check_data,
    "pattern": check_pattern,
    "parquet": check_data,
    "shards": check_data,
    "metrics": check_metrics,
}
