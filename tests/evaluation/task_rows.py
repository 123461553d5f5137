"""Rows of the real task data, written in their publishers' fields, for this program and the harness alike."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2.evaluation.texts import wikitext_pages

EVAL_DATA = Path(os.environ.get("GPT2_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "eval"
HARNESS_NAMES = {  # ours -> the harness's name, its file, and its split
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "arc-easy": ("arc/arc_easy.yaml", "test"),
    "arc-challenge": ("arc/arc_challenge.yaml", "test"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "wikitext2": ("wikitext/wikitext.yaml", "test"),
}


def publisher_rows(data: Path, task: str) -> Iterator[dict[str, Any]]:
    """The rows of a task in the folder `data` (shared/data/eval), as its publisher or the hub writes them."""
    if task == "hellaswag":
        for row in _lines(data / "hellaswag" / "hellaswag_val.jsonl.gz"):
            label, _, context = row["lm_eval_query"].partition(": ")
            yield {
                "activity_label": label,
                "ctx_a": context,
                "ctx_b": "",
                "ctx": row["ctx"],
                "endings": row["endings"],
                "label": str(row["label"]),
            }
    elif task == "lambada":
        yield from _lines(data / "lambada" / "lambada_test.jsonl")
    elif task == "wikitext2":
        path = data / "wikitext" / "wiki.test.raw"
        yield from ({"page": page} for page in wikitext_pages(path.read_bytes(), str(path)))
    elif task == "winogrande":
        yield from map(_winogrande, _lines(data / "multiple-choice" / "winogrande.jsonl.gz"))
    elif task == "piqa":
        for row in _lines(data / "multiple-choice" / "piqa.jsonl.gz"):
            goal = row["query"].removeprefix("Question: ").removesuffix("\n")
            yield {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}
    else:
        name = {"openbookqa": "openbook_qa"}.get(task, task.replace("-", "_"))
        for row in _lines(data / "multiple-choice" / f"{name}.jsonl.gz"):
            labels = "ABCDE"[: len(row["choices"])]
            question = "question_stem" if task == "openbookqa" else "question"
            yield {
                question: row["query"].removeprefix("Question: ") if task != "openbookqa" else row["query"],
                "choices": {"text": row["choices"], "label": list(labels)},
                "answerKey": labels[row["gold"]],
            }


def write_rows(data: Path, task: str, count: int, path: Path) -> Path:
    """The first `count` rows of a task as JSON lines."""
    rows = (json.dumps(row) for _, row in zip(range(count), publisher_rows(data, task), strict=False))
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    first, second = row["context_options"]
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    shared = first[: first.rfind(" ", 0, same) + 1]
    options = [option[len(shared) :] for option in row["context_options"]]
    sentence = f"{shared}_ {row['continuation']}"
    return {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(row["gold"] + 1)}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(json.loads, file)
