"""Profile of a few training steps: a trace, and a table of the operators by time."""

import gzip
import logging
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("gpt2")

WARMUP_STEPS = 3  # not recorded: compilation and warm-up
ACTIVE_STEPS = 3
COMPRESS_MIN_BYTES = 64 * 2**20  # smaller traces are not compressed


class StepProfiler:
    """A context manager that profiles a few early steps of a loop, which calls `step()` at the end of each.

    Writes `trace.json` (or `trace.json.gz`, if large; https://ui.perfetto.dev opens both) and `profile.txt`, the
    operators by self time. A loop that ends early gets a profile of the steps recorded until then.
    """

    def __init__(self, folder: Path, device: torch.device, steps: int, *, enabled: bool = True) -> None:
        """steps: number of steps of the loop; in a short one fewer warm-up steps are skipped."""
        self.folder, self.device = folder, device
        self._warmup_steps = max(0, min(WARMUP_STEPS, steps - 1))
        self._active_steps = max(1, min(ACTIVE_STEPS, steps - self._warmup_steps))
        self._done = 0
        self._profile: profile | None = None
        self._enabled = enabled and steps > 0

    def __enter__(self) -> Self:
        if self._enabled:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            steps = None  # record all steps
            if self._warmup_steps:  # the profiler starts in the last of them, so that its own start is not recorded
                steps = schedule(wait=self._warmup_steps - 1, warmup=1, active=self._active_steps, repeat=1)
            self._profile = profile(activities=activities, schedule=steps, acc_events=True)
            self._profile.start()
        return self

    def step(self) -> None:
        """Mark the end of a step."""
        if self._profile is None:
            return
        self._done += 1
        if self._done == self._warmup_steps + self._active_steps:
            self._finish()
        else:
            self._profile.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._finish()

    def _finish(self) -> None:
        """Stop recording and write the profile; if that fails, log a warning and let the run continue."""
        finished, self._profile = self._profile, None
        assert finished is not None
        finished.stop()
        if self._done <= self._warmup_steps:
            log.warning("--profile: the run ended before the first step to record")
            return
        try:
            self._write(finished)
        except (OSError, RuntimeError) as error:
            log.warning("cannot write the profile in %s: %s", self.folder, error)

    def _write(self, finished: profile) -> None:
        path = self.folder / "trace.json"
        compressed = path.with_suffix(".json.gz")
        compressed.unlink(missing_ok=True)
        finished.export_chrome_trace(str(path))
        if path.stat().st_size >= COMPRESS_MIN_BYTES:
            with path.open("rb") as plain, gzip.open(compressed, "wb") as file:
                shutil.copyfileobj(plain, file)
            path.unlink()
        kind = "device" if self.device.type == "cuda" else "cpu"
        table = finished.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=25, max_name_column_width=70)
        steps = f"{self._done - self._warmup_steps} steps after the first {self._warmup_steps}, on {self.device}"
        (self.folder / "profile.txt").write_text(f"{steps}\n\n{table}\n", encoding="utf-8")
        log.info("profile: %s", self.folder / "profile.txt")
