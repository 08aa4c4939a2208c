"""A model library in this process: one thread owns it, and calls come and go singly, so that its batch stays full.

What the thread drives is a `Library` (`vllm.py`, `transformers.py`). One that cannot be loaded is an `InputError` of
the first call; one that dies is a `ServiceGone` of every call that waits for it, and the run can be gone on with.
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

LOOK = 0.5
"""Seconds between two looks whether an engine's processes are there."""
_LOADING = threading.RLock()
"""Held while a library loads: they measure free memory and switch settings of the whole process as they do so."""


class Asked(NamedTuple):
    """One call as a library takes it."""

    messages: tuple[Message, ...]
    sampling: Sampling
    schema: Schema | None
    extra: dict[str, Any]
    images: ImageStore


class Library(Protocol):
    """What the thread drives; all but `sample` and `is_alive` runs in that thread alone."""

    @property
    def is_busy(self) -> bool:
        """True while something that was taken in is not ended."""
        ...

    def add(self, number: int, asked: Asked) -> None:
        """Takes a call in; `JobEnded` where the engine will not have this one."""
        ...

    def step(self) -> Iterable[tuple[int, Reply | JobEnded]]:
        """Goes on with all that was taken in; those that ended."""
        ...

    def drop(self, number: int) -> None:
        """Nobody waits for that call any longer."""
        ...

    def sample(self) -> Sample | None:
        """What the engine says about itself; None where it says nothing."""
        ...

    def is_alive(self) -> bool:
        """False once a process of the engine is gone: the thread may wait for its answers forever."""
        ...

    def close(self) -> None:
        """Lets go of the device."""
        ...


Load = Callable[[], Library]


def refused(error: Exception) -> CallFailed:
    """What a library that will not have one conversation means for its job."""
    return refusal_of(" ".join(str(error).split())[:300])


def one_line(error: BaseException) -> str:
    """The first words of an error, with its kind."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def check_extra(extra: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """`InputError` for a field of `extra` that the library does not know: it is `what`."""
    for name in extra:
        if name not in known:
            raise InputError(f"extra: {name!r} is {what}" + nearest(name, list(known)), remedy="mend or drop it")


@dataclass(frozen=True)
class _Ask:
    number: int
    asked: Asked
    answered: "asyncio.Future[Reply]"


class EngineThread:
    """One engine and the calls that it works on."""

    def __init__(
        self,
        name: str,
        load: Load,
        concurrency: int,
        hooks: Hooks,
    ) -> None:
        """Begins to load, which `hooks.outages` says for as long as it lasts. Needs a running event loop.

        `concurrency`: most calls that the engine has at once.
        """
        self.name = name
        self._loop = asyncio.get_running_loop()
        self._pending, self._places = PendingCalls(hooks.may_send), asyncio.Semaphore(concurrency)
        self._orders: queue.SimpleQueue[_Ask | int | None] = queue.SimpleQueue()
        self._asked: dict[int, asyncio.Future[Reply]] = {}
        self._count, self._outages = 0, hooks.outages
        self._library: Library | None = None
        self._ended: IntersafeError | None = None
        self._is_closing = False
        self._log = stderr_file()
        self._is_loaded, self._is_over = asyncio.Event(), asyncio.Event()
        self._outages[name] = "it loads"
        self._looking: asyncio.Task[None] | None = None
        # A daemon: one that waits for an engine that is gone must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(load,), name=f"engine {name}", daemon=True)
        self._thread.start()

    async def answer(self, asked: Asked) -> Reply:
        """The reply; `CallFailed` if the engine will not have the call, `ServiceGone` if there is no engine."""
        async with self._pending.ended_at_limit():
            await self._is_loaded.wait()
            async with self._places:
                self._pending.check()
                with self._pending.in_flight():
                    return await self._ask(asked)

    async def _ask(self, asked: Asked) -> Reply:
        if self._ended:
            raise self._ended
        self._count += 1
        number = self._count
        answered: asyncio.Future[Reply] = self._loop.create_future()
        self._asked[number] = answered
        self._orders.put(_Ask(number, asked, answered))
        try:
            return await answered
        finally:
            if self._asked.pop(number, None) and not (answered.done() and not answered.cancelled()):
                self._orders.put(number)

    def sample(self) -> Sample | None:
        """What the engine says about itself; None while it loads, or where it says nothing."""
        return self._library.sample() if self._library and not self._ended else None

    async def aclose(self) -> None:
        """Lets go of the engine once the step that is under way has ended."""
        await self._pending.aclose()
        self._is_closing = True
        self._orders.put(None)
        # What still loads ends with this process; a step of an engine that is gone may never end.
        if self._library:
            await self._is_over.wait()
        if self._looking:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        self._fail(ServiceGone(f"the engine of {self.name} was closed"))  # nobody may wait for it any longer
        self._outages.pop(self.name, None)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self, load: Load) -> None:
        try:
            self._work(load)
        except BaseException as error:  # noqa: BLE001  whatever ends the thread has to reach those who wait for it
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
            while self._take_in(library):
                if library.is_busy:
                    for number, outcome in library.step():
                        self._tell(self._settle, number, outcome)
        finally:
            library.close()

    def _take_in(self, library: Library) -> bool:
        """Hands all that waits over, and waits for something where the engine has nothing to do; False: no more."""
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
                    library.add(order.number, order.asked)
                except JobEnded as error:
                    self._tell(self._settle, order.number, error)
        return True

    def _tell(self, act: Callable[..., None], *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any longer
            self._loop.call_soon_threadsafe(act, *values)

    # --- in the event loop -------------------------------------------------------------------------------------------

    def _loaded(self, library: Library) -> None:
        if self._is_closing:
            return
        self._library = library
        self._outages.pop(self.name, None)
        self._is_loaded.set()
        self._looking = asyncio.create_task(self._look(library))

    async def _look(self, library: Library) -> None:
        while not self._ended:
            await asyncio.sleep(LOOK)
            if not library.is_alive():
                self._fail(RuntimeError("its process is gone"))

    def _settle(self, number: int, outcome: Reply | JobEnded) -> None:
        answered = self._asked.get(number)
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
                f"the engine of {self.name} died ({what}), engines.log in the run says more; "
                "run the same command again: nothing is lost"
            )
        self._ended = error
        self._is_over.set()
        self._outages.pop(self.name, None)
        self._is_loaded.set()
        for answered in self._asked.values():
            if not answered.done():
                answered.set_exception(error)


class InProcessModel:
    """One member of the cast on an engine of this process, which others may share."""

    def __init__(self, member: Member, images: ImageStore, thread: EngineThread) -> None:
        self.identity = member.identity
        self.thread = thread
        self._member, self._images = member, images

    async def answer(self, call: Call) -> Reply:
        """The reply, as soon as the engine has it."""
        schema = call.schema if self._member.json_schema else None
        return await self.thread.answer(Asked(call.messages, call.sampling, schema, self._member.extra, self._images))

    async def aclose(self) -> None:
        """Lets go of the engine."""
        await self.thread.aclose()
