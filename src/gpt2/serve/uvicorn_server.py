"""The server process: its socket, timeouts for slow clients, and a graceful shutdown."""

import asyncio
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt2.errors import ConfigError
from gpt2.serve.errors import APIError
from gpt2.serve.models import ServedModel
from gpt2.serve.sse import SEND_TIMEOUT_SECONDS

CONNECTION_CLOSE_SECONDS = 3  # for open responses, once all sequences have finished
HEADER_TIMEOUT_SECONDS = 30.0  # for the header of a request to arrive
ACCEPTS = 16  # connections that asyncio accepts in one go
ACCEPTS_IN_FLIGHT = 6 * ACCEPTS  # accepted, and not closed yet though they are beyond the limit
BACKLOG = 1024  # connections that the system holds until they are accepted
RESERVED_DESCRIPTORS = 64  # for files, pipes and the sockets that listen
CLOSED_LOG_SECONDS = 60.0

_log = logging.getLogger("gpt2.serve")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one. Raises ConfigError if it cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: there is no such address ({error})", field="host") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_TIMEOUT_SECONDS))
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = "is in use" if error.errno in (48, 98, 10048) else f"cannot be used: {error.strerror}"
        message = f"port {port} on {host} {reason}; choose another --port, or 0 for a free one"
        raise ConfigError(message, field="port") from error
    return bound


def base_url(listener: socket.socket) -> str:
    """The address of the socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def max_connections() -> int:
    """The most open connections: fewer than the file descriptors of the process, so that accepting never fails."""
    try:
        import resource
    except ImportError:  # Windows
        return 10_000
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return 10_000
    return max(1, min(10_000, descriptors - ACCEPTS_IN_FLIGHT - max(RESERVED_DESCRIPTORS, descriptors // 4)))


class OpenConnections:
    """The open connections of one server, of which those that wait for a header are closed when there are too many."""

    def __init__(self) -> None:
        self.waiting: dict[LimitedProtocol, None] = {}  # for the header of a request, the oldest first
        self._num_closed, self._next_warning = 0, 0.0

    def log_closed(self, reason: str) -> None:
        """Count a connection that was closed, with one warning a minute."""
        self._num_closed += 1
        if time.monotonic() >= self._next_warning:
            _log.warning("%d connection(s) closed: %s", self._num_closed, reason)
            self._num_closed, self._next_warning = 0, time.monotonic() + CLOSED_LOG_SECONDS


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with limits: on open connections, and on the time in which the header of a request arrives.

    A connection beyond the limit replaces the one that has waited longest for a header; if none waits, it is closed.
    """

    _header_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, open_connections: OpenConnections, **given: Any) -> None:
        super().__init__(*args, **given)
        self._open_connections = open_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Start the timer for the first request, and close a connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) <= (limit := max_connections()):
            self._update_header_timer(True)
            return
        self._open_connections.log_closed(f"{limit} are open, the most allowed")
        oldest = next(iter(self._open_connections.waiting), None)
        if oldest is None:
            transport.abort()
            return
        oldest.close_now()
        self._update_header_timer(True)

    def close_now(self) -> None:
        """Close the connection without a response; it no longer counts as open."""
        self._update_header_timer(False)
        self.connections.discard(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Stop the timer when the header is complete; data that is part of one does not reset it."""
        super().data_received(data)
        self._update_header_timer(self.cycle is None or self.cycle.response_complete)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        super().connection_lost(exc)
        self._update_header_timer(False)

    def _update_header_timer(self, waiting_for_header: bool) -> None:
        if waiting_for_header and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self.timeout_keep_alive_handler)
            self._open_connections.waiting[self] = None
        elif not waiting_for_header and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
            del self._open_connections.waiting[self]

    def send_400_response(self, msg: str) -> None:
        """Respond to data that is not HTTP with an error of ours, unless a response has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = bytes(APIError(400, "this is not HTTP/1.1").response().body)
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()


def limited_protocol(connections: OpenConnections | None = None) -> type[asyncio.Protocol]:
    """`LimitedProtocol` for one server, as uvicorn's `http` setting takes it."""
    return cast("type[asyncio.Protocol]", partial(LimitedProtocol, open_connections=connections or OpenConnections()))


class Server(uvicorn.Server):
    """Runs an application until SIGTERM or Ctrl-C; then refuses new requests, and waits for `grace_seconds`.

    A second signal ends the wait. The server stops with `broken` set when the scheduler thread of a model has died.
    """

    def __init__(
        self,
        app: FastAPI,
        models: Sequence[ServedModel],
        grace_seconds: float,
        on_ready: Callable[[], None],
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        self._open_connections = OpenConnections()
        config = uvicorn.Config(
            app,
            http=limited_protocol(self._open_connections),
            backlog=ACCEPTS,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=list(trusted_proxies),
            timeout_graceful_shutdown=CONNECTION_CLOSE_SECONDS,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 * 1024,
        )
        super().__init__(config)
        self._schedulers = [served.scheduler for served in models]
        self._grace_seconds, self._on_ready = grace_seconds, on_ready
        self._shutdown_deadline: float | None = None
        self.broken = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept requests, and call `on_ready`."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # uvicorn has one setting for this and for `ACCEPTS`
        asyncio.get_running_loop().set_exception_handler(self._handle_loop_error)
        self._on_ready()

    def _handle_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """One line a minute instead of a traceback for each connection when the system has no descriptors."""
        if str(context.get("message")).startswith("socket.accept()"):
            self._open_connections.log_closed("the system is out of file descriptors")
        else:
            loop.default_exception_handler(context)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown at the first signal, and end its wait at the second."""
        if self._shutdown_deadline is not None:
            self.force_exit = sig == signal.SIGINT and self._shutdown_deadline == 0
            self._shutdown_deadline = 0
            return
        self._shutdown_deadline = time.monotonic() + self._grace_seconds
        for scheduler in self._schedulers:
            scheduler.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; uvicorn asks ten times a second."""
        if self._shutdown_deadline is None:
            self.broken = not all(scheduler.alive for scheduler in self._schedulers)
            self.should_exit = self.should_exit or self.broken
        elif all(scheduler.idle for scheduler in self._schedulers):
            self.should_exit = True
        elif time.monotonic() > self._shutdown_deadline:
            for scheduler in self._schedulers:
                scheduler.abort()
        return await super().on_tick(counter)
