"""The reproduction of GPT-2 (124M) at 1/10,000 of its size: hub, preparation, training, HellaSwag, the final table."""

import json
import random
from pathlib import Path

import pytest

from gpt2.data.prepare_corpus import CorpusOptions
from tests.helpers.cli_helpers import run_cli
from tests.helpers.dataset_hub import DatasetHub, parquet
from tests.helpers.task_files import write_hellaswag

TINY = ("--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "64", "--batch-size", "16", "--no-compile")
SHARD_TOKENS = 10_000  # 10**8 / 10,000


def write_corpus(hub: DatasetHub) -> None:
    """About a million tokens in the layout of FineWeb-Edu: two files of a sample, and the card that names it."""
    rng = random.Random(1)
    words = [f"{a}{b}" for a in ("na", "ko", "ri", "te", "mu") for b in ("la", "so", "ve", "din", "per")]
    texts = [" ".join(rng.choices(words, k=rng.randrange(50, 900))) + "." for _ in range(800)]
    files = {f"sample/10BT/00{i}_00000.parquet": parquet(texts[400 * i : 400 * (i + 1)]) for i in range(2)}
    card = [{"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}]
    hub.add("HuggingFaceFW/fineweb-edu", files, card)


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2_vocabulary")
@pytest.mark.parametrize("recipe", ["gpt2-124m", "gpt2-124m-1gpu"])
def test_the_whole_path_from_the_hub_to_the_table(
    recipe: str,
    hub: DatasetHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_corpus(hub)
    caplog.set_level("INFO", logger="gpt2.data")
    monkeypatch.setattr("gpt2.data.prepare.CorpusOptions", lambda: CorpusOptions(shard_tokens=SHARD_TOKENS))
    monkeypatch.setattr("gpt2.data.prepare_corpus.check_disk", lambda *args: None)
    rows = write_hellaswag(tmp_path / "hellaswag.jsonl", 8)
    tasks = ("--eval-tasks-data", f"hellaswag={rows}", "--eval-tasks-every", "4")
    short = ("--max-steps", "8", "--eval-every", "4", "--eval-tokens", "2000", "--save-every", "4")
    place = ("--out-dir", str(tmp_path / "runs"), "--name", "rehearsal")
    code, out, err = run_cli(capsys, "train", recipe, *TINY, *tasks, *short, *place, "--micro-batch-size", "8")
    assert code == 0, err
    run = Path(out.strip())
    assert "fineweb-edu-10B: 2 files" in caplog.text
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 8
    assert "hellaswag" in (run / "report.md").read_text().lower()
    code, table, err = run_cli(capsys, "eval", str(run), "--tasks", "hellaswag", "--task-data", f"hellaswag={rows}")
    assert code == 0, err
    assert "hellaswag" in table
    print(err, table)
    code, _, err = run_cli(capsys, "train", recipe, *TINY, *tasks, *short, "--out-dir", str(tmp_path / "runs"))
    assert code == 0, err
    assert len(hub.fetched) == 2  # the second run finds the shards
