"""A small task file for evaluation during training."""

import json
from pathlib import Path

ENDINGS = ("comes", "goes", "sleeps", "reads")


def write_hellaswag(path: Path, rows: int = 24) -> Path:
    """HellaSwag rows of at most 19 characters each, in the publisher's fields."""
    lines = [
        json.dumps({"activity_label": "A", "ctx_a": f"number {i}", "endings": ENDINGS, "label": str(i * 7 % 4)})
        for i in range(rows)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
