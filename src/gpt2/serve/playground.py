"""The playground: one page, and the questions it asks about a model.

    GET  /                    the page; GET /static/NAME what it is made of
    GET  /inspect/models      the models and their shapes
    POST /inspect/next        what might come next, under any settings
    POST /inspect/score       what a model thinks of each token of a text, and its perplexity
    POST /inspect/attention   where the token at a position looks, by layer and head
    POST /inspect/lens        what each layer would have said

The questions are answered by the plain model in a thread, one at a time, beside the scheduler and not through it.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gpt2.errors import UserError, did_you_mean
from gpt2.generation.filters import History
from gpt2.model import GPT
from gpt2.serve.errors import APIError, to_api_error
from gpt2.serve.inspect import (
    attention_weights,
    logit_lens,
    next_logits,
    perplexity,
    score_tokens,
    token_offsets,
    token_text,
    top_candidates,
)
from gpt2.serve.schema import CommonRequestFields
from gpt2.tokenizer import Tokenizer

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MAX_CHARACTERS, MAX_TOKENS = 100_000, 16_384  # of a text to score
MAX_INSPECT_TOKENS = 512  # tokens before the one whose attention or layers are shown; more would be too small to see
MAX_PENDING_REQUESTS = 32  # questions at a time; a page asks a few

T = TypeVar("T")


class InspectableModel(Protocol):
    """What the playground needs of a served model."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> GPT: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


class _InspectRequest(BaseModel):
    """About a text, as `tokens` or as `text`; `model` may be left out where there is one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    tokens: list[int] | None = Field(default=None, max_length=MAX_TOKENS)
    text: str | None = Field(default=None, max_length=MAX_CHARACTERS)


class NextTokenRequest(_InspectRequest, CommonRequestFields):
    """What might come next under the settings of a request; `asked` is a token to tell of wherever it ranks."""

    prompt_length: int | None = Field(default=None, ge=0)
    top: int = Field(default=20, ge=1, le=200)
    asked: int | None = Field(default=None, ge=0)


class ScoreTextRequest(_InspectRequest):
    """What the model thinks of every token but the first, which nothing stands before."""


class AttentionRequest(_InspectRequest):
    """Where the token at `position` looks; the last one if it is left out."""

    position: int | None = Field(default=None, ge=0)


class LogitLensRequest(AttentionRequest):
    """What each layer would say after `position`."""

    top: int = Field(default=5, ge=1, le=50)
    asked: int | None = Field(default=None, ge=0)


class _InspectWorker:
    """Answers one question at a time, in a thread, and remembers the last logits: sliders move over one prompt."""

    def __init__(self, models: Mapping[str, InspectableModel]) -> None:
        self.models = models
        self._semaphore, self._num_pending = asyncio.Semaphore(1), 0
        self._cached_logits: tuple[str, list[int], Tensor] | None = None

    def find_model(self, name: str | None) -> InspectableModel:
        """The model of a name, or the only one."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise APIError(400, f"which model? There are {', '.join(self.models)}", "model")
        if name not in self.models:
            hint = did_you_mean(name, self.models)
            raise APIError(404, f"there is no model '{name}'{hint}", "model", "model_not_found")
        return self.models[name]

    async def run(self, function: Callable[[], T]) -> T:
        """What `work` returns, in its turn."""
        if self._num_pending >= MAX_PENDING_REQUESTS:
            raise APIError(429, "too many questions at once", retry_after=1)
        self._num_pending += 1
        try:
            async with self._semaphore:
                return await asyncio.to_thread(function)
        finally:
            self._num_pending -= 1

    def logits(self, served: InspectableModel, tokens: list[int]) -> Tensor:
        """The logits after `tokens`, (1, V)."""
        if self._cached_logits is None or self._cached_logits[:2] != (served.name, tokens):
            self._cached_logits = served.name, tokens, next_logits(served.model, tokens)
        return self._cached_logits[2]


def playground_router(models: Mapping[str, InspectableModel]) -> APIRouter:
    """The page and its questions, for models by name. Errors have OpenAI's body."""
    router, desk = APIRouter(), _InspectWorker(models)
    _add_page_routes(router)
    _add_inspect_routes(router, desk)
    return router


def _add_page_routes(router: APIRouter) -> None:
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file_response(files["index.html"])

    @router.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return _file_response(files[name]) if name in files else APIError(404, f"there is no file '{name}'").response()


def _file_response(path: Path) -> Response:
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=PAGE_HEADERS)


def _add_inspect_routes(router: APIRouter, worker: _InspectWorker) -> None:
    @router.get("/inspect/models")
    async def models() -> Any:
        return {"models": [_model_info(served) for served in worker.models.values()]}

    @router.post("/inspect/next")
    async def next_token(question: NextTokenRequest) -> Any:
        return await _run_inspection(worker, question, _inspect_next)

    @router.post("/inspect/score")
    async def score_text(question: ScoreTextRequest) -> Any:
        return await _run_inspection(worker, question, _inspect_score)

    @router.post("/inspect/attention")
    async def attention_of(question: AttentionRequest) -> Any:
        return await _run_inspection(worker, question, _inspect_attention)

    @router.post("/inspect/lens")
    async def layers_of(question: LogitLensRequest) -> Any:
        return await _run_inspection(worker, question, _inspect_lens)


async def _run_inspection(
    worker: _InspectWorker,
    body: Any,
    handler: Callable[[_InspectWorker, InspectableModel, list[int], Any], dict[str, Any]],
) -> Any:
    """The answer, or what is wrong with the question."""
    try:
        served = worker.find_model(body.model)
        return await worker.run(lambda: handler(worker, served, _token_ids(served, body), body))
    except APIError as error:
        return error.response()
    except UserError as error:
        return to_api_error(error).response()


def _model_info(served: InspectableModel) -> dict[str, Any]:
    c, tokenizer = served.model.config, served.tokenizer
    return {
        "name": served.name,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "block_size": c.block_size,
        "vocab_size": c.vocab_size,
        "parameters": served.model.num_parameters(),
        "end_of_text": tokenizer.end_of_text,
        "fingerprint": tokenizer.fingerprint,
    }


def _token_ids(served: InspectableModel, body: _InspectRequest) -> list[int]:
    """The ids that the question is about."""
    if (body.tokens is None) == (body.text is None):
        raise UserError("a question needs tokens or text, and not both")
    ids = body.tokens
    if ids is None:
        ids = served.tokenizer.encode(body.text or "", allow_special=True)
    if len(ids) > MAX_TOKENS:
        raise UserError(f"{len(ids)} tokens are more than the {MAX_TOKENS} that are looked at")
    return ids


def _inspect_next(
    worker: _InspectWorker, served: InspectableModel, ids: list[int], body: NextTokenRequest
) -> dict[str, Any]:
    sampling = body.sampling()
    sampling.check_token_ids(served.model.config.vocab_size)
    _check_token_id(served, body.asked)
    end = served.tokenizer.end_of_text
    ids = ids or [end]  # an empty text stands after the end of another
    prompt_length = len(ids) if body.prompt_length is None else min(body.prompt_length, len(ids))
    history = History(ids, prompt_length, (end,))
    logits = worker.logits(served, ids)
    return asdict(top_candidates(logits, served.tokenizer, sampling, history, body.top, body.asked))


def _inspect_score(
    worker: _InspectWorker, served: InspectableModel, ids: list[int], body: ScoreTextRequest
) -> dict[str, Any]:
    scored = score_tokens(served.model, served.tokenizer, ids) if ids else []
    first = [
        {"id": token, "text": token_text(served.tokenizer, token), "logprob": None, "rank": None} for token in ids[:1]
    ]
    told = first + [asdict(token) for token in scored]
    tokens = [token | {"start": at} for token, at in zip(told, token_offsets(served.tokenizer, ids), strict=True)]
    return {"tokens": tokens, "perplexity": perplexity(scored), "count": len(ids)}


def _inspect_attention(
    worker: _InspectWorker, served: InspectableModel, ids: list[int], body: AttentionRequest
) -> dict[str, Any]:
    ids, position, start = _context_window(served, ids, body.position)
    weights = attention_weights(served.model, ids, position)
    texts = [token_text(served.tokenizer, token) for token in ids]
    return {"start": start, "position": start + position, "texts": texts, "weights": _round_weights(weights)}


def _inspect_lens(
    worker: _InspectWorker, served: InspectableModel, ids: list[int], body: LogitLensRequest
) -> dict[str, Any]:
    _check_token_id(served, body.asked)
    ids, position, start = _context_window(served, ids, body.position)
    layers = logit_lens(served.model, served.tokenizer, ids, position, body.top, body.asked)
    told = [
        {
            "layer": layer.layer,
            "asked": layer.asked,
            "tokens": [{"id": i, "text": text, "probability": p} for i, text, p in layer.tokens],
        }
        for layer in layers
    ]
    return {"start": start, "position": start + position, "layers": told}


def _context_window(served: InspectableModel, ids: list[int], position: int | None) -> tuple[list[int], int, int]:
    """The tokens up to a position, the last of them if they are many; where it is among them, and where they begin."""
    position = len(ids) - 1 if position is None else position
    if not 0 <= position < len(ids):
        raise UserError(f"there is no position {position} in a text of {len(ids)} tokens")
    start = max(0, position + 1 - min(MAX_INSPECT_TOKENS, served.model.config.block_size))
    return ids[start : position + 1], position - start, start


def _check_token_id(served: InspectableModel, token_id: int | None) -> None:
    if token_id is not None and token_id >= served.model.config.vocab_size:
        raise UserError(f"token {token_id} is not in the model's vocabulary of {served.model.config.vocab_size:,}")


def _round_weights(weights: Tensor) -> list[list[list[float]]]:
    """To five decimals: the page draws them, and a long text has many."""
    return [[[round(w, 5) for w in head] for head in layer] for layer in weights.tolist()]
