"""The result of a run: a model folder, or an adapter for the model that the run started from."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpt2.formats.huggingface import disk_name
from gpt2.lora import (
    LoRAConfig,
    adapter_state_dict,
    load_adapter_weights,
    merge_and_unload,
    peft_name,
    read_adapter,
    save_adapter,
)
from gpt2.model import GPT, GPTConfig
from gpt2.templates import ChatTemplate, save_template
from gpt2.tokenizer import Tokenizer
from gpt2.weights import CONV1D_WEIGHTS, model_from_state_dict, save


@dataclass(frozen=True)
class ModelArtifact:
    """How the weights of a run are saved: as a model folder `model/`, or as an `adapter/` for a base model.

    base, base_fingerprint: name and fingerprint of an adapter's base model.
    """

    config: GPTConfig
    tokenizer: Tokenizer | None
    template: ChatTemplate | None = None
    lora: LoRAConfig | None = None
    base: str = ""
    base_fingerprint: str = ""

    @property
    def folder_name(self) -> str:
        return "model" if self.lora is None else "adapter"

    def weights(self, model: GPT) -> dict[str, Tensor]:
        """The weights of `model` that are saved, by name; not copied."""
        if self.lora is not None:
            return adapter_state_dict(model)
        return {name: p.detach() for name, p in model.named_parameters()}

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write `folder/model` or `folder/adapter`."""
        if self.lora is not None:
            save_adapter(folder / self.folder_name, self.lora, weights, self.base, self.base_fingerprint)
            if self.template is not None:
                save_template(self.template, folder / self.folder_name)
        else:
            save(
                model_from_state_dict(self.config, weights),
                self.tokenizer,
                folder / self.folder_name,
                template=self.template,
            )

    def saved_tensors(self, weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """A glob pattern of the safetensors files that `save` writes, and the tensors in them."""
        weights = {name: weight.cpu() for name, weight in weights.items()}
        if self.lora is not None:
            return "adapter/*.safetensors", {peft_name(name): weight for name, weight in weights.items()}
        return "model/*.safetensors", {
            disk_name(name, self.config): weight.t() if name.endswith(CONV1D_WEIGHTS) else weight
            for name, weight in weights.items()
        }

    def save_merged(self, model: GPT, run_folder: Path) -> None:
        """For an adapter: also write the merged model as `model/`. The weights of `model` are overwritten."""
        if self.lora is not None:
            load_adapter_weights(model, read_adapter(run_folder))
            save(merge_and_unload(model, copy=False), self.tokenizer, run_folder / "model", template=self.template)
