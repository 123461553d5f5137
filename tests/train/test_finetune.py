"""Fine-tuning on text or on prompts and answers, with all weights or with LoRA."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
from gpt2.commands.finetune import finetune_settings
from gpt2.commands.train import resolve_config
from gpt2.config import TrainConfig, config_for_resume, read_toml
from gpt2.data.prepare import open_data
from gpt2.errors import UserError
from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, merge_and_unload, read_adapter
from gpt2.loss import IGNORE_INDEX
from gpt2.reporting.metrics import read_metrics, without_timings
from gpt2.train.comparison import MAX_TOKENS, compare
from gpt2.train.setup import setup_run
from gpt2.train.trainer import train
from tests.helpers.tiny_trainer import file_contents
from tests.helpers.training_helpers import NUMBERS_TEXT, fixed_seed_sampler

DOUBLES = [{"prompt": f"double {i}", "answer": str(2 * i)} for i in range(60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model, trained briefly on numbers."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "numbers.txt").write_text(NUMBERS_TEXT)
    shape: dict[str, Any] = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 48}
    config = TrainConfig(
        name="base",
        out_dir=str(folder),
        data=str(folder / "numbers.txt"),
        tokenizer="bytes",
        **shape,
        batch_size=8,
        max_steps=20,
        warmup_steps=5,
        lr=3e-3,
        dtype="float32",
        device="cpu",
        sample_tokens=0,
        save_every=0,
        eval_every=0,
    )
    return train(config)


@pytest.fixture
def tuning(base: Path, tmp_path: Path) -> TrainConfig:
    """A run of about a second on prompts and answers."""
    (tmp_path / "doubles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOUBLES))
    given: dict[str, Any] = {
        "data": str(tmp_path / "doubles.jsonl"),
        "name": "tuned",
        "out_dir": str(tmp_path / "runs"),
    }
    given |= {"batch_size": 4, "lr": 3e-3, "dtype": "float32", "device": "cpu", "sample_tokens": 0, "epochs": 0.0}
    given |= {"max_steps": 12, "eval_every": 4, "save_every": 4, "warmup_steps": 2, "patience": 0, "block_size": 48}
    return resolve_config("finetune", finetune_settings(str(base), given))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in gpt2.load(folder)[0].named_parameters()}


def test_loss_is_computed_on_answers_only(tuning: TrainConfig) -> None:
    run = setup_run(tuning, Path(tuning.out_dir) / "none")
    batch = run.loader.batch(0)
    assert batch.documents is not None
    ids = batch.targets[batch.targets != IGNORE_INDEX].tolist()
    output = run.data.tokenizer.decode(ids).split("<|endoftext|>")
    assert {text.strip() for text in output} - {""} <= {row["answer"] for row in DOUBLES}
    everything = setup_run(replace(tuning, mask_prompt=False), Path(tuning.out_dir) / "none").loader.batch(0).targets
    assert "ser: double" in run.data.tokenizer.decode(everything[everything != IGNORE_INDEX].tolist())


def test_finetuning_lowers_the_loss_and_writes_a_complete_run_folder(tuning: TrainConfig, base: Path) -> None:
    folder = train(replace(tuning, max_steps=40), fixed_seed_sampler)
    losses = [line["val_loss"] for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line]
    assert min(losses) < 0.6 * losses[0]
    assert (folder / "report.md").exists()
    from transformers import AutoTokenizer, GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(folder / "model")
    tokens = torch.tensor([list(b"User: double 7\nAssistant:")])
    torch.testing.assert_close(theirs(tokens).logits, gpt2.load(folder)[0](tokens), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    talk_of = [{"role": "user", "content": "double 7"}]
    text = tokenizer.apply_chat_template(talk_of, tokenize=False, add_generation_prompt=True)
    assert text == "User: double 7\nAssistant:"


@pytest.mark.parametrize("how", [{}, {"lora_rank": 2, "lora_dropout": 0.1}, {"freeze": 2}, {"template": "chatml"}])
def test_a_resumed_finetuning_equals_an_uninterrupted_one(tuning: TrainConfig, how: dict[str, Any]) -> None:
    whole = train(replace(tuning, name="whole", **how), fixed_seed_sampler)
    folder = train(replace(tuning, name="parts", keep_checkpoints=9, **how), fixed_seed_sampler)
    for step in (12, 8):  # as if killed after step 8 was recorded and before it was saved
        for path in (folder / "checkpoints" / f"step-{step}").rglob("*"):
            path.unlink() if path.is_file() else None
    train(config_for_resume(folder, {}), fixed_seed_sampler)
    one, other = (without_timings(read_metrics(path / "metrics.jsonl")) for path in (whole, folder))
    assert one == other
    assert file_contents(whole / "model") == file_contents(folder / "model")
    product = "adapter" if "lora_rank" in how else "model"
    for name in (product, "optimizer.safetensors"):
        ours, theirs = (path / "checkpoints" / "step-12" / name for path in (folder, whole))
        assert (
            (file_contents(ours) == file_contents(theirs))
            if ours.is_dir()
            else (ours.read_bytes() == theirs.read_bytes())
        )


def test_lora_trains_and_saves_only_the_adapters(tuning: TrainConfig, base: Path) -> None:
    folder = train(replace(tuning, lora_rank=2, lora_targets="c_attn", max_steps=24, lr=1e-2))
    assert sorted(p.name for p in (folder / "checkpoints" / "step-24").iterdir()) == [
        "adapter",
        "optimizer.safetensors",
        "state.json",
    ]
    adapter = read_adapter(folder)
    assert len(adapter.tensors) == 2 * 3
    assert adapter.base_model == str(base / "model")
    assert adapter.base_fingerprint == base_fingerprint(gpt2.load(base)[0])
    before, after = weights(base), weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(3)}
    merged = weights_with_adapter(base, folder)
    assert all(torch.equal(merged[name], after[name]) for name in after)
    losses = [line["val_loss"] for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line]
    assert losses[-1] < losses[0]
    state = (folder / "checkpoints" / "step-24" / "optimizer.safetensors").stat().st_size
    assert state < 100 * sum(t.numel() for t in adapter.tensors.values()) < 4 * sum(w.numel() for w in after.values())


def weights_with_adapter(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in gpt2.load(base, adapter=adapter)[0].named_parameters()}


def test_a_model_with_adapters_generates_the_same_text_as_the_merged_one(base: Path) -> None:
    model, tokenizer = gpt2.load(base)
    add_adapter(model, LoRAConfig(rank=2))
    for tensor in adapter_state_dict(model).values():
        tensor.normal_(std=0.5, generator=torch.Generator().manual_seed(tensor.numel()))
    with_adapters = gpt2.generate(model, tokenizer, "The number", max_new_tokens=20, temperature=0)
    assert with_adapters == gpt2.generate(
        merge_and_unload(model), tokenizer, "The number", max_new_tokens=20, temperature=0
    )
    assert with_adapters != gpt2.generate(gpt2.load(base)[0], tokenizer, "The number", max_new_tokens=20, temperature=0)


def test_frozen_blocks_and_embeddings_stay_as_they_are(tuning: TrainConfig, base: Path) -> None:
    before, after = weights(base), weights(train(replace(tuning, freeze=2)))
    for name in before:
        kept = name.startswith(("transformer.wte", "transformer.wpe", "transformer.h.0.", "transformer.h.1."))
        assert torch.equal(before[name], after[name]) == kept, name


def test_the_best_is_kept_and_patience_ends_the_run(tuning: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate that is too high, the first validations are the best."""
    config = replace(tuning, lr=0.3, max_steps=60, eval_every=2, save_every=0, patience=3, warmup_steps=12)
    folder = train(config)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line]
    best = min(lines, key=lambda line: line["val_loss"])
    assert lines[-1]["step"] < 60
    assert [line["step"] for line in lines[-3:]] == [best["step"] + 2, best["step"] + 4, best["step"] + 6]
    assert f"validation loss was lowest at step {best['step']}" in capsys.readouterr().err
    report = (folder / "report.md").read_text()
    assert "was stopped" not in report
    data = setup_run(replace(config, name="again"), folder.parent / "again")
    data.model.load_state_dict(gpt2.load(folder)[0].state_dict())
    assert trainer_validate(data) == pytest.approx(best["val_loss"], rel=1e-5)
    steps = len(read_metrics(folder / "metrics.jsonl"))
    train(config_for_resume(folder, {}))  # it was over, and is
    assert len(read_metrics(folder / "metrics.jsonl")) == steps


def trainer_validate(run: Any) -> float:
    from gpt2.train.trainer import validate

    return validate(run)


def test_the_best_of_a_resumed_run_is_the_best_of_all(tuning: TrainConfig) -> None:
    config = replace(tuning, lr=0.3, eval_every=2, save_every=2, warmup_steps=6, keep_checkpoints=99)
    whole = train(replace(config, name="whole"))
    folder = train(replace(config, name="parts"))
    for step in (12, 10):
        (folder / "checkpoints" / f"step-{step}" / "state.json").unlink()
    train(config_for_resume(folder, {}))
    assert file_contents(whole / "model") == file_contents(folder / "model")


def test_special_tokens_of_a_template_are_added_and_trained(tuning: TrainConfig) -> None:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = train(replace(tuning, template="chatml", add_tokens="<calm>,<storm>"))
    model, tokenizer = gpt2.load(folder)
    assert tokenizer is not None
    assert model.config.vocab_size == tokenizer.vocab_size == 257 + 4
    theirs = AutoTokenizer.from_pretrained(folder / "model")
    for mark in ("<|im_start|>", "<|im_end|>", "<calm>", "<storm>"):
        assert tokenizer.encode(mark, allow_special=True) == [theirs.convert_tokens_to_ids(mark)]
    assert GPT2LMHeadModel.from_pretrained(folder / "model").config.vocab_size == 261


def test_epochs_become_steps(tuning: TrainConfig) -> None:
    config = replace(tuning, epochs=2.0, eval_every=100, warmup_steps=100, batch_size=2)
    run = setup_run(config, Path(tuning.out_dir) / "none")
    steps = -(-2 * run.loader.windows_per_epoch // 2)
    assert (run.config.max_steps, run.config.warmup_steps) == (steps, steps // 10)
    assert run.config.eval_every == max(1, steps // 10)
    folder = train(config)
    assert read_toml(folder / "config.toml").max_steps == steps == len(read_metrics(folder / "metrics.jsonl"))
    train(config_for_resume(folder, {"max_steps": steps + 2}))
    assert len(read_metrics(folder / "metrics.jsonl")) == steps + 2


def test_documents_of_plain_text_do_not_attend_to_each_other(tuning: TrainConfig, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i:02}.txt").write_text(NUMBERS_TEXT[i * 300 : i * 300 + 211])
    config = replace(tuning, data=str(texts), max_steps=6)
    run = setup_run(config, tmp_path / "none")
    batch, end = run.loader.batch(0), run.data.tokenizer.end_of_text
    assert batch.documents is not None
    assert torch.equal(batch.documents, (batch.tokens == end).cumsum(1))
    assert (batch.tokens == end).any()
    assert setup_run(replace(config, separate_documents=False), tmp_path / "none").loader.batch(0).documents is None
    train(config)


def test_the_comparison_equals_evaluating_both_models(tuning: TrainConfig, base: Path) -> None:
    folder = train(replace(tuning, max_steps=40, sample_tokens=8))
    found = compare(read_toml(folder / "config.toml"), folder, fixed_seed_sampler)
    own, general = found.losses
    assert own.after < own.before
    assert own.text == "doubles, held out"
    for model_folder, loss in ((base, general.before), (folder, general.after)):
        model, tokenizer = gpt2.load(model_folder)
        total, count = 0.0, 0
        for batch in open_data("python-docs", tokenizer).validation_batches(8, 48, MAX_TOKENS):
            with torch.no_grad():
                total += model.loss(batch.tokens, batch.targets, 1.0).item()
            count += batch.num_targets
        assert loss == pytest.approx(total / count, rel=1e-4)
    for answer in found.answers:
        number = int(answer.prompt.split("double ")[1].split("\n")[0])
        assert answer.reference == str(2 * number)
        model, tokenizer = gpt2.load(base)
        assert answer.prompt + answer.before == fixed_seed_sampler(model, tokenizer, answer.prompt, 8)
    result = found.markdown()
    assert "| doubles, held out |" in result
    assert "lower |" in result


@pytest.mark.parametrize(
    ("given", "result"),
    [
        ({"freeze": 4}, "--freeze 4 is more than the model's 3 blocks"),
        ({"freeze": 1, "lora_rank": 2}, "--freeze and --lora-rank cannot be combined"),
        ({"add_tokens": "<a>", "lora_rank": 2}, "--add-tokens and --lora-rank cannot be combined"),
        ({"template": "chatml", "lora_rank": 2}, r"the template's <\|im_start\|> is no token of the model"),
        (
            {"lora_rank": 2, "lora_targets": "c_atn"},
            r"the model has no 'c_atn' for an adapter \(did you mean 'c_attn'\?\)",
        ),
        ({"lora_rank": -1}, "--lora-rank must be at least 0"),
        ({"lora_rank": 1, "lora_alpha": 0.0}, "--lora-alpha must be over 0"),
        ({"init_from": None, "lora_rank": 1}, "--lora-rank needs a model to start from"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl"),
    ],
)
def test_unsupported_combinations_are_one_line_errors(tuning: TrainConfig, given: dict[str, Any], result: str) -> None:
    with pytest.raises(UserError, match=result) as error:
        train(replace(tuning, **given))
    assert "\n" not in str(error.value)
    assert not (Path(tuning.out_dir) / "tuned").exists()


def test_a_changed_base_model_is_an_error(tuning: TrainConfig, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    gpt2.save(*gpt2.load(base), own)
    folder = train(replace(tuning, init_from=str(own), lora_rank=2, max_steps=4, name="first"))
    model, tokenizer = gpt2.load(own)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(2)
    gpt2.save(model, tokenizer, own)
    with pytest.raises(UserError, match=r"has an adapter for .*own, which has changed since"):
        train(config_for_resume(folder, {"max_steps": 8}))
