"""Evaluation: the log-likelihood scorer, tasks with stated protocols, perplexity, published values."""
