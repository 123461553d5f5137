"""Non-finite losses and gradients: a diagnosis of the step, and a dump from which it can be recomputed.

`diagnose_non_finite` is called before an update whose loss or gradient is not finite. It recomputes the batch with
hooks on every module, writes all inputs of the step to `RUN/dumps/step-N`, and returns the one-line error that ends the
run. `replay_dump` recomputes the step from such a folder.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2.config import CHOICES
from gpt2.data.loader import Batch
from gpt2.errors import UserError
from gpt2.files import staging_folder
from gpt2.lora import lora_layers, merge_and_unload
from gpt2.loss import IGNORE_INDEX
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import DTYPE_NAMES, apply_activation_checkpointing, parse_dtype, pick_device
from gpt2.tokenizer import Tokenizer
from gpt2.train.non_finite_origin import NonFiniteOrigin, StepInputs, find_non_finite_origin, is_finite_in_float32
from gpt2.weights import load, save

EXCERPT_TOKENS, EXCERPT_CHARACTERS = 48, 60
MAX_ROWS_SHOWN = 4


def diagnose_non_finite(run_folder: Path, model: GPT, tokenizer: Tokenizer, inputs: StepInputs) -> UserError:
    """The error for a step whose loss or gradient is not finite; writes its dump.

    The model's weights and torch's random state are unchanged, its gradients are cleared.
    """
    try:
        origin, finite_in_float32 = find_non_finite_origin(model, inputs), is_finite_in_float32(model, inputs)
    except torch.OutOfMemoryError:
        origin, finite_in_float32 = NonFiniteOrigin("unknown"), None
    loss, norm = inputs.loss, inputs.grad_norm
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
    diagnosis = f"step {inputs.step:,}: {what}; origin: {origin}{_describe_rows(origin, inputs, tokenizer)}"
    try:
        folder = write_dump(run_folder, model, tokenizer, inputs, origin)
        dump = f"dumped to {folder} (gpt2 train --replay {folder})"
    except UserError as error:
        dump = str(error)
    return UserError(f"{diagnosis}; {dump}: {_advice(origin, inputs, finite_in_float32)}", code="non_finite_loss")


def write_dump(run_folder: Path, model: GPT, tokenizer: Tokenizer, inputs: StepInputs, origin: NonFiniteOrigin) -> Path:
    """Write `RUN/dumps/step-N`, from which `replay_dump` recomputes the step, atomically; returns that folder.

    It holds `model/` (a model folder like any other, with the weights before the update), `batch.safetensors`,
    `batch.txt` (the rows as text), `random.safetensors`, and `dump.json`. It replaces a dump of the same step.
    Raises UserError when it cannot be written.
    """
    folder = run_folder / "dumps" / f"step-{inputs.step}"
    numbers = {
        "step": inputs.step,
        "loss": _json_value(inputs.loss),
        "grad_norm": _json_value(inputs.grad_norm),
        "lr": inputs.lr,
        "micro_batch_size": inputs.micro_batch_size,
        "divisor": inputs.divisor,
        "activation_checkpointing": inputs.activation_checkpointing,
        "dropout": model.config.dropout,
        "dtype": DTYPE_NAMES[inputs.dtype],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "device": str(model.device),
        "torch": torch.__version__,
        "origin": {key: _json_value(value) for key, value in asdict(origin).items()},
    }
    texts = [f"--- row {row}\n{tokenizer.decode(ids)}\n\n" for row, ids in enumerate(inputs.batch.tokens.tolist())]
    try:
        with staging_folder(folder) as written:
            save(merge_and_unload(model) if lora_layers(model) else model, tokenizer, written / "model")
            batch = inputs.batch._asdict()
            tensors = {name: tensor.contiguous() for name, tensor in batch.items() if tensor is not None}
            save_file(tensors, written / "batch.safetensors")
            save_file(inputs.rng_state, written / "random.safetensors")
            (written / "batch.txt").write_text("".join(texts), encoding="utf-8")
            (written / "dump.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            written.rename(folder)
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(f"cannot write the dump {folder}: {error}") from error
    return folder


def replay_dump(folder: Path) -> str:
    """Recompute the step of a dump on its device, and return the diagnosis in a few lines.

    The same machine and torch give the same bits, unless the step used torch.compile.
    Raises UserError for a folder that is not a dump.
    """
    model, tokenizer, inputs, numbers = _read_dump(folder)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(numbers["matmul_precision"])
        origin = find_non_finite_origin(model, inputs)
        finite_in_float32 = is_finite_in_float32(model, inputs)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{folder} cannot be recomputed: {' '.join(str(error).split())}") from error
    finally:
        torch.set_float32_matmul_precision(precision)
    lines = [f"step {inputs.step:,} on {model.device} in {DTYPE_NAMES[inputs.dtype]}, recomputed from {folder}"]
    pairs = (("loss", origin.loss, inputs.loss), ("norm of the gradient", origin.grad_norm, inputs.grad_norm))
    for what, now, before in pairs:
        lines.append(f"the {what} is {now}{', as before' if str(now) == str(before) else f'; before: {before}'}")
    lines.append(f"origin: {origin}{_describe_rows(origin, inputs, tokenizer)}")
    if origin.bad_gradients:
        lines.append(f"non-finite gradients: {_abbreviated(origin.bad_gradients)}")
    if finite_in_float32 is not None:
        lines.append(
            f"in float32 {'all values are finite' if finite_in_float32 else 'there are non-finite values too'}"
        )
    return "\n".join(lines)


def excerpt(tokenizer: Tokenizer | None, row: Tensor, position: int | None = None) -> str:
    """An excerpt of one row of a batch, (T,), quoted on one line: its beginning, or the text before `position`."""
    stop = EXCERPT_TOKENS if position is None else position + 1
    ids = row[max(0, stop - EXCERPT_TOKENS) : stop].tolist()
    text = " ".join(tokenizer.decode(ids).split()) if tokenizer is not None else " ".join(map(str, ids))
    if len(text) > EXCERPT_CHARACTERS:
        text = text[:EXCERPT_CHARACTERS] + "…" if position is None else "…" + text[-EXCERPT_CHARACTERS:]
    return f"'{text}'"


def _describe_rows(origin: NonFiniteOrigin, inputs: StepInputs, tokenizer: Tokenizer | None) -> str:
    """The rows with non-finite values, and an excerpt of the first; empty when they are unknown."""
    if not origin.rows:
        return ""
    number, first = len(origin.rows), inputs.batch.tokens[origin.rows[0]]
    if number == len(inputs.batch.tokens) > 1:
        return f" (in all {number} rows of the batch; row 0: {excerpt(tokenizer, first)})"
    text = excerpt(tokenizer, first, origin.position)
    names = f"row{'s' * (number > 1)} {_abbreviated(origin.rows)}"
    return f" ({names} of the batch{f'; row {origin.rows[0]}' if number > 1 else ''}: {text})"


def _abbreviated(names: tuple[Any, ...]) -> str:
    more = f" and {len(names) - MAX_ROWS_SHOWN} more" if len(names) > MAX_ROWS_SHOWN else ""
    return ", ".join(map(str, names[:MAX_ROWS_SHOWN])) + more


def _advice(origin: NonFiniteOrigin, inputs: StepInputs, finite_in_float32: bool | None) -> str:
    if origin.kind == "weight" and inputs.step == 1:
        return "the run started with them: use another model for --init-from"
    if origin.kind == "weight":
        return "they were damaged before this step: resume from an older checkpoint with a lower --lr"
    if origin.kind == "nothing":
        return "torch.compile or the hardware may be at fault: continue with --resume auto, or try --no-compile"
    if finite_in_float32:
        return f"the values overflow in {DTYPE_NAMES[inputs.dtype]}: use --dtype float32"
    fix = "lower --lr, or raise --warmup-steps"
    if origin.kind in ("backward", "gradient", "norm"):
        return f"{fix}; --grad-clip cannot repair a gradient that is not finite"
    return fix


def _json_value(value: Any) -> Any:
    """`value` as valid JSON: a non-finite number becomes a string."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read_dump(folder: Path) -> tuple[GPT, Tokenizer | None, StepInputs, dict[str, Any]]:
    """The content of a dump, without the text. Raises UserError for a folder that is not a dump."""
    if not (folder / "dump.json").is_file():
        raise UserError(f"{folder} is not a dump: it has no dump.json (dumps are in RUN/dumps/step-N)")
    try:
        numbers = json.loads((folder / "dump.json").read_text(encoding="utf-8"))
        batch, random = load_file(folder / "batch.safetensors"), load_file(folder / "random.safetensors")
        recompute = numbers.get("recompute", False)  # the key's older name
        inputs = StepInputs(
            step=int(numbers["step"]),
            batch=Batch(batch["tokens"], batch["targets"], batch.get("documents")),
            micro_batch_size=int(numbers["micro_batch_size"]),
            divisor=float(numbers["divisor"]),
            dtype=parse_dtype(numbers["dtype"]),
            lr=float(numbers["lr"]),
            rng_state={"cpu": random["cpu"], **random},
            loss=float(numbers["loss"]),
            grad_norm=float(numbers["grad_norm"]),
            activation_checkpointing=bool(numbers.get("activation_checkpointing", recompute)),
        )
        device = pick_device(numbers["device"], fall_back=True)
        if inputs.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size {inputs.micro_batch_size}")
        if numbers["matmul_precision"] not in CHOICES["matmul_precision"]:
            raise ValueError(f"matmul_precision {numbers['matmul_precision']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:
        raise UserError(f"{folder} is not a valid dump: {error!r}") from error
    model, tokenizer = load(folder / "model", device=device, dtype=None)
    if not _is_batch_for(inputs.batch, model.config):
        raise UserError(f"{folder} is not a valid dump: its batch does not fit its model")
    if inputs.activation_checkpointing:
        apply_activation_checkpointing(model.transformer.h)
    return model, tokenizer, inputs, numbers


def _is_batch_for(batch: Batch, config: GPTConfig) -> bool:
    """Return whether the batch is valid for the model: (B, T) token ids, and targets that may be -100."""
    tokens, targets, documents = batch
    for other in (targets, tokens if documents is None else documents):
        if not (tokens.dtype == other.dtype == torch.int64 and tokens.shape == other.shape and tokens.dim() == 2):
            return False
    ids = torch.stack([tokens, targets.where(targets != IGNORE_INDEX, 0)])
    known = ids.numel() > 0 and int(ids.min()) >= 0 and int(ids.max()) < config.vocab_size
    return known and tokens.size(1) <= config.block_size
