"""Calls that wait for a slot, a quota, a pause or a server that is away: they end once no call may be sent.

A call that is in flight is not ended: it is paid for.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from intersafe.errors import BudgetReached

CHECK_EVERY = 0.25
"""Seconds between two checks whether calls may be sent."""

_NOTHING = contextlib.nullcontext()  # may be entered any number of times


class PendingCalls:
    """The calls of one service, and which of them only wait."""

    def __init__(self, may_send: Callable[[], None] | None) -> None:
        """`may_send` raises `BudgetReached` once no call may be sent; None: there is no limit."""
        self._may_send = may_send
        self._waiting: dict[asyncio.Task[object] | None, asyncio.Timeout] = {}
        self._checking: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Stops the checks."""
        if self._checking:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)

    def check(self) -> None:
        """Called right before a call is sent; `BudgetReached` where it may not be."""
        if self._may_send:
            self._may_send()

    def ended_at_limit(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Around a call: `BudgetReached` if a limit is reached while the call waits."""
        return self._ended_at_limit() if self._may_send else _NOTHING

    @contextlib.asynccontextmanager
    async def _ended_at_limit(self) -> AsyncIterator[None]:
        if self._checking is None:
            self._checking = asyncio.create_task(self._check_again_and_again())
        task = asyncio.current_task()
        try:
            async with asyncio.timeout(None) as timeout:
                self._waiting[task] = timeout
                try:
                    yield
                finally:
                    self._waiting.pop(task, None)
        except TimeoutError:
            if timeout.expired():
                self.check()
            raise

    def in_flight(self) -> contextlib.AbstractContextManager[None]:
        """Around a request: meanwhile the call of this task does not wait."""
        return self._in_flight() if self._may_send else _NOTHING

    @contextlib.contextmanager
    def _in_flight(self) -> Iterator[None]:
        task = asyncio.current_task()
        timeout = self._waiting.pop(task, None)
        try:
            yield
        finally:
            if timeout:
                self._waiting[task] = timeout

    async def _check_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY)
            try:
                self.check()
            except BudgetReached:
                now = asyncio.get_running_loop().time()
                for timeout in self._waiting.values():
                    if not timeout.expired():
                        timeout.reschedule(now)
