"""Runs a coroutine to its end: from a terminal, in a notebook, and until a signal stops it."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from intersafe.errors import ServiceGone

SIGNAL_GRACE = 5.0
"""Seconds after a signal in which further ones are ignored, so that the run can close."""


def run_anywhere(make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs the coroutine to its end, in a thread of its own if a notebook's event loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(make())
        return
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None] | None]] = Future()

    async def work() -> None:
        begun.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        await make()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(lambda: asyncio.run(work()))
        outer = asyncio.current_task()
        try:
            while not wait((done,), timeout=0.2).done:
                # `asyncio.run` answers Ctrl-C by cancelling its task, which cannot notice while this call blocks.
                if outer is not None and outer.cancelling():
                    raise KeyboardInterrupt
            done.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            if task is not None:
                loop.call_soon_threadsafe(task.cancel)  # otherwise leaving the block would wait for the whole run
            raise


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP cancel the task once; the block then raises `KeyboardInterrupt`.

    An ignored signal stays ignored: with `nohup` a run outlives its terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {name: handler for name, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    stopped: list[float] = []

    def stop() -> None:
        # A second signal right after the first (from a shell and its user) must not interrupt the closing.
        if not stopped or loop.time() - stopped[-1] > SIGNAL_GRACE:
            stopped.append(loop.time())
            task.cancel()

    for name in before:
        loop.add_signal_handler(name, stop)
    try:
        yield
    except (asyncio.CancelledError, ServiceGone):
        # Ctrl-C in a terminal also stops the processes of an engine: that it is gone is expected then.
        if stopped:
            raise KeyboardInterrupt from None
        raise
    finally:
        for name, handler in before.items():
            loop.remove_signal_handler(name)
            signal.signal(name, handler)
