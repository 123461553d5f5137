"""Responses as JSON or as server-sent events, cancelled when the client disconnects."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gpt2.serve.errors import APIError

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log: the client has disconnected
SEND_TIMEOUT_SECONDS = 60.0  # after which a client that does not read its stream is disconnected


async def run_until_disconnect(receive: Receive, coroutine: Coroutine[Any, Any, T]) -> T | None:
    """The result of the coroutine; None if the client disconnects first, which cancels it.

    receive: the ASGI channel, once the request body has been read.
    """
    task, disconnect = asyncio.create_task(coroutine), asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, disconnect):
            one.cancel()
        await asyncio.wait((task, disconnect))  # so that their slots are free afterwards


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def json_response(
    request: Request, coroutine: Coroutine[Any, Any, BaseModel], headers: Mapping[str, str] | None = None
) -> Response:
    """The result of the coroutine as JSON."""
    body = await run_until_disconnect(request.receive, coroutine)
    if body is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(body.model_dump(exclude_unset=True), headers=headers)


class SSEResponse(Response):
    """Server-sent events in OpenAI's form, with ``[DONE]`` at the end.

    An error before the first event is a response of its own, with its status; a later one is the last event. A client
    that does not read for `SEND_TIMEOUT_SECONDS` is disconnected.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[BaseModel], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"} | dict(headers or {}))
        del self.headers["content-length"]
        self._events, self._started = events, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(TimeoutError):
            await run_until_disconnect(receive, self._send_events(scope, receive, send))

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    body = event.model_dump(exclude_unset=True)
                    await self._send(
                        send, json.dumps(body, ensure_ascii=False, separators=(",", ":")), body.get("type")
                    )
        except APIError as error:
            if not self._started:
                await error.response()(scope, receive, send)
                return
            await self._send(send, error.body)
        await self._send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, data: str, event_type: str | None = None) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        name = f"event: {event_type}\n" if event_type else ""
        body = f"{name}data: {data}\n\n".encode("utf-8", "replace")
        async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await asyncio.sleep(0)  # lets a disconnect be noticed before the next event
