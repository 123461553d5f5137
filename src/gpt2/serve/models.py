"""The models that are served, each with its tokenizer, scheduler and chat template."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from gpt2.errors import ModelFilesError, did_you_mean
from gpt2.files import expand_path
from gpt2.generation.engine import LanguageModel
from gpt2.generation.text import encode_prompt
from gpt2.model import GPT
from gpt2.serve.errors import APIError
from gpt2.serve.limits import Limits
from gpt2.serve.scheduler import Scheduler
from gpt2.templates import ChatTemplate
from gpt2.terminal import shorten
from gpt2.tokenizer import Tokenizer


@dataclass
class ServedModel:
    """A model with all that is needed to serve it.

    model:           the plain model, for the playground's inspection.
    inference_model: the model that generates; only the scheduler runs it.
    reference:       the MODEL argument it was loaded from, for commands that a user can copy.
    has_template:    whether the chat template is the model's own, and not the default for models without one.
    """

    name: str
    model: GPT
    inference_model: LanguageModel
    tokenizer: Tokenizer
    scheduler: Scheduler
    template: ChatTemplate
    reference: str = ""
    has_template: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def max_prompt_characters(self) -> int:
        """The most characters a prompt can have: longer ones cannot fit the context, and are not even encoded."""
        longest = max(len(self.tokenizer.token_bytes(token)) for token in range(self.tokenizer.vocab_size))
        return longest * self.scheduler.context_length

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt. ``<|endoftext|>`` is encoded as that token, and so is an empty prompt."""
        return encode_prompt(self.tokenizer, text)


def create_served_model(
    name: str,
    model: GPT,
    inference_model: LanguageModel,
    tokenizer: Tokenizer | None,
    limits: Limits,
    template: ChatTemplate | None = None,
    max_length: int | None = None,
    reference: str | None = None,
) -> ServedModel:
    """A model with its own scheduler. Raises ModelFilesError if there is no tokenizer."""
    if tokenizer is None:
        raise ModelFilesError(f"{name} has no tokenizer, which serving requires")
    scheduler = Scheduler(inference_model, limits.slots, limits.max_waiting, limits.per_client, max_length)
    own_template = template or ChatTemplate()
    return ServedModel(
        name, model, inference_model, tokenizer, scheduler, own_template, reference or name, template is not None
    )


def served_model_name(model_ref: str) -> str:
    """The name of a model: its hub name or the name of its folder; for the model of a run, the name of the run."""
    path = expand_path(model_ref)
    if not path.exists():
        return model_ref
    path = path.resolve()
    return path.parent.name or path.name if path.name == "model" else path.name  # /model has no parent with a name


def find_model(models: Mapping[str, ServedModel], name: str | None) -> ServedModel:
    """The model with this name; the first one for None and "". Raises APIError 404."""
    if not name:
        return next(iter(models.values()))
    if name not in models:
        name = shorten(name, 200)
        hint = did_you_mean(name, models) or f": there is {', '.join(models)}"
        raise APIError(404, f"the model '{name}' does not exist{hint}", "model", "model_not_found")
    return models[name]
