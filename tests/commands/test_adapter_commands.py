"""The commands with an adapter beside the model."""

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
    """The folder of a run with an adapter in it."""
    model, config = random_model(SHAPE), LoRAConfig(rank=3)
    add_adapter(model, config)
    for tensor in adapter_state_dict(model).values():
        nn.init.normal_(tensor, std=0.3)
    save_adapter(folder / "adapter", config, adapter_state_dict(model), "somewhere/base", base_fingerprint(model))
    return folder


@pytest.fixture
def talker(tmp_path: Path) -> tuple[str, str]:
    """The folders of a small model that speaks bytes, and of an adapter that changes what it says."""
    save(random_model(SHAPE), get_tokenizer("bytes"), tmp_path / "talker")
    return str(tmp_path / "talker"), str(_adapter(tmp_path / "run"))


def test_the_commands_speak_with_an_adapter_as_with_the_merged_model(
    talker: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = talker
    merged = str(tmp_path / "merged")
    assert run_cli(capsys, "export", base, merged, "--adapter", adapter)[:2] == (0, f"{merged}\n")
    for command in (["sample", "--prompt", "What"], ["sample", "--prompt", "What", "--logprobs"], ["chat"]):
        said = {}
        for name, model in (("base", [base]), ("adapted", [base, "--adapter", adapter]), ("merged", [merged])):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What\n")))
            flags = ["--max-new-tokens", "20", "--seed", "1"]
            code, said[name], err = run_cli(capsys, command[0], *model, *command[1:], *flags)
            assert code == 0, err
        assert said["adapted"] == said["merged"] != said["base"]


def test_the_adapter_is_not_for_the_draft(
    talker: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = talker
    other = str(save(random_model(SHAPE, 1), get_tokenizer("bytes"), tmp_path / "other"))
    flags = ["--adapter", adapter, "--prompt", "What", "--max-new-tokens", "20", "--temperature", "0"]
    plain = run_cli(capsys, "sample", base, *flags)
    assert run_cli(capsys, "sample", base, *flags, "--draft", other)[:2] == plain[:2]


def test_the_way_a_model_talks_is_exported_with_it(talker: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = talker
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
    ("line", "said"),
    [
        ("sample {other} --adapter {adapter}", "is for another model (somewhere/base): the fingerprints differ"),
        ("export {other} {tmp}/out --adapter {adapter}", "is for another model (somewhere/base)"),
        ("chat {base} --adapter {tmp}/nothing", "nothing is no folder with an adapter_config.json"),
        ("sample {base} --adapter {base}", "talker is no adapter: it has no adapter_config.json"),
    ],
)
def test_a_wrong_adapter_is_one_line(
    talker: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    other = save(random_model(SHAPE, 1), get_tokenizer("bytes"), tmp_path / "other")
    names = {"base": talker[0], "adapter": talker[1], "other": other, "tmp": tmp_path}
    code, out, err = run_cli(capsys, *line.format(**names).split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
