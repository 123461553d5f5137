"""GPT-2 in plain PyTorch.

    import gpt2

    model, tokenizer = gpt2.load("gpt2")            # a hub name, a model folder or a run folder
    gpt2.generate(model, tokenizer, "Hello", num_samples=5, max_new_tokens=30, temperature=0.8, top_k=50, seed=42)
    for sample, text in gpt2.stream(model, tokenizer, "Hello"): ...

    result = gpt2.train("quickstart", name="mine")  # the settings are the flags of `gpt2 train`
    result = gpt2.finetune(result.folder, "questions.jsonl", lora_rank=8)
    results = gpt2.evaluate(result.folder, tasks=["wikitext2"])
    gpt2.save(model, tokenizer, "folder")           # a model folder for `transformers` and every other command

    logits = model(tokens)                          # int64 (B, T) -> (B, T, vocab_size)
    loss = model.loss(tokens, targets)              # mean next-token loss in nats

    load, save                            model folders, run folders and names on the hub
    generate, stream, Sampling            text from prompts: whole, in pieces, and the sampling settings
    prepare_for_inference                 the CPU kernel or CUDA graphs; float32, bfloat16, float16, int8, int4
    train, finetune, evaluate             the commands of the same names; RunResult is what the first two return
    trace, patch, ablate                  activations by name, replaced or removed; logit_attribution: what made a logit
    GPT, GPTConfig, KVCache               the model, its shape, the cache of keys and values
    Tokenizer, get_tokenizer              text to token ids and back
    UserError                             every mistake that a user can fix: one line, and the argument in `field`

`gpt2 --help` lists the same as commands. Every function has a docstring: help(gpt2.generate), help(gpt2.api.train).
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2.api import RunResult, evaluate, finetune, train
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
    "RunResult": "gpt2.api",
    "Sampling": "gpt2.generation.sampling",
    "Tokenizer": "gpt2.tokenizer",
    "UserError": "gpt2.errors",
    "evaluate": "gpt2.api",
    "finetune": "gpt2.api",
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
_CALLABLE_PACKAGES = ("train",)  # a package that is also a function: see gpt2/train/__init__.py

__all__ = [
    "GPT",
    "GPTConfig",
    "KVCache",
    "RunResult",
    "Sampling",
    "Tokenizer",
    "UserError",
    "ablate",
    "evaluate",
    "finetune",
    "generate",
    "get_tokenizer",
    "load",
    "logit_attribution",
    "patch",
    "prepare_for_inference",
    "save",
    "stream",
    "trace",
    "train",
]
__version__ = "1.0.0"


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import gpt2` and `gpt2 --help` stay instant."""
    if name == "accelerated":
        warnings.warn("gpt2.accelerated is now gpt2.prepare_for_inference", DeprecationWarning, stacklevel=2)
        name = "prepare_for_inference"
    if name in _CALLABLE_PACKAGES:
        return import_module(f"gpt2.{name}")
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    value = getattr(import_module(_LAZY_IMPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
