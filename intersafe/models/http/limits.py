"""How many calls one server is given at once, and for how long it may stay away.

The limit follows AIMD, as TCP finds the capacity of a line, and remembers its ceiling as TCP CUBIC does (RFC 9438): a
429 or 503 lowers it once for all calls that were in flight together, a few rounds of successes bring it back to just
below the level that was refused, and there it stays for a while before it feels its way further. `hold` keeps all new
calls back until a moment of the event loop's clock (`Retry-After`, an outage); `Absence` says how long that should be
and when the patience is used up.
"""

import asyncio
import email.utils
import math
import random
import time
from collections import deque

DECREASE = 0.75
LONGEST_PAUSE = 30.0

_RECOVERY = 4.0  # rounds from the lowered limit to just below the ceiling; a round is one success per place
_FIRST_STAY, _LONGEST_STAY = 8.0, 32.0  # rounds there before the ceiling is tried again, longer each time it holds
_UNSURE = 0.5  # rounds back where a level was refused that had been below the ceiling, and no stay


class TurnedAway(Exception):
    """The server is not there any longer for those who wait; raised by `Limiter.acquire`."""


class Limiter:
    """A fair gate in front of one server: `started = await acquire()` before a request, `release()` after it."""

    def __init__(self, most: int) -> None:
        """`most`: the largest limit, in requests."""
        self._most = self._limit = self._low = float(most)
        self._ceiling = math.inf
        self._recovery, self._stay = _UNSURE, 0.0
        self._rounds = 0.0
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._held_until = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._lowered_at = float("-inf")

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at least 1."""
        return max(1, int(self._limit))

    @property
    def in_flight(self) -> int:
        """Places that are taken."""
        return self._in_flight

    @property
    def is_held(self) -> bool:
        """True while no request may start."""
        return asyncio.get_running_loop().time() < self._held_until

    async def acquire(self) -> float:
        """Waits for a place, first come first served; returns the moment at which the request starts."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._in_flight + 1 <= self._limit and now >= self._held_until and not self._waiting:
            self._in_flight += 1
            return now
        turn: asyncio.Future[bool] = loop.create_future()
        self._waiting.append(turn)
        self._hand_over()
        try:
            if not await turn:
                raise TurnedAway
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():
                self.release()  # the place was handed over before the cancellation arrived
            raise
        return loop.time()

    def release(self) -> None:
        """Gives the place back."""
        self._in_flight -= 1
        if self._waiting:
            self._hand_over()

    def _hand_over(self) -> None:
        """Counts the place for the one who waits, so that a newcomer cannot take it in between."""
        if self.is_held:
            return  # the alarm does it
        while self._waiting and self._in_flight < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(True)

    def turn_away(self) -> None:
        """Sends all away who wait for a place."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(False)

    def succeeded(self) -> None:
        """A request was answered: back to the ceiling in a few rounds, a stay below it, then beyond with growing steps.

        A limit that is not reached learns nothing: with most places empty the server might refuse the next level too.
        """
        if self._limit >= self._most or 2 * self._in_flight < self._limit:
            return
        self._rounds += 1 / self._limit
        knee = max(1.0, self._ceiling - 1)
        if self._rounds < self._recovery:
            self._limit = max(self._limit, self._low + (knee - self._low) * self._rounds / self._recovery)
        else:
            self._limit = max(self._limit, knee + max(0.0, self._rounds - self._recovery - self._stay) ** 2)
        if self._limit >= self._most:
            self._limit, self._ceiling = self._most, math.inf
        self._hand_over()

    def overloaded(self, started: float, *, is_late: bool = False) -> None:
        """Lowers the limit below what is in flight, once for all requests that started before it was last lowered.

        Where nothing was answered since then the server is out rather than full: its ceiling is not known better. A
        refusal below the ceiling is a smaller capacity or mere chance, so that the way back is short: the next tells.
        A time-out (`is_late`) is neither, and comes too late for a short way back.
        """
        if started <= self._lowered_at:
            return
        level = max(1.0, min(self._limit, self._in_flight))
        if self._rounds > 0 or self._ceiling == math.inf:
            if is_late or level >= self._ceiling - 1:
                self._recovery, self._stay = _RECOVERY, min(_LONGEST_STAY, max(_FIRST_STAY, 2 * self._stay))
            else:
                self._recovery, self._stay = _UNSURE, 0.0
            self._ceiling = level
        self._low = self._limit = max(1.0, level * DECREASE)
        self._rounds = 0.0
        self._lowered_at = asyncio.get_running_loop().time()

    def resize(self, most: int) -> None:
        """Changes the largest limit; one that was reached is the limit at once."""
        if self._limit >= self._most or self._limit > most:
            self._limit = self._low = float(most)
        self._most = float(most)
        self._hand_over()

    def hold(self, seconds: float) -> None:
        """Starts no request for so many seconds."""
        loop = asyncio.get_running_loop()
        if (until := loop.time() + seconds) > self._held_until:
            self._set_alarm(loop, until)

    def resume(self) -> None:
        """Ends a hold."""
        self._held_until = 0.0
        if self._alarm:
            self._alarm.cancel()
        self._hand_over()

    def _set_alarm(self, loop: asyncio.AbstractEventLoop, until: float) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._held_until = until
        self._alarm = loop.call_at(until, self._wake)

    def _wake(self) -> None:
        """The loop's clock is coarse: a timer may ring a moment before its time."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._held_until:
            self._set_alarm(loop, self._held_until)
        else:
            self._hand_over()


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

    def pause(self, started: float, least: float = 0.0, left: float | None = None) -> float:
        """Seconds to wait before the next request: 1/16, 1/8 ... 30, at least `least`, at most the patience `left`.

        It grows once for all requests that were under way together: a burst of faults is one fault.
        """
        now = asyncio.get_running_loop().time()
        if started > self._paused_at:
            self._pauses += 1
            self._paused_at = now
        growing = min(LONGEST_PAUSE, 2.0 ** min(self._pauses, 16) / 32) * random.uniform(0.75, 1.25)
        return max(0.0, min(max(growing, least), self._patience - self.seconds if left is None else left))


def seconds_of(retry_after: str, date: str = "") -> float:
    """A `Retry-After` header, in seconds or as a date (RFC 9110, 10.2.3), as 0 to 3600 seconds; 0 for nonsense.

    A date is held against the answer's own `Date`, since our clock may be wrong.
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        until = _moment(retry_after)
        now = _moment(date) or time.time()
        seconds = until - now if until else 0.0
    return min(3600.0, max(0.0, seconds))


def _moment(date: str) -> float:
    """Seconds of an HTTP date since 1970; 0 where it is none."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return 0.0
