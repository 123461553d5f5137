"""Checkpoint formats: one file for each, and `table.py`, which recognizes them. `gpt2.weights` is the front door."""
