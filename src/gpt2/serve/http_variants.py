"""ASGI middleware in front of all others: spellings of paths, HEAD, request ids, and allowed origins (CORS)."""

import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "X-Request-Id"
EXPOSED_HEADERS = (REQUEST_ID_HEADER, "Retry-After", "Warning")
PREFLIGHT_SECONDS = 600  # for which a browser may keep the answer to a preflight request

_VALID_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class NormalizeRequests:
    """``//v1/models/`` is ``/v1/models``, HEAD is GET without the body, and every response has a request id.

    The id is the client's `X-Request-Id` if it sends a valid one, and a new one otherwise.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _VALID_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        head = scope["method"] == "HEAD"

        async def send_variant(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        path = re.sub("/+", "/", scope["path"])
        path = path.rstrip("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if head else scope["method"]}
        await self._app(scope, receive, send_variant)


class AllowOrigins:
    """CORS for pages of these origins; requests of other origins pass unchanged and are checked by the next app.

    origins: such as ``https://chat.example``; ``*`` for any.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        self._cors = CORSMiddleware(
            self._without_origin,
            allow_origin_regex=".*",  # those that are not allowed do not come here
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
            max_age=PREFLIGHT_SECONDS,
            allow_private_network=True,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        allowed = origin is not None and not self._origins.isdisjoint(("*", origin.lower()))
        await (self._cors if allowed else self._app)(scope, receive, send)

    async def _without_origin(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"origin"]
        await self._app({**scope, "headers": headers}, receive, send)
