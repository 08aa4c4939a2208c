"""Calls that wait - for a place, a quota, a pause, a server that is away - and end at once when no call may be sent.

A call on its way to a server is left alone: it is paid for.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

from intersafe.errors import BudgetReached

LOOK = 0.25
"""Seconds between two questions whether calls may be sent."""

_NOTHING = contextlib.nullcontext()  # may be entered any number of times


class Waits:
    """The calls of one service that are under way, and which of them only wait."""

    def __init__(self, may_send: Callable[[], None] | None) -> None:
        """`may_send` raises `BudgetReached` from the moment on when no call may be sent; None: there is no limit."""
        self._may_send = may_send
        self._waiting: dict[asyncio.Task[object] | None, asyncio.Timeout] = {}
        self._looking: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Looks no more."""
        if self._looking:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    def check(self) -> None:
        """Asked right before a call is sent; `BudgetReached` where it may not be."""
        if self._may_send:
            self._may_send()

    def ended_at_the_limit(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Around a call: `BudgetReached` if a limit is reached while it waits."""
        return self._ended_at_the_limit() if self._may_send else _NOTHING

    @contextlib.asynccontextmanager
    async def _ended_at_the_limit(self) -> AsyncIterator[None]:
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        task = asyncio.current_task()
        try:
            async with asyncio.timeout(None) as watch:
                self._waiting[task] = watch
                try:
                    yield
                finally:
                    self._waiting.pop(task, None)
        except TimeoutError:
            if watch.expired():
                self.check()
            raise

    def on_its_way(self) -> contextlib.AbstractContextManager[None]:
        """Around a request: meanwhile the call of this task does not wait."""
        return self._on_its_way() if self._may_send else _NOTHING

    @contextlib.contextmanager
    def _on_its_way(self) -> Iterator[None]:
        task = asyncio.current_task()
        watch = self._waiting.pop(task, None)
        try:
            yield
        finally:
            if watch:
                self._waiting[task] = watch

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            try:
                self.check()
            except BudgetReached:
                now = asyncio.get_running_loop().time()
                for watch in self._waiting.values():
                    if not watch.expired():
                        watch.reschedule(now)
