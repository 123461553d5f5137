"""Training: recipes, setup, the training loop, checkpoints and the run folder.

`gpt2.train(recipe, **settings)` trains a model: this package is also the function `gpt2.api.train`, whichever of
`gpt2.train` and its modules is imported first.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A module that can be called. A function of this name in `gpt2` would be replaced when a submodule is imported."""

    def __call__(self, recipe: str | Path = "quickstart", **settings: Any) -> Any:
        return import_module("gpt2.api").train(recipe, **settings)


sys.modules[__name__].__class__ = _CallablePackage
