"""From a prompt to text: sampling (logits to probabilities) and the engine that runs the model."""
