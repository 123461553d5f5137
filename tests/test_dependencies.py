"""Every package that is imported is declared, and internals of another package only within bounds."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

COMPARED_WITH = {"transformers", "xllamacpp"}  # where they are installed, in gpt2 convert
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def declared() -> dict[str, str]:
    """{name: requirement} of the core and all extras but `dev`."""
    extras = [one for extra, given in PROJECT["optional-dependencies"].items() if extra != "dev" for one in given]
    return {name_of(one): one for one in [*PROJECT["dependencies"], *extras]}


def imported_packages() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"gpt2"}


def test_every_imported_package_is_declared() -> None:
    distributions = packages_distributions()
    found = {
        name: [one.lower().replace("_", "-") for one in distributions.get(name, [name])] for name in imported_packages()
    }
    missing = {
        name for name, candidates in found.items() if not {name.replace("_", "-"), *candidates} & set(declared())
    }
    assert not missing - COMPARED_WITH


@pytest.mark.parametrize("name", ["uvicorn", "h11", "pydantic", "pydantic-core", "starlette"])
def test_packages_whose_internals_are_used_have_both_bounds(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+,<[0-9.]+", declared()[name])


def test_the_extra_for_development_has_the_requirements_of_the_server() -> None:
    assert set(PROJECT["optional-dependencies"]["serve"]) <= set(PROJECT["optional-dependencies"]["dev"])
