"""The playground: a page, and the routes by which it inspects a model.

    GET  /                    the page; GET /static/NAME its files
    GET  /inspect/models      the models and their shapes
    POST /inspect/next        the most likely next tokens, under any sampling parameters
    POST /inspect/score       the log-probability of each token of a text, and its perplexity
    POST /inspect/attention   the attention weights of one position, by layer and head
    POST /inspect/lens        the logit lens: the prediction of each layer
    POST /inspect/...         whole matrices, contributions, experiments: see `gpt2.serve.inside` and `experiments`

Inspection runs the plain model in a thread, one request at a time, and not through the scheduler.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from pydantic import Field
from torch import Tensor

from gpt2.errors import RequestError
from gpt2.generation.filters import History
from gpt2.serve.errors import APIError
from gpt2.serve.experiments import add_experiment_routes
from gpt2.serve.inside import add_inside_routes
from gpt2.serve.inspect import (
    attention_weights,
    logit_lens,
    next_logits,
    partial_bytes,
    perplexity,
    score_tokens,
    token_offsets,
    token_text,
    top_candidates,
)
from gpt2.serve.inspect_worker import InspectRequest, InspectWorker, check_token_id, context_window
from gpt2.serve.json_route import JsonRoute
from gpt2.serve.models import ServedModel
from gpt2.serve.schema import CommonRequestFields

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE_HEADERS = {  # stricter than the other responses
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}


class NextTokenRequest(InspectRequest, CommonRequestFields):
    """Predict the next token under sampling parameters. `asked`: a token to report whatever its rank."""

    prompt_length: int | None = Field(default=None, ge=0)
    top: int = Field(default=20, ge=1, le=200)
    asked: int | None = Field(default=None, ge=0)


class ScoreTextRequest(InspectRequest):
    """Score every token except the first, which has no context. `top`: tokens to report in place of each."""

    top: int = Field(default=0, ge=0, le=10)


class AttentionRequest(InspectRequest):
    """Show the attention of `position`, by default the last one."""

    position: int | None = Field(default=None, ge=0)


class LogitLensRequest(AttentionRequest):
    """Show the prediction of each layer after `position`. `asked`: a token to report whatever its rank."""

    top: int = Field(default=5, ge=1, le=50)
    asked: int | None = Field(default=None, ge=0)


def playground_router(models: Mapping[str, ServedModel]) -> APIRouter:
    """The routes of the page and of the inspection, for models by name."""
    router, worker = APIRouter(route_class=JsonRoute), InspectWorker(models)
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file_response(files["index.html"])

    @router.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise APIError(404, f"there is no file '{name}'")
        return _file_response(files[name])

    @router.get("/inspect/models")
    async def models_() -> Any:
        return {"models": [_model_info(served) for served in models.values()]}

    worker.add_route(router, "/inspect/next", NextTokenRequest, _inspect_next)
    worker.add_route(router, "/inspect/score", ScoreTextRequest, _inspect_score)
    worker.add_route(router, "/inspect/attention", AttentionRequest, _inspect_attention)
    worker.add_route(router, "/inspect/lens", LogitLensRequest, _inspect_lens)
    add_inside_routes(router, worker)
    add_experiment_routes(router, worker)
    return router


def _file_response(path: Path) -> Response:
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=PAGE_HEADERS)


def _model_info(served: ServedModel) -> dict[str, Any]:
    config, tokenizer = served.model.config, served.tokenizer
    return {
        "name": served.name,
        "reference": served.reference,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.block_size,
        "vocab_size": config.vocab_size,
        "parameters": served.model.num_parameters(),
        "end_of_text": tokenizer.end_of_text,
        "has_chat_template": served.has_template,
        "fingerprint": tokenizer.fingerprint,
    }


def _inspect_next(worker: InspectWorker, served: ServedModel, ids: list[int], body: NextTokenRequest) -> dict[str, Any]:
    sampling = body.sampling()
    sampling.check_token_ids(served.model.config.vocab_size)
    check_token_id(served, body.asked)
    ids = ids or [served.tokenizer.end_of_text]  # an empty text begins after the end of another
    prompt_length = len(ids) if body.prompt_length is None else min(body.prompt_length, len(ids))
    history = History(ids, prompt_length, served.tokenizer.end_tokens)
    logits = next_logits(served.model, ids, worker.text(served))
    return asdict(top_candidates(logits, served.tokenizer, sampling, history, body.top, body.asked))


def _inspect_score(
    worker: InspectWorker, served: ServedModel, ids: list[int], body: ScoreTextRequest
) -> dict[str, Any]:
    tokenizer = served.tokenizer
    scored = score_tokens(served.model, tokenizer, ids, worker.text(served)) if ids else []
    first = [
        {"id": token, "text": token_text(tokenizer, token), "logprob": None, "rank": None}
        | {"bytes": partial_bytes(tokenizer, token)}
        for token in ids[:1]
    ]
    rows = zip(first + [asdict(token) for token in scored], token_offsets(tokenizer, ids), strict=True)
    tokens = [token | {"start": offset} for token, offset in rows]
    if body.top and ids:
        if len(ids) > served.model.config.block_size:
            raise RequestError(f"top needs a text that fits the context of {served.model.config.block_size} tokens")
        for token, likely in zip(tokens[1:], worker.text(served).update(ids).top(body.top, len(ids)), strict=True):
            token["top"] = [{"text": token_text(tokenizer, i), "probability": round(p, 6)} for i, p in likely]
    return {"tokens": tokens, "perplexity": perplexity(scored), "count": len(ids)}


def _inspect_attention(
    worker: InspectWorker, served: ServedModel, ids: list[int], body: AttentionRequest
) -> dict[str, Any]:
    ids, position, start = context_window(served, ids, body.position)
    weights = attention_weights(served.model, ids, position, worker.text(served))
    texts = [token_text(served.tokenizer, token) for token in ids[: position + 1]]
    offsets = token_offsets(served.tokenizer, ids[: position + 1])
    return {
        "start": start,
        "position": start + position,
        "texts": texts,
        "offsets": offsets,
        "weights": _round_weights(weights),
    }


def _inspect_lens(worker: InspectWorker, served: ServedModel, ids: list[int], body: LogitLensRequest) -> dict[str, Any]:
    check_token_id(served, body.asked)
    ids, position, start = context_window(served, ids, body.position)
    layers = logit_lens(served.model, served.tokenizer, ids, position, body.top, body.asked, worker.text(served))
    return {"start": start, "position": start + position, "layers": [asdict(layer) for layer in layers]}


def _round_weights(weights: Tensor) -> list[list[list[float]]]:
    """Round to five decimals, which is enough to draw them, to keep the response small."""
    return [[[round(w, 5) for w in head] for head in layer] for layer in weights.tolist()]
