"""Merge an adapter that this program or `peft` wrote into a plain model.

Beside LoRA on the matrices of the blocks: DoRA ("DoRA: Weight-Decomposed Low-Rank Adaptation", Liu et al. 2024), LoRA
on the token embedding and the head, and whole parameters (`bias`, `modules_to_save`, embeddings of another vocabulary
size). The result computes what PEFT's model computes before its own merge: an embedding and a head that differ are
untied, where `merge_and_unload` of PEFT adds to a tied weight and so changes both.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpt2.lora import Adapter, add_delta_weight, base_fingerprint, base_mismatch_error
from gpt2.model import GPT
from gpt2.peft_format import EMBEDDING, HEAD, LORA_A, LORA_B


@torch.no_grad()
def merge_adapter(model: GPT, adapter: Adapter) -> None:
    """Merge an adapter into a plain model, in place. The vocabulary may become another one, and the head untied.

    Raises ModelFilesError if the adapter is for another base model.
    """
    if adapter.base_fingerprint not in (None, base_fingerprint(model)):
        raise base_mismatch_error(adapter, "the fingerprints differ")
    layers = sorted(name.removesuffix(LORA_A) for name in adapter.tensors if name.endswith(LORA_A))
    replaced = dict(adapter.replaced)
    embeddings = {name: replaced.pop(f"{name}.weight", None) for name in (EMBEDDING, HEAD)}
    modules: dict[str, nn.Module] = dict(model.named_modules())
    _check_shapes(modules, adapter, layers, replaced, embeddings)
    if any(tensor is not None for tensor in embeddings.values()) or not {EMBEDDING, HEAD}.isdisjoint(layers):
        _replace_embeddings(model, adapter, embeddings, is_untied=not {EMBEDDING, HEAD}.isdisjoint(layers))
    for name, tensor in replaced.items():
        model.get_parameter(name).copy_(tensor)
    for name in layers:
        weight = modules[name].get_parameter("weight")
        add_delta_weight(weight, adapter.tensors[name + LORA_A], adapter.tensors[name + LORA_B], adapter.scales[name])
        if name in adapter.magnitudes:
            norm = torch.linalg.vector_norm(weight.float(), dim=1)  # (out,)
            weight.mul_((adapter.magnitudes[name].to(weight.device) / norm)[:, None])


def _check_shapes(
    modules: Mapping[str, nn.Module],
    adapter: Adapter,
    layers: list[str],
    replaced: dict[str, Tensor],
    embeddings: dict[str, Tensor | None],
) -> None:
    """Raise ModelFilesError unless everything of the adapter has its place in the model."""
    expected = {
        f"{name}.{key}": tuple(p.shape) for name in modules for key, p in modules[name].named_parameters("", False)
    }
    for name, tensor in embeddings.items():
        if tensor is not None:
            if tensor.dim() != 2 or tensor.size(1) != expected[f"{name}.weight"][1]:
                raise base_mismatch_error(adapter, f"{name} is {tuple(tensor.shape)}")
            expected[f"{name}.weight"] = tuple(tensor.shape)
    rows = {name: expected[f"{name}.weight"][0] for name in (EMBEDDING, HEAD)}
    if rows[EMBEDDING] != rows[HEAD]:
        raise base_mismatch_error(adapter, f"{EMBEDDING} has {rows[EMBEDDING]} rows and {HEAD} {rows[HEAD]}")
    shapes = {name: tuple(tensor.shape) for name, tensor in replaced.items()}
    for name in layers:
        a, b = adapter.tensors[name + LORA_A], adapter.tensors[name + LORA_B]
        shapes[f"{name}.weight"] = (len(b), a.size(1))
        if name in adapter.magnitudes and adapter.magnitudes[name].shape != (len(b),):
            raise base_mismatch_error(adapter, f"the magnitude of {name} is {tuple(adapter.magnitudes[name].shape)}")
    for name, shape in shapes.items():
        if name not in expected:
            raise base_mismatch_error(
                adapter, f"it has {name.removesuffix('.weight')}, and the model has no such layer"
            )
        if shape != expected[name]:
            layer = name.removesuffix(".weight")
            raise base_mismatch_error(adapter, f"{layer} is {shape} in it and {expected[name]} in the model")


def _replace_embeddings(model: GPT, adapter: Adapter, given: dict[str, Tensor | None], is_untied: bool) -> None:
    """Set the token embedding and the head to the given weights, or their own, tied only if they are equal."""
    wte, head = model.transformer.wte, model.lm_head
    old, was_tied = wte.weight, model.config.tie_word_embeddings
    embedding, output = (
        weight if tensor is None else tensor.to(weight)
        for weight, tensor in ((wte.weight, given[EMBEDDING]), (head.weight, given[HEAD]))
    )
    is_tied = was_tied and not is_untied and (embedding is output or torch.equal(embedding, output))
    wte.weight = nn.Parameter(embedding.detach().clone() if embedding is old else embedding, old.requires_grad)
    head.weight = wte.weight if is_tied else nn.Parameter(output.detach().clone(), old.requires_grad)
    wte.num_embeddings = head.out_features = len(embedding)
    model.config = replace(model.config, vocab_size=len(embedding), tie_word_embeddings=is_tied)
