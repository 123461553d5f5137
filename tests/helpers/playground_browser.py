"""A server, a browser and a page object for the tests of the playground."""

import asyncio
import shutil
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from torch import Tensor

import gpt2
from gpt2.cache import KVCache
from gpt2.model import GPT, GPTConfig
from gpt2.serve.app import create_app
from gpt2.serve.limits import Limits
from gpt2.serve.middleware import AccessPolicy
from gpt2.serve.models import ServedModel, create_served_model
from gpt2.templates import ChatTemplate
from gpt2.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from tests.helpers.live_server import run_app
from tests.helpers.transformers_reference import random_model

BROWSER_FLAGS = [
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
BYTE_TOKENIZER = ByteTokenizer()


def sharpen_logits(model: GPT) -> GPT:
    """Give a random model a less uniform distribution, with a low probability for partial characters."""
    spelled = [TOKENIZER.token_bytes(i) for i in range(CONFIG.vocab_size)]
    parts = [i for i, word in enumerate(spelled) if not (word.isascii() and word.decode().isprintable())]
    model.transformer.wte.weight.data[parts] = 0
    model.transformer.ln_f.weight.data.mul_(8)
    return model


MODELS = {"one": sharpen_logits(random_model(CONFIG, 1)), "two": sharpen_logits(random_model(CONFIG, 2))}


class SlowGPT(GPT):
    """A GPT with a delay in every forward pass, so that a test can act during generation."""

    delay_seconds = 0.1

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        time.sleep(self.delay_seconds)
        return super().hidden_states(tokens, cache, documents)


def create_served_models(
    models: dict[str, GPT], tokenizer: Tokenizer, limits: Limits, template: ChatTemplate | None = None
) -> dict[str, ServedModel]:
    """Served models by name, without conversion for inference."""
    return {
        name: create_served_model(name, model, model, tokenizer, limits, template) for name, model in models.items()
    }


@contextmanager
def run_playground(
    models: dict[str, GPT],
    tokenizer: Tokenizer,
    limits: Limits = LIMITS,
    access: AccessPolicy | None = None,
    template: ChatTemplate | None = None,
) -> Iterator[str]:
    """Run a server with these models; its address."""
    with run_app(create_app(create_served_models(models, tokenizer, limits, template), limits, access)) as address:
        yield f"{address}/"


class BreakableProxy:
    """A TCP proxy to a server, whose connections can be cut and restored. It has its own address."""

    def __init__(self, address: str) -> None:
        self._upstream, self._writers, self._port = urlsplit(address), set(), 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.restore()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}/"

    def restore(self) -> None:
        self._run_in_loop(self._listen())

    def disconnect(self) -> None:
        """Refuse new connections, and abort the open ones."""
        self._run_in_loop(self._abort_connections())

    def close(self) -> None:
        self.disconnect()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run_in_loop(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._handle_connection, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _abort_connections(self) -> None:
        self._server.close()
        for end in self._writers:
            end.transport.abort()

    async def _handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._upstream.hostname, self._upstream.port)
        self._writers |= {writer, back}
        await asyncio.gather(self._forward(reader, back), self._forward(there, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


def require_chromium() -> str:
    """The path of Chromium; skips the test if it is not installed."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    return path


@contextmanager
def launch_browser() -> Iterator[Any]:
    """Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = require_chromium()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class PlaygroundPage:
    """The playground in a browser tab. `errors` collects console errors and requests to other servers."""

    def __init__(self, browser: Any, address: str, ready: str = "#next li", **context_options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context_options})
        self.context.set_default_timeout(30_000)
        self.page, self.errors, self.expected_errors = self.context.new_page(), [], ()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda entry: entry.type == "error" and self.errors.append(entry.text))
        self.page.on("request", lambda request: self._check_origin(request.url, address))
        self.page.goto(address)
        self.page.wait_for_selector(ready)

    def _check_origin(self, url: str, address: str) -> None:
        if not url.startswith((address, "blob:", "data:")):
            self.errors.append(f"request to {url}")

    def fill_setting(self, name: str, value: Any) -> None:
        """Set a sampling parameter."""
        if not self.page.is_visible(f"#set-{name}"):
            self.page.click("summary:has-text('More')")
            self.page.click("summary:has-text('Length, stop strings')")
        self.page.fill(f"#set-{name}", str(value))

    def generate(self, text: str, key: str | None = None) -> str:
        """Replace the text, continue it, and return all of it."""
        self.page.fill("#text", text)
        return self.continue_text(key)

    def continue_text(self, key: str | None = None) -> str:
        self.page.keyboard.press(key) if key else self.page.click("#go")
        return self.wait_until_done()

    def wait_until_done(self) -> str:
        """Wait until generation has finished; the whole text."""
        self.page.wait_for_selector("body:not(.running) #status:has-text('a second')")
        return self.text

    @property
    def text(self) -> str:
        return self.page.input_value("#text")

    def click_token(self, number: int) -> str:
        """Click a generated token; its text."""
        token = self.page.locator("#backdrop > span:has(> span)").nth(number)
        box = token.locator("span").bounding_box()
        self.page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
        self.page.wait_for_selector("#alternatives:not([hidden])")
        return token.text_content()

    def accessibility_violations(self) -> list[str]:
        """The violations that axe finds."""
        reason = "axe is not installed: pip install axe-playwright-python"
        module = pytest.importorskip("axe_playwright_python.sync_playwright", reason=reason)
        found = module.Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {node['html'][:120]} {node['any'][:1]}" for one in found for node in one["nodes"]]


def generated_text(prompt: str = PROMPT, model: str = "one", **settings: Any) -> str:
    settings = {"max_new_tokens": 12, "top_k": 50, "seed": 42, **settings}
    return gpt2.generate(MODELS[model], TOKENIZER, prompt, **settings)[0]
