"""What a run makes: a model folder, or an adapter for the model it began with."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpt2.formats.huggingface import disk_name
from gpt2.lora import LoRAConfig, adapter_tensors, load_into, merge, peft_name, read_adapter, save_adapter
from gpt2.model import GPT, GPTConfig
from gpt2.templates import Template, save_template
from gpt2.tokenizer import Tokenizer
from gpt2.weights import TRANSPOSED, model_of, save


@dataclass(frozen=True)
class Product:
    """What a run makes of its weights: a model folder `model/`, or an `adapter/` for the model it began with.

    base, base_fingerprint: of an adapter, what that model is called and which it is.
    """

    config: GPTConfig
    tokenizer: Tokenizer | None
    template: Template | None = None
    lora: LoRAConfig | None = None
    base: str = ""
    base_fingerprint: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        return "model" if self.lora is None else "adapter"

    def weights(self, model: GPT) -> dict[str, Tensor]:
        """What of a model is written, by name, where it is."""
        if self.lora is not None:
            return adapter_tensors(model)
        return {name: p.detach() for name, p in model.named_parameters()}

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write `folder/model` or `folder/adapter`."""
        if self.lora is not None:
            save_adapter(folder / self.name, self.lora, weights, self.base, self.base_fingerprint)
            if self.template is not None:
                save_template(self.template, folder / self.name)
        else:
            save(model_of(self.config, weights), self.tokenizer, folder / self.name, template=self.template)

    def files(self, weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """The safetensors files that `save` writes, as a pattern, and the tensors that are in them."""
        weights = {name: weight.cpu() for name, weight in weights.items()}
        if self.lora is not None:
            return "adapter/*.safetensors", {peft_name(name): weight for name, weight in weights.items()}
        return "model/*.safetensors", {
            disk_name(name, self.config): weight.t() if name.endswith(TRANSPOSED) else weight
            for name, weight in weights.items()
        }

    def save_merged(self, model: GPT, run_folder: Path) -> None:
        """Where it is an adapter: write the whole model that it makes of `model`, too, whose own weights are lost."""
        if self.lora is not None:
            load_into(model, read_adapter(run_folder))
            save(merge(model, keep=False), self.tokenizer, run_folder / "model", template=self.template)
