"""The progress bar of `gpt2 eval` in a terminal of 80 columns."""

import functools
import io
import re

import pytest
from rich.console import Console

from gpt2.commands import eval_progress
from gpt2.evaluation.measures import Measured


@pytest.mark.parametrize("task", ["lambada", "hellaswag-completion"])
def test_rows_time_and_score_fit_into_80_columns(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = functools.partial(Console, file=screen, force_terminal=True, width=80, no_color=True)
    monkeypatch.setattr(eval_progress, "Console", lambda stderr: console())
    with eval_progress.ProgressBar(task) as bar:
        bar(167, 10042, Measured({"acc": 0.25, "acc_norm": 0.3125, "loss": 3.5}))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    line = next(line for line in re.split(r"[\r\n]", text) if "167/10042" in line)
    assert line.startswith(task)
    assert re.search(r"167/10042 +(\d+:\d\d:\d\d|-:--:--) +acc 0.2500  acc_norm 0.3125", line)
