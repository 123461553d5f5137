"""The numbers of lm-evaluation-harness on the same folder and rows: decisions equal, log-likelihoods to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2.evaluation.evaluate import evaluate_tasks, prepare_task
from gpt2.evaluation.scorer import score
from gpt2.evaluation.tasks import TASKS
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer, train_bpe
from gpt2.weights import load, save
from tests.evaluation.task_rows import EVAL_DATA, HARNESS_NAMES, write_rows

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'plain-gpt2[eval]'")

pytestmark = pytest.mark.slow
ROWS = 200


@pytest.fixture(scope="module", params=["random", "trained"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights with GPT-2's vocabulary, or a model that learned some of WikiText."""
    if not EVAL_DATA.is_dir():
        pytest.skip(f"no {EVAL_DATA}")
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "random":
        torch.manual_seed(1)
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=160))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        return save(model.eval(), get_tokenizer("gpt2"), folder)
    return save(*_trained(), folder)


def _trained() -> tuple[GPT, Any]:
    """Two layers, 120 steps on the validation set of WikiText-2, a BPE of 2,048 tokens."""
    text = (EVAL_DATA.parent / "wikitext-2" / "valid.txt").read_text()[:400_000]
    tokenizer = train_bpe([text], 2048)
    torch.manual_seed(2)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=256, vocab_size=tokenizer.vocab_size))
    ids = torch.tensor(tokenizer.encode(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        starts = torch.randint(len(ids) - 129, (8,)).tolist()
        rows = torch.stack([ids[start : start + 129] for start in starts])
        loss = model.loss(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def run_harness(folder: Path, task: str, rows: Path) -> dict[str, Any]:
    """The harness's own task, its data aside, on its hf model: results and samples."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    file, split = HARNESS_NAMES[task]
    name = f"local_{task.replace('-', '_')}"
    home = rows.parent / name
    home.mkdir()
    (home / f"{name}.yaml").write_text(
        f"include: {Path(str(lm_eval.__file__)).parent / 'tasks' / file}\n"
        f"task: {name}\ndataset_path: json\ndataset_name: null\ntag: null\ntraining_split: null\n"
        f"validation_split: {'null' if split == 'test' else split}\n"
        f"test_split: {split if split == 'test' else 'null'}\n"
        f"dataset_kwargs:\n  data_files:\n    {split}: {rows}\n"
    )
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16)
    found: Any = lm_eval.simple_evaluate(
        model,
        tasks=[name],
        task_manager=TaskManager(include_path=str(home), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return {**{k.split(",")[0]: v for k, v in found["results"][name].items()}, "samples": found["samples"][name]}


@pytest.mark.parametrize("task", HARNESS_NAMES)
def test_the_numbers_are_those_of_the_harness(
    task: str, folder: Path, tmp_path: Path, gpt2_vocabulary: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model, tokenizer = load(folder)
    assert tokenizer is not None
    count = 6 if task == "wikitext2" and tokenizer.vocab_size > 50_000 else ROWS  # each row is a page
    rows = write_rows(EVAL_DATA, task, count, tmp_path / "rows.jsonl")
    theirs = run_harness(folder, task, rows)
    name = "wikitext2-harness" if task == "wikitext2" else task
    ours = evaluate_tasks(model, tokenizer, [name], task_data={name: str(rows)})[name]
    compared = [metric for metric in ours.metrics if metric in theirs]
    assert compared
    assert set(compared) >= {metric for metric in theirs if metric in ("acc", "acc_norm", "word_perplexity")}
    for metric in compared:
        if metric.startswith("acc"):
            assert ours.metrics[metric] == theirs[metric], metric
        else:
            assert ours.metrics[metric] == pytest.approx(theirs[metric], rel=1e-5), metric

    samples = sorted(theirs["samples"], key=lambda sample: sample["doc_id"])
    assert len(samples) == ours.rows
    if task != "wikitext2":
        (part,) = prepare_task(TASKS[task], tokenizer, model, task_data={task: str(rows)})
        scored = dict(pair for batch in score(model, part.prepared.groups) for pair in batch)
        for sample in samples:
            for (given,), mine in zip(sample["resps"], scored[sample["doc_id"]], strict=True):
                # beyond 1,000 nats the harness's float32 sums are coarser than 1e-4
                assert mine.log_likelihood == pytest.approx(float(given[0]), abs=1e-4, rel=3e-7)
                assert mine.is_greedy == (str(given[1]) == "True")
