"""Rows per second of `gpt2 eval` beside lm-evaluation-harness's `hf` model, in turns on the same cores.

    python benchmarks/eval_race.py --data FOLDER [--rows 16] [--turns 3] [--n-layer 12 --n-embd 768]

FOLDER holds hellaswag/hellaswag_val.jsonl.gz, lambada/lambada_test.jsonl and wikitext/wiki.test.raw. Both sides get
the same texts and the same random weights (the shape counts, not what was learned), in float32. Tokenization is timed
on both sides; reading files and loading the model are not. --batch-size auto lets the harness search for its batch
size, as its users do, and counts that search. On a machine that others use too, the ratio of CPU times with one
thread (OMP_NUM_THREADS=1) is the steadier one: it does not count the time that others had the cores.

The limit: CPU seconds of nothing but the matrix products that the scores need, at the float32 rate measured in the same
run. `limit_ratio_cpu` is the harness's time over it: no program that computes these scores on this machine is faster.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import write_result
from torch import nn

from gpt2.evaluation.choices import prepare_choices
from gpt2.evaluation.evaluate import run_passes
from gpt2.evaluation.fetch import open_task_file
from gpt2.evaluation.lambada import prepare_lambada
from gpt2.evaluation.measures import Prepared
from gpt2.evaluation.perplexity import harness_units, prepare_rolling
from gpt2.evaluation.prepare import ScoringPass
from gpt2.evaluation.records import rows_of
from gpt2.evaluation.tasks import TASKS
from gpt2.evaluation.texts import harness_pages, wikitext_pages
from gpt2.evaluation.tree import build_tree
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import configure_malloc
from gpt2.tokenizer import Tokenizer, get_tokenizer
from gpt2.weights import save

FILES = {
    "hellaswag": "hellaswag/hellaswag_val.jsonl.gz",
    "lambada": "lambada/lambada_test.jsonl",
    "wikitext2-harness": "wikitext/wiki.test.raw",
}


def read_rows(task: str, count: int, data: Path) -> list[Any]:
    """The first rows of a task as our tasks read them: `Choices`, `Passage`s, or pages of text."""
    path = str(data / FILES[task])
    file = open_task_file(TASKS[task].data_file, path)
    if task == "wikitext2-harness":
        return harness_pages(wikitext_pages(file.content, path)[:count], path)
    read: Any = TASKS[task].read
    return [read(row) for row in islice(rows_of(file.content, path), count)]


def prepare(task: str, rows: list[Any], model: GPT, tokenizer: Tokenizer) -> Prepared:
    """The rows as our scorer takes them."""
    if task == "hellaswag":
        return prepare_choices(rows, tokenizer, model.config)
    if task == "lambada":
        return prepare_lambada(rows, tokenizer, model.config)
    return prepare_rolling(rows, tokenizer, model.config, harness_units(rows))


def our_run(task: str, rows: list[Any], model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    """One run of ours, tokenization included: the metrics."""
    prepared = prepare(task, rows, model, tokenizer)
    return run_passes([ScoringPass(prepared)], model, TASKS[task].protocol).metrics


def harness_requests(task: str, rows: list[Any]) -> list[Any]:
    """What the harness's task of this name asks of a model: `Instance`s, of which its models read `args`."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    if task == "wikitext2-harness":
        return [Instance("loglikelihood_rolling", {}, (text.scored,), i) for i, text in enumerate(rows)]
    pairs: list[tuple[str, str]] = []
    for row in rows:
        if task == "lambada":
            context, _, word = row.text.rpartition(" ")
            pairs.append((context, f" {word}"))
        else:
            pairs += zip(row.contexts, row.continuations, strict=True)
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def needed_flops(task: str, rows: list[Any], model: GPT, tokenizer: Tokenizer) -> float:
    """Floating-point operations of the linear layers for the tokens that must be computed, each shared prefix once."""
    trees = [build_tree(group) for group in prepare(task, rows, model, tokenizer).groups]
    scored = sum(len(np.unique(np.concatenate(tree.paths))) for tree in trees)
    layers = sum(module.weight.numel() for module in model.transformer.modules() if isinstance(module, nn.Linear))
    return 2.0 * layers * sum(map(len, trees)) + 2.0 * model.lm_head.weight.numel() * scored


def matmul_rate(repeats: int = 10) -> float:
    """The best FLOP/s of CPU time of a float32 product in the shape of the MLP's first layer, (1024, 768, 3072)."""
    a, b, seconds = torch.randn(1024, 768), torch.randn(768, 3072), []
    for _ in range(repeats):
        start = time.process_time()
        torch.mm(a, b)
        seconds.append(time.process_time() - start)
    return 2.0 * a.numel() * b.size(1) / min(seconds)


def race(task: str, args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, hf: Any) -> dict[str, Any]:
    """Both in turns: seconds of every run, and the ratio of the medians."""
    rows = read_rows(task, args.pages if task == "wikitext2-harness" else args.rows, args.data)
    requests = harness_requests(task, rows)
    ask: Callable[..., Any] = hf.loglikelihood_rolling if task == "wikitext2-harness" else hf.loglikelihood
    found: dict[str, Any] = {"rows": len(rows), "requests": len(requests)}
    found |= {name: [] for name in ("ours", "harness", "ours_cpu", "harness_cpu")}
    metrics, theirs = {}, []
    for _ in range(args.turns):
        start, cpu = time.perf_counter(), time.process_time()
        metrics = our_run(task, rows, model, tokenizer)
        middle, between = time.perf_counter(), time.process_time()
        theirs = ask(requests, disable_tqdm=True)
        found["ours"].append(middle - start)
        found["ours_cpu"].append(between - cpu)
        found["harness"].append(time.perf_counter() - middle)
        found["harness_cpu"].append(time.process_time() - between)
    for kind in ("", "_cpu"):
        ratio = statistics.median(found[f"harness{kind}"]) / statistics.median(found[f"ours{kind}"])
        found[f"ratio{kind}"] = ratio
    found["matmul_flops"], found["needed_flops"] = matmul_rate(), needed_flops(task, rows, model, tokenizer)
    found["limit_cpu"] = found["needed_flops"] / found["matmul_flops"]
    found["of_limit"] = found["limit_cpu"] / statistics.median(found["ours_cpu"])
    found["limit_ratio_cpu"] = statistics.median(found["harness_cpu"]) / found["limit_cpu"]
    found["metrics"] = metrics
    found["harness_total"] = sum(one if isinstance(one, float) else one[0] for one in theirs)
    print(
        f"{task}: {found['ratio']:.2f} times the harness's rows/s, {found['ratio_cpu']:.2f} by CPU time "
        f"(limit {found['limit_ratio_cpu']:.2f}; ours is at {found['of_limit']:.0%} of it)",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--pages", type=int, default=1, help="of WikiText")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-size", default="16", help="of the harness; 'auto' searches for one first")
    parser.add_argument("--n-layer", type=int, default=12)
    parser.add_argument("--n-embd", type=int, default=768)
    parser.add_argument("--tasks", default=",".join(FILES))
    parser.add_argument("--name", default="eval_race", help="of the file in results/")
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    configure_malloc(keep_freed=True)  # as `gpt2 eval` does on a CPU; here it is for both
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=args.n_layer, n_embd=args.n_embd)).eval()
    tokenizer = get_tokenizer("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        save(model, tokenizer, folder)
        hf = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=args.batch_size)
    found = {task: race(task, args, model, tokenizer, hf) for task in args.tasks.split(",")}
    command = (
        f"python benchmarks/eval_race.py --data FOLDER --rows {args.rows} --pages {args.pages} --turns {args.turns}"
    )
    settings = {"n_layer": args.n_layer, "n_embd": args.n_embd, "dtype": "float32", "harness_batch": args.batch_size}
    threads = {"threads": torch.get_num_threads()}
    write_result(args.name, command, {**settings, **threads, "tasks": found})
    print(json.dumps({task: one["ratio"] for task, one in found.items()}))


if __name__ == "__main__":
    main()
