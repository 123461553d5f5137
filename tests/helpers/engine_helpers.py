"""What tests of the engine and of the scheduler share."""

from gpt2.generation.engine import Engine, GenerationRequest
from gpt2.model import GPT


def generate_alone(model: GPT, request: GenerationRequest) -> list[int]:
    """The new tokens of the request in an engine of its own."""
    engine = Engine(model, slots=1)
    sequence = engine.submit(request)
    while not engine.idle:
        engine.step()
    return sequence.new_tokens
