"""Adapters equal `peft` on `transformers`: outputs, gradients, and files in both directions."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt2.lora import (
    LoRAConfig,
    adapter_state_dict,
    add_adapter,
    base_fingerprint,
    merge_and_unload,
    read_adapter,
    save_adapter,
)
from gpt2.model import GPT, GPTConfig
from gpt2.weights import load, save
from tests.helpers.transformers_reference import random_batch, random_model, relative_error, to_transformers

peft = pytest.importorskip("peft")

SHAPE = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=24, n_inner=40)
CONFIGS = [
    LoRAConfig(rank=4, alpha=6.0),
    LoRAConfig(rank=4, alpha=6.0, use_rslora=True),
    LoRAConfig(rank=3, alpha=1.5, dropout=0.3, targets=("c_attn",)),
    LoRAConfig(rank=2, alpha=4.0, targets=("mlp.c_proj", "c_fc")),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """peft warns of the layout of GPT-2's matrices, and of a base that is not on the hub."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomize(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for _, tensor in sorted(tensors.items()):
        nn.init.normal_(tensor, std=0.1, generator=generator)


def ours(config: LoRAConfig) -> GPT:
    model = random_model(SHAPE)
    add_adapter(model, config)
    randomize(adapter_state_dict(model))
    return model


def theirs(config: LoRAConfig, base: Any = None) -> Any:
    """An adapter of peft with the same settings, random, on the same base."""
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM" if base is None else "FEATURE_EXTRACTION",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        use_rslora=config.use_rslora,
    )
    model = peft.get_peft_model(base or to_transformers(random_model(SHAPE)), settings)
    randomize({name: p.data for name, p in model.named_parameters() if "lora_" in name})
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    return model.eval()(tokens).logits


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_reads_our_adapter(tmp_path: Path, config: LoRAConfig) -> None:
    model, tokens = ours(config), random_batch(SHAPE)[0]
    save_adapter(tmp_path, config, adapter_state_dict(model), "base", base_fingerprint(model))
    read = peft.PeftModel.from_pretrained(to_transformers(random_model(SHAPE)), tmp_path)
    assert relative_error(model(tokens), logits(read, tokens)) < 1e-5
    assert read.peft_config["default"].base_model_name_or_path == "base"
    assert relative_error(model(tokens), logits(read.merge_and_unload(), tokens)) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
def test_we_read_the_adapter_of_peft(tmp_path: Path, config: LoRAConfig) -> None:
    reference, tokens = theirs(config), random_batch(SHAPE)[0]
    reference.save_pretrained(tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert replace(read.config, targets=tuple(sorted(read.config.targets))) == replace(
        config, targets=tuple(sorted(config.targets))
    )
    save(random_model(SHAPE), None, tmp_path / "base")
    merged, _ = load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert relative_error(merged(tokens), logits(reference, tokens)) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        {"rank_pattern": {"c_attn": 5}, "alpha_pattern": {"mlp.c_proj": 7}},
        {"rank_pattern": {"h.1.attn.c_proj": 1, "c_proj": 3}, "use_rslora": True},
    ],
)
def test_we_merge_ranks_and_alphas_by_layer(tmp_path: Path, more: dict[str, Any]) -> None:
    base, tokens = to_transformers(random_model(SHAPE)), random_batch(SHAPE)[0]
    settings = {"target_modules": ["c_attn", "c_proj"], "r": 2, "lora_alpha": 3, **more}
    reference = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    randomize({name: p.data for name, p in reference.named_parameters() if "lora_" in name})
    reference.save_pretrained(tmp_path / "adapter")
    save(random_model(SHAPE), None, tmp_path / "base")
    merged, _ = load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert relative_error(merged(tokens), logits(reference, tokens)) < 1e-5


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": r".*\.h\.1\..*c_(attn|proj)"},
        {"layers_to_transform": [1], "layers_pattern": "h"},
    ],
)
def test_we_read_patterns_and_selected_blocks_of_peft(tmp_path: Path, more: dict[str, Any]) -> None:
    base, tokens = to_transformers(random_model(SHAPE)), random_batch(SHAPE)[0]
    settings = {"target_modules": ["c_attn", "c_proj"], **more}
    reference = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    randomize({name: p.data for name, p in reference.named_parameters() if "lora_" in name})
    reference.save_pretrained(tmp_path / "adapter")
    save(random_model(SHAPE), None, tmp_path / "base")
    merged, _ = load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert relative_error(merged(tokens), logits(reference, tokens)) < 1e-5
    read = read_adapter(tmp_path / "adapter")  # peft reads what we write
    again = save_adapter(tmp_path / "again", read.config, read.tensors, read.base_model, "")
    rebuilt = peft.PeftModel.from_pretrained(to_transformers(random_model(SHAPE)), again)
    assert relative_error(merged(tokens), logits(rebuilt, tokens)) < 1e-5


VOCABULARY = 2 * SHAPE.vocab_size


@pytest.mark.parametrize(
    ("more", "is_tied"),
    [
        ({"use_dora": True}, True),
        ({"use_dora": True, "use_rslora": True, "target_modules": ["c_attn", "c_fc", "lm_head"]}, False),
        ({"bias": "all"}, True),
        ({"bias": "lora_only"}, True),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["wte"]}, False),
        ({"modules_to_save": ["wte", "lm_head"]}, False),
        ({"modules_to_save": ["wte"], "ensure_weight_tying": True}, False),
        ({"modules_to_save": ["ln_f", "wpe", "c_fc", "attn.c_proj"]}, True),
        ({"target_modules": ["wte", "c_attn"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["lm_head", "wte", "c_fc"], "bias": "lora_only"}, False),
        ({"vocab_size": VOCABULARY}, True),
        ({"vocab_size": VOCABULARY, "modules_to_save": ["wte", "lm_head"]}, False),
        ({"vocab_size": VOCABULARY, "target_modules": ["wte", "c_attn"]}, False),
    ],
)
def test_we_merge_what_else_peft_trains(tmp_path: Path, more: dict[str, Any], is_tied: bool) -> None:
    """DoRA, biases, whole modules, embeddings and heads, also of another vocabulary size."""
    base, settings = to_transformers(random_model(SHAPE)), {"target_modules": ["c_attn", "mlp.c_proj"], **more}
    vocab_size = settings.pop("vocab_size", SHAPE.vocab_size)
    if vocab_size != SHAPE.vocab_size:
        base.resize_token_embeddings(vocab_size)
    reference = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    reference.save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True if vocab_size > SHAPE.vocab_size else "auto"
    )
    save(random_model(SHAPE), None, tmp_path / "base")
    merged, _ = load(tmp_path / "base", adapter=tmp_path / "adapter")
    tokens = random_batch(replace(SHAPE, vocab_size=vocab_size))[0]
    assert relative_error(merged(tokens), logits(reference, tokens)) < 1e-5
    assert (merged.config.vocab_size, merged.config.tie_word_embeddings) == (vocab_size, is_tied)
    save(merged, None, tmp_path / "merged")
    again, _ = load(tmp_path / "merged")
    assert torch.equal(again(tokens), merged(tokens))


def test_we_read_an_adapter_that_peft_saved_from_a_model_without_head(tmp_path: Path) -> None:
    config, tokens = CONFIGS[0], random_batch(SHAPE)[0]
    twin = to_transformers(random_model(SHAPE))
    reference = theirs(config, twin.transformer)
    reference.save_pretrained(tmp_path / "adapter")
    save(random_model(SHAPE), None, tmp_path / "base")
    merged, _ = load(tmp_path / "base", adapter=tmp_path / "adapter")
    hidden = reference.eval()(tokens).last_hidden_state
    assert relative_error(merged.hidden_states(tokens), hidden) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
def test_our_files_equal_those_of_peft(tmp_path: Path, config: LoRAConfig) -> None:
    model = ours(config)
    save_adapter(tmp_path / "ours", config, adapter_state_dict(model), "base", base_fingerprint(model))
    theirs(config).save_pretrained(tmp_path / "theirs")
    mine, reference = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {
        name: (t.shape, t.dtype) for name, t in reference.items()
    }
    settings, usual = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    usual |= {"base_model_name_or_path": "base", "target_modules": sorted(usual["target_modules"])}
    assert {key: usual[key] for key in settings} == settings


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[3]])
def test_gradients_equal_those_of_peft(config: LoRAConfig) -> None:
    model, reference = ours(config).train(), theirs(config).train()
    paired = {
        name: reference.get_parameter(f"base_model.model.{name}.default.weight") for name in adapter_state_dict(model)
    }
    for name, tensor in adapter_state_dict(model).items():
        paired[name].data.copy_(tensor)
    tokens, targets = random_batch(SHAPE)
    own = model.loss(tokens, targets)
    own.backward()
    their_logits = reference(tokens).logits
    loss = nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    loss.backward()
    assert relative_error(own, loss) < 1e-6
    for name, p in paired.items():
        assert relative_error(model.get_parameter(name).grad, p.grad) < 1e-4, name  # pyright: ignore[reportArgumentType]
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == reference.get_nb_trainable_parameters()[0]


def test_initialization_equals_that_of_peft() -> None:
    wide = GPTConfig(vocab_size=8, block_size=8, n_layer=1, n_head=1, n_embd=512)
    model = GPT(wide)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=["c_fc", "c_proj"])
    reference = peft.get_peft_model(to_transformers(model), settings)
    add_adapter(model, LoRAConfig(rank=64, targets=("c_fc", "c_proj")))
    for name, tensor in adapter_state_dict(model).items():
        other = reference.get_parameter(f"base_model.model.{name}.default.weight")
        if name.endswith("lora_B"):
            assert not tensor.any()
            assert not other.any()
        else:
            assert tensor.std().item() == pytest.approx(other.std().item(), rel=0.02)  # of 32,768 numbers at least
            assert tensor.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.02)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_transformers_reads_the_merged_folder_and_it_equals_the_merge_of_peft(
    tmp_path: Path, config: LoRAConfig
) -> None:
    from transformers import GPT2LMHeadModel

    model, tokens = ours(config), random_batch(SHAPE)[0]
    save(merge_and_unload(model), None, tmp_path / "merged")
    read: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert relative_error(model(tokens), logits(read, tokens)) < 1e-5
    save_adapter(tmp_path / "adapter", config, adapter_state_dict(model), "base", base_fingerprint(model))
    base = to_transformers(random_model(SHAPE))
    reference = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert reference.keys() == read.state_dict().keys()
    for name, tensor in read.state_dict().items():
        assert relative_error(tensor, reference[name]) < 1e-6, name
