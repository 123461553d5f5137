"""Benchmarks: the speed ladder, and peers side by side. Everything is measured in one run, and compared as ratios."""
