"""The application: every path, and errors in OpenAI's form."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from gpt2 import __version__
from gpt2.errors import UserError, did_you_mean
from gpt2.serve import chat_completions, completions, schema
from gpt2.serve.errors import APIError, to_api_error
from gpt2.serve.limits import Limits
from gpt2.serve.metrics import Metrics
from gpt2.serve.middleware import AccessPolicy, RequestMiddleware
from gpt2.serve.models import ServedModel, find_model
from gpt2.serve.playground import playground_router
from gpt2.serve.response_stream import ParsedRequest, ResponseStream
from gpt2.serve.sse import SSEResponse, json_response

REQUEST_FIELDS = {*schema.CompletionRequest.model_fields, *schema.ChatRequest.model_fields, "text", "tokens"}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorBody, "description": about}
    for status, about in {
        400: "The request is wrong: `param` names the field",
        401: "The API key is missing or wrong",
        403: "The request comes from another site",
        404: "There is no such model",
        408: "The request did not arrive in time",
        413: "The request is too large",
        429: "Too many requests: see Retry-After",
        500: "The model is damaged, or the server has a fault",
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
) -> FastAPI:
    """The server of these models, by name; the first is the default. Its schedulers run while it does.

    limits:      how much a client may ask for.
    access:      who may ask; by default everybody who can reach it.
    log_prompts: tell the log what was asked, which it does not say otherwise.
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
    app.state.models, app.state.limits = dict(models), limits
    _add_openai_routes(app, limits, metrics, log_prompts)
    _add_utility_routes(app, metrics)
    playground = playground_router(dict(models))
    app.include_router(playground)
    _add_exception_handlers(app)
    _customize_openapi(app)
    paths = [path for route in (*app.routes, *playground.routes) if (path := getattr(route, "path", ""))]
    app.add_middleware(RequestMiddleware, access=access, max_body=limits.max_body, metrics=metrics, paths=paths)
    return app


def _add_openai_routes(app: FastAPI, limits: Limits, metrics: Metrics, log_prompts: bool) -> None:
    models: Mapping[str, ServedModel] = app.state.models

    def begin(request: Request, body: schema.CommonRequestFields, ask: ParsedRequest) -> ResponseStream:
        if log_prompts:
            _log.info("prompt %s", body.model_dump_json(exclude_none=True))
        return ResponseStream(ask, request.scope["gpt2.client"], limits, metrics)

    @app.post("/v1/completions", response_model=schema.Completion)
    async def create_completion(body: schema.CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        ask = completions.parse_request(body, find_model(models, body.model), limits)
        reply = begin(request, body, ask)
        if body.stream:
            return SSEResponse(completions.completion_chunks(body, reply))
        return await json_response(request, completions.completion(body, reply))

    @app.post("/v1/chat/completions", response_model=schema.ChatCompletion)
    async def create_chat_completion(body: schema.ChatRequest, request: Request) -> Response:
        """Go on with a conversation."""
        ask = chat_completions.parse_request(body, find_model(models, body.model), limits)
        reply = begin(request, body, ask)
        if body.stream:
            return SSEResponse(chat_completions.chat_completion_chunks(body, reply))
        return await json_response(request, chat_completions.chat_completion(body, reply))

    @app.get("/v1/models", response_model=schema.ModelList)
    async def list_models() -> dict[str, Any]:
        """The models that are served."""
        return {"object": "list", "data": [_model_info(served) for served in models.values()]}

    @app.get("/v1/models/{model:path}", response_model=schema.ModelInfo)
    async def retrieve_model(model: str) -> dict[str, Any]:
        """One of them."""
        return _model_info(find_model(models, model))


def _model_info(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "gpt2",
        "context_length": served.scheduler.context_length,
        "vocab_size": served.model.config.vocab_size,
    }


def _add_utility_routes(app: FastAPI, metrics: Metrics) -> None:
    models: Mapping[str, ServedModel] = app.state.models

    @app.post("/tokenize", response_model=schema.TokenizeResponse)
    def tokenize(body: schema.TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text."""
        tokenizer = find_model(models, body.model).tokenizer
        tokens = tokenizer.encode(body.text, allow_special=True)
        return {"tokens": tokens, "texts": [tokenizer.decode([token]) for token in tokens], "count": len(tokens)}

    @app.post("/detokenize", response_model=schema.DetokenizeResponse)
    def detokenize(body: schema.DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        try:
            return {"text": find_model(models, body.model).tokenizer.decode(body.tokens)}
        except UserError as error:
            raise APIError(400, str(error), "tokens") from None

    @app.get("/health", response_model=schema.Health)
    async def health() -> JSONResponse:
        """Whether the server takes requests."""
        schedulers = {name: served.scheduler for name, served in models.items()}
        busy = {
            name: {"running": one.running, "waiting": one.waiting, "slots": one.slots}
            for name, one in schedulers.items()
        }
        broken = not all(one.alive for one in schedulers.values())
        status = "broken" if broken else "draining" if any(one.draining for one in schedulers.values()) else "ok"
        return JSONResponse({"status": status, "models": busy}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def tell_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def _add_exception_handlers(app: FastAPI) -> None:
    async def tell_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error.response()

    async def tell_user_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        return to_api_error(error).response()

    async def tell_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors()).response()

    async def tell_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = APIError(error.status_code, _http_error_message(request, error)).response()
        response.headers.update(error.headers or {})
        return response

    async def tell_fault(request: Request, error: Exception) -> Response:
        return APIError(500, "this is a fault of the server: its log says more").response()

    app.add_exception_handler(APIError, tell_error)
    app.add_exception_handler(UserError, tell_user_error)
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.add_exception_handler(HTTPException, tell_http)
    app.add_exception_handler(Exception, tell_fault)


def _http_error_message(request: Request, error: HTTPException) -> str:
    path = ascii(request.url.path)[1:-1][:100]
    if error.status_code == 404:
        return f"there is no {path} here"
    if error.status_code == 405:
        return f"{path} does not answer {request.method}"
    return str(error.detail)


def _validation_error(errors: Sequence[Any]) -> APIError:
    """The first thing that is wrong with a request, by the name of its field."""
    problem = errors[0]
    where = [part for part in problem["loc"][1:] if isinstance(part, str | int)]
    if problem["type"] == "json_invalid":
        return APIError(400, "the request is not JSON")
    if not where:
        return APIError(400, "the request must be a JSON object, sent as application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        name = str(where[-1])[:100]
        return APIError(
            400, f"there is no field '{name}'{did_you_mean(name, REQUEST_FIELDS)}", param[:200], "unknown_field"
        )
    return APIError(400, f"{param}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"[:500], param[:200])


def _customize_openapi(app: FastAPI) -> None:
    """What /openapi.json says: our own error for requests that are not valid, which FastAPI believes to be 422."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            about = plain()
            for operations in about["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                about["components"]["schemas"].pop(name, None)
            for path in ("/v1/completions", "/v1/chat/completions"):
                about["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {
                    "schema": {"type": "string"}
                }
        return app.openapi_schema or plain()

    app.openapi = described
