"""What a run makes: a model folder, or an adapter for the model it began with."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

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
    """What a run makes of its weights: a model folder `model/`, or an `adapter/` for the model it began with.

    base, base_fingerprint: of an adapter, what that model is called and which it is.
    """

    config: GPTConfig
    tokenizer: Tokenizer | None
    template: ChatTemplate | None = None
    lora: LoRAConfig | None = None
    base: str = ""
    base_fingerprint: str = ""

    @property
    def folder_name(self) -> str:
        """Of its folder."""
        return "model" if self.lora is None else "adapter"

    def weights(self, model: GPT) -> dict[str, Tensor]:
        """What of a model is written, by name, where it is."""
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
        """The safetensors files that `save` writes, as a pattern, and the tensors that are in them."""
        weights = {name: weight.cpu() for name, weight in weights.items()}
        if self.lora is not None:
            return "adapter/*.safetensors", {peft_name(name): weight for name, weight in weights.items()}
        return "model/*.safetensors", {n: w.t() if n.endswith(CONV1D_WEIGHTS) else w for n, w in weights.items()}

    def save_merged(self, model: GPT, run_folder: Path) -> None:
        """Where it is an adapter: write the whole model that it makes of `model`, too, whose own weights are lost."""
        if self.lora is not None:
            load_adapter_weights(model, read_adapter(run_folder))
            save(merge_and_unload(model, copy=False), self.tokenizer, run_folder / "model", template=self.template)
