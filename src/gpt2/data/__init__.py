"""From text to batches: resolve -> sources -> prepare -> shards -> loader; rows -> instruct -> packed."""
