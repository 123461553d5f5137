"""`gpt2 bench generate`: every variant generates the plain model's tokens, and metrics follow from raw times."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import decode_peers
from benchmarks.decode_peers import PEERS, LlamaCpp, PeerModelWriter, parse_decode_peers, peer_variants

from gpt2.bench.common import InProcessRunner
from gpt2.bench.decode import (
    NUM_CHECKED_TOKENS,
    TIE_LOGIT_GAP,
    Decoder,
    DecodeResult,
    DecodeWorkload,
    GPT2Decoder,
    ReferenceDecoder,
    VariantSpec,
    bytes_per_step,
    our_variants,
    perplexity,
    weight_bytes,
)
from gpt2.bench.decode_comparison import check_tokens, compute_metrics, run_comparison
from gpt2.cli import main
from gpt2.errors import UserError
from gpt2.formats import gguf_writer
from gpt2.model import GPT, GPTConfig
from gpt2.runtime import DTYPES
from gpt2.tokenizer import get_tokenizer
from gpt2.weights import save
from tests.helpers.bench_helpers import FAKE_NANOGPT

TINY = GPTConfig(vocab_size=3001, n_layer=2, n_head=2, n_embd=64)
WORK = DecodeWorkload("cpu", TINY, prompt_tokens=6, new_tokens=9, batch_sizes=(1, 3), rounds=2, seed=0, pause=0)
FLAGS = "--n-layer 2 --n-head 2 --n-embd 64 --vocab-size 3001 --batch-size 1,3 --prompt-tokens 6 --max-new-tokens 9"
GENERATE = ["bench", "generate", "--device", "cpu", "--rounds", "2", *FLAGS.split()]
NANOGPT_GENERATE = """
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None):
        assert top_k == 1
        for _ in range(max_new_tokens):
            tokens = torch.cat((tokens, self(tokens, tokens)[0][:, -1:].argmax(-1)), 1)
        return tokens
"""


def in_torch(model: GPT, precision: str) -> GPT:
    """Replaces `prepare_for_inference`: no kernel has to be compiled."""
    if precision not in DTYPES:
        raise UserError(f"no {precision} here")
    return model.to(DTYPES[precision])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, with a fixed bandwidth."""
    monkeypatch.setattr("gpt2.bench.decode.prepare_for_inference", in_torch)
    monkeypatch.setattr("gpt2.bench.decode_comparison.measure_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("gpt2.commands.bench_generate.SubprocessRunner", InProcessRunner)


@pytest.fixture
def generating_nanogpt(nanogpt: str) -> str:
    """A stand-in for nanoGPT with `generate`."""
    Path(nanogpt, "model.py").write_text("import torch\n" + FAKE_NANOGPT + NANOGPT_GENERATE)
    return nanogpt


@torch.inference_mode()
def greedy_tokens(model: GPT, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of the plain model, without a cache."""
    tokens = torch.tensor(prompts)
    for _ in range(new_tokens):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[:, len(prompts[0]) :].tolist()


def expected() -> list[list[int]]:
    return greedy_tokens(WORK.build_model(), WORK.prompts(0, 3), WORK.new_tokens)


def check_run(decoder: Decoder) -> None:
    run = decoder.run(WORK.prompts(0, 3), WORK.new_tokens)
    assert run.tokens == expected()
    assert 0 < run.first_token_seconds < run.total_seconds
    again = decoder.run(WORK.prompts(0, 1), WORK.new_tokens)  # the first batch leaves no state behind
    assert again.tokens == expected()[:1]


def test_random_weights_generate_various_tokens() -> None:
    tokens, gaps = ReferenceDecoder(WORK).greedy_tokens()
    assert tokens == expected()[0][:NUM_CHECKED_TOKENS]
    assert len({token for row in expected() for token in row}) > 9  # not one repeated token
    assert min(gaps) > TIE_LOGIT_GAP
    assert len({tuple(row) for number in (0, 1) for row in WORK.prompts(number, 3)}) == 6
    assert WORK.prompts(1, 3)[0] == WORK.prompts(1, 1)[0]


def test_our_variants_generate_the_plain_models_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    check_run(GPT2Decoder(WORK, "float32", True))
    monkeypatch.setattr("gpt2.bench.decode.prepare_for_inference", in_torch)
    check_run(GPT2Decoder(WORK, "float32", False))
    half = GPT2Decoder(WORK, "bfloat16", True)
    assert half.cache_width == 2
    assert half.run(WORK.prompts(0, 2), 3).tokens == greedy_tokens(WORK.build_model().bfloat16(), WORK.prompts(0, 2), 3)


def test_transformers_and_ctranslate2_generate_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    files = PeerModelWriter(WORK, tmp_path)
    for name in ("transformers", "ctranslate2"):
        files.write(name)
        check_run(PEERS[name].make_decoder(WORK, "float32", str(tmp_path)))
    whole = PEERS["ctranslate2"].make_decoder(replace(WORK, new_tokens=200), "int8", str(tmp_path))
    assert len(whole.run(WORK.prompts(0, 1), 200).tokens[0]) == 200  # nothing ends a text


def test_nanogpt_generates_the_same(generating_nanogpt: str) -> None:
    check_run(PEERS["nanogpt"].make_decoder(WORK, "float32", generating_nanogpt))


def test_llama_cpp_generates_the_same(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    gguf_writer.write(WORK.build_model(), None, tmp_path / "f32.gguf", "f32")
    check_run(LlamaCpp(WORK, "f32", str(tmp_path)))


def test_llama_cpp_in_its_precisions(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    PeerModelWriter(WORK, tmp_path).write("llamacpp")
    decoders = {precision: LlamaCpp(WORK, precision, str(tmp_path)) for precision in PEERS["llamacpp"].precisions}
    for precision, most_wrong in (("f16", 0), ("q8_0", 1)):
        tokens = decoders[precision].run(WORK.prompts(0, 3), 2).tokens
        assert sum(row != right[:2] for row, right in zip(tokens, expected(), strict=True)) <= most_wrong
    assert decoders["q4_0"].run(WORK.prompts(0, 3), 4).tokens != []
    assert decoders["f16"].weight_bytes == pytest.approx(weight_bytes(TINY, 16), rel=0.02)
    assert decoders["q8_0"].weight_bytes == pytest.approx(weight_bytes(TINY, 8.5), rel=0.04)
    assert decoders["q4_0"].weight_bytes < decoders["q8_0"].weight_bytes


class Failing(GPT2Decoder):
    """Fails with three rows, and in the second round with one."""

    times = 0

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`."""
        self.times += 1
        if len(prompts) == 3 or self.times == 3:
            raise RuntimeError("no more\nat all")
        return super().run(prompts, new_tokens)


class Short(GPT2Decoder):
    """Generates one token too few."""

    def run(self, prompts: list[list[int]], new_tokens: int) -> DecodeResult:
        """See `Decoder.run`."""
        return super().run(prompts, new_tokens - 1)


def variant_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(v for v in result["lanes"] if name in (v["name"], v["contestant"]))


def test_comparison_of_all_variants(here: None) -> None:
    entries = [
        *our_variants("all"),
        VariantSpec("failing", "float32", "float32", Failing, (True,)),
        VariantSpec("short", "bfloat16", "bfloat16", Short, (True,)),
        VariantSpec("slow", "q8_0", "q8_0", Slow, max_batch_size=1, max_new_tokens=8),
        VariantSpec("absent", "q4_0", "q4_0", GPT2Decoder, reason="not installed: pip install it"),
    ]
    kept: list[int] = []
    result = run_comparison(
        WORK,
        entries,
        runner_class=InProcessRunner,
        save_partial=lambda found: kept.append(len(variant_of(found, "float32")["batches"])),
    )
    assert kept == [1, 2]
    families = [variant["family"] for variant in result["lanes"]]
    assert families == sorted(families, key=["float32", "16 bits", "8 bits", "4 bits"].index)
    for name in ("float32", "bfloat16", "float32-torch", "bfloat16-torch"):
        batches = variant_of(result, name)["batches"]
        assert [batch["batch_size"] for batch in batches] == [1, 3]
        for batch in batches:
            assert len(batch["first_seconds"]) == len(batch["decode_seconds"]) == 2
            assert batch["peak_memory"] > 2**20
            assert not batch["wrong"]
            assert "float32" not in name or batch["agreement"] == NUM_CHECKED_TOKENS
    assert [variant_of(result, name)["reason"] for name in ("int8", "int4")] == ["no int8 here", "no int4 here"]
    assert variant_of(result, "absent")["reason"] == "not installed: pip install it"
    one, three = variant_of(result, "failing")["batches"]
    assert len(one["decode_seconds"]) == 1
    assert one["reason"] == three["reason"] == "no more"
    assert "did not generate 8 tokens in each of 1 rows" in variant_of(result, "short")["batches"][0]["reason"]
    (batch,) = variant_of(result, "slow")["batches"]
    assert (batch["batch_size"], batch["new_tokens"]) == (1, 8)
    assert {ratio["contestant"] for ratio in result["ratios"]} == set()  # no peer ran beside one of ours


class Slow(GPT2Decoder):
    """A peer of another precision."""

    def __init__(self, work: DecodeWorkload, precision: str) -> None:
        super().__init__(work, "float32", True)


def test_metrics_follow_from_raw_times() -> None:
    def variant(contestant: str, name: str, family: str, decode: list[float]) -> dict[str, Any]:
        batch = {"batch_size": 4, "new_tokens": 11, "reason": None, "first_seconds": [0.5, 0.7, 0.6]}
        about = {"contestant": contestant, "name": name, "family": family, "weight_bytes": 10**6, "cache_width": 2}
        return about | {"batches": [batch | {"decode_seconds": decode}, {"batch_size": 8, "reason": "no memory"}]}

    variants = [
        variant("gpt2", "float32", "float32", [0.2, 0.4, 0.3]),
        variant("gpt2", "float32-torch", "float32", [0.8, 0.8, 0.8]),
        variant("transformers", "float32", "float32", [0.6, 0.6, 0.6]),
        variant("gpt2", "int8", "8 bits", [0.1]),
    ]
    work = replace(WORK, batch_sizes=(4, 8))
    result = compute_metrics({"bandwidths": [1e9, 2e9, 9e9], "lanes": variants}, work)
    assert result["bandwidth"] == 2e9
    batch = variants[0]["batches"][0]
    assert batch["first_ms"] == pytest.approx({"median": 600, "low": 550, "high": 650})
    assert batch["tokens_per_second"] == pytest.approx({"median": 40 / 0.3, "low": 40 / 0.35, "high": 40 / 0.25})
    assert batch["limit"] == pytest.approx(4 * 2e9 / bytes_per_step(work, 10**6, 2, 4, 11))
    assert batch["of_limit"] == pytest.approx(40 / 0.3 / batch["limit"])
    (ratio,) = result["ratios"]
    assert ratio["ratio"] == pytest.approx(2)
    assert (ratio["ours"], ratio["contestant"], ratio["theirs"]) == ("float32", "transformers", "float32")


def test_wrong_tokens_are_those_that_rounding_does_not_explain() -> None:
    right, gaps = list(range(NUM_CHECKED_TOKENS)), [1.0] * NUM_CHECKED_TOKENS
    other = [0, 1, 2, 9, 9, 9, 9, 9]
    assert check_tokens(right, (right, gaps), "float32") == {"agreement": NUM_CHECKED_TOKENS, "wrong": False}
    assert check_tokens(other, (right, gaps), "float32") == {"agreement": 3, "wrong": True}
    assert check_tokens(other, (right, gaps), "bfloat16") == {"agreement": 3, "wrong": False}
    gaps[3] = TIE_LOGIT_GAP / 2
    assert not check_tokens(other, (right, gaps), "float32")["wrong"]


def run_command(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    return int(exit.value.code or 0)


def test_the_command(here: None, generating_nanogpt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    record, chart, again = (tmp_path / name for name in ("a.json", "a.svg", "b.svg"))
    flags = ["--peer", f"nanogpt={generating_nanogpt}", "--json", str(record), "--chart", str(chart)]
    assert run_command([*GENERATE, *flags]) == 0
    out, err = capsys.readouterr()
    assert all(part in out for part in ("batch 1", "batch 3", "float32-torch", "of limit", "1.0 GB/s", "no int4 here"))
    assert "as fast as nanogpt float32" in out
    assert "round 2 of 2" in err
    result = json.loads(record.read_text())
    assert result["kind"] == "bench generate"
    assert result["workload"]["n_embd"] == 64
    assert result["bandwidth"] == 1e9
    drawn = chart.read_text()
    assert all(part in drawn for part in ("batch 3", "nanogpt bfloat16", "gpt2 float32", "2 layers of 64"))
    assert run_command(["bench", "chart", str(record), str(again)]) == 0
    assert "nanogpt bfloat16" in again.read_text()


def test_a_variant_with_other_tokens_is_wrong(
    here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(model: GPT, precision: str) -> GPT:
        torch.manual_seed(1)
        return GPT(model.config).eval()

    monkeypatch.setattr("gpt2.bench.decode.prepare_for_inference", other)
    assert run_command([*GENERATE, "--variants", "float32,float32-torch", "--chart", str(tmp_path / "a.svg")]) == 1
    assert "WRONG: other tokens from token 1 on" in capsys.readouterr().out
    assert (tmp_path / "a.svg").read_text().count("WRONG") == 2


def test_perplexity_is_measured_with_the_speed(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=64, n_layer=1, n_head=2, n_embd=16))
    save(model, get_tokenizer("bytes"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 9)
    flags = [
        "--batch-size",
        "1",
        "--prompt-tokens",
        "4",
        "--max-new-tokens",
        "4",
        "--variants",
        "float32,float32-torch",
    ]
    flags += ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--text-tokens", "100"]
    assert run_command(["bench", "generate", "--device", "cpu", "--json", str(tmp_path / "a.json"), *flags]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    tokens = list(((tmp_path / "text.txt").read_bytes())[:100])
    right = perplexity(model, tokens)
    assert [variant["perplexity"] for variant in result["lanes"]] == pytest.approx([right, right])
    out = capsys.readouterr().out
    assert f"{right:.3f}" in out
    assert "the first 100 tokens of text.txt" in out


def test_a_peer_that_is_not_installed(here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is an error before anything is timed."""
    monkeypatch.setattr(decode_peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--peer llamacpp is not installed: pip install llama-cpp-python gguf$"):
        parse_decode_peers(["llamacpp"])
    (tmp_path / "files").mkdir()
    peers = {"llamacpp": None, "ctranslate2": None}
    entries = peer_variants(WORK, peers, tmp_path / "files", InProcessRunner)
    assert {entry.reason for entry in entries if entry.contestant == "llamacpp"} == {
        "not installed: pip install llama-cpp-python gguf"
    }
    assert all(entry.reason for entry in entries)
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--peer vllm", "there is no peer 'vllm': there are transformers"),
        ("--peer ctranslate", "did you mean 'ctranslate2'?"),
        ("--peer nanogpt", "needs a checkout"),
        ("--variants int3", "there is no variant 'int3'"),
        ("--variants ,", "--variants is empty"),
        ("--batch-size 1,x", "--batch-size must be integers from 1"),
        ("--batch-size 0", "--batch-size must be integers from 1"),
        ("--batch-size ,", "at least 1 batch size"),
        ("--max-new-tokens 1", "new_tokens must be at least 2"),
        ("--rounds 0", "rounds must be at least 1"),
        ("--shape gpt3", "--shape gpt3 is not one of"),
        ("--text a.txt", "--text needs --model"),
        ("--model x --n-layer 3", "--model defines the shape"),
        ("--n-head 7", "n_embd"),
        ("--json no/such.json", "there is no folder"),
        ("--chart a.bmp", "a chart is one of"),
        ("--device tpu", "device 'tpu'"),
    ],
)
def test_invalid_flags_are_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [] if "--model" in flags else GENERATE[2:]
    assert run_command(["bench", "generate", *small, *flags.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_all_peers_in_subprocesses(tmp_path: Path, generating_nanogpt: str) -> None:
    for package in ("ctranslate2", "llama_cpp", "gguf"):
        pytest.importorskip(package)
    names = ["transformers", "ctranslate2", "llamacpp", f"nanogpt={generating_nanogpt}"]
    peers = [word for name in names for word in ("--peer", name)]
    assert run_command([*GENERATE, *peers, "--json", str(tmp_path / "a.json")]) == 0
    variants = json.loads((tmp_path / "a.json").read_text())["lanes"]
    assert {variant["contestant"] for variant in variants} == {"gpt2", *PEERS}
    for variant in variants:
        assert variant["reason"] is None or "has no" in variant["reason"]
        assert all(batch["reason"] is None for batch in variant["batches"])
        assert all(
            batch["agreement"] == NUM_CHECKED_TOKENS
            for batch in variant["batches"]
            if variant["precision"] == "float32"
        )
