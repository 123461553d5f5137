"""A server and a browser for the tests of the playground."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from reference import random_model
from serving import listening
from torch import Tensor

from gpt2.cache import KVCache
from gpt2.model import GPT, GPTConfig
from gpt2.serve.app import create_app
from gpt2.serve.limits import Limits
from gpt2.serve.models import ServedModel, serve_model
from gpt2.tokenizer import Tokenizer, train_bpe

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


SENTENCE = "the cat sat on the mat and the dog ran to the barn while a bird sang in the tree "
TOKENIZER = train_bpe([SENTENCE * 9, *(SENTENCE[i:] + SENTENCE[:i] for i in range(len(SENTENCE)))], 300)
CONFIG = GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=96, n_layer=3, n_head=2, n_embd=32)
PROMPT = "the cat sat on"
LIMITS = Limits(slots=4)


def sharp(model: GPT) -> GPT:
    """Surer of what it says than random weights are, and not likely to say a part of a character."""
    spelled = [TOKENIZER.token_bytes(i) for i in range(CONFIG.vocab_size)]
    parts = [i for i, word in enumerate(spelled) if not (word.isascii() and word.decode().isprintable())]
    model.transformer.wte.weight.data[parts] = 0
    model.transformer.ln_f.weight.data.mul_(8)
    return model


MODELS = {"one": sharp(random_model(CONFIG, 1)), "two": sharp(random_model(CONFIG, 2))}


class SlowGPT(GPT):
    """Takes its time for every step, so that somebody can be quicker."""

    seconds = 0.02

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        time.sleep(self.seconds)
        return super().hidden_states(tokens, cache)


def served(models: dict[str, GPT], tokenizer: Tokenizer, limits: Limits) -> dict[str, ServedModel]:
    """Models by name, run as they are."""
    return {name: serve_model(name, model, model, tokenizer, limits) for name, model in models.items()}


@contextmanager
def playing(models: dict[str, GPT], tokenizer: Tokenizer, limits: Limits | None = None) -> Iterator[str]:
    """The address of a server of these models."""
    limits = limits or Limits(slots=4)
    with listening(create_app(served(models, tokenizer, limits), limits)) as address:
        yield f"{address}/"


def chromium() -> str:
    """Where the browser is; skips, with the reason, where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium: apt-get install chromium")
    return path


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser of playwright's."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = chromium()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
