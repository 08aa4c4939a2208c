"""The batch lane: calls of members with `batch: true` go to the provider's batch endpoint, many in one file.

A *lane* is one model at one provider under one key. A call waits in the lane's *collection* until that is full or no
call was added for a while: then every dialogue that can continue is waiting. The collection becomes a batch, of which
several may be in progress. Each call takes its answer by its key, in this process or in a later one. Nothing is sent
before it is recorded on the disk (`files.py`). A batch that the provider has is followed again after a restart and
never sent twice (`api.py`).
"""

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from msgspec import structs

from intersafe.errors import BudgetReached, CallFailed, IntersafeError, ServiceGone, StorageError
from intersafe.models.base import Hooks, Reply
from intersafe.models.batch.api import ROUTE, TERMINAL, BatchApi, Pace, Refused, Remote
from intersafe.models.batch.files import BatchFolder, State, close, reply_in
from intersafe.models.http.faults import Transient
from intersafe.models.http.quirks import QUEUE_FULL
from intersafe.recipe.sections import Limits

MOST_BYTES = 190 * 10**6
"""In one file: below the provider's 200 MB."""
LATE_FILES = 5
"""Looks at a completed batch that names no file of results yet."""
FETCHES = 3
"""How often results are fetched that hold fewer answers than the provider has counted."""
BURST = 64  # calls that are answered before other tasks may run


@dataclass
class _PendingCall:
    """A call without an answer; its body is made when it is written and not held in memory."""

    role: str
    body: Callable[[], bytes]
    answered: asyncio.Future[Reply]
    tries: int = 0

    def fail(self, error: BaseException) -> None:
        """Ends the call. Its job may have been cancelled already: then nobody reads the error."""
        self.answered.set_exception(error)
        self.answered.exception()


@dataclass
class _Collection:
    """A batch that is being written."""

    nonce: str
    file: BinaryIO
    size: int = 0
    keys: list[str] = field(default_factory=list)


class Lane:
    """One model at one provider: the calls that wait, are collected, or are in a batch."""

    def __init__(
        self, name: str, service: BatchApi, limits: Limits, folder: BatchFolder, hooks: Hooks, pace: Pace
    ) -> None:
        self._name, self._api, self._identity, self._limits = name, service, service.identity, limits
        self._folder, self._hooks, self._pace = folder, hooks, pace
        self._waiting: dict[str, _PendingCall] = {}
        self._sent: set[str] = set()
        """Keys of the calls in collections and batches, whether a job of this process waits for them or not."""
        self._open: _Collection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._added = 0.0
        self._most = self._ceiling = float(pace.most_requests)
        self._under_way: dict[str, State] = {}
        self._faults = 0
        """Batches in a row with faults that were not the calls' own."""
        self._held_until = 0.0
        self._freed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None
        self._closed = False
        self._adopted = asyncio.Event()
        self._start(self._adopt())

    async def aclose(self) -> None:
        """Stops; batches that the provider has continue there."""
        if self._closed:
            return
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._open:
            self._open.file.close()
            self._folder.requests(self._open.nonce).unlink(missing_ok=True)
        if self._under_way:
            calls = sum(len(state.keys) for state in self._under_way.values())
            self._hooks.notify(
                f"{self._identity}: {len(self._under_way)} batches with {calls:,} calls stay with the provider; "
                "the run takes their answers when it resumes"
            )
        self._folder.sweep()
        await self._api.aclose()

    async def ask(self, role: str, key: str, body: Callable[[], bytes]) -> Reply:
        """The answer to the call of that key: from a batch that has it, or from the next one."""
        await self._adopted.wait()
        if self._broken:
            raise _copy(self._broken)
        if (reply := self._known(key)) is not None:
            return reply
        waiting = self._waiting[key] = _PendingCall(role, body, asyncio.get_running_loop().create_future())
        if key not in self._sent:
            self._collect(key, waiting)
        return await waiting.answered

    def _known(self, key: str) -> Reply | None:
        """The reply that an earlier batch brought, unless the call is better asked again."""
        found = self._folder.take(key)
        if found is None:
            return None
        try:
            reply = reply_in(found.line, self._api.clean)
        except Transient:
            return None
        except CallFailed:
            if found.old:  # as after any failed call, a new process asks again
                return None
            raise
        return None if found.old and reply.finish == "blocked" else reply

    # --- collecting --------------------------------------------------------------------------------------------------

    def _collect(self, key: str, waiting: _PendingCall) -> None:
        """Writes the call into the open collection."""
        line = b'{"custom_id":"%s","method":"POST","url":"%s","body":%s}\n' % (
            key.encode(),
            ROUTE.encode(),
            waiting.body(),
        )
        if self._open and self._open.size + len(line) > MOST_BYTES:
            self._seal()
        try:
            if self._open is None:
                nonce = secrets.token_hex(16)
                self._open = _Collection(nonce, self._folder.requests(nonce).open("xb"))
            self._open.file.write(line)
        except OSError as error:
            raise _storage_error(error) from None
        self._open.size += len(line)
        self._open.keys.append(key)
        self._sent.add(key)
        loop = asyncio.get_running_loop()
        self._added = loop.time()
        if len(self._open.keys) >= int(self._most):
            self._seal()
        elif self._timer is None:
            self._timer = loop.call_later(self._pace.quiet, self._seal_if_quiet)

    def _seal_if_quiet(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        if self._open is None:
            return
        if (left := self._added + self._pace.quiet - loop.time()) > 0:
            self._timer = loop.call_later(left, self._seal_if_quiet)
        else:
            self._seal()

    def _seal(self) -> None:
        collection, self._open = self._open, None
        assert collection
        state = State(collection.nonce, self._name, time.time(), collection.keys)
        self._start(self._send(state, collection.file))

    # --- one batch ---------------------------------------------------------------------------------------------------

    async def _adopt(self) -> None:
        """Follows the batches that an earlier process left at the provider; calls that it never got are asked again."""
        for state in [state for state in self._folder.states if state.lane == self._name]:
            if not state.batch:
                # Without a file at the provider there can be no batch over it.
                found = await self._api.find(state.nonce, state.made) if state.file else None
                if found is None:
                    self._folder.forget(state)
                    continue
                state = structs.replace(state, batch=found.id)
                await asyncio.to_thread(self._folder.record, state)
            self._sent.update(state.keys)
            self._under_way[state.nonce] = state
            self._start(self._follow(state, None))
        self._folder.states = [state for state in self._folder.states if state.lane != self._name]
        self._adopted.set()

    async def _send(self, state: State, file: BinaryIO) -> None:
        """From a collection to a batch; the state is on the disk before each step that the provider sees."""
        await asyncio.to_thread(close, file)
        await asyncio.to_thread(self._folder.record, state)
        try:
            await self._wait_while_held()
            state = structs.replace(state, file=await self._api.upload(self._folder.requests(state.nonce)))
            await asyncio.to_thread(self._folder.record, state)
            remote = await self._api.create(state.file, state.nonce, state.made)
        except Refused as refused:
            await self._split(state, refused)
            return
        except BudgetReached as reached:
            self._give_up(state, reached)
            return
        state = structs.replace(state, batch=remote.id)
        self._under_way[state.nonce] = state
        await asyncio.to_thread(self._folder.record, state)
        self._folder.requests(state.nonce).unlink(missing_ok=True)
        self._hooks.notify(f"{self._identity}: batch {self._api.clean(remote.id)} of {len(state.keys):,} calls sent")
        await self._follow(state, remote)

    async def _wait_while_held(self) -> None:
        """Returns when no hold is in force: it is over, or one of our batches has ended well."""
        loop = asyncio.get_running_loop()
        while (left := self._held_until - loop.time()) > 0:
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), left)

    async def _follow(self, state: State, remote: Remote | None) -> None:
        """Looks at a batch until it has ended, then fetches its results."""
        pause, late = self._pace.first_pause, 0
        while remote is None or remote.status not in TERMINAL or self._is_late(remote, late):
            if remote is not None:
                late += remote.status in TERMINAL
                await asyncio.sleep(pause)
                pause = min(self._pace.longest_pause, pause * 1.5)
            remote = await self._api.look(state.batch)
        if remote.status == "failed" and not remote.files:
            problems = remote.problems
            words = "; ".join(self._api.clean(p.message or p.code or "") for p in problems[:3]) or "no reason given"
            full = any(problem.code == QUEUE_FULL for problem in problems)
            lines = tuple(problem.line for problem in problems if problem.line)
            await self._split(state, Refused(words, 0, QUEUE_FULL if full else "", lines))
            return
        for _ in range(FETCHES):
            await self._api.download(remote.files, self._folder.part(state.nonce))
            offsets, answers = await asyncio.to_thread(self._folder.index, state)
            if answers >= remote.answered:
                break
            await asyncio.sleep(pause)  # fewer answers came than were paid for; another copy is appended
        self._folder.keep(state, offsets)
        await self._settle(state, remote)

    @staticmethod
    def _is_late(remote: Remote, looks: int) -> bool:
        """True if a completed batch does not yet name the file of its answers."""
        return remote.status == "completed" and remote.answered > 0 and not remote.output_file_id and looks < LATE_FILES

    # --- what became of its calls ------------------------------------------------------------------------------------

    async def _settle(self, state: State, remote: Remote) -> None:
        """Gives the calls that wait their answers; those without one go into the next batch."""
        del self._under_way[state.nonce]
        words = f"no result in the batch, which is {remote.status}"
        unusable, again = 0, Counter[str]()
        for number, key in enumerate(state.keys):
            if (waiting := self._taken_from_batch(key)) is None:
                continue
            found = self._folder.take(key)
            try:
                if found is None:
                    raise Transient(words)
                waiting.answered.set_result(reply_in(found.line, self._api.clean))
            except Transient as fault:
                unusable += 1
                is_counted = remote.status != "expired"
                again[waiting.role] += self._collect_again(key, waiting, str(fault), counted=is_counted)
            except CallFailed as error:
                waiting.fail(error)
            if waiting.answered.done():
                self._waiting.pop(key, None)
            if number % BURST == BURST - 1:
                await asyncio.sleep(0)
        if unusable:
            which = f"batch {self._api.clean(remote.id)} is {remote.status}"
            self._hooks.notify(
                f"{self._identity}: {which}; "
                f"{unusable:,} of its {len(state.keys):,} calls had no usable answer and are asked again"
            )
            self._log_again(again, f"{which}, no usable answer")
            self._hold()
        else:
            self._faults, self._held_until = 0, 0.0
            self._most = min(self._ceiling, self._most * 1.25)
            self._freed.set()

    async def _split(self, state: State, refused: Refused) -> None:
        """A refused batch: the calls that the provider names fail, the others go into smaller or later batches."""
        self._under_way.pop(state.nonce, None)
        self._folder.forget(state)
        full, large = refused.code == QUEUE_FULL, refused.status == 413
        if full and not self._under_way:  # else the queue is full of ours, and has room when one of them has ended
            self._most = max(1.0, len(state.keys) // 2)
        if large:
            self._most = self._ceiling = max(1.0, len(state.keys) // 2)
        self._hooks.notify(
            f"{self._identity}: a batch of {len(state.keys):,} calls was not taken ({refused}); asked again"
        )
        self._hold()
        named, again = {line - 1 for line in refused.lines}, Counter[str]()
        for number, key in enumerate(state.keys):
            if (waiting := self._taken_from_batch(key)) is None:
                continue
            if number in named or (large and len(state.keys) == 1):
                del self._waiting[key]
                waiting.fail(CallFailed("endpoint", "bad_request", str(refused)))
            else:
                is_counted = not (full or large or named)
                again[waiting.role] += self._collect_again(key, waiting, str(refused), counted=is_counted)
            if number % BURST == BURST - 1:
                await asyncio.sleep(0)
        self._log_again(again, refused)

    def _log_again(self, calls: Counter[str], why: object) -> None:
        for role, count in (+calls).items():
            self._api.incidents.asked_again(role, count, why)

    def _taken_from_batch(self, key: str) -> _PendingCall | None:
        """The call of that key, which is in no batch any longer; None if nobody waits for it any longer."""
        self._sent.discard(key)
        if (waiting := self._waiting.get(key)) and waiting.answered.done():
            del self._waiting[key]
            return None
        return waiting

    def _give_up(self, state: State, reached: BudgetReached) -> None:
        """Ends the calls of a batch that may not be sent any more."""
        if not state.file:  # else the next process looks for it, in case the provider has it after all
            self._folder.forget(state)
        for key in state.keys:
            if waiting := self._taken_from_batch(key):
                del self._waiting[key]
                waiting.fail(_copy(reached))

    def _collect_again(self, key: str, waiting: _PendingCall, words: str, *, counted: bool) -> bool:
        """True if the call goes into the next batch, False if its tries are used up; `counted` if this was one."""
        waiting.tries += counted
        if waiting.tries >= self._limits.retries:
            del self._waiting[key]
            waiting.fail(CallFailed("endpoint", "server_error", words))
            return False
        self._collect(key, waiting)
        return True

    def _hold(self) -> None:
        """Sends no batch for a while, longer each time in a row."""
        self._faults += 1
        pause = min(self._pace.longest_pause, self._pace.first_pause * 2.0 ** min(self._faults, 10))
        self._held_until = asyncio.get_running_loop().time() + pause

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An error that ends a task of the lane ends every call that waits, and with them the run."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._broken = self._as_ending(error)
        self._adopted.set()
        for waiting in self._waiting.values():
            if not waiting.answered.done():
                waiting.fail(_copy(self._broken))
        self._waiting.clear()

    def _as_ending(self, error: BaseException) -> BaseException:
        """The error as one that ends the run."""
        if isinstance(error, Refused):
            return ServiceGone(f"{self._identity} at {self._api.url}: {error}; fix it, then run the same command again")
        return _storage_error(error) if isinstance(error, OSError) else error


def _copy(error: BaseException) -> BaseException:
    """An exception of its own for each call: a shared one would gather the traces of thousands."""
    return type(error)(str(error)) if isinstance(error, IntersafeError) else error


def _storage_error(error: OSError) -> StorageError:
    where = error.filename or "batches"
    return StorageError(f"{where}: {error.strerror}; fix it, then run the same command again")
