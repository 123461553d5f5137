"""The server process: a socket of its own, one line when it is ready, and an end in which what runs is finished."""

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

from gpt2.errors import UserError
from gpt2.serve.errors import APIError
from gpt2.serve.models import ServedModel
from gpt2.serve.sse import SEND_TIMEOUT_SECONDS

CONNECTION_CLOSE_SECONDS = 3  # for answers on their way, once all texts have ended
HEADER_TIMEOUT_SECONDS = 30.0  # in which the head of a request has to arrive


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 takes a free one. Raises UserError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: there is no such address ({error})") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_TIMEOUT_SECONDS))
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = "is in use" if error.errno in (48, 98, 10048) else f"cannot be had: {error.strerror}"
        raise UserError(f"port {port} on {host} {reason}; choose another --port, or 0 for a free one") from error
    return bound


def base_url(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's, with an end to its patience: a client has `HEAD_SECONDS` for the head of its request."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The time for the first request begins."""
        super().connection_made(transport)
        self._update_header_timer(True)

    def data_received(self, data: bytes) -> None:
        """It goes on whatever comes in drops, and ends with a whole head."""
        super().data_received(data)
        self._update_header_timer(self.cycle is None or self.cycle.response_complete)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        super().connection_lost(exc)
        self._update_header_timer(False)

    def _update_header_timer(self, waiting_for_header: bool) -> None:
        if waiting_for_header and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self.timeout_keep_alive_handler)
        elif not waiting_for_header and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of ours, unless an answer is on its way already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = bytes(APIError(400, "this is not HTTP/1.1").response().body)
            head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Runs an app until SIGTERM or Ctrl-C; then new requests are refused, and those that run may take `grace` seconds.

    A second signal ends that time. It ends by itself, with `broken` set, when the thread of a model has died.
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
        """Begin to answer, and say so."""
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._shutdown_deadline is not None:
            self.force_exit = sig == signal.SIGINT and self._shutdown_deadline == 0
            self._shutdown_deadline = 0
            return
        self._shutdown_deadline = time.monotonic() + self._grace_seconds
        for scheduler in self._schedulers:
            scheduler.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it time to go?"""
        if self._shutdown_deadline is None:
            self.broken = not all(scheduler.alive for scheduler in self._schedulers)
            self.should_exit = self.should_exit or self.broken
        elif all(scheduler.idle for scheduler in self._schedulers):
            self.should_exit = True
        elif time.monotonic() > self._shutdown_deadline:
            for scheduler in self._schedulers:
                scheduler.abort()
        return await super().on_tick(counter)
