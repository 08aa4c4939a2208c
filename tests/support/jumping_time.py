"""An event loop whose time jumps to the next timer: minutes of waiting pass at once, and exactly."""

import asyncio
import random
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class JumpingLoop(asyncio.SelectorEventLoop):
    """Where nothing is ready, the time of the next timer is now."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_NeverWaits(self))

    def time(self) -> float:
        return self.now


class _NeverWaits(selectors.SelectSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.now += max(0.0, timeout or 0.0)
        return super().select(0)


def run(main: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns, in time that jumps; a deadlock fails at once."""
    random.seed(1)  # the jitter of the pauses

    async def bounded() -> T:
        return await asyncio.wait_for(main, 1_000_000)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(bounded())
