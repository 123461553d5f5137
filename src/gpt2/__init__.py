"""GPT-2 in plain PyTorch."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2.cache import KVCache
    from gpt2.errors import UserError
    from gpt2.generation.inference import prepare_for_inference
    from gpt2.generation.sampling import Sampling
    from gpt2.generation.text import generate, stream
    from gpt2.interpret import ablate, logit_attribution, patch, trace
    from gpt2.model import GPT, GPTConfig
    from gpt2.tokenizer import Tokenizer, get_tokenizer
    from gpt2.weights import load, save

_LAZY_IMPORTS = {
    "GPT": "gpt2.model",
    "GPTConfig": "gpt2.model",
    "KVCache": "gpt2.cache",
    "Sampling": "gpt2.generation.sampling",
    "Tokenizer": "gpt2.tokenizer",
    "UserError": "gpt2.errors",
    "ablate": "gpt2.interpret",
    "generate": "gpt2.generation.text",
    "get_tokenizer": "gpt2.tokenizer",
    "load": "gpt2.weights",
    "logit_attribution": "gpt2.interpret",
    "patch": "gpt2.interpret",
    "prepare_for_inference": "gpt2.generation.inference",
    "save": "gpt2.weights",
    "stream": "gpt2.generation.text",
    "trace": "gpt2.interpret",
}

__all__ = [
    "GPT",
    "GPTConfig",
    "KVCache",
    "Sampling",
    "Tokenizer",
    "UserError",
    "ablate",
    "generate",
    "get_tokenizer",
    "load",
    "logit_attribution",
    "patch",
    "prepare_for_inference",
    "save",
    "stream",
    "trace",
]
__version__ = "1.0.0"


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import gpt2` and `gpt2 --help` stay instant."""
    if name == "accelerated":
        warnings.warn("gpt2.accelerated is now gpt2.prepare_for_inference", DeprecationWarning, stacklevel=2)
        name = "prepare_for_inference"
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    value = getattr(import_module(_LAZY_IMPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
