"""The server process: its socket, timeouts for slow clients, and a graceful shutdown."""

import asyncio
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType

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


class HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's protocol with a timeout: the header of a request must arrive within `HEADER_TIMEOUT_SECONDS`."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._update_header_timer(True)

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
        elif not waiting_for_header and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def send_400_response(self, msg: str) -> None:
        """Respond to data that is not HTTP with an error of ours, unless a response has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = bytes(APIError(400, "this is not HTTP/1.1").response().body)
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()


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
        config = uvicorn.Config(
            app,
            http=HeaderTimeoutProtocol,
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
        self._on_ready()

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
