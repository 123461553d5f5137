"""What the lower precisions of `gpt2 eval --dtype` cost in accuracy: the same rows in each, compared with float32.

    python benchmarks/eval_dtypes.py MODEL --data FOLDER [--rows 1000] [--dtypes float32,bfloat16,int8]

FOLDER holds hellaswag/hellaswag_val.jsonl.gz and lambada/lambada_test.jsonl. For each dtype: the metrics, how many
rows have another decision than in float32, and the seconds. Writes results/eval_dtypes.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from machine import write_result

from gpt2.evaluation.evaluate import prepare_task
from gpt2.evaluation.scorer import score
from gpt2.evaluation.tasks import TASKS
from gpt2.generation.engine import LanguageModel
from gpt2.generation.inference import prepare_for_inference
from gpt2.runtime import DTYPES
from gpt2.weights import load

FILES = {"hellaswag": "hellaswag/hellaswag_val.jsonl.gz", "lambada": "lambada/lambada_test.jsonl"}


def load_in(dtype: str, name: str) -> LanguageModel:
    """The model as `gpt2 eval --dtype` runs it: in torch, or for int8 and int4 in the CPU kernel."""
    model = load(name)[0].eval()
    return model.to(DTYPES[dtype]) if dtype in DTYPES else prepare_for_inference(model, dtype)


def run(task: str, args: argparse.Namespace, dtype: str) -> tuple[dict[str, Any], list[tuple[float, ...]]]:
    """Metrics and seconds, and the record of every row: decisions, then log-likelihoods."""
    model, tokenizer = load_in(dtype, args.model), load(args.model)[1]
    assert tokenizer is not None
    (one,) = prepare_task(TASKS[task], tokenizer, model, args.rows, {task: str(args.data / FILES[task])})
    start, records = time.perf_counter(), {}
    for batch in score(model, one.prepared.groups):
        records |= {index: one.prepared.record(index, scored) for index, scored in batch}
    seconds = time.perf_counter() - start
    found = one.prepared.summarize(records)
    return {"metrics": found.metrics, "stderr": found.stderr, "seconds": seconds}, [records[i] for i in sorted(records)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--dtypes", default="float32,bfloat16,int8")
    args = parser.parse_args()
    tasks: dict[str, Any] = {}
    for task in FILES:
        exact: list[tuple[float, ...]] = []
        for dtype in args.dtypes.split(","):
            found, records = run(task, args, dtype)
            exact = exact or records
            found["other_decisions"] = sum(a[0] != b[0] for a, b in zip(records, exact, strict=True))
            differences = [
                abs(x - y) for a, b in zip(records, exact, strict=True) for x, y in zip(a[2:], b[2:], strict=True)
            ]
            found["mean_log_likelihood_difference"] = sum(differences) / len(differences)
            tasks.setdefault(task, {})[dtype] = found
            print(task, dtype, found, flush=True)
    command = f"python benchmarks/eval_dtypes.py MODEL --data FOLDER --rows {args.rows}"
    write_result("eval_dtypes", command, {"rows": args.rows, "tasks": tasks})
    print(json.dumps(tasks))


if __name__ == "__main__":
    main()
