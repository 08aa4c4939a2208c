"""A model library in this process: one thread owns it, and calls enter and leave one by one, so its batch stays full.

The thread drives a `Library` (`vllm.py`, `transformers.py`). If it cannot be loaded, every call is an `InputError`. If
it dies, every call that waits for it is a `ServiceGone`, and the run can be resumed.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from intersafe.engines.failures import explain, log_lines
from intersafe.engines.log import stderr_file
from intersafe.engines.metrics import Sample
from intersafe.errors import CallFailed, InputError, IntersafeError, JobEnded, ServiceGone
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Reply, Sampling
from intersafe.models.http.faults import refusal_of
from intersafe.models.http.pending import PendingCalls
from intersafe.recipe.sections import Member
from intersafe.records import Message
from intersafe.replies import Schema
from intersafe.wording import nearest

CHECK_EVERY = 0.5
"""Seconds between two checks whether an engine's processes are alive."""
_LOADING = threading.RLock()
"""Held while a library loads: it measures free memory and changes settings of the whole process."""


class EngineCall(NamedTuple):
    """One call as a library gets it."""

    messages: tuple[Message, ...]
    sampling: Sampling
    schema: Schema | None
    extra: dict[str, Any]
    images: ImageStore


class Library(Protocol):
    """What the thread drives; all but `sample` and `is_alive` runs in that thread alone."""

    @property
    def is_busy(self) -> bool:
        """True while a call has not ended."""
        ...

    def add(self, number: int, call: EngineCall) -> None:
        """Accepts a call; `JobEnded` where the engine refuses it."""
        ...

    def step(self) -> Iterable[tuple[int, Reply | JobEnded]]:
        """One iteration over all accepted calls; yields those that ended, by number."""
        ...

    def drop(self, number: int) -> None:
        """Cancels a call, since nobody waits for it any longer."""
        ...

    def sample(self) -> Sample | None:
        """The engine's own metrics; None where it has none."""
        ...

    def is_alive(self) -> bool:
        """False once a process of the engine has ended: the thread may wait for its answers forever."""
        ...

    def close(self) -> None:
        """Frees the device."""
        ...


Load = Callable[[], Library]


def refused(error: Exception) -> CallFailed:
    """The failure of a call whose conversation a library refuses."""
    return refusal_of(" ".join(str(error).split())[:300])


def one_line(error: BaseException) -> str:
    """The type of an error and the first 300 characters of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def check_extra(extra: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """`InputError` for a field of `extra` that is not in `known`; the message says that it is `what`."""
    for name in extra:
        if name not in known:
            raise InputError(f"extra: {name!r} is {what}" + nearest(name, list(known)), remedy="correct or drop it")


@dataclass(frozen=True)
class _Order:
    """A call on its way to the thread."""

    number: int
    call: EngineCall
    answered: "asyncio.Future[Reply]"


class EngineThread:
    """One engine and its calls."""

    def __init__(
        self,
        name: str,
        load: Load,
        concurrency: int,
        hooks: Hooks,
    ) -> None:
        """Begins to load, which `hooks.outages` shows until it is done. Needs a running event loop.

        `concurrency`: most calls that the engine has at once.
        """
        self.name = name
        self._loop = asyncio.get_running_loop()
        self._pending, self._slots = PendingCalls(hooks.may_send), asyncio.Semaphore(concurrency)
        self._orders: queue.SimpleQueue[_Order | int | None] = queue.SimpleQueue()
        """A call, the number of one to cancel, or None: close."""
        self._answered: dict[int, asyncio.Future[Reply]] = {}
        """The replies that are waited for, by number of the call."""
        self._count, self._outages = 0, hooks.outages
        self._library: Library | None = None
        self._ended: IntersafeError | None = None
        self._is_closing = False
        self._log = stderr_file()
        self._is_loaded, self._is_over = asyncio.Event(), asyncio.Event()
        self._outages[name] = "it loads"
        self._checking: asyncio.Task[None] | None = None
        # A daemon: a thread that waits for a dead engine must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(load,), name=f"engine {name}", daemon=True)
        self._thread.start()

    async def answer(self, call: EngineCall) -> Reply:
        """The reply; `CallFailed` if the engine refuses the call, `ServiceGone` if the engine died."""
        async with self._pending.ended_at_limit():
            await self._is_loaded.wait()
            async with self._slots:
                self._pending.check()
                with self._pending.in_flight():
                    return await self._ask(call)

    async def _ask(self, call: EngineCall) -> Reply:
        if self._ended:
            raise self._ended
        self._count += 1
        number = self._count
        answered: asyncio.Future[Reply] = self._loop.create_future()
        self._answered[number] = answered
        self._orders.put(_Order(number, call, answered))
        try:
            return await answered
        finally:
            if self._answered.pop(number, None) and not (answered.done() and not answered.cancelled()):
                self._orders.put(number)

    def sample(self) -> Sample | None:
        """The engine's own metrics; None while it loads, or where it has none."""
        return self._library.sample() if self._library and not self._ended else None

    async def aclose(self) -> None:
        """Ends the engine after its current step."""
        await self._pending.aclose()
        self._is_closing = True
        self._orders.put(None)
        # A library that still loads ends with this process; a step of a dead engine may never end.
        if self._library:
            await self._is_over.wait()
        if self._checking:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        self._fail(ServiceGone(f"the engine of {self.name} was closed"))  # for calls that still wait
        self._outages.pop(self.name, None)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self, load: Load) -> None:
        try:
            self._work(load)
        except BaseException as error:  # noqa: BLE001  every error has to reach the calls that wait
            self._tell(self._fail, error)
        finally:
            self._tell(self._is_over.set)

    def _work(self, load: Load) -> None:
        with _LOADING:
            if self._is_closing:
                return
            library = load()
        try:
            self._tell(self._loaded, library)
            while self._accept_orders(library):
                if library.is_busy:
                    for number, outcome in library.step():
                        self._tell(self._settle, number, outcome)
        finally:
            library.close()

    def _accept_orders(self, library: Library) -> bool:
        """Passes all waiting orders on, and waits for one where the engine has nothing to do; False: close."""
        with contextlib.suppress(queue.Empty):
            while True:
                order = self._orders.get(block=not library.is_busy)
                if order is None:
                    return False
                if isinstance(order, int):
                    library.drop(order)
                    continue
                if order.answered.cancelled():
                    continue
                try:
                    library.add(order.number, order.call)
                except JobEnded as error:
                    self._tell(self._settle, order.number, error)
        return True

    def _tell(self, act: Callable[..., None], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no call waits
            self._loop.call_soon_threadsafe(act, *values)

    # --- in the event loop -------------------------------------------------------------------------------------------

    def _loaded(self, library: Library) -> None:
        if self._is_closing:
            return
        self._library = library
        self._outages.pop(self.name, None)
        self._is_loaded.set()
        self._checking = asyncio.create_task(self._check_again_and_again(library))

    async def _check_again_and_again(self, library: Library) -> None:
        while not self._ended:
            await asyncio.sleep(CHECK_EVERY)
            if not library.is_alive():
                self._fail(RuntimeError("its process has ended"))

    def _settle(self, number: int, outcome: Reply | JobEnded) -> None:
        answered = self._answered.get(number)
        if answered is None or answered.done():
            return
        if isinstance(outcome, JobEnded):
            answered.set_exception(outcome)
        else:
            answered.set_result(outcome)

    def _fail(self, error: BaseException) -> None:
        if self._ended:
            return
        if not isinstance(error, IntersafeError):
            said = log_lines(*self._log) if self._log else []
            what = explain(said, Path("engines.log"), had_answered=True).what or one_line(error)
            error = ServiceGone(
                f"the engine of {self.name} died ({what}), see engines.log in the run directory; "
                "run the same command again: nothing is lost"
            )
        self._ended = error
        self._is_over.set()
        self._outages.pop(self.name, None)
        self._is_loaded.set()
        for answered in self._answered.values():
            if not answered.done():
                answered.set_exception(error)


class InProcessModel:
    """One member of the cast on an engine of this process, which others may share."""

    def __init__(self, member: Member, images: ImageStore, thread: EngineThread) -> None:
        self.identity = member.identity
        self.thread = thread
        self._member, self._images = member, images

    async def answer(self, call: Call) -> Reply:
        """The reply; `CallFailed` if the engine refuses the call, `ServiceGone` if the engine died."""
        schema = call.schema if self._member.json_schema else None
        own = EngineCall(call.messages, call.sampling, schema, self._member.extra, self._images)
        return await self.thread.answer(own)

    async def aclose(self) -> None:
        """Ends the engine."""
        await self.thread.aclose()
