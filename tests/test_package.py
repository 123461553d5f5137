"""The distribution: version, citation, and a wheel and an sdist that work in a clean environment."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import gpt2
from gpt2.files import source_commit

ROOT = Path(__file__).parents[1]


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gpt2.__version__
    assert f"\n## {gpt2.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_version_command_names_the_commit(capsys: pytest.CaptureFixture[str]) -> None:
    from gpt2.cli import main

    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    commit = source_commit(ROOT)
    expected = f"gpt2 {gpt2.__version__}" + (f" ({commit})" if commit else "")
    assert (exit_info.value.code, capsys.readouterr().out) == (0, expected + "\n")


def test_installed_package_has_no_commit(tmp_path: Path) -> None:
    assert source_commit(tmp_path) is None


def test_issue_templates_are_valid() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(form)
            assert all({"type", "attributes"} <= set(part) for part in form["body"])


@pytest.mark.slow
def test_wheel_and_sdist_work_in_a_clean_environment(tmp_path: Path) -> None:
    def run(*command: str | Path, cwd: Path = ROOT) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path)
    sdist = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    source = next((tmp_path / "source").iterdir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {"gpt2/native/kernel.cpp", "gpt2/serve/static/index.html"} <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    assert re.fullmatch(r"plain_gpt2-[\d.]+-py3-none-any\.whl", wheel.name)

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = next((tmp_path / "venv").rglob("site-packages"))
    (site / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the rest
    assert run(scripts / "gpt2", "--version", cwd=tmp_path) == f"gpt2 {gpt2.__version__}\n"
    where = run(scripts / "python", "-c", "import gpt2; print(gpt2.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))

    torch.manual_seed(0)
    tokenizer = gpt2.get_tokenizer("bytes")
    config = gpt2.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=16)
    gpt2.save(gpt2.GPT(config), tokenizer, tmp_path / "model")
    text = run(scripts / "gpt2", "sample", "model", "--prompt", "Hello", "--max-new-tokens", "5", cwd=tmp_path)
    assert text.startswith("Hello")
