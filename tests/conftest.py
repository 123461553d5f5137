"""What the tests share: real data when it lies beside the checkout, and a home of their own."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("GPT2_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
TIKTOKEN_CACHE = SHARED / "tiktoken-cache"

if "TIKTOKEN_CACHE_DIR" not in os.environ and TIKTOKEN_CACHE.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(TIKTOKEN_CACHE)


@pytest.fixture(autouse=True)
def gpt2_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own cache folder and never touches the user's."""
    home = tmp_path / "gpt2-home"
    monkeypatch.setenv("GPT2_HOME", str(home))
    return home


@pytest.fixture
def shakespeare_file() -> Path:
    """Karpathy's tinyshakespeare, from the data folder beside the checkout (or $GPT2_TEST_DATA)."""
    path = SHARED / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip(f"no {path}: put tinyshakespeare there, or set GPT2_TEST_DATA")
    return path


@pytest.fixture
def gpt2_vocabulary() -> None:
    """Skip, with the reason, where GPT-2's own vocabulary is not in tiktoken's cache."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder or not any(Path(folder).iterdir()):
        pytest.skip("GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR")
