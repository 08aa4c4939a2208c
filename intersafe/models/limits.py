"""How many calls one model is given at once: AIMD, as TCP finds the capacity of a line.

A 429 or 503 lowers the limit once for all calls that were in flight together; every success raises it a little again.
`hold` keeps all new calls of the model back until a moment of the event loop's clock (`Retry-After`, an outage).
"""

import asyncio
from collections import deque

DECREASE = 0.75


class Limiter:
    """A fair gate in front of one model: `started = await acquire()` before a request, `release()` after it."""

    def __init__(self, most: int) -> None:
        """`most`: the ceiling, in requests."""
        self._most = float(most)
        self._limit = float(most)
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._held_until = 0.0
        self._lowered_at = float("-inf")

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at least 1."""
        return max(1, int(self._limit))

    async def acquire(self) -> float:
        """Waits for a place; returns the moment at which the request starts."""
        loop = asyncio.get_running_loop()
        while True:
            pause = self._held_until - loop.time()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self._in_flight >= self.limit:
                await self._wait(loop)
            else:
                self._in_flight += 1
                return loop.time()

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:
                self._wake()  # the place that this task was given goes to the next one
            raise

    def release(self) -> None:
        """Gives the place back."""
        self._in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        for _ in range(min(self.limit - self._in_flight, len(self._waiting))):
            self._waiting.popleft().set_result(None)

    def succeeded(self) -> None:
        """Raises the limit by one for each full round of successes."""
        if self._limit < self._most:
            self._limit = min(self._most, self._limit + 1 / self._limit)
            self._wake()

    def overloaded(self, started: float) -> None:
        """Lowers the limit, once for all requests that were under way when it was last lowered."""
        if started > self._lowered_at:
            self._limit = max(1.0, self._limit * DECREASE)
            self._lowered_at = asyncio.get_running_loop().time()

    def hold(self, seconds: float) -> None:
        """Starts no request for so many seconds."""
        self._held_until = max(self._held_until, asyncio.get_running_loop().time() + seconds)
