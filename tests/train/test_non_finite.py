"""Non-finite values: the module of origin is found, and the step can be recomputed bitwise."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gpt2
from gpt2.config import TrainConfig
from gpt2.data.loader import Batch, TokenLoader
from gpt2.data.prepare import open_data
from gpt2.distributed.parallel import DistributedModel
from gpt2.distributed.process_group import SINGLE_PROCESS
from gpt2.errors import UserError
from gpt2.loss import IGNORE_INDEX
from gpt2.model import GPT, GPTConfig
from gpt2.optimizers import build_optimizers
from gpt2.runtime import apply_activation_checkpointing, can_compile, compile_blocks, get_rng_state, seed_step
from gpt2.tokenizer import get_tokenizer
from gpt2.train.artifact import ModelArtifact
from gpt2.train.non_finite import diagnose_non_finite, excerpt, replay_dump, write_dump
from gpt2.train.non_finite_origin import StepInputs, find_non_finite_origin, is_finite_in_float32
from gpt2.train.setup import Run
from gpt2.train.trainer import update

ODD = ord("~")  # a token that the batch holds in one place only
ODD_ROW, ODD_POSITION = 5, 7
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. "


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=3, n_head=2, n_embd=16)).train()


@pytest.fixture
def inputs() -> StepInputs:
    """A batch of eight rows in micro-batches of two."""
    ids = torch.tensor(list((TEXT * 2)[: 8 * 16 + 1].encode()))
    tokens, targets = ids[:-1].view(8, 16).clone(), ids[1:].view(8, 16).clone()
    tokens[ODD_ROW, ODD_POSITION] = ODD
    targets[2] = IGNORE_INDEX
    torch.manual_seed(1)
    return StepInputs(12, Batch(tokens, targets), 2, 112.0, torch.float32, 1e-3, get_rng_state(torch.device("cpu")))


def parameter(model: GPT, name: str) -> Tensor:
    return model.get_parameter(name).data


def spoil_one_position(model: GPT, block: int) -> None:
    """Make the output of a block's `mlp.c_proj` overflow at the odd token, with finite weights.

    That token alone has anything in the first channel, which nothing but the embedding writes to. One hidden unit
    of the MLP fires where it stands (there the layer norm gives some 3.9), and is silent elsewhere.
    """
    parameter(model, "transformer.wte.weight")[:, 0] = 0
    parameter(model, "transformer.wpe.weight")[:, 0] = 0
    parameter(model, "transformer.wte.weight")[ODD, 0] = 1e3
    for name in [name for name, _ in model.named_parameters() if name.endswith("c_proj.weight")]:
        parameter(model, name)[0] = 0
    mlp = f"transformer.h.{block}.mlp"
    parameter(model, f"{mlp}.c_fc.weight")[0] = 0
    parameter(model, f"{mlp}.c_fc.weight")[0, 0] = 1e10
    parameter(model, f"{mlp}.c_fc.bias")[0] = -2e10
    parameter(model, f"{mlp}.c_proj.weight")[:, 0] = 1e35


def silent_unit(model: GPT, value: float) -> None:
    """Give a hidden unit of the last MLP this constant value; its output weights are zero."""
    parameter(model, "transformer.h.2.mlp.c_fc.bias")[0] = value
    parameter(model, "transformer.h.2.mlp.c_proj.weight")[:, 0] = 0


def state_of(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_non_finite_weights_are_reported_first(model: GPT, inputs: StepInputs) -> None:
    parameter(model, "transformer.h.1.attn.c_proj.bias")[3] = math.nan
    origin = find_non_finite_origin(model, inputs)
    assert (origin.kind, origin.name, origin.value) == ("weight", "transformer.h.1.attn.c_proj.bias", "nan")
    assert math.isnan(origin.loss)
    assert "transformer.h.0.ln_1.weight" in origin.bad_gradients


@pytest.mark.parametrize(("block", "activation_checkpointing"), [(0, False), (2, False), (1, True)])
def test_an_output_that_overflows_is_found_with_its_row_and_place(
    model: GPT, inputs: StepInputs, block: int, activation_checkpointing: bool
) -> None:
    name = f"transformer.h.{block}.mlp.c_proj"
    spoil_one_position(model, block)
    if activation_checkpointing:
        apply_activation_checkpointing(model.transformer.h)
    origin = find_non_finite_origin(model, inputs)
    assert (origin.kind, origin.name, origin.value) == ("output", name, "inf")
    assert (origin.rows, origin.position) == ((ODD_ROW,), ODD_POSITION)
    whole = find_non_finite_origin(model, replace(inputs, micro_batch_size=8))
    assert (whole.name, whole.rows, whole.position) == (name, (ODD_ROW,), ODD_POSITION)


def test_overflow_between_submodules_is_attributed_to_the_module(model: GPT, inputs: StepInputs) -> None:
    """Queries and keys are finite, their products are not, in every row."""
    parameter(model, "transformer.h.1.attn.c_attn.weight")[:32] *= 1e22
    origin = find_non_finite_origin(model, inputs)
    assert (origin.kind, origin.name, origin.value) == ("output", "transformer.h.1.attn", "nan")
    assert origin.rows == tuple(range(8))


def test_a_loss_that_overflows_is_found_with_its_row(model: GPT, inputs: StepInputs) -> None:
    """The logit of a target that one row alone has, twice: it is as low as float32 goes."""
    untied = GPT(replace(model.config, tie_word_embeddings=False))
    inputs.batch.targets[3, 4:6] = ODD
    untied.transformer.ln_f.weight.data.zero_()
    untied.transformer.ln_f.bias.data.fill_(1.0)
    untied.lm_head.weight.data[ODD] = -2e37  # times 16 channels
    origin = find_non_finite_origin(untied, inputs)
    assert (origin.kind, origin.name, origin.value, origin.rows) == ("loss", "", "inf", (3,))


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_gradient_that_overflows_in_a_module_is_found(
    model: GPT, inputs: StepInputs, activation_checkpointing: bool
) -> None:
    """Two matrices in a row, each with a huge gain that the forward pass multiplies by zero."""
    if activation_checkpointing:
        apply_activation_checkpointing(model.transformer.h)
    parameter(model, "transformer.h.1.mlp.c_fc.weight").fill_(1e30)
    parameter(model, "transformer.h.1.mlp.c_proj.weight").fill_(1e30)
    parameter(model, "transformer.h.1.mlp.c_proj.bias").fill_(0.01)
    parameter(model, "transformer.h.1.ln_2.weight").zero_()
    parameter(model, "transformer.h.1.mlp.c_proj.weight")[::2] *= 1.5  # so that the layer norms let it pass
    origin = find_non_finite_origin(model, inputs)
    assert math.isfinite(origin.loss)
    assert (origin.kind, origin.name) == ("backward", "transformer.h.1.mlp.c_fc")
    assert origin.rows
    assert 2 not in origin.rows  # it has no targets, so no gradient
    assert str(origin).startswith(f"the input gradient of transformer.h.1.mlp.c_fc is {origin.value}, of gradients up")
    assert "transformer.h.1.ln_2.bias" in origin.bad_gradients
    assert "transformer.h.2.ln_2.bias" not in origin.bad_gradients


def test_an_overflowing_parameter_gradient_is_found(model: GPT, inputs: StepInputs) -> None:
    """Its input and its output gradient are large; its input gradient is finite."""
    silent_unit(model, 1e18)
    parameter(model, "transformer.ln_f.weight").fill_(1e26)
    origin = find_non_finite_origin(model, inputs)
    assert math.isfinite(origin.loss)
    assert (origin.kind, origin.name, origin.rows) == ("gradient", "transformer.h.2.mlp.c_proj.weight", ())
    assert origin.bad_gradients == ("transformer.h.2.mlp.c_proj.weight",)


def test_a_norm_that_overflows_alone_is_found(model: GPT, inputs: StepInputs) -> None:
    silent_unit(model, 1e18)
    parameter(model, "transformer.ln_f.weight").fill_(1e8)
    origin = find_non_finite_origin(model, inputs)
    assert math.isfinite(origin.loss)
    assert (origin.kind, origin.name, origin.bad_gradients) == ("norm", "transformer.h.2.mlp.c_proj.weight", ())
    assert origin.grad_norm == math.inf


def test_nothing_is_found_in_a_sound_step(model: GPT, inputs: StepInputs) -> None:
    origin = find_non_finite_origin(model, inputs)
    assert (origin.kind, origin.bad_gradients) == ("nothing", ())


def test_what_bfloat16_alone_cannot_hold_is_told_from_what_no_dtype_can(model: GPT, inputs: StepInputs) -> None:
    """A weight that rounds to infinity in bfloat16, with a tiny input and an unused output."""
    parameter(model, "transformer.h.1.ln_2.weight").zero_()
    parameter(model, "transformer.h.1.ln_2.bias").fill_(1e-32)
    parameter(model, "transformer.h.1.mlp.c_fc.weight")[0] = 3.4e38
    parameter(model, "transformer.h.1.mlp.c_proj.weight")[:, 0] = 0
    inputs = replace(inputs, dtype=torch.bfloat16)
    origin = find_non_finite_origin(model, inputs)
    assert (origin.kind, origin.name, origin.value) == ("output", "transformer.h.1.mlp.c_fc", "inf")
    assert is_finite_in_float32(model, inputs) is True
    spoil_one_position(model, 0)
    assert is_finite_in_float32(model, inputs) is False
    assert is_finite_in_float32(model, replace(inputs, dtype=torch.float32)) is None


def test_the_diagnosis_leaves_everything_as_it_was(model: GPT, inputs: StepInputs, tmp_path: Path) -> None:
    spoil_one_position(model, 1)
    model.eval()
    before, torch_state, python_state = state_of(model), torch.get_rng_state(), random.getstate()
    diagnose_non_finite(tmp_path, model, get_tokenizer("bytes"), inputs)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    for p in model.parameters():
        assert p.grad is None
        assert not p._post_accumulate_grad_hooks  # pyright: ignore[reportAttributeAccessIssue]


def run_of(model: GPT, tmp_path: Path, **values: Any) -> Run:
    (tmp_path / "numbers.txt").write_text(TEXT * 30)
    sizes: dict[str, Any] = {"block_size": 16, "batch_size": 8, "micro_batch_size": 2, "max_steps": 20}
    config = TrainConfig(name="tiny", data=str(tmp_path / "numbers.txt"), tokenizer="bytes", **sizes, **values)
    data = open_data(config.data, config.tokenizer)
    loader = TokenLoader(data.train, config.batch_size, config.block_size, config.seed)
    optimizers = build_optimizers(model, config)
    cpu = torch.device("cpu")
    return Run(
        tmp_path / "run",
        config,
        data,
        loader,
        model,
        optimizers,
        cpu,
        torch.float32,
        ModelArtifact(model.config, data.tokenizer),
        SINGLE_PROCESS,
        DistributedModel("none", model, SINGLE_PROCESS, cpu),
    )


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_replayed_step_equals_the_training_step_bitwise(
    model: GPT, activation_checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with finite values and dropout: without the random state the values differ."""
    model = GPT(replace(model.config, dropout=0.1))
    if activation_checkpointing:
        apply_activation_checkpointing(model.transformer.h)
    run = run_of(model, tmp_path)
    batch, before, run.step = run.loader.batch(3), state_of(model), 4
    seed_step(run.config.seed, run.step)
    state = get_rng_state(run.device)
    loss, norm = update(run, batch, 1e-3)[:2]
    model.load_state_dict(before)
    divisor = float(batch.num_targets)
    inputs = StepInputs(4, batch, 2, divisor, torch.float32, 1e-3, state, loss, norm, activation_checkpointing)
    origin = find_non_finite_origin(model, inputs)
    assert (origin.kind, origin.loss, origin.grad_norm) == ("nothing", loss, norm)
    elsewhere = find_non_finite_origin(model, replace(inputs, rng_state=get_rng_state(run.device)))
    assert elsewhere.loss != loss

    folder = write_dump(run.folder, model, run.data.tokenizer, inputs, origin)
    assert write_dump(run.folder, model, run.data.tokenizer, inputs, origin) == folder  # in the place of the first
    assert [path.name for path in folder.parent.iterdir()] == ["step-4"]
    assert replay_dump(folder).splitlines() == [
        f"step 4 on cpu in float32, recomputed from {folder}",
        f"the loss is {loss}, as before",
        f"the norm of the gradient is {norm}, as before",
        "origin: nothing: recomputed, all values are finite",
    ]
    numbers = json.loads((folder / "dump.json").read_text())
    old = {"recompute": numbers.pop("activation_checkpointing"), **numbers}  # a dump of an older version
    (folder / "dump.json").write_text(json.dumps(old))
    with_old_key: list[bool] = []
    monkeypatch.setattr(
        "gpt2.train.non_finite.apply_activation_checkpointing", lambda blocks: with_old_key.append(True)
    )
    assert replay_dump(folder).endswith("all values are finite")
    assert with_old_key == [True] * activation_checkpointing


def test_the_message_and_the_dump_name_the_origin(model: GPT, inputs: StepInputs, tmp_path: Path) -> None:
    spoil_one_position(model, 1)
    tokenizer = get_tokenizer("bytes")
    inputs = replace(inputs, loss=math.nan, grad_norm=math.nan)
    message = str(diagnose_non_finite(tmp_path, model, tokenizer, inputs))
    folder = tmp_path / "dumps" / "step-12"
    text = bytes(inputs.batch.tokens[ODD_ROW, : ODD_POSITION + 1].tolist()).decode()
    assert message == (
        "step 12: the loss is nan; origin: the output of transformer.h.1.mlp.c_proj is inf, "
        f"of inputs up to 1.9e+10 (row 5 of the batch: '{' '.join(text.split())}'); dumped to {folder} "
        f"(gpt2 train --replay {folder}): lower --lr, or raise --warmup-steps"
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "batch.safetensors",
        "batch.txt",
        "dump.json",
        "model",
        "random.safetensors",
    ]
    numbers = json.loads((folder / "dump.json").read_text(), parse_constant=pytest.fail)
    assert (numbers["step"], numbers["loss"], numbers["micro_batch_size"], numbers["dropout"]) == (12, "nan", 2, 0.0)
    assert numbers["origin"]["rows"] == [ODD_ROW]
    rows = (folder / "batch.txt").read_text().split("--- row ")
    assert rows[1 + ODD_ROW] == f"{ODD_ROW}\n{tokenizer.decode(inputs.batch.tokens[ODD_ROW].tolist())}\n\n"
    weights, _ = gpt2.load(folder)  # a model folder like any other
    assert torch.equal(weights.transformer.wte.weight, model.transformer.wte.weight)

    result = replay_dump(folder)
    assert "the loss is nan, as before" in result
    assert (
        "origin: the output of transformer.h.1.mlp.c_proj is inf, of inputs up to 1.9e+10 (row 5 of the batch: "
        in result
    )
    assert "non-finite gradients: transformer.wte.weight" in result


def test_bad_weights_survive_the_dump(model: GPT, inputs: StepInputs, tmp_path: Path) -> None:
    parameter(model, "transformer.wte.weight")[7, 3] = math.inf
    message = str(diagnose_non_finite(tmp_path, model, get_tokenizer("bytes"), inputs))
    assert "origin: the weights themselves: transformer.wte.weight is inf; " in message
    assert message.endswith("they were damaged before this step: resume from an older checkpoint with a lower --lr")
    assert "origin: the weights themselves: transformer.wte.weight is inf" in replay_dump(
        tmp_path / "dumps" / "step-12"
    )
    message = str(diagnose_non_finite(tmp_path, model, get_tokenizer("bytes"), replace(inputs, step=1)))
    assert message.endswith("the run started with them: use another model for --init-from")


def test_a_dump_that_cannot_be_written_does_not_hide_the_origin(model: GPT, inputs: StepInputs, tmp_path: Path) -> None:
    (tmp_path / "dumps").write_text("a file in the way")
    spoil_one_position(model, 1)
    message = str(diagnose_non_finite(tmp_path, model, get_tokenizer("bytes"), inputs))
    assert "origin: the output of transformer.h.1.mlp.c_proj" in message
    assert f"; cannot write the dump {tmp_path / 'dumps' / 'step-12'}: " in message
    assert "\n" not in message


def test_an_invalid_dump_is_a_one_line_error(model: GPT, inputs: StepInputs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a dump: it has no dump\.json"):
        replay_dump(tmp_path)
    spoil_one_position(model, 1)
    diagnose_non_finite(tmp_path, model, get_tokenizer("bytes"), inputs)
    folder = tmp_path / "dumps" / "step-12"
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def numbers(**changed: Any) -> bytes:
        return json.dumps(json.loads(whole[folder / "dump.json"]) | changed).encode()

    changes = ({"dtype": "int3"}, {"dtype": 3}, {"device": "toaster"}, {"device": None}, {"micro_batch_size": 0})
    changes += ({"matmul_precision": "so-so"}, {"step": None})
    broken = {
        "dump.json": [b"[]", b"{}", b"{", *(numbers(**changed) for changed in changes)],
        "batch.safetensors": [b"", whole[folder / "random.safetensors"]],
        "random.safetensors": [b"", whole[folder / "batch.safetensors"]],
        "model/config.json": [b"{}"],
        "model/model.safetensors": [b"x"],
    }
    for name, contents in broken.items():
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(UserError) as caught:
                replay_dump(folder)
            assert str(folder) in str(caught.value) or "is not one of" in str(caught.value), (name, content)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole[folder / name])
    (folder / "random.safetensors").unlink()
    with pytest.raises(UserError, match="is not a valid dump"):
        replay_dump(folder)


def test_a_batch_that_does_not_fit_the_model_is_an_invalid_dump(model: GPT, inputs: StepInputs, tmp_path: Path) -> None:
    origin = find_non_finite_origin(model, inputs)
    tokens = inputs.batch.tokens
    for bad in (tokens + 10_000, tokens[:4], tokens.float(), tokens.repeat(1, 9)):
        folder = write_dump(tmp_path, model, get_tokenizer("bytes"), inputs, origin)
        save_file({"tokens": bad, "targets": inputs.batch.targets}, folder / "batch.safetensors")
        with pytest.raises(UserError, match=r"step-12"):
            replay_dump(folder)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no C++ compiler")
def test_compiled_blocks_are_looked_into(model: GPT, inputs: StepInputs) -> None:
    spoil_one_position(model, 1)
    compile_blocks(model.transformer.h)
    assert not model.loss(inputs.batch.tokens, inputs.batch.targets).isfinite()
    origin = find_non_finite_origin(model, inputs)
    assert (origin.name, origin.rows, origin.position) == ("transformer.h.1.mlp.c_proj", (ODD_ROW,), ODD_POSITION)


def test_excerpts_are_short_and_on_one_line() -> None:
    tokenizer = get_tokenizer("bytes")
    row = torch.tensor(tokenizer.encode("one\n  two\n" + "x" * 300 + " the end"))
    assert excerpt(tokenizer, row) == "'one two " + "x" * 38 + "'"
    assert excerpt(tokenizer, row, 9) == "'one two'"
    assert excerpt(tokenizer, row, len(row) - 1).endswith("xxx the end'")
    assert len(excerpt(None, row)) == 63
