"""Threads in which texts of requests are rendered and tokenized, so that other requests are served meanwhile."""

from collections.abc import Callable
from typing import TypeVar

import anyio

from gpt2.serve.errors import APIError

MAX_THREADS = 2
MAX_PENDING_REQUESTS = 64  # each holds its body in memory

Result = TypeVar("Result")


class TokenizerThreads:
    """At most `MAX_THREADS` functions run at the same time, and at most `MAX_PENDING_REQUESTS` run or wait."""

    def __init__(self) -> None:
        self._limiter, self._num_pending = anyio.CapacityLimiter(MAX_THREADS), 0

    async def run(self, function: Callable[..., Result], *args: object) -> Result:
        """The result of the function in a thread. Raises APIError 429 if too many wait."""
        if self._num_pending >= MAX_PENDING_REQUESTS:
            raise APIError(429, "too many texts are tokenized at the same time", retry_after=1)
        self._num_pending += 1
        try:
            return await anyio.to_thread.run_sync(lambda: function(*args), limiter=self._limiter)
        finally:
            self._num_pending -= 1
