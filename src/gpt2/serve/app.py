"""The FastAPI application: routes, error handlers and the OpenAPI schema."""

import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from gpt2 import __version__
from gpt2.errors import UserError, did_you_mean
from gpt2.serve import chat_completions, completions, responses, responses_schema, schema
from gpt2.serve.errors import APIError, to_api_error
from gpt2.serve.http_variants import AllowOrigins, NormalizeRequests
from gpt2.serve.json_route import JsonRoute
from gpt2.serve.limits import Limits
from gpt2.serve.metrics import Metrics
from gpt2.serve.middleware import AccessPolicy, RequestMiddleware
from gpt2.serve.models import ServedModel, find_model
from gpt2.serve.playground import playground_router
from gpt2.serve.response_stream import ParsedRequest, ResponseStream
from gpt2.serve.sse import SSEResponse, json_response
from gpt2.serve.tokenizer_threads import TokenizerThreads
from gpt2.terminal import shorten

JSON_PART_ITEMS = 10_000
REQUEST_TYPES = {
    "/v1/completions": schema.CompletionRequest,
    "/v1/chat/completions": schema.ChatRequest,
    "/v1/responses": responses_schema.ResponsesRequest,
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody, "description": description}
    for status, description in {
        400: "The request is invalid: `param` names the field",
        401: "The API key is missing or wrong",
        403: "The request comes from another site",
        404: "The model does not exist",
        408: "The request did not arrive in time",
        413: "The request body is too large",
        429: "Too many requests: see Retry-After",
        500: "The model has non-finite logits, or the server failed",
        503: "The server is shutting down",
        504: "The request took too long",
    }.items()
}

_log = logging.getLogger("gpt2.serve")


def create_app(
    models: Mapping[str, ServedModel],
    limits: Limits | None = None,
    access: AccessPolicy | None = None,
    log_prompts: bool = False,
    aliases: Mapping[str, str] | None = None,
    allowed_origins: Sequence[str] = (),
) -> FastAPI:
    """The application that serves these models by name; the first is the default. It starts and stops their schedulers.

    limits:      limits on what a client may request.
    access:      which requests are accepted; all of them by default.
    log_prompts: whether the bodies of requests are logged, prompts included.
    aliases:     {another name: name of a model}.
    allowed_origins: origins whose pages may use the server from a browser (CORS); ``*`` for any.
    """
    limits, access = limits or Limits(), access or AccessPolicy()
    metrics = Metrics(models)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for served in models.values():
            served.scheduler.start()
        yield
        for served in models.values():
            await run_in_threadpool(served.scheduler.stop)

    app = FastAPI(
        title="gpt2", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=ERROR_RESPONSES
    )
    app.router.route_class = JsonRoute
    app.state.models, app.state.limits = dict(models), limits
    app.state.tokenizer_threads = TokenizerThreads()
    names = {**models, **{alias: models[name] for alias, name in (aliases or {}).items()}}
    _add_openai_routes(app, names, limits, metrics, log_prompts)
    _add_utility_routes(app, names, metrics)
    playground = playground_router(dict(models))
    app.include_router(playground)
    for kind in (APIError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _error_response)
    _customize_openapi(app)
    paths = [path for route in (*app.routes, *playground.routes) if (path := getattr(route, "path", ""))]
    app.add_middleware(RequestMiddleware, access=access, max_body=limits.max_body, metrics=metrics, paths=paths)
    if allowed_origins:
        app.add_middleware(AllowOrigins, origins=allowed_origins)
    app.add_middleware(NormalizeRequests)
    return app


def _add_openai_routes(
    app: FastAPI, models: Mapping[str, ServedModel], limits: Limits, metrics: Metrics, log_prompts: bool
) -> None:
    threads: TokenizerThreads = app.state.tokenizer_threads

    def start(request: Request, body: BaseModel, parsed: ParsedRequest) -> ResponseStream:
        if log_prompts:
            _log.info("prompt %s", body.model_dump_json(exclude_none=True))
        return ResponseStream(parsed, request.scope["gpt2.client"], limits, metrics)

    @app.post("/v1/completions", response_model=schema.Completion)
    async def create_completion(body: schema.CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        parsed = await threads.run(completions.parse_request, body, find_model(models, body.model), limits)
        response = start(request, body, parsed)
        if body.stream:
            return SSEResponse(completions.completion_chunks(body, response))
        return await json_response(request, completions.completion(body, response))

    @app.post("/v1/chat/completions", response_model=schema.ChatCompletion)
    async def create_chat_completion(body: schema.ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        parsed = await threads.run(chat_completions.parse_request, body, find_model(models, body.model), limits)
        response = start(request, body, parsed)
        headers = _warning_header(body.warnings)
        if body.stream:
            return SSEResponse(chat_completions.chat_completion_chunks(body, response), headers)
        return await json_response(request, chat_completions.chat_completion(body, response), headers)

    @app.post("/v1/responses", response_model=responses_schema.ResponsesResponse)
    async def create_response(body: responses_schema.ResponsesRequest, request: Request) -> Response:
        """Continue a conversation; nothing is stored."""
        parsed = await threads.run(responses.parse_request, body, find_model(models, body.model), limits)
        response = start(request, body, parsed)
        headers = _warning_header(body.warnings)
        if body.stream:
            return SSEResponse(responses.response_events(body, response), headers)
        return await json_response(request, responses.create_response(body, response), headers)

    @app.get("/v1")
    async def list_endpoints() -> dict[str, list[str]]:
        """List the endpoints of the API."""
        operations = [f"{method.upper()} {path}" for path, item in app.openapi()["paths"].items() for method in item]
        return {"endpoints": operations}

    @app.get("/v1/models")
    async def list_models() -> schema.ModelList:
        """List the models that are served."""
        return schema.ModelList(object="list", data=[_model_info(name, served) for name, served in models.items()])

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> schema.ModelInfo:
        """Describe one model."""
        return _model_info(model, find_model(models, model))


def _warning_header(warnings: Sequence[str]) -> dict[str, str]:
    return {"Warning": ", ".join(f'299 gpt2 "{text}"' for text in warnings)} if warnings else {}


def _model_info(name: str, served: ServedModel) -> schema.ModelInfo:
    return schema.ModelInfo(
        id=name,
        object="model",
        created=served.created,
        owned_by="gpt2",
        context_length=served.scheduler.context_length,
        vocab_size=served.model.config.vocab_size,
    )


def _add_utility_routes(app: FastAPI, models: Mapping[str, ServedModel], metrics: Metrics) -> None:
    threads: TokenizerThreads = app.state.tokenizer_threads

    @app.post("/tokenize", response_model=schema.TokenizeResponse)
    async def tokenize(body: schema.TokenizeRequest) -> Response:
        """Encode a text."""
        return await threads.run(_tokenize, body, find_model(models, body.model))

    @app.post("/detokenize", response_model=schema.DetokenizeResponse)
    async def detokenize(body: schema.DetokenizeRequest) -> Response:
        """Decode tokens."""
        return await threads.run(_detokenize, body, find_model(models, body.model))

    @app.get("/health", response_model=schema.Health)
    async def health() -> JSONResponse:
        """Whether the server accepts requests."""
        schedulers = {served.name: served.scheduler for served in models.values()}
        load = {
            name: schema.ModelHealth(running=one.running, waiting=one.waiting, slots=one.slots)
            for name, one in schedulers.items()
        }
        broken = not all(one.alive for one in schedulers.values())
        status = "broken" if broken else "draining" if any(one.draining for one in schedulers.values()) else "ok"
        body = schema.Health(status=status, models=load)
        return JSONResponse(body.model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """The metrics in Prometheus' text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def _tokenize(body: schema.TokenizeRequest, served: ServedModel) -> Response:
    tokens = served.tokenizer.encode(body.given_text, allow_special=True)
    text_of = {token: served.tokenizer.decode([token]) for token in set(tokens)}  # of millions, few are different
    texts = [text_of[token] for token in tokens]
    parts = ('{"tokens":', *_json_list(tokens), ',"texts":', *_json_list(texts), f',"count":{len(tokens)}}}')
    return Response("".join(parts), media_type="application/json")


def _json_list(values: Sequence[Any]) -> Iterator[str]:
    """A JSON list in parts: the encoder holds the interpreter while it runs, and other threads run between parts."""
    yield "["
    for start in range(0, len(values), JSON_PART_ITEMS):
        encoded = json.dumps(values[start : start + JSON_PART_ITEMS], ensure_ascii=False, separators=(",", ":"))
        yield ("," if start else "") + encoded[1:-1]
    yield "]"


def _detokenize(body: schema.DetokenizeRequest, served: ServedModel) -> Response:
    try:
        return JSONResponse({"text": served.tokenizer.decode(body.tokens)})
    except UserError as error:
        raise APIError(400, str(error), "tokens") from None


async def _error_response(request: Request, error: Exception) -> Response:
    """The response for any exception of a route, in OpenAI's form."""
    if isinstance(error, APIError):
        return error.response()
    if isinstance(error, UserError):
        return to_api_error(error).response()
    if isinstance(error, RequestValidationError):
        body_type = getattr(request.scope.get("endpoint"), "__annotations__", {}).get("body")
        return _validation_error(error.errors(), body_type).response()
    if isinstance(error, HTTPException):
        response = APIError(error.status_code, _http_error_message(request, error)).response()
        response.headers.update(error.headers or {})
        return response
    return APIError(500, "the server failed: see its log").response()


def _http_error_message(request: Request, error: HTTPException) -> str:
    path = ascii(request.url.path)[1:-1][:100]
    if error.status_code == 404:
        return f"{path} does not exist"
    if error.status_code == 405:
        return f"{path} does not support {request.method}"
    return str(error.detail)


def _validation_error(errors: Sequence[Any], body_type: type[BaseModel] | None) -> APIError:
    """The error response for the first invalid field of a request of this type."""
    problem = errors[0]
    location = [part for part in problem["loc"][1:] if isinstance(part, str | int)]
    if problem["type"] == "json_invalid":
        return APIError(400, "the request is not JSON")
    if not location:
        return APIError(400, "the request must be a JSON object, sent as application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        message = _unknown_field_message(shorten(location[-1]), location, body_type)
        return APIError(400, message, param, "unknown_field")
    return APIError(400, f"{shorten(param)}: {shorten(problem['msg'][:1].lower() + problem['msg'][1:], 400)}", param)


def _unknown_field_message(name: str, location: Sequence[str | int], body_type: type[BaseModel] | None) -> str:
    """The message for a field that does not exist, with the most similar field of the same object."""
    if len(location) > 1:
        body_type = schema.StreamOptions if location[0] == "stream_options" else None
    elif elsewhere := [path for path, other in REQUEST_TYPES.items() if name in other.model_fields]:
        return f"there is no field '{name}' here: it is a field of {elsewhere[0]}"
    return f"there is no field '{name}'{did_you_mean(name, body_type.model_fields if body_type else ())}"


def _customize_openapi(app: FastAPI) -> None:
    """Correct /openapi.json: invalid requests get our 400 instead of FastAPI's 422, and completions may be streamed."""
    default = app.openapi

    def customized() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = default()
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            for path in REQUEST_TYPES:
                document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {
                    "schema": {"type": "string"}
                }
        return app.openapi_schema or default()

    app.openapi = customized
