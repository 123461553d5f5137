"""A server for tests: the application under uvicorn on a free port, with a tiny model of bytes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from gpt2.generation.inference import prepare_for_inference
from gpt2.model import GPT, GPTConfig
from gpt2.serve.app import create_app
from gpt2.serve.limits import Limits
from gpt2.serve.middleware import AccessPolicy
from gpt2.serve.models import ServedModel, create_served_model
from gpt2.serve.scheduler import Scheduler
from gpt2.serve.uvicorn_server import HeaderTimeoutProtocol
from gpt2.tokenizer import get_tokenizer
from tests.helpers.transformers_reference import random_model

CONFIG = GPTConfig(vocab_size=257, block_size=128, n_layer=2, n_head=2, n_embd=16)
BYTE_TOKENIZER = get_tokenizer("bytes")
SMALL_LIMITS = Limits(slots=4)


@dataclass(frozen=True)
class LiveServer:
    """A running server: its address, models and application."""

    url: str
    models: dict[str, ServedModel]
    app: Any

    @property
    def model(self) -> GPT:
        """The plain model."""
        return self.models["tiny"].model

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the model."""
        return self.models["tiny"].scheduler

    def client(self, key: str | None = None) -> httpx.Client:
        """An HTTP client for this server."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def wait_until_idle(self) -> None:
        """Wait until all slots are free. Fails after a few seconds."""
        until = time.monotonic() + 10
        while not (self.scheduler.idle and self.scheduler.engine.idle):
            assert time.monotonic() < until, f"{self.scheduler.running} running, {self.scheduler.waiting} waiting"
            time.sleep(0.005)


@contextmanager
def temporary_home(native_cache: Path, folder: Path) -> Iterator[None]:
    """Set GPT2_HOME to an empty folder with a link to the compiled kernel, for fixtures of a module."""
    with pytest.MonkeyPatch.context() as patch:
        (folder / "native").symlink_to(native_cache)
        patch.setenv("GPT2_HOME", str(folder))
        yield


@contextmanager
def run_app(app: FastAPI) -> Iterator[str]:
    """Run the application in a thread; its address."""
    config = uvicorn.Config(
        app, http=HeaderTimeoutProtocol, ws="none", port=0, log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < until, "the server does not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def run_server(limits: Limits = SMALL_LIMITS, access: AccessPolicy | None = None, **given: Any) -> Iterator[LiveServer]:
    """Run a server with one model, "tiny". given: further arguments of `create_served_model`."""
    model = random_model(CONFIG)
    models = {"tiny": create_served_model("tiny", model, prepare_for_inference(model), BYTE_TOKENIZER, limits, **given)}
    app = create_app(models, limits, access)
    with run_app(app) as address:
        yield LiveServer(address, models, app)
