"""ASGI middleware for every request: API keys, hosts and origins, body size, security headers, metrics and log."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2.serve.errors import APIError
from gpt2.serve.metrics import Metrics

PUBLIC_PATHS = ("/", "/health", "/openapi.json", "/favicon.ico")  # and /static/: they need no API key
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # browsers leave them out
MAX_ARRIVING_BODIES = 64
BODY_TIMEOUT_SECONDS = 30.0  # for the whole body of a request to arrive
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}

_HOST_PATTERN = re.compile(r"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")  # RFC 3986, without user names

_log = logging.getLogger("gpt2.serve")


@dataclass(frozen=True)
class AccessPolicy:
    """Which requests are accepted.

    api_keys:      requests must have one of them as ``Authorization: Bearer KEY``; empty for no check.
    allowed_hosts: values of the Host header that are accepted, as a protection against DNS rebinding; None for any.
    """

    api_keys: Sequence[str] = ()
    allowed_hosts: Sequence[str] | None = None


class RequestMiddleware:
    """Checks each request before the application, adds security headers, counts it and logs it."""

    def __init__(
        self, app: ASGIApp, access: AccessPolicy, max_body: int, metrics: Metrics, paths: Sequence[str]
    ) -> None:
        self._app, self._max_body, self._metrics, self._paths = app, max_body, metrics, set(paths)
        self._num_arriving_bytes = 0
        self._digests = [_digest(key) for key in access.api_keys]
        self._hosts = None if access.allowed_hosts is None else {host.lower() for host in access.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_time, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            key = self._check_key(scope["path"], headers)
            address = (scope.get("client") or ("", 0))[0]
            scope["gpt2.client"] = f"key {key}" if len(self._digests) > 1 and key >= 0 else address
            _check_framing(headers)
            if scope["method"] == "POST" and scope["path"] in self._paths:  # no other route has a body to read
                receive = await self._read_body(headers, receive)
            await self._app(scope, receive, send_with_headers)
        except APIError as error:
            await error.response()(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            _log.warning("the response to %s is incomplete: the server is shutting down", ascii(scope["path"]))
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            client, milliseconds = scope.get("client") or ("?", 0), 1e3 * (time.monotonic() - start_time)
            _log.info("%s %s %s %s %.0f ms", client[0], scope["method"], ascii(scope["path"]), status, milliseconds)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            raise APIError(403, f"the host {host!r:.100} is not allowed: see gpt2 serve --allowed-host")
        origin = headers.get("origin")
        if origin is not None and not self._is_own_origin(origin, host):
            raise APIError(403, "requests from pages of other sites are not allowed")

    def _is_own_origin(self, origin: str, host: str) -> bool:
        """Whether an origin is this server: the same host and port, or a name of --allowed-host at a default port.

        A proxy or tunnel may pass on another Host than the browser's; only the names that were allowed are accepted.
        """
        scheme, netloc = _parse_origin(origin)
        if scheme not in DEFAULT_PORTS:
            return False
        netloc = netloc.removesuffix(DEFAULT_PORTS[scheme])
        allowed = (self._hosts or set()) - set(LOOPBACK_HOSTS)
        return netloc in ({host.lower().removesuffix(DEFAULT_PORTS[scheme])} | allowed) - {""}

    def _check_key(self, path: str, headers: Headers) -> int:
        """The index of the API key; -1 where no key is needed."""
        if not self._digests or path in PUBLIC_PATHS or path.startswith("/static/"):
            return -1
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip() if scheme.lower() == "bearer" else "")
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            problem = "the API key is wrong" if given else "no API key: send 'Authorization: Bearer KEY'"
            raise APIError(401, problem)
        return matches.index(True)

    async def _read_body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the whole body, up to the size limit. Returns a channel that gives the body, and then what follows.

        All bodies that are arriving have `MAX_ARRIVING_BODIES` times the size limit together.
        """
        length = headers.get("content-length", "")
        too_large = APIError(413, f"the request body has more than {self._max_body:,} bytes", code="request_too_large")
        if length.isdecimal() and int(length[:20]) > self._max_body:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
                while more:
                    message = await receive()
                    part = message.get("body", b"")
                    body += part
                    self._num_arriving_bytes += len(part)
                    if self._num_arriving_bytes > MAX_ARRIVING_BODIES * self._max_body:
                        raise APIError(429, "too many request bodies at the same time", retry_after=5)
                    more = message["type"] == "http.request" and message.get("more_body", False)
                    if len(body) > self._max_body:
                        raise too_large
        except TimeoutError:
            raise APIError(408, f"the request did not arrive within {BODY_TIMEOUT_SECONDS:g} seconds") from None
        finally:
            self._num_arriving_bytes -= len(body)
        return _ReplayReceive(bytes(body), receive)


class _ReplayReceive:
    """An ASGI channel that gives a body that was read already, and then what follows it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body_message: dict[str, Any] | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        first, self._body_message = self._body_message, None
        return first or await self._receive()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _check_framing(headers: Headers) -> None:
    """Refuse a request whose end two programs may see at different places (RFC 9112, section 6.3)."""
    if "content-length" in headers and "transfer-encoding" in headers:
        raise APIError(400, "a request has Content-Length or Transfer-Encoding, not both", closes=True)


def _hostname(host: str) -> str | None:
    """The name or address in a Host header; None for one with more than a port beside it."""
    if not _HOST_PATTERN.fullmatch(host):
        return None
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _parse_origin(origin: str) -> tuple[str, str]:
    """(scheme, host and port) of an origin in lower case; empty if it is not valid."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return "", ""
    return parts.scheme.lower(), parts.netloc.lower()
