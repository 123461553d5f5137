"""The commands with --adapter."""

import io
from pathlib import Path

import pytest
from torch import nn

from gpt2.lora import LoRAConfig, adapter_state_dict, add_adapter, base_fingerprint, save_adapter
from gpt2.model import GPTConfig
from gpt2.templates import ChatTemplate, load_template, save_template
from gpt2.tokenizer import get_tokenizer
from gpt2.weights import save
from tests.helpers.cli_helpers import run_cli
from tests.helpers.transformers_reference import random_model

SHAPE = GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16)


def _adapter(folder: Path) -> Path:
    """Write a run folder with a random adapter."""
    model, config = random_model(SHAPE), LoRAConfig(rank=3)
    add_adapter(model, config)
    for tensor in adapter_state_dict(model).values():
        nn.init.normal_(tensor, std=0.3)
    save_adapter(folder / "adapter", config, adapter_state_dict(model), "somewhere/base", base_fingerprint(model))
    return folder


@pytest.fixture
def base_and_adapter(tmp_path: Path) -> tuple[str, str]:
    """The folders of a small model with a byte tokenizer, and of an adapter that changes its output."""
    save(random_model(SHAPE), get_tokenizer("bytes"), tmp_path / "base")
    return str(tmp_path / "base"), str(_adapter(tmp_path / "run"))


def test_an_adapter_gives_the_text_of_the_merged_model(
    base_and_adapter: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter = base_and_adapter
    merged = str(tmp_path / "merged")
    assert run_cli(capsys, "export", base, merged, "--adapter", adapter)[:2] == (0, f"{merged}\n")
    for command in (["sample", "--prompt", "What"], ["sample", "--prompt", "What", "--logprobs"], ["chat"]):
        texts = {}
        for name, model in (("base", [base]), ("adapted", [base, "--adapter", adapter]), ("merged", [merged])):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What\n")))
            flags = ["--max-new-tokens", "20", "--seed", "1"]
            code, texts[name], err = run_cli(capsys, command[0], *model, *command[1:], *flags)
            assert code == 0, err
        assert texts["adapted"] == texts["merged"] != texts["base"]


def test_the_draft_model_is_used_without_the_adapter(
    base_and_adapter: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = base_and_adapter
    other = str(save(random_model(SHAPE, 1), get_tokenizer("bytes"), tmp_path / "other"))
    flags = ["--adapter", adapter, "--prompt", "What", "--max-new-tokens", "20", "--temperature", "0"]
    plain = run_cli(capsys, "sample", base, *flags)
    assert run_cli(capsys, "sample", base, *flags, "--draft", other)[:2] == plain[:2]


def test_the_chat_template_is_exported(base_and_adapter: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = base_and_adapter
    save_template(ChatTemplate("{{ messages[0]['content'] }} of the model"), Path(base))
    for name, flags in (("own", []), ("theirs", ["--adapter", adapter])):
        out = Path(base).with_name(name)
        if flags:
            save_template(ChatTemplate("{{ messages[0]['content'] }} of the adapter"), Path(adapter, "adapter"))
        assert run_cli(capsys, "export", base, str(out), *flags)[0] == 0
        found = load_template(out)
        assert found is not None
        assert found.source.endswith("adapter" if flags else "model")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample {other} --adapter {adapter}", "is for another model (somewhere/base): the fingerprints differ"),
        ("export {other} {tmp}/out --adapter {adapter}", "is for another model (somewhere/base)"),
        ("chat {base} --adapter {tmp}/nothing", "nothing is no folder with an adapter_config.json"),
        ("sample {base} --adapter {base}", "base is no adapter: it has no adapter_config.json"),
    ],
)
def test_a_wrong_adapter_is_one_line(
    base_and_adapter: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    other = save(random_model(SHAPE, 1), get_tokenizer("bytes"), tmp_path / "other")
    names = {"base": base_and_adapter[0], "adapter": base_and_adapter[1], "other": other, "tmp": tmp_path}
    code, out, err = run_cli(capsys, *line.format(**names).split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
