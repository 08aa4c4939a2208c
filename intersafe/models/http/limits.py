"""How many calls one server gets at once, and how long it may stay away.

The limit follows AIMD, as TCP finds the capacity of a path, and remembers its ceiling as TCP CUBIC does (RFC 9438). A
429 or 503 lowers it once for all calls that were in flight together. A few rounds of successes bring it back to just
below the level that was refused. There it stays for a while before it probes further. `hold` starts no request until a
moment of the event loop's clock (`Retry-After`, an outage). `Outage` says how long that should be, and when the
patience is used up.
"""

import asyncio
import math
import random
from collections import deque

DECREASE = 0.75
LONGEST_PAUSE = 30.0
"""Seconds between two requests to a server that is away, at most."""

_RECOVERY = 4.0  # rounds from the lowered limit to just below the ceiling; a round is one success per slot
_FIRST_STAY, _LONGEST_STAY = 8.0, 32.0  # rounds there before the ceiling is tried again, longer each time it holds
_UNSURE = 0.5  # rounds back where a level below the known ceiling was refused, and no stay


class QueueCleared(Exception):
    """The server went away while the call waited for a slot; raised by `Limiter.acquire`."""


class Limiter:
    """A fair queue in front of one server: `started = await acquire()` before a request, `release()` after it."""

    def __init__(self, most: int) -> None:
        """`most`: the largest limit, in requests."""
        self._most = self._limit = self._low = float(most)
        self._ceiling = math.inf
        self._recovery, self._stay = _UNSURE, 0.0
        self._rounds = 0.0
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[bool]] = deque()
        self._held_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._lowered_at = float("-inf")

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at least 1."""
        return max(1, int(self._limit))

    @property
    def in_flight(self) -> int:
        """Slots that are taken."""
        return self._in_flight

    @property
    def is_held(self) -> bool:
        """True while no request may start."""
        return asyncio.get_running_loop().time() < self._held_until

    async def acquire(self) -> float:
        """Waits for a slot, first come first served; returns the time at which the request starts.

        `QueueCleared` if the server goes away meanwhile.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._in_flight + 1 <= self._limit and now >= self._held_until and not self._waiting:
            self._in_flight += 1
            return now
        slot: asyncio.Future[bool] = loop.create_future()
        self._waiting.append(slot)
        self._hand_over()
        try:
            if not await slot:
                raise QueueCleared
        except asyncio.CancelledError:
            if not slot.cancelled() and slot.result():
                self.release()  # the slot was handed over before the cancellation arrived
            raise
        return loop.time()

    def release(self) -> None:
        """Gives the slot back."""
        self._in_flight -= 1
        if self._waiting:
            self._hand_over()

    def _hand_over(self) -> None:
        """Takes the slot for the next call in the queue, so that a newcomer cannot take it in between."""
        if self.is_held:
            return  # the timer does it
        while self._waiting and self._in_flight < self.limit:
            slot = self._waiting.popleft()
            if not slot.done():
                self._in_flight += 1
                slot.set_result(True)

    def clear_queue(self) -> None:
        """Ends the waiting of every call in the queue with `QueueCleared`."""
        while self._waiting:
            slot = self._waiting.popleft()
            if not slot.done():
                slot.set_result(False)

    def succeeded(self) -> None:
        """A request was answered: back to the ceiling in a few rounds, a stay below it, then beyond with growing steps.

        A limit that is not reached teaches nothing: with most slots empty the server might refuse the next level too.
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

        If nothing was answered since then, the server is away rather than full: its ceiling is not known better. A
        refusal below the ceiling is a smaller capacity or chance, so the way back is short and the next one tells. A
        time-out (`is_late`) is neither, and comes too late for a short way back.
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
        """Changes the largest limit; a limit that had reached it moves with it."""
        if self._limit >= self._most or self._limit > most:
            self._limit = self._low = float(most)
        self._most = float(most)
        self._hand_over()

    def hold(self, seconds: float) -> None:
        """Starts no request for that long; a longer hold wins."""
        loop = asyncio.get_running_loop()
        if (until := loop.time() + seconds) > self._held_until:
            self._set_timer(loop, until)

    def resume(self) -> None:
        """Ends a hold."""
        self._held_until = 0.0
        if self._timer:
            self._timer.cancel()
        self._hand_over()

    def _set_timer(self, loop: asyncio.AbstractEventLoop, until: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._held_until = until
        self._timer = loop.call_at(until, self._wake)

    def _wake(self) -> None:
        """The loop's clock is coarse: a timer may fire a moment early."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._held_until:
            self._set_timer(loop, self._held_until)
        else:
            self._hand_over()


class Outage:
    """The clock of an outage: it starts at the first fault and ends with the first answer after it."""

    def __init__(self, patience: float) -> None:
        """`patience`: seconds that an outage may last."""
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
        """A request that was sent at `started` was answered; returns how many seconds the outage had lasted."""
        lasted = self.seconds
        self._since, self._pauses = None, 0
        self.answered = max(self.answered, started)
        return lasted

    def begin(self) -> None:
        """A fault; the first one starts the clock."""
        if self._since is None:
            self._since = asyncio.get_running_loop().time()

    def is_over_patience(self, started: float) -> bool:
        """True if even a request that was sent after the first fault, at `started`, got no answer in time."""
        return self._since is not None and started > self._since and self.seconds >= self._patience

    def pause(self, started: float, least: float = 0.0, left: float | None = None) -> float:
        """Seconds to wait before the next request: 1/16, 1/8 ... 30, at least `least`, at most the patience `left`.

        It grows once for all requests that were in flight together: a burst of faults is one fault.
        """
        now = asyncio.get_running_loop().time()
        if started > self._paused_at:
            self._pauses += 1
            self._paused_at = now
        growing = min(LONGEST_PAUSE, 2.0 ** min(self._pauses, 16) / 32) * random.uniform(0.75, 1.25)
        return max(0.0, min(max(growing, least), self._patience - self.seconds if left is None else left))
