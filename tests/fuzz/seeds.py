"""Valid folders of each kind, as files, from which hostile ones are made."""

import io
import json
from pathlib import Path

from gpt2.data.prepare import prepare
from gpt2.data.sources import Document, Texts
from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, save_adapter
from gpt2.model import GPT
from gpt2.tokenizer import ByteTokenizer, train_bpe
from gpt2.weights import save
from tests.fuzz.checks import SHAPE
from tests.helpers.tokenizer_samples import SENTENCES

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = b'{"prompt": "What is it?", "answer": "It is 5."}\n{"prompt": "And now?", "answer": "No."}\n' * 4
RECORD = {"step": 1, "loss": 5.5, "lr": 1e-3, "tokens": 256, "tokens_per_second": 1e3, "eval/hellaswag/acc": 0.25}


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make_seeds(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of a valid folder by kind; `folder` is for temporary ones."""
    tokenizer = train_bpe(SENTENCES, SHAPE.vocab_size)
    model = GPT(SHAPE)
    files = read_files(save(model, tokenizer, folder / "model"))
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    add_adapter(model, config := LoRAConfig(rank=2))
    adapter = save_adapter(folder / "adapter", config, adapter_state_dict(model), "base", base_fingerprint(model))
    texts = Texts("texts", tuple(Document(str(i), text.encode() * 20) for i, text in enumerate(SENTENCES)))
    prepare(texts, ByteTokenizer(), folder / "shards")
    return {
        "model": files,
        "tokenizer": {name: files[name] for name in names},
        "template": {"chat_template.jinja": TEMPLATE.encode(), "tokenizer_config.json": b'{"eos_token": "<|eos|>"}'},
        "adapter": read_files(adapter),
        "rows": {"rows.jsonl": ROWS},
        "pattern": {"a.txt": b"one", "b.txt": b"two"},
        "parquet": {"rows.parquet": parquet({"prompt": ["a", "b"] * 4, "answer": ["c", "d"] * 4})},
        "shards": read_files(folder / "shards"),
        "metrics": {"metrics.jsonl": b"".join(json.dumps({**RECORD, "step": i}).encode() + b"\n" for i in range(1, 9))},
    }


def parquet(columns: dict, compression: str = "zstd") -> bytes:
    """A Parquet file of these columns; b"" without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return b""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression=compression)
    return buffer.getvalue()
