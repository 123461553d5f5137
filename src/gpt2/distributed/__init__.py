"""Data parallelism: the process group of a run, and the model distributed over its ranks."""
