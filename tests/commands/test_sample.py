"""`gpt2 sample`: what each flag does to the text, and which cannot be used together."""

import io
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt2
from gpt2.cli import Parser
from gpt2.commands.generation_args import add_sampling_flags, encode_bad_words, sampling_from_args
from gpt2.errors import UserError
from gpt2.generation.beam_search import beam_search_texts
from gpt2.generation.contrastive_search import contrastive_stream
from gpt2.generation.engine import LanguageModel
from gpt2.generation.inference import PRECISIONS, prepare_for_inference
from gpt2.generation.sampling import Sampling
from gpt2.generation.speculative import PromptLookup, speculate
from gpt2.model import GPTConfig
from gpt2.terminal import escape_for_terminal
from gpt2.tokenizer import BPETokenizer, get_tokenizer
from tests.helpers.cli_helpers import run_cli
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=257, block_size=128, n_layer=1, n_head=2, n_embd=16)
MODEL = random_model(CONFIG)
BYTES = get_tokenizer("bytes")
NUMBERS = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "typical_p": 0.95,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": -0.2,
    "no_repeat_ngram_size": 4,
    "min_new_tokens": 6,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(gpt2.save(MODEL, BYTES, tmp_path_factory.mktemp("model") / "model_folder"))


@pytest.fixture
def model() -> LanguageModel:
    """The model of `model_folder`, prepared for inference as the command does it."""
    return prepare_for_inference(MODEL, "float32")


def parsed(*argv: str) -> Sampling:
    parser = Parser(prog="x")
    add_sampling_flags(parser)
    return sampling_from_args(parser.parse_args(argv))


def test_every_setting_has_a_flag() -> None:
    """Each flag alone, and all at once."""
    assert set(NUMBERS) | {"logit_bias", "bad_words"} == {field.name for field in fields(Sampling)}
    assert parsed() == Sampling(top_k=50)
    for name, value in NUMBERS.items():
        settings: dict[str, Any] = {"top_k": 50} | {name: value}
        assert parsed(f"--{name.replace('_', '-')}", str(value)) == Sampling(**settings)
        assert parsed(f"--{name}", str(value)) == Sampling(**settings)
    flags = [word for name, value in NUMBERS.items() for word in (f"--{name}", str(value))]
    biases = ["--logit-bias", "5=-100", "--logit-bias", "7=-inf"]
    assert parsed(*flags, *biases) == Sampling(**NUMBERS, logit_bias={5: -100, 7: -math.inf})  # pyright: ignore[reportArgumentType]


def test_text_equals_generate_with_the_same_settings(
    model_folder: str, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for name, value in NUMBERS.items() for word in (f"--{name}", str(value))]
    flags += ["--logit-bias", "200=3", "--bad-word", "b", "--stop", "q", "--seed", "4", "--max-new-tokens", "20"]
    code, out, err = run_cli(capsys, "sample", model_folder, "--prompt", "Hello", "--num-samples", "3", *flags)
    assert code == 0, err
    settings: dict[str, Any] = {**NUMBERS, "logit_bias": {200: 3}, "bad_words": [[98], [32, 98]]}
    texts = gpt2.generate(model, BYTES, "Hello", num_samples=3, max_new_tokens=20, stop=["q"], seed=4, **settings)
    assert out == "\n---\n".join(texts) + "\n"
    assert len(set(texts)) == 3


def test_several_prompts_one_of_them_from_standard_input(
    model_folder: str, model: LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("déjà\nvu".encode())))
    prompts = ["--prompt", "One", "--prompt", "-", "--prompt", ""]
    code, out, _ = run_cli(
        capsys, "sample", model_folder, *prompts, "--num-samples", "2", "--max-new-tokens", "9", "--seed", "1"
    )
    assert code == 0
    texts = gpt2.generate(model, BYTES, ["One", "déjà\nvu", ""], num_samples=2, max_new_tokens=9, seed=1, top_k=50)
    assert out == "\n---\n".join(text for some in texts for text in some) + "\n"


def test_bad_words_are_encoded_with_and_without_a_space(small_bpe: BPETokenizer) -> None:
    words = encode_bad_words(small_bpe, ["fox", " fox", "lazy dog"])
    assert words == tuple(tuple(small_bpe.encode(text)) for text in ("fox", " fox", "lazy dog", " lazy dog"))
    with pytest.raises(UserError, match="at least one character"):
        encode_bad_words(small_bpe, ["fox", " "])
    with pytest.raises(UserError, match="has no tokenizer"):
        encode_bad_words(None, ["fox"])
    assert encode_bad_words(None, []) == ()


@pytest.mark.parametrize("samples", [1, 2])
def test_logprobs_are_those_of_the_model(samples: int, model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "Hello", "--max-new-tokens", "6", "--seed", "2", "--num-samples", str(samples)]
    words = [
        "--logit-bias=104=50",
        "--repetition-penalty",
        "1.5",
    ]  # the table has the model's own probabilities, without these
    code, out, _ = run_cli(capsys, "sample", model_folder, *flags, *words, "--logprobs", "3")
    tables = out.split("---\n")
    assert (code, len(tables)) == (0, samples)
    tokens = BYTES.encode("Hello")
    head, *rows = tables[0].rstrip("\n").split("\n")
    assert head.split() == ["prob.", "token", "most", "likely"]
    assert len(rows) == 6
    for row in rows:
        with torch.no_grad():
            probs = MODEL(torch.tensor([tokens]))[0, -1].softmax(-1)
        best = probs.topk(3)
        prob, word, *others = row.split()
        (token,) = (i for i in range(257) if spelled(i) == word)
        assert float(prob.rstrip("%")) / 100 == pytest.approx(probs[token].item(), abs=6e-5)
        assert others[::2] == [spelled(i) for i in best.indices.tolist()]
        assert [float(text.rstrip("%")) / 100 for text in others[1::2]] == pytest.approx(best.values.tolist(), abs=6e-5)
        tokens.append(token)


def spelled(token: int) -> str:
    if token == 256:
        return "'<|endoftext|>'"
    return repr(chr(token)) if token < 128 else repr(bytes([token]))


def test_logprobs_end_at_end_of_text_and_stop_strings(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_cli(capsys, "sample", model_folder, "--logprobs", "0", "--logit-bias", "256=1000")
    assert out.splitlines()[1].endswith("%  '<|endoftext|>'")
    assert len(out.splitlines()) == 2
    _, out, _ = run_cli(capsys, "sample", model_folder, "--logprobs", "0", "--logit-bias", "65=1000", "--stop", "AA")
    assert len(out.splitlines()) == 3


def test_beam_search(model_folder: str, model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-beams", "6", "--num-samples", "3", "--length-penalty", "0.5", "--num-beam-groups", "2"]
    flags += ["--diversity-penalty", "0.7", "--repetition-penalty", "1.3", "--stop", "]]", "--max-new-tokens", "12"]
    code, out, _ = run_cli(capsys, "sample", model_folder, "--prompt", "Hello", "--prompt", "Bye", *flags)
    assert code == 0
    texts = [
        text
        for prompt in ("Hello", "Bye")
        for text in beam_search_texts(
            model,
            BYTES,
            prompt,
            num_beams=6,
            num_return=3,
            max_new_tokens=12,
            length_penalty=0.5,
            num_beam_groups=2,
            diversity_penalty=0.7,
            sampling=Sampling(repetition_penalty=1.3),
            stop=["]]"],
        )
    ]
    assert len(texts) == 6
    assert out == "\n---\n".join(texts) + "\n"


def test_contrastive_search(model_folder: str, model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--penalty-alpha", "0.6", "--max-new-tokens", "12", "--frequency-penalty", "0.1"]
    sampling = Sampling(frequency_penalty=0.1)
    for more, top_k in (([], 4), (["--top-k", "7"], 7)):
        code, out, _ = run_cli(capsys, "sample", model_folder, "--prompt", "Hello", *flags, *more)
        pieces = contrastive_stream(
            model, BYTES, "Hello", top_k=top_k, penalty_alpha=0.6, max_new_tokens=12, sampling=sampling
        )
        assert (code, out) == (0, "Hello" + "".join(pieces) + "\n")


def test_speculative_decoding_gives_the_text_of_plain_decoding(
    model_folder: str, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["sample", model_folder, "--prompt", "Hello", "--temperature", "0", "--max-new-tokens", "30"]
    plain = run_cli(capsys, *base)[1]
    for flags in (["--draft", model_folder], ["--prompt-lookup"], ["--prompt-lookup", "2"]):
        code, out, err = run_cli(capsys, *base, *flags)
        assert (code, out) == (0, plain)
        assert "drafted tokens accepted" in err
        assert "tokens per call of the model" in err
        assert err.count("\n") == 1
    assert run_cli(capsys, *base, "--draft", model_folder)[2].startswith("gpt2: 100% of ")
    drawn = run_cli(capsys, *base[:4], "--seed", "3", "--prompt", "Bye", "--max-new-tokens", "30", "--prompt-lookup")[1]
    texts = [
        prompt + "".join(speculate(model, BYTES, prompt, PromptLookup(), Sampling(top_k=50), max_new_tokens=30, seed=3))
        for prompt in ("Hello", "Bye")
    ]
    assert drawn == "\n---\n".join(texts) + "\n"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision(precision: str, model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-new-tokens", "5", "--temperature", "0", "--logit-bias", "65=1000", "--device", "cpu"]
    code, out, err = run_cli(capsys, "sample", model_folder, "--prompt", "x", "--dtype", precision, *flags)
    assert (code, out) == (0, "xAAAAA\n"), err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-beams 5 --draft {model_folder}", "--num-beams and --draft cannot be used together"),
        ("--num-beams 5 --penalty-alpha 0.6", "--num-beams and --penalty-alpha cannot be used together"),
        ("--draft {model_folder} --prompt-lookup", "--draft and --prompt-lookup cannot be used together"),
        ("--logprobs --num_beams 3", "--num-beams and --logprobs cannot be used together"),
        ("--logprobs -1", "--logprobs must be 0 or more, not -1"),
        ("--logprobs --max-new-tokens -50", "--max-new-tokens must be 0 or more, not -50"),
        ("--logprobs 2 --num-samples 0", "num_samples must be at least 1"),
        (
            "--draft {model_folder} --num-samples 2",
            "--draft generates one text: it cannot be used with --num-samples 2",
        ),
        ("--penalty-alpha 0.6 --num-samples 2", "--penalty-alpha generates one text"),
        ("--num-beams 3 --num-samples 4", "--num-samples must be at least 1 and at most --num-beams, not 4"),
        ("--num-beams 0", "num-beams must be at least 1"),
        ("--num-beams 258", "num-beams must be at least 1 and at most"),
        ("--num-beams 4 --num-beam-groups 3", "num-beam-groups must divide num-beams (4) evenly, not 3"),
        ("--num-beams 4 --temperature 0.5", "--num-beams does not sample: --temperature has no effect"),
        ("--num-beams 4 --top-k 5", "--top-k has no effect"),
        ("--penalty-alpha 0.5 --top-p 0.5", "--top-p has no effect"),
        ("--penalty-alpha 2", "penalty-alpha must be between 0 and 1, not 2"),
        ("--penalty-alpha 0.5 --top-k 0", "top-k must be at least 1"),
        ("--length-penalty 2", "--length-penalty needs --num-beams"),
        ("--diversity-penalty 2", "--diversity-penalty needs --num-beams"),
        ("--prompt-lookup 0", "prompt lookup needs at least 1 token to look for, not 0"),
        ("--draft {other}", "the draft has a vocabulary of 300 tokens, the model one of 257"),
        ("--draft ./nowhere", "there is no model folder nowhere"),
        ("--logit-bias 65", "logit-bias must be ID=BIAS, as 50256=-100, not 65"),
        ("--logit-bias 65=x", "logit-bias must be ID=BIAS"),
        ("--logit-bias 300=1", "token 300 is not in the model's vocabulary of 257"),
        ("--logit-bias=-1=1", "logit-bias must give ids of 0 or more"),
        ("--bad-word=", "a bad word must have at least one character"),
        ("--stop=", "a stop string must have at least one character"),
        ("--min-p 2", "min-p must be 0 or more and at most 1"),
        ("--repetition-penalty 0", "repetition-penalty must be over 0"),
        ("--top-k 1.5", "argument --top-k: invalid int value: '1.5'"),
        ("--prompt - --prompt -", "give --prompt - once"),
        ("--dtype int5", "dtype 'int5' is not one of float32, bfloat16, float16, int8, int4 (did you mean 'int8'?)"),
    ],
)
def test_invalid_flags_are_one_line_and_exit_code_2(
    flags: str, message: str, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "{other}" in flags:
        gpt2.save(random_model(replace(CONFIG, vocab_size=300)), None, tmp_path / "other")
    argv = flags.format(model_folder=model_folder, other=tmp_path / "other").split()
    code, out, err = run_cli(capsys, "sample", model_folder, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;owned\x07\x1b[2J\x9b31m", r"\x1b]0;owned\x07\x1b[2J\x9b31m"),
        ("rm\r\n\b\x7f\tx", "rm\\r\n\\x08\\x7f\tx"),
        ("a\u202egnp.exe\u2066", r"a\u202egnp.exe\u2066"),
        ("naïve 日本語\u3000עברית 👩\u200d👧 \ufffd", "naïve 日本語\u3000עברית 👩\u200d👧 \ufffd"),
    ],
)
def test_control_characters_are_escaped_on_a_terminal(text: str, expected: str) -> None:
    assert escape_for_terminal(text, FakeTerminal()) == expected
    assert escape_for_terminal(text, io.StringIO()) == text
    assert escape_for_terminal(text, None) == text


def test_sampled_text_cannot_control_a_terminal(
    model_folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max-new-tokens", "3", "--logit-bias", "27=1000", "--num-samples", "2"]
    for mode in ([], ["--num-beams", "2"], ["--logprobs", "1"]):
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            code, out, _ = run_cli(capsys, "sample", model_folder, *flags, *mode)
        assert code == 0
        assert out.count(r"\x1b") >= 5  # the second of two beams has another token
        assert "\x1b" not in out
    assert run_cli(capsys, "sample", model_folder, *flags)[1] == "\x1b\x1b\x1b\n---\n\x1b\x1b\x1b\n"
