"""Flags and arguments that cannot be used: each is refused in one line that says what to do."""

import json
from pathlib import Path

import pytest

import gpt2
from gpt2.model import GPT, GPTConfig
from gpt2.tokenizer import get_tokenizer
from tests.helpers.cli_helpers import run_cli


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model folder. The current folder is one with rows, a text, and a run called quickstart."""
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=16))
    (tmp_path / "qa.jsonl").write_text(json.dumps({"prompt": "a?", "answer": "b"}) + "\n")
    (tmp_path / "my.txt").write_text("some text\n" * 50)
    gpt2.save(model, get_tokenizer("bytes"), tmp_path / "runs" / "quickstart" / "model")
    (tmp_path / "runs" / "quickstart" / "config.toml").write_text('data = "my.txt"\ntokenizer = "bytes"\n')
    return str(gpt2.save(model, get_tokenizer("bytes"), tmp_path / "base"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("finetune {base} qa.jsonl", "unexpected argument 'qa.jsonl': use --data qa.jsonl"),
        ("finetune {base} --data qa.jsonl --n-layer 3", "no --n-layer: a fine-tuned model keeps the shape of MODEL"),
        ("finetune {base} --data qa.jsonl --lora-alpha 4", "--lora-alpha needs --lora-rank"),
        ("finetune {base} --data qa.jsonl --lora-targets c_fc", "--lora-targets needs --lora-rank"),
        ("finetune {base} --data qa.jsonl --lora-dropout 0.1", "--lora-dropout needs --lora-rank"),
        ("finetune {base} --data qa.jsonl --tokenizer gpt2", "has its own tokenizer: leave --tokenizer out"),
        ("finetune {base} --data qa.jsonl --block-size 64", "--block-size 64 is more than the model's context of 48"),
        ("finetune {base} --data qa.jsonl --lora-rank 17", "--lora-rank 17 is more than the model's width of 16"),
        ("finetune {base} --data qa.jsonl --epochs 1 --max-steps 5", "--epochs and --max-steps both give the length"),
        ("finetune --resume runs/quickstart", "was made by gpt2 train: gpt2 train --resume runs/quickstart"),
        ("train my.txt", "my.txt is no recipe, and no .toml file: to train on it, use --data my.txt"),
        (
            "train --data qa.jsonl",
            "has prompts and answers, and --tokenizer bpe:1024 is trained on text: use gpt2 finet",
        ),
        ("train --data my.txt --tokenizer bpe:abc", "tokenizer 'bpe:abc': bpe:N needs a number of tokens"),
        ("train --learning-rate 1", "there is no --learning-rate (did you mean '--lr'?)"),
        ("train quickstart --learning_rate=1", "there is no --learning_rate (did you mean '--lr'?)"),
        ("train --decay-steps 5", "--decay-steps needs --schedule wsd"),
        ("train --min-lr 0 --schedule constant", "--schedule constant keeps --lr: --min-lr has no effect"),
        ("train --beta2 0.9 --optimizer sgd", "--optimizer sgd has one beta: --beta2 has no effect"),
        ("train --init-from {base} --tokenizer gpt2", "has its own tokenizer: leave --tokenizer out"),
        ("train --out-dir nowhere --resume", "--resume: there is no run in nowhere"),
        ("sample {base} two words", "unexpected argument 'words': quote the prompt"),
        ("sample {base} --dtype fp16", "dtype 'fp16' is not one of float32, bfloat16, float16, int8, int4 (did you"),
        ("sample {base} --length-penalty 1", "--length-penalty needs --num-beams"),
        ("sample {base} --num-beams 2 --temperature 0", "--num-beams does not sample: --temperature has no effect"),
        ("sample quickstart", "there is no model folder quickstart (did you mean 'runs/quickstart'?)"),
        ("sample runs/quikstart", "there is no model folder runs/quikstart (did you mean 'runs/quickstart'?)"),
        ("sample ./bse", "there is no model folder bse (did you mean 'base'?)"),
        ("chat {base} --plain --system x", "--plain has no roles: --system has no effect"),
        ("bench generate --text-tokens 5", "--text-tokens needs --text"),
    ],
)
def test_the_error_says_what_to_do(argv: str, message: str, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys, *argv.format(base=base).split())
    assert message in err
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_positional_prompt_is_the_same_as_the_flag(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seed", "0", "--max-new-tokens", "5"]
    expected = run_cli(capsys, "sample", base, "--prompt", "Hello", *flags)
    assert expected[0] == 0
    assert run_cli(capsys, "sample", base, "Hello", *flags) == expected
    assert run_cli(capsys, "sample", base, *flags, "Hello") == expected


def test_a_bare_resume_takes_the_newest_run(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_cli(capsys, "train", "--resume", "--print-config")
    assert code == 0, err
    assert 'data = "my.txt"' in out


def test_export_does_not_replace_another_model(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = GPT(GPTConfig(vocab_size=257, block_size=48, n_layer=1, n_head=2, n_embd=16))
    out = tmp_path / "out"
    gpt2.save(other, get_tokenizer("bytes"), out)
    before = (out / "model.safetensors").read_bytes()
    code, _, err = run_cli(capsys, "export", base, str(out))
    assert (code, err) == (2, f"gpt2: {out} holds another model: --overwrite replaces it\n")
    assert (out / "model.safetensors").read_bytes() == before
    assert run_cli(capsys, "export", base, str(out), "--overwrite")[0] == 0
    assert run_cli(capsys, "export", base, str(out), "--dtype", "float16")[0] == 0
    assert run_cli(capsys, "export", base, str(out))[0] == 0
