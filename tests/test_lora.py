"""LoRA adapters: outputs, training, merging, files, and their errors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    save_adapter,
    trainable_parameters,
)
from gpt2.model import GPT, GPTConfig
from gpt2.weights import load, save
from tests.helpers.transformers_reference import ODD_CONFIGS, random_batch, random_model, relative_error

SHAPE = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=24, n_inner=40)
CONFIG = LoRAConfig(rank=3, alpha=5.0)
MATRICES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def with_adapter(shape: GPTConfig = SHAPE, config: LoRAConfig = CONFIG, seed: int = 0) -> GPT:
    """A model with an adapter that changes its outputs: a random B."""
    model = random_model(shape, seed)
    add_adapter(model, config)
    for name, tensor in adapter_state_dict(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(tensor, std=0.1)
    return model


def write_adapter(folder: Path, model: GPT, config: LoRAConfig = CONFIG) -> Path:
    return save_adapter(folder, config, adapter_state_dict(model), "somewhere/base", base_fingerprint(model))


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


def write_with_settings(folder: Path, **changes: Any) -> Path:
    path = write_adapter(folder, with_adapter()) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"peft_type": "IA3"}, "has the peft_type IA3: only LORA is supported"),
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"bias": "lora_only"}, 'bias="lora_only" is not supported'),
        ({"modules_to_save": ["wte"]}, r'modules_to_save=\["wte"\] is not supported'),
        ({"alpha_pattern": {"(a+)+$": 4}}, "alpha_pattern=.* is not supported: merge it with PEFT first"),
        ({"alpha_pattern": {"c_attn": "4"}}, "alpha_pattern=.* is not supported: merge it with PEFT first"),
        ({"alpha_pattern": [4]}, "alpha_pattern=.* is not supported: merge it with PEFT first"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base"),
        ({"target_modules": ["q_proj"]}, "has no tensors for its target 'q_proj'"),
        ({"target_modules": ["c_attn"]}, r"it has tensors for transformer\.h\.0\.attn\.c_proj, which is not among its"),
        ({"target_modules": 3}, "target_modules cannot be 3"),
        ({"target_modules": []}, "tensors for|needs targets"),
        ({"r": "8"}, 'r cannot be "8"'),
        ({"r": True}, "r cannot be true"),
        ({"r": 4}, r"is \(3, 24\), which is not of rank 4"),
        ({"lora_alpha": None}, "lora_alpha cannot be null"),
        ({"lora_alpha": -1}, "alpha of an adapter must be over 0"),
        ({"lora_dropout": 1.0}, "dropout of an adapter"),
    ],
)
def test_unsupported_peft_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        read_adapter(write_with_settings(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_targets_of_patterns_or_some_blocks_follow_from_the_tensors(tmp_path: Path) -> None:
    layers = list(lora_layers(with_adapter()))
    for changes in ({"target_modules": ".*c_.*"}, {"layers_to_transform": [0, 1]}, {"exclude_modules": ["wte"]}):
        assert read_adapter(write_with_settings(tmp_path, **changes)).config.targets == tuple(sorted(layers))


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"]


def _embedding(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.transformer.wte.lora_embedding_A"] = torch.zeros(3, 97)


def _head(tensors: dict[str, Tensor]) -> None:
    tensors |= {f"base_model.model.lm_head.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"}


def _flat(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_drop, r"it lacks transformer\.h\.1\.mlp\.c_fc\.lora_B"),
        (_embedding, "wte.lora_embedding_A is neither a lora_A nor a lora_B"),
        (_head, "lm_head cannot have an adapter, c_attn, c_proj, c_fc can: merge it with PEFT"),
        (_flat, r"lora_A is \(3,\), which is not of rank 3"),
        (dict.clear, "it has no tensors"),
    ],
)
def test_inconsistent_tensors_are_one_line(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], line: str
) -> None:
    path = write_adapter(tmp_path, with_adapter()) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=line) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


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
