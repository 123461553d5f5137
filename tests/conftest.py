"""Fixtures of all tests: real data where it is available, and a cache folder per test."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers must not compete for cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from gpt2.config import TrainConfig
from gpt2.tokenizer import BPETokenizer, Tokenizer, train_bpe
from tests.helpers.dataset_hub import DatasetHub, serve_datasets
from tests.helpers.tokenizer_samples import SENTENCES, TOKENIZER_FACTORIES
from tests.helpers.training_helpers import NUMBERS_TEXT

settings.register_profile("busy machine", deadline=None)  # no test depends on its time
settings.load_profile("busy machine")

SHARED = Path(os.environ.get("GPT2_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
TIKTOKEN_CACHE = SHARED / "tiktoken-cache"

if "TIKTOKEN_CACHE_DIR" not in os.environ and TIKTOKEN_CACHE.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(TIKTOKEN_CACHE)

hypothesis.settings.register_profile("gpt2", deadline=None)  # on a busy machine any example may take long
hypothesis.settings.load_profile("gpt2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for pytest-xdist (--dist loadgroup): one group per file, and one for all multi-process tests.

    A file stays together because of its module fixtures. Tests that start several ranks run one at a time.
    """
    for item in items:
        file = item.path.relative_to(Path(__file__).parent)
        group = "multi-process" if file.parts[0] == "distributed" else file.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled CPU kernel: kept between runs and shared by all workers of pytest-xdist.

    Libraries in it are named by a hash of all that they depend on, and appear by an atomic rename.
    """
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("native") if cache is None else cache.mkdir("gpt2-native")


@pytest.fixture(autouse=True)
def gpt2_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, compiled: Path) -> Path:
    """Give every test its own cache folder, except for compiled code. The user's is never used."""
    home = tmp_path_factory.mktemp("gpt2-home")
    (home / "native").symlink_to(compiled)
    monkeypatch.setenv("GPT2_HOME", str(home))
    return home


@pytest.fixture
def shakespeare_file() -> Path:
    """Karpathy's tinyshakespeare, from $GPT2_TEST_DATA (by default ../shared/data)."""
    path = SHARED / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip(f"no {path}: put tinyshakespeare there, or set GPT2_TEST_DATA")
    return path


@pytest.fixture
def gpt2_vocabulary() -> None:
    """Skip if GPT-2's vocabulary is not in tiktoken's cache."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder or not any(Path(folder).iterdir()):
        pytest.skip("GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    """Restore the matmul precision that a ladder step sets for its process."""
    import torch

    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def quick_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the matmul rate for a millisecond, on a small matrix."""
    from gpt2.hardware import measure_matmul

    for name in ("gpt2.bench.ladder.measure_matmul", "benchmarks.train_peers.measure_matmul"):
        monkeypatch.setattr(name, lambda device, dtype, seconds: measure_matmul(device, dtype, 0.001, size=256))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks find no compiler."""
    for name in ("gpt2.bench.ladder.can_compile", "benchmarks.train_peers.can_compile"):
        monkeypatch.setattr(name, lambda device: False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, no_compiler: None) -> None:
    """`gpt2 bench train` measures in this process, without compiling."""
    from gpt2.bench.common import InProcessRunner, run_in_process

    monkeypatch.setattr("gpt2.commands.bench_train.run_in_subprocess", run_in_process)
    monkeypatch.setattr("gpt2.commands.bench_train.SubprocessRunner", InProcessRunner)


@pytest.fixture
def nanogpt(tmp_path: Path) -> str:
    """A folder with a stand-in for nanoGPT's model.py."""
    from tests.helpers.bench_helpers import FAKE_NANOGPT

    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text(FAKE_NANOGPT)
    return str(folder)


@pytest.fixture(params=list(TOKENIZER_FACTORIES))
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the three kinds of tokenizer."""
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    return TOKENIZER_FACTORIES[request.param]()


@pytest.fixture
def small_bpe() -> BPETokenizer:
    """A tokenizer with 300 tokens, trained on three sentences."""
    return train_bpe(SENTENCES, 300)


@pytest.fixture
def text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text to train on, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "numbers.txt"
    path.write_text(NUMBERS_TEXT)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    """The configuration of a training run of a second or two on a text file."""
    (tmp_path / "numbers.txt").write_text(NUMBERS_TEXT)
    return TrainConfig(
        name="tiny",
        out_dir=str(tmp_path / "runs"),
        data=str(tmp_path / "numbers.txt"),
        tokenizer="bytes",
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=32,
        dropout=0.1,
        batch_size=8,
        max_steps=30,
        lr=3e-3,
        warmup_steps=5,
        dtype="float32",
        device="cpu",
        eval_every=10,
        save_every=10,
        sample_tokens=0,
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    """An empty hub of data sets on loopback, which `huggingface_hub` uses."""
    with serve_datasets() as hub:
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield hub
