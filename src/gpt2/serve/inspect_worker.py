"""The worker that inspects models for the playground: one request at a time, in a thread."""

import asyncio
import copy
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from gpt2.errors import RequestError
from gpt2.interpret import HeadScores, head_scores
from gpt2.model import GPT
from gpt2.serve.errors import APIError
from gpt2.serve.field_types import StrictModel
from gpt2.serve.inspected_text import InspectedText
from gpt2.serve.models import ServedModel, find_model

MAX_CHARACTERS, MAX_TOKENS = 100_000, 16_384  # of an inspected text
MAX_INSPECT_TOKENS = 1024  # of the context whose attention or layers are shown: more would be too small to see
MAX_PENDING_REQUESTS = 32  # a page sends a few at a time
MAX_PENDING_OF_CLIENT = 16
MAX_KEPT_RESULTS = 128  # of experiments; each has some hundred numbers

TokenIds = Annotated[list[int], Field(max_length=MAX_TOKENS, fail_fast=True)]


class InspectRequest(StrictModel):
    """A text to inspect, as `tokens` or as `text`. `model` may be omitted if there is only one."""

    model: str | None = None
    tokens: TokenIds | None = None
    text: str | None = Field(default=None, max_length=MAX_CHARACTERS)


Handler = Callable[["InspectWorker", ServedModel, list[int], Any], Any]


class InspectWorker:
    """Runs one request at a time in a thread, and keeps the last text of each model: the next one is much the same.

    Requests of clients that have disconnected are not run.
    """

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.models = models
        self._semaphore, self._pending = asyncio.Semaphore(1), Counter[str]()
        self._texts: dict[str, InspectedText] = {}
        self._own_models: dict[str, GPT] = {}
        self._scores: dict[str, HeadScores] = {}
        self._results: OrderedDict[Any, Any] = OrderedDict()

    async def run(self, request: Request, body: InspectRequest, handler: Handler, keep: bool = False) -> Any:
        """The response to a request, by the function that computes it from the token ids.

        keep: whether the result is kept for an equal request.
        """
        if body.model is None and len(self.models) != 1:
            raise APIError(400, f"model is required: there are {', '.join(self.models)}", "model")
        served, client = find_model(self.models, body.model), str(request.scope.get("gpt2.client", ""))
        if self._pending.total() >= MAX_PENDING_REQUESTS or self._pending[client] >= MAX_PENDING_OF_CLIENT:
            raise APIError(429, "too many requests at the same time", retry_after=1)
        self._pending[client] += 1
        try:
            async with self._semaphore:
                if await request.is_disconnected():
                    raise APIError(408, "the client has disconnected")
                return await asyncio.to_thread(self._handle, served, body, handler, keep)
        finally:
            self._pending[client] -= 1
            self._pending += Counter()  # without the clients that have no request

    def _handle(self, served: ServedModel, body: InspectRequest, handler: Handler, keep: bool) -> Any:
        ids = _token_ids(served, body)
        if not keep:
            return handler(self, served, ids, body)
        asked = f"{ids} {body.model_dump_json(exclude={'tokens', 'text'})}"
        key = (handler, served.name, hashlib.sha256(asked.encode()).digest())
        if key not in self._results:
            self._results[key] = handler(self, served, ids, body)
            while len(self._results) > MAX_KEPT_RESULTS:
                self._results.popitem(last=False)
        self._results.move_to_end(key)
        return self._results[key]

    def add_route(
        self, router: APIRouter, path: str, model: type[InspectRequest], handler: Handler, keep: bool = False
    ) -> None:
        """Add a POST route that answers requests of this model with `run`."""

        async def respond(request: Request, body: Any) -> Any:
            return await self.run(request, body, handler, keep)

        respond.__annotations__["body"] = model  # from which FastAPI makes the schema
        router.add_api_route(path, respond, methods=["POST"], name=path.rpartition("/")[2])

    def text(self, served: ServedModel) -> InspectedText:
        """The text of this model that was inspected last."""
        if served.name not in self._texts:
            self._texts[served.name] = InspectedText(served.model)
        return self._texts[served.name]

    def own_model(self, served: ServedModel) -> GPT:
        """The model with the same weights in modules of its own: the scheduler may run those of `served.model`, which
        therefore never have hooks."""
        if served.name not in self._own_models:
            shared = {id(weight): weight for weight in (*served.model.parameters(), *served.model.buffers())}
            self._own_models[served.name] = copy.deepcopy(served.model, shared)
        return self._own_models[served.name]

    def scores(self, served: ServedModel) -> HeadScores:
        """What the heads of the model attend to in a repeated random text; computed once."""
        if served.name not in self._scores:
            self._scores[served.name] = head_scores(self.own_model(served))
        return self._scores[served.name]


def _token_ids(served: ServedModel, body: InspectRequest) -> list[int]:
    """The token ids of the text to inspect."""
    if (body.tokens is None) == (body.text is None):
        raise RequestError("give either tokens or text")
    ids = body.tokens
    if ids is None:
        ids = served.tokenizer.encode(body.text or "", allow_special=True)
    if len(ids) > MAX_TOKENS:
        raise RequestError(f"the text has {len(ids)} tokens: at most {MAX_TOKENS} can be inspected")
    return ids


def context_window(served: ServedModel, ids: list[int], position: int | None) -> tuple[list[int], int, int]:
    """The tokens of which the position is shown, its index among them, and where they begin.

    All of them if they fit, so that other positions of the same text need no new computation.
    """
    position = len(ids) - 1 if position is None else position
    if not 0 <= position < len(ids):
        raise RequestError(f"there is no position {position} in a text of {len(ids)} tokens")
    longest = min(MAX_INSPECT_TOKENS, served.model.config.block_size)
    if len(ids) <= longest:
        return ids, position, 0
    start = max(0, position + 1 - longest)
    return ids[start : position + 1], position - start, start


def check_token_id(served: ServedModel, token_id: int | None) -> None:
    """Raises RequestError if the token is not in the model's vocabulary."""
    if token_id is not None and token_id >= served.model.config.vocab_size:
        raise RequestError(f"token {token_id} is not in the model's vocabulary of {served.model.config.vocab_size:,}")
