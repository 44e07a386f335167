"""How much the server takes on: the size of a request, how many are worked on, how many wait, and for how long."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from llava.serve.refusal import Refusal

LONGEST_RETRY_SECONDS = 60
_NEWEST_SHARE = 0.1
"""Weight of the newest request in the mean time that a request takes."""


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        body_bytes: largest body of a request.
        images: most images of a request.
        running: requests that are worked on at a time.
        waiting: further requests that wait for a place; all others are refused with status 429.
        seconds: from the first byte of a request to the end of its answer.
    """

    body_bytes: int = 32 * 2**20
    images: int = 8
    running: int = 64
    waiting: int = 256
    seconds: float = 600.0


class Gate:
    """Counts the requests that are in the house. All methods belong to one event loop.

    Attributes:
        is_draining: whether no request is admitted any more.
        num_admitted: requests in the house.
        num_running: those of them that are worked on.
    """

    def __init__(self, limits: Limits):
        self.is_draining = False
        self._limits = limits
        self._places = asyncio.Semaphore(limits.running)
        self.num_admitted = self.num_running = 0
        self._mean_seconds = 1.0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def num_waiting(self) -> int:
        """Requests that are admitted and not worked on: their body is read, or they wait for a place."""
        return self.num_admitted - self.num_running

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Let a request in, before its body is read.

        Raises:
            Refusal: 503 where the server is about to end, 429 where too many wait.
        """
        if self.is_draining:
            raise Refusal(
                "the server is shutting down: ask again, another one may answer",
                status=503, code="draining", headers={"Retry-After": "1"},
            )  # fmt: skip
        if self.num_admitted >= self._limits.running + self._limits.waiting:
            raise Refusal(
                f"{self._limits.waiting} requests are waiting already: ask again later",
                status=429, code="rate_limit_exceeded", headers={"Retry-After": str(self._guess_wait())},
            )  # fmt: skip
        self.num_admitted += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self.num_admitted -= 1
            if not self.num_admitted:
                self._is_empty.set()

    @asynccontextmanager
    async def take_place(self) -> AsyncIterator[None]:
        """Wait, in the order of arrival, until an admitted request may be worked on."""
        async with self._places:
            self.num_running += 1
            start = asyncio.get_running_loop().time()
            try:
                yield
            finally:
                self.num_running -= 1
                seconds = asyncio.get_running_loop().time() - start
                self._mean_seconds += _NEWEST_SHARE * (seconds - self._mean_seconds)

    def _guess_wait(self) -> int:
        """Guess after how many seconds a place in the queue is free: the time of as many requests as now wait."""
        seconds = self._mean_seconds * self.num_waiting / self._limits.running
        return max(1, min(round(seconds), LONGEST_RETRY_SECONDS))

    async def drain(self) -> None:
        """Admit nobody from now on, and return when the last request has left."""
        self.is_draining = True
        await self._is_empty.wait()
