"""Adapters of PEFT that hold more than LoRA: what does not fit is one line; its tokenizer is used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.errors import UserError
from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, load_adapter_weights, read_adapter
from gpt2.lora import save_adapter as save_lora
from gpt2.model import GPT, GPTConfig
from gpt2.peft_merge import merge_adapter
from gpt2.tokenizer import BPETokenizer, ByteTokenizer
from gpt2.weights import load, save
from tests.helpers.transformers_reference import random_model

SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)
PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: dict[str, Tensor], **settings: object) -> Path:
    """An adapter of rank 2 on c_attn, with more tensors and settings, as PEFT writes it: without a fingerprint."""
    model, config = random_model(SHAPE), LoRAConfig(rank=2, targets=("c_attn",))
    add_adapter(model, config)
    save_lora(folder, config, adapter_state_dict(model), "base", base_fingerprint(model))
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("tensors", "settings", "line"),
    [
        ({"transformer.wte.weight": (260, 16)}, {}, "transformer.wte has 260 rows and lm_head 257$"),
        ({"transformer.wte.weight": (257, 8)}, {}, r"transformer.wte is \(257, 8\)$"),
        ({"lm_head.weight": (257,)}, {}, r"lm_head is \(257,\)$"),
        ({"score.weight": (2, 16)}, {"modules_to_save": ["score"]}, "tensor .*score.weight is not supported"),
        ({"transformer.score.weight": (2, 16)}, {"modules_to_save": ["score"]}, "the model has no such layer$"),
        ({"transformer.h.0.attn.c_attn.bias": (47,)}, {"bias": "all"}, r"\(47,\) in it and \(48,\) in the model$"),
        ({"transformer.h.1.ln_1.bias": (16,)}, {"bias": "all"}, "h.1.ln_1.bias, and the model has no such layer$"),
        (
            {"transformer.h.0.attn.c_attn.lora_magnitude_vector": (16,)},
            {"use_dora": True},
            r"the magnitude of transformer\.h\.0\.attn\.c_attn is \(16,\)$",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], settings: dict[str, object], line: str
) -> None:
    folder = write_adapter(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()}, **settings)
    model, before = random_model(SHAPE), random_model(SHAPE).state_dict()
    with pytest.raises(UserError, match=line) as caught:
        merge_adapter(model, read_adapter(folder))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_tokenizer_in_the_folder_of_the_adapter_is_used(tmp_path: Path, small_bpe: BPETokenizer) -> None:
    """As of a vocabulary that was extended for the adapter, whose tokenizer is saved beside it."""
    save(random_model(SHAPE), ByteTokenizer(), tmp_path / "base")
    weight = torch.randn(small_bpe.vocab_size, 16)
    folder = write_adapter(tmp_path / "adapter", {"transformer.wte.weight": weight, "lm_head.weight": weight.clone()})
    assert isinstance(load(tmp_path / "base", adapter=folder)[1], ByteTokenizer)  # that of the base
    small_bpe.save(folder)
    model, tokenizer = load(tmp_path / "base", adapter=folder)
    assert tokenizer is not None
    assert (model.config.vocab_size, tokenizer.fingerprint) == (small_bpe.vocab_size, small_bpe.fingerprint)
    assert model.config.tie_word_embeddings


def test_such_an_adapter_cannot_be_trained_further(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, {"transformer.ln_f.bias": torch.ones(16)}, bias="all")
    model: GPT = random_model(SHAPE)
    add_adapter(model, LoRAConfig(rank=2, targets=("c_attn",)))
    with pytest.raises(UserError, match=r"it can only be merged$"):
        load_adapter_weights(model, read_adapter(folder))
