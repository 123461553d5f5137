"""The functions of `gpt2`: what the commands do, with the same names and defaults; errors name the argument."""

import inspect
import pydoc
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
from gpt2.cli import Parser
from gpt2.commands import train as train_command
from gpt2.commands.generation_args import add_sampling_flags, sampling_from_args
from gpt2.errors import UserError
from gpt2.generation.chat import Conversation
from gpt2.generation.engine import GenerationRequest
from gpt2.generation.text import make_sampling
from gpt2.native.build import load_library
from gpt2.native.model import NativeGPT
from gpt2.serve.schema import CompletionRequest
from gpt2.tokenizer import ByteTokenizer, Tokenizer
from gpt2.train import trainer
from gpt2.train.stopping import TIME_LIMIT_EXIT_CODE, Interrupted
from gpt2.weights import save

TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_steps": 3,
    "sample_tokens": 4,
    "eval_tokens": 64,
    "device": "cpu",
    "dtype": "float32",
    "warmup_steps": 1,
}
SHAPE = gpt2.GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)
TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize(
    "order",
    [
        "import gpt2; f = gpt2.train; import gpt2.train.recipes",
        "import gpt2.train.recipes; import gpt2; f = gpt2.train",
        "from gpt2.train.recipes import RECIPES; from gpt2 import train as f; import gpt2",
    ],
)
def test_train_is_a_package_and_a_function_in_any_order_of_import(order: str) -> None:
    check = "print(callable(f), gpt2.train is f, callable(gpt2.train.recipes.load_recipe))"
    assert subprocess.check_output([sys.executable, "-c", f"{order}; {check}"], text=True) == "True True True\n"


def test_the_callable_package_has_the_signature_of_the_function() -> None:
    from gpt2 import api

    assert list(inspect.signature(gpt2.train).parameters) == list(inspect.signature(api.train).parameters)


def test_import_gpt2_imports_no_torch() -> None:
    code = "import sys, gpt2; dir(gpt2); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_train_returns_what_the_command_makes(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = gpt2.train("quickstart", data=text_file, name="by-function", **TINY)
    flags = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    assert train_command.main(["quickstart", "--data", str(text_file), "--name", "by-command", *flags]) == 0
    by_command = Path(capsys.readouterr().out.strip())
    name = "model/model.safetensors"
    assert (result.folder / name).read_bytes() == (by_command / name).read_bytes()
    assert result.finished
    assert result.steps == 3
    assert {"loss", "val_loss", "lr", "grad_norm", "tokens"} <= result.metrics.keys()
    assert result.metrics["tokens"] == 3 * 4 * 16


@pytest.mark.slow
def test_finetune_and_evaluate_by_name_and_in_memory(text_file: Path) -> None:
    base = gpt2.train("quickstart", data=text_file, name="base", **TINY).folder
    settings: dict[str, Any] = {"max_steps": 2, "lora_rank": 2, "lora_targets": ["c_attn"], "sample_tokens": 0}
    finished = gpt2.finetune(base, text_file, **settings)
    assert "## Before and after" in finished.comparison
    assert finished.comparison in (finished.folder / "report.md").read_text()

    model, tokenizer = gpt2.load(finished.folder)
    by_name = gpt2.evaluate(finished.folder, data=text_file, device="cpu")
    in_memory = gpt2.evaluate(model, tokenizer, data=[text_file])
    assert by_name == in_memory
    assert by_name[str(text_file)].metrics["bits_per_byte"] > 0


def test_a_time_limit_returns_and_resume_continues(text_file: Path) -> None:
    stopped = gpt2.train("quickstart", data=text_file, name="short", max_minutes=1e-9, **TINY)
    assert (stopped.finished, stopped.steps) == (False, 1)
    finished = gpt2.train(resume=stopped.folder, max_minutes=0.0)
    assert (finished.finished, finished.steps, finished.folder.resolve()) == (True, 3, stopped.folder.resolve())


@pytest.mark.parametrize(
    ("code", "raised"), [(128 + signal.SIGINT, KeyboardInterrupt), (128 + signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_program_after_the_save(
    code: int, raised: type[BaseException], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> Path:
        raise Interrupted(text_file.parent, 2, "a signal", code)

    assert code != TIME_LIMIT_EXIT_CODE
    monkeypatch.setattr(trainer, "train", stopped)
    with pytest.raises(raised):
        gpt2.train("quickstart", data=text_file, **TINY)


def test_python_the_commands_and_the_server_have_the_same_defaults() -> None:
    parser = Parser(prog="x")
    add_sampling_flags(parser)
    args = parser.parse_args([])
    request = CompletionRequest.model_validate({"prompt": "x"})
    assert make_sampling({}) == sampling_from_args(args) == request.sampling()
    assert (make_sampling({}).top_k, make_sampling({}).temperature) == (50, 1.0)
    functions = (gpt2.generate, gpt2.stream, Conversation, GenerationRequest)
    lengths = {inspect.signature(one).parameters["max_new_tokens"].default for one in functions}
    assert lengths == {args.max_new_tokens}
    assert inspect.signature(gpt2.generate).parameters.keys() == inspect.signature(gpt2.stream).parameters.keys()


def test_stream_takes_the_settings_of_generate() -> None:
    torch.manual_seed(0)
    model = gpt2.GPT(SHAPE).eval()
    settings: dict[str, Any] = {"max_new_tokens": 8, "seed": 3, "temperature": 0.7, "top_k": 5, "stop": "\x00"}
    (text,) = gpt2.generate(model, TOKENIZER, "ab", **settings)
    assert text == "ab" + "".join(piece for _, piece in gpt2.stream(model, TOKENIZER, "ab", **settings))


def test_help_starts_with_an_overview() -> None:
    text = pydoc.plain(pydoc.render_doc(gpt2))
    start = text[: text.index("PACKAGE CONTENTS")]
    for name in gpt2.__all__:
        assert name in start, name
    assert "gpt2.load(" in start


def test_tokenizers_have_a_length_and_a_repr(any_tokenizer: Tokenizer) -> None:
    assert len(any_tokenizer) == any_tokenizer.vocab_size
    assert any_tokenizer.name in repr(any_tokenizer)
    assert f"{any_tokenizer.vocab_size:,} tokens" in repr(any_tokenizer)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_load_takes_a_dtype_by_name(dtype: Any, tmp_path: Path) -> None:
    save(gpt2.GPT(SHAPE), TOKENIZER, tmp_path, dtype=dtype)
    for kept in (dtype, None):
        assert gpt2.load(tmp_path, dtype=kept)[0].lm_head.weight.dtype == torch.bfloat16


WRONG_TYPE: Any = 5
A_TEXT: Any = "many"
IDS = torch.zeros(1, 4, dtype=torch.int64)
WRONG: dict[str, Callable[[gpt2.GPT], object]] = {
    "recipe": lambda model: gpt2.train(WRONG_TYPE),
    "lr": lambda model: gpt2.train(lr="high"),
    "learning_rate": lambda model: gpt2.train(learning_rate=1e-3),
    "model": lambda model: gpt2.finetune(WRONG_TYPE, "x.txt"),
    "limit": lambda model: gpt2.evaluate("gpt2", limit=A_TEXT),
    "tasks": lambda model: gpt2.evaluate("gpt2", tasks=WRONG_TYPE),
    "ref": lambda model: gpt2.load(WRONG_TYPE),
    "dtype": lambda model: gpt2.load("gpt2", dtype="bf16"),
    "device": lambda model: gpt2.load("gpt2", device=WRONG_TYPE),
    "folder": lambda model: gpt2.save(model, TOKENIZER, WRONG_TYPE),
    "precision": lambda model: gpt2.prepare_for_inference(model, "int5"),
    "prompt": lambda model: gpt2.generate(model, TOKENIZER, WRONG_TYPE),
    "num_samples": lambda model: gpt2.generate(model, TOKENIZER, "a", num_samples="2"),
    "max_new_tokens": lambda model: gpt2.generate(model, TOKENIZER, "a", max_new_tokens=1.5),
    "seed": lambda model: gpt2.generate(model, TOKENIZER, "a", seed="x"),
    "stop": lambda model: gpt2.generate(model, TOKENIZER, "a", stop=5),
    "temperature": lambda model: gpt2.generate(model, TOKENIZER, "a", temperature="hot"),
    "top_k": lambda model: gpt2.generate(model, TOKENIZER, "a", top_k=2.5),
    "top_p": lambda model: gpt2.generate(model, TOKENIZER, "a", gpt2.Sampling(), top_p=0.5),
    "sampling": lambda model: gpt2.stream(model, TOKENIZER, "a", WRONG_TYPE),
    "bad_words": lambda model: gpt2.generate(model, TOKENIZER, "a", bad_words=[[257]]),
    "tokenizer": lambda model: gpt2.get_tokenizer("bpe:x"),
    "text": lambda model: TOKENIZER.encode(WRONG_TYPE),
    "token": lambda model: TOKENIZER.decode([257]),
    "tokens": lambda model: model(torch.full((1, 4), 257)),
    "targets": lambda model: model.loss(IDS, torch.full((1, 4), -1)),
    "vocab_size": lambda model: gpt2.GPTConfig(vocab_size=A_TEXT),
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_value_raises_an_error_that_names_the_argument(argument: str) -> None:
    with pytest.raises(UserError) as raised:
        WRONG[argument](gpt2.GPT(SHAPE))
    assert raised.value.field == argument
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tokens", [IDS.float(), IDS[0], [[1, 2]], torch.tensor([[-1]])])
def test_tokens_of_another_type_or_shape_are_refused_by_every_implementation(tokens: Any) -> None:
    model = gpt2.GPT(SHAPE).eval()
    kernel = load_library()
    for one in [model] if kernel is None else [model, NativeGPT(model, "float32", kernel)]:
        with pytest.raises(UserError) as raised:
            one.hidden_states(tokens)
        assert raised.value.field == "tokens"


def test_ignored_targets_are_allowed() -> None:
    assert gpt2.GPT(SHAPE).loss(IDS, torch.tensor([[1, -100, 2, -100]])).isfinite()
