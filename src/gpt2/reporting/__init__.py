"""Reports of a training run: metrics.jsonl, loss.png, report.md, trackers, and the profiler."""
