"""LoRA adapters: outputs, training, merging, files, and their errors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2.errors import UserError
from gpt2.lora import (
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    base_fingerprint,
    load_adapter_weights,
    lora_layers,
    merge_and_unload,
    read_adapter,
    trainable_parameters,
)
from gpt2.model import GPT, GPTConfig
from gpt2.weights import load, save
from tests.helpers.adapters import ADAPTER_CONFIG as CONFIG
from tests.helpers.adapters import ADAPTER_SHAPE as SHAPE
from tests.helpers.adapters import with_adapter, write_adapter
from tests.helpers.transformers_reference import ODD_CONFIGS, random_batch, random_model, relative_error

MATRICES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("shape", ODD_CONFIGS)
def test_a_new_adapter_changes_nothing(shape: GPTConfig) -> None:
    model = random_model(shape)
    tokens, _ = random_batch(shape)
    before = model(tokens)
    add_adapter(model, CONFIG)
    assert torch.equal(model(tokens), before)
    assert len(lora_layers(model)) == 4 * shape.n_layer


def test_the_adapter_equals_the_formula_of_the_paper() -> None:
    model = with_adapter()
    layer = lora_layers(model)["transformer.h.1.mlp.c_fc"]
    x = torch.randn(2, 5, SHAPE.n_embd)
    expected = x @ layer.weight.T + layer.bias + (5 / 3) * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert relative_error(layer(x), expected) < 1e-6
    assert LoRAConfig(rank=4, alpha=6, use_rslora=True).scale == 3.0


def test_only_the_adapter_is_trained() -> None:
    model = with_adapter()
    tokens, targets = random_batch(SHAPE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = trainable_parameters(model)
    assert list(trainable) == [
        f"transformer.h.{i}.{name}.lora_{x}" for i in range(SHAPE.n_layer) for name in MATRICES for x in "AB"
    ]
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    model.loss(tokens, targets).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name
        assert (parameter.grad is None) == (name not in trainable), name


def test_dropout_applies_to_the_input_of_the_adapter_in_training_only() -> None:
    model = with_adapter(config=replace(CONFIG, dropout=0.5))
    tokens, _ = random_batch(SHAPE)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    for tensor in adapter_state_dict(model).values():
        tensor.zero_()
    assert torch.equal(model(tokens), model(tokens))  # the base model itself has none


def test_a_seed_determines_the_new_adapter() -> None:
    drawn = []
    for _ in range(2):
        model = random_model(SHAPE)
        torch.manual_seed(7)
        add_adapter(model, CONFIG)
        drawn.append(adapter_state_dict(model))
    assert all(torch.equal(tensor, drawn[1][name]) for name, tensor in drawn[0].items())


@pytest.mark.parametrize("targets", [("c_attn",), ("mlp.c_proj", "c_fc"), ("transformer.h.1.attn.c_proj",)])
def test_targets_match_the_ends_of_names(targets: tuple[str, ...]) -> None:
    model = random_model(SHAPE)
    add_adapter(model, LoRAConfig(targets=targets))
    names = [name for name in dict(model.named_modules()) if name.endswith(tuple(f".{target}" for target in targets))]
    assert list(lora_layers(model)) == (names or list(targets))


@pytest.mark.parametrize("shape", ODD_CONFIGS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_model_is_plain_and_has_the_same_logits(shape: GPTConfig, use_rslora: bool) -> None:
    model = with_adapter(shape, replace(CONFIG, use_rslora=use_rslora)).train()
    state, tokens = torch.get_rng_state(), random_batch(shape)[0]
    merged = merge_and_unload(model)
    assert torch.equal(torch.get_rng_state(), state)  # merging during training does not change the training
    assert relative_error(merged(tokens), model(tokens)) < 1e-5
    plain = GPT(shape)
    assert [(name, p.shape) for name, p in merged.named_parameters()] == [
        (name, p.shape) for name, p in plain.named_parameters()
    ]
    assert not lora_layers(merged)
    assert merged.training
    assert len(trainable_parameters(merged)) == len(list(plain.parameters()))
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in theirs for p in merged.parameters())  # a copy


def test_all_parameters_of_a_merged_model_are_trainable() -> None:
    merged = merge_and_unload(with_adapter())
    tokens, targets = random_batch(SHAPE)
    merged.loss(tokens, targets).backward()
    assert all(p.grad is not None for p in merged.parameters())


def test_save_and_read_round_trip(tmp_path: Path) -> None:
    config = LoRAConfig(rank=2, alpha=0.5, dropout=0.25, targets=("c_attn", "mlp.c_proj"), use_rslora=True)
    model = with_adapter(config=config)
    run = tmp_path / "run"
    write_adapter(run / "adapter", model, config)
    for ref in (run, run / "adapter", str(run)):
        read = read_adapter(ref)
        assert read.config == replace(config, targets=("c_attn", "mlp.c_proj"))
        assert (read.base_model, read.base_fingerprint) == ("somewhere/base", base_fingerprint(random_model(SHAPE)))
        assert read.tensors.keys() == adapter_state_dict(model).keys()
        assert all(torch.equal(tensor, adapter_state_dict(model)[name]) for name, tensor in read.tensors.items())
    assert sorted(path.name for path in run.iterdir()) == ["adapter"]  # and nothing half-written


def test_load_merges_an_adapter_and_several_share_a_base(tmp_path: Path) -> None:
    base, tokens = random_model(SHAPE), random_batch(SHAPE)[0]
    save(base, None, tmp_path / "base")
    for seed in (1, 2):
        model = random_model(SHAPE)
        torch.manual_seed(seed)
        add_adapter(model, CONFIG)
        for tensor in adapter_state_dict(model).values():
            nn.init.normal_(tensor, std=0.1)
        write_adapter(tmp_path / f"adapter-{seed}", model)
        loaded, _ = load(tmp_path / "base", adapter=tmp_path / f"adapter-{seed}")
        assert relative_error(loaded(tokens), model(tokens)) < 1e-5
        assert relative_error(loaded(tokens), base(tokens)) > 0.01
        for name, parameter in merge_and_unload(model).named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name
    assert torch.equal(load(tmp_path / "base")[0](tokens), base(tokens))


def test_a_base_in_bfloat16_is_the_same_base_and_the_merge_rounds_once(tmp_path: Path) -> None:
    model = with_adapter()
    folder = write_adapter(tmp_path / "adapter", model)
    save(random_model(SHAPE), None, tmp_path / "exact")
    save(random_model(SHAPE), None, tmp_path / "rounded", dtype=torch.bfloat16)
    for name, parameter in merge_and_unload(model).named_parameters():
        exact, _ = load(tmp_path / "exact", dtype=torch.bfloat16, adapter=folder)
        assert torch.equal(exact.get_parameter(name), parameter.bfloat16()), name
    kept, _ = load(tmp_path / "rounded", dtype=None, adapter=folder)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    full, _ = load(tmp_path / "rounded", adapter=folder)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert all(torch.equal(kept.get_parameter(name), p.bfloat16()) for name, p in full.named_parameters())


def test_load_adapter_weights_restores_the_adapter(tmp_path: Path) -> None:
    model, other, tokens = with_adapter(), random_model(SHAPE), random_batch(SHAPE)[0]
    adapter = read_adapter(write_adapter(tmp_path, model))
    add_adapter(other, adapter.config)
    load_adapter_weights(other, adapter)
    assert torch.equal(other(tokens), model(tokens))
    assert all(p.requires_grad for p in trainable_parameters(other).values())


@pytest.mark.parametrize(
    ("shape", "config", "line"),
    [
        (SHAPE, LoRAConfig(rank=3, targets=("c_attn",)), r"has transformer\.h\.0\.attn\.c_proj\.lora_A, unlike"),
        (SHAPE, LoRAConfig(rank=4), r"is for another model \(somewhere/base\): .*lora_A is \(3, 24\).* \(4, 24\)"),
        (replace(SHAPE, n_layer=3), CONFIG, r"lacks transformer\.h\.2\.attn\.c_attn\.lora_A"),
    ],
)
def test_loading_into_another_adapter_shape_is_refused(
    tmp_path: Path, shape: GPTConfig, config: LoRAConfig, line: str
) -> None:
    adapter, other = read_adapter(write_adapter(tmp_path, with_adapter())), random_model(shape)
    add_adapter(other, config)
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(other).items()}
    with pytest.raises(UserError, match=line) as caught:
        load_adapter_weights(other, adapter)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(other).items())


@pytest.mark.parametrize(
    ("shape", "seed", "line"),
    [
        (SHAPE, 1, "the fingerprints differ"),
        (replace(SHAPE, vocab_size=98), 0, "the fingerprints differ"),
    ],
)
def test_an_adapter_for_another_base_is_one_line(tmp_path: Path, shape: GPTConfig, seed: int, line: str) -> None:
    save(random_model(shape, seed), None, tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", with_adapter())
    with pytest.raises(UserError, match=rf"^the adapter {folder} is for another model \(somewhere/base\): {line}$"):
        load(tmp_path / "base", adapter=folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"n_layer": 1}, r"it has transformer\.h\.1\.attn\.c_attn, and the model has no such layer"),
        ({"n_embd": 32}, r"transformer\.h\.0\.attn\.c_attn is \(72, 24\) in it and \(96, 32\) in the model"),
        ({"n_inner": 41}, r"transformer\.h\.0\.mlp\.c_fc is \(40, 24\) in it and \(41, 24\) in the model"),
    ],
)
def test_without_a_fingerprint_shapes_are_checked(tmp_path: Path, change: dict[str, int], line: str) -> None:
    save(random_model(replace(SHAPE, **change)), None, tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", with_adapter())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=line):
        load(tmp_path / "base", adapter=folder)


def test_the_fingerprint_depends_on_the_base_alone() -> None:
    base = random_model(SHAPE)
    same = base_fingerprint(base)
    assert base_fingerprint(with_adapter()) == same == base_fingerprint(random_model(SHAPE).bfloat16())
    assert (
        base_fingerprint(merge_and_unload(with_adapter())) != same
    )  # an adapter for a merged model is not for the base
    with torch.no_grad():
        base.transformer.h[1].get_parameter("ln_2.bias")[3] += 0.5
    assert base_fingerprint(base) != same


def test_broken_and_missing_files_are_one_line(tmp_path: Path) -> None:
    for ref in (tmp_path, tmp_path / "none", "owner/name"):
        with pytest.raises(UserError, match=r"adapter_config\.json, as fine-tuning with --lora-rank"):
            read_adapter(ref)
    folder = write_adapter(tmp_path / "adapter", with_adapter())
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="is no whole safetensors file: it has"):
        read_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; pickled weights are not loaded"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_adapter(folder)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the adapter"):
        write_adapter(tmp_path / "file" / "adapter", with_adapter())


def test_a_failed_save_leaves_no_mixed_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path / "adapter", with_adapter())
    replace_file = Path.replace

    def full_disk(self: Path, target: Path) -> Path:
        if self.name == "adapter_config.json":
            raise OSError("disk full")
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(UserError, match="disk full"):
        write_adapter(
            tmp_path / "adapter", with_adapter(config=replace(CONFIG, alpha=50.0)), replace(CONFIG, alpha=50.0)
        )
    with pytest.raises(UserError, match="is no adapter"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rank": 0}, "rank of an adapter must be at least 1, not 0"),
        ({"alpha": 0.0}, "alpha of an adapter must be over 0, not 0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, r"dropout of an adapter must be in \[0, 1\), not 1"),
        ({"targets": ()}, "an adapter needs targets"),
    ],
)
def test_unsupported_config_values_are_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        LoRAConfig(**change)


def test_an_unknown_target_leaves_the_model_unchanged() -> None:
    model = random_model(SHAPE)
    with pytest.raises(UserError, match=r"^the model has no 'c_atn' for an adapter \(did you mean 'c_attn'\?\): there"):
        add_adapter(model, LoRAConfig(targets=("c_fc", "c_atn")))
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    add_adapter(model, CONFIG)
    with pytest.raises(ValueError, match="an adapter already"):
        add_adapter(model, CONFIG)
