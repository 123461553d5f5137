"""From text to batches: sources -> prepare -> shards -> loader."""
