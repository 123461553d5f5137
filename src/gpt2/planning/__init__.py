"""Planning of a training run: FLOPs, memory, step time, and scaling over many devices."""
