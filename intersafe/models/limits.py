"""How many calls one server is given at once, and for how long it may stay away.

The limit follows AIMD, as TCP finds the capacity of a line: a 429 or 503 lowers it once for all calls that were in
flight together, every success raises it a little again. `hold` keeps all new calls back until a moment of the event
loop's clock (`Retry-After`, an outage); `Absence` says how long that should be and when the patience is used up.
"""

import asyncio
import email.utils
import random
import time
from collections import deque

DECREASE = 0.75
LONGEST_PAUSE = 30.0


class Limiter:
    """A fair gate in front of one server: `started = await acquire()` before a request, `release()` after it."""

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

    @property
    def in_flight(self) -> int:
        """Places that are taken."""
        return self._in_flight

    async def acquire(self) -> float:
        """Waits for a place, first come first served; returns the moment at which the request starts."""
        loop = asyncio.get_running_loop()
        if self._in_flight >= self.limit:  # so it is whenever somebody waits
            await self._turn(loop)
        else:
            self._in_flight += 1
        while (pause := self._held_until - loop.time()) > 0:
            try:
                await asyncio.sleep(pause)
            except asyncio.CancelledError:
                self.release()
                raise
        return loop.time()

    async def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.release()  # the place was handed over before the cancellation arrived
            raise

    def release(self) -> None:
        """Gives the place back."""
        self._in_flight -= 1
        self._hand_over()

    def _hand_over(self) -> None:
        """Counts the place for the one who waits, so that a newcomer cannot take it in between."""
        while self._waiting and self._in_flight < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)

    def succeeded(self) -> None:
        """Raises the limit by one for each full round of successes."""
        if self._limit < self._most:
            self._limit = min(self._most, self._limit + 1 / self._limit)
            self._hand_over()

    def overloaded(self, started: float) -> None:
        """Lowers the limit below what is in flight, once for all requests that started before it was last lowered."""
        if started > self._lowered_at:
            self._limit = max(1.0, min(self._limit, self._in_flight) * DECREASE)
            self._lowered_at = asyncio.get_running_loop().time()

    def hold(self, seconds: float) -> None:
        """Starts no request for so many seconds."""
        self._held_until = max(self._held_until, asyncio.get_running_loop().time() + seconds)


class Absence:
    """How long a server has not answered: since its first fault without an answer after it."""

    def __init__(self, patience: float) -> None:
        """`patience`: seconds that it may last."""
        self._patience = patience
        self._since: float | None = None
        self._pauses = 0
        self._paused_at = float("-inf")
        self.answered = float("-inf")
        """When the latest of the answered requests was sent."""

    @property
    def seconds(self) -> float:
        """How long it has lasted, 0 while the server answers."""
        return 0.0 if self._since is None else asyncio.get_running_loop().time() - self._since

    def end(self, started: float) -> float:
        """A request that was sent at `started` was answered; returns how long the absence had lasted."""
        lasted = self.seconds
        self._since, self._pauses = None, 0
        self.answered = max(self.answered, started)
        return lasted

    def begin(self) -> None:
        """A fault; the first one starts the clock."""
        if self._since is None:
            self._since = asyncio.get_running_loop().time()

    def is_over_patience(self, started: float) -> bool:
        """True if even a request that was sent after the first fault, at `started`, found nobody in time."""
        return self._since is not None and started > self._since and self.seconds >= self._patience

    def pause(self, started: float, least: float = 0.0) -> float:
        """Seconds to wait before the next request: 1/16, 1/8 ... 30, at least `least`, at most the patience left.

        It grows once for all requests that were under way together: a burst of faults is one fault.
        """
        now = asyncio.get_running_loop().time()
        if started > self._paused_at:
            self._pauses += 1
            self._paused_at = now
        growing = min(LONGEST_PAUSE, 2.0 ** min(self._pauses, 16) / 32) * random.uniform(0.75, 1.25)
        return max(0.0, min(max(growing, least), self._patience - self.seconds))


def seconds_of(retry_after: str) -> float:
    """A `Retry-After` header, in seconds or as a date (RFC 9110, 10.2.3), as 0 to 3600 seconds; 0 for nonsense."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(3600.0, max(0.0, seconds))
