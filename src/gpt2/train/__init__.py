"""Training: recipes, setup, the training loop, checkpoints and the run folder."""
