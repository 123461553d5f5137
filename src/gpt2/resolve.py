"""What a MODEL argument stands for: its folder, config, tokenizer, chat template and adapter, resolved in one place."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from gpt2.lora import find_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.templates import ChatTemplate, load_template
from gpt2.tokenizer import Tokenizer
from gpt2.weights import find_model_folder, load, load_model_tokenizer, read_config, read_template

_log = logging.getLogger("gpt2")


@dataclass(frozen=True)
class ResolvedModel:
    """The files of a model. Weights, tokenizer and template are read when they are used."""

    folder: Path  # the model folder, or the file of a format that is one file
    config: GPTConfig
    adapter: Path | None = None  # the folder of a LoRA adapter

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None if it has none. Raises UserError for broken files."""
        return load_model_tokenizer(self.folder, self.config)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The adapter's chat template, else the model's, else None. Raises UserError for broken files."""
        own = None if self.adapter is None else load_template(self.adapter)
        return own or read_template(self.folder)

    def load(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
    ) -> tuple[GPT, Tokenizer | None]:
        """Read the weights, with the adapter merged into them, and the tokenizer: see `gpt2.load`."""
        return load(self.folder, device=device, dtype=dtype, adapter=self.adapter)


def resolve_model(ref: str | Path, adapter: str | Path | None = None) -> ResolvedModel:
    """Resolve a run folder, a model folder or a hub name, and the adapter to use with it.

    adapter: the folder of a LoRA adapter, or of the run that wrote it.
    Raises UserError where `ref` or `adapter` cannot be found, or config.json is not a GPT-2's.
    """
    adapter_folder = None if adapter is None else find_adapter(adapter)
    folder = find_model_folder(ref)
    _log.debug("%s is %s%s", ref, folder, "" if adapter_folder is None else f" with the adapter {adapter_folder}")
    return ResolvedModel(folder, read_config(folder), adapter_folder)
