"""The farm: jobs grown in many processes on many machines; the driver's side of it.

Each worker (`worker.py`) is a Ray actor with an event loop and a journal file of its own in the run directory that all
machines share. Which worker grows a job decides nothing, so the bytes of the result are those of one process. A worker
that is lost is given up for good, and its file is nobody else's ever again, as it may go on writing unseen; its jobs go
to others with all that its journal holds of them, and a new worker with a new file takes its place as soon as the
cluster has room.
"""

import asyncio
import contextlib
import hashlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import msgspec

from intersafe.errors import BudgetReached, InputError, JobEnded, JobRejected, ServiceGone, StorageError
from intersafe.generation.prepare import Prepared
from intersafe.generation.scheduler import AnyJob, Outcome
from intersafe.generation.workers.ray_cluster import first_line, library
from intersafe.generation.workers.worker import ENDS, KINDS, Grown, Seen, Setup, Worker, share_of, versions_here
from intersafe.images.store import ImageStore
from intersafe.records import Dialogue
from intersafe.run.budget import Budget
from intersafe.run.journal import Entry, Journal, RoleTally, entries_of, tally

LOOK = 1.0
"""Seconds between two looks at the workers; longer where there are more than 100 of them."""
STARTING = 60.0
"""Seconds that the first worker may take to come up, however little patience there is."""
SILENCE = 60.0
"""Seconds that a worker may leave a look unanswered: then its process hangs, and what it grows would wait forever."""
CLOSING = 20.0
"""Seconds that the workers have to close their journals."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries to start a worker; they begin with one."""
LOSSES = 5
"""Workers that may be lost while they grow one and the same job; then it may be the job that ends them."""


@dataclass(eq=False)
class _Hand:
    """One worker."""

    journal: str
    """Its file in the run directory."""
    actor: Any
    node: str = ""
    growing: set[tuple[str, int]] = field(default_factory=set)
    """Line and place of the jobs that it has."""
    seen: Seen = field(default_factory=lambda: Seen({}, {}, []))
    looking: "asyncio.Task[None] | None" = None
    lost: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done once it is given up."""
    left: "asyncio.Task[dict[tuple[str, int], list[Entry]]] | None" = None
    """Reads what it left of its jobs."""

    def news(self) -> list[str]:
        """What it has said since this was last asked."""
        said, self.seen.said[:] = list(self.seen.said), []
        return said


class Farm:
    """Grows jobs in workers (a `lines.Grower`); an async context manager around the growing of all lines."""

    def __init__(
        self,
        prepared: Prepared,
        path: Path,
        workers: int,
        journal: Journal,
        budget: Budget,
        images: ImageStore,
        say: Callable[[str], None],
        older: Path | None = None,
        *,
        silence: float = SILENCE,
    ) -> None:
        """`journal` was loaded; it hands its replies over, and its tallies count on from what the workers say.

        `images` is told the perceptual hashes, so that the gates open no image here.
        """
        self.in_flight: Counter[str] = Counter()
        """Calls under way by role, as of the last look; and the services that workers wait for."""
        self.waiting: dict[str, str] = {}
        recipe = prepared.recipe
        self._ray, self._root, self._say, self.budget = library(), path.resolve(), say, budget
        self._recipe, self._prepared, self._older = share_of(recipe, workers), prepared, older
        self._count = workers
        self._room = ceil((recipe.limits.concurrency + max(1, recipe.limits.concurrency // 8)) / workers)
        self._silence, self._images = silence, images
        self._patience = max(STARTING, recipe.limits.patience)
        self._journal, self._paid = journal, journal.hand_over()
        self._before = {role: msgspec.structs.replace(spent) for role, spent in journal.roles.items()}
        self._gone: list[_Hand] = []
        self._hands: list[_Hand] = []
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._problem: Exception | None = None
        self._closing = False
        self._trouble = "none was given a place: has the cluster free CPUs?"
        self._alone_since = time.monotonic()

    async def __aenter__(self) -> "Farm":
        self._tasks = [asyncio.create_task(self._keep_one()) for _ in range(self._count)]
        self._tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Lets the workers close their journals and counts what they paid for to the end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._closing = True
        problems = await asyncio.gather(*(self._close(hand) for hand in list(self._hands)))
        await asyncio.gather(*(hand.left for hand in self._gone if hand.left), return_exceptions=True)
        self._count_up()
        if problem := next(filter(None, problems), ""):
            raise StorageError(problem)

    # --- a job -------------------------------------------------------------------------------------------------------

    async def grow(self, line: str, job: AnyJob, original: Dialogue | None = None) -> Outcome:
        """The outcome of a job, grown by the worker that has the fewest; again by another one where that is lost."""
        place, encode = (line, job.index), msgspec.msgpack.encode
        paid = self._paid.pop(place, [])
        order, origin = encode(job), encode(original) if original else b""
        for _ in range(LOSSES):
            self.budget.check()
            hand = await self._free_hand()
            hand.growing.add(place)
            try:
                grown = await self._ask(hand, hand.actor.grow.remote(line, order, origin, encode(paid)))
            finally:
                if not hand.lost.done():
                    hand.growing.discard(place)
                    self._changed.set()
            if grown is not None:
                for reference, found in grown.hashes.items():
                    self._images.remember(reference, found)
                return _outcome_of(grown, line)
            assert hand.left is not None
            paid = [*paid, *(await asyncio.shield(hand.left)).get(place, ())]
        raise ServiceGone(
            f"{LOSSES} workers in a row were lost while they grew the job {job.key} (the last one: {self._trouble}); "
            "give the workers more memory, then run the same command again: nothing is lost"
        )

    async def _ask(self, hand: _Hand, ref: Any) -> Grown | None:
        """What the worker answers; None if it is lost."""
        answer: asyncio.Future[Any] = asyncio.wrap_future(ref.future())
        either: list[asyncio.Future[Any]] = [answer, hand.lost]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._ray.cancel(ref)
            answer.cancel()
            raise
        if not answer.done():
            answer.cancel()
            return None
        try:
            grown: Grown = answer.result()
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            raise JobEnded("internal", type(cause).__name__, str(cause)[:300]) from None
        except self._ray.exceptions.RayError as error:
            self._lose(hand, error)
            return None
        return grown

    async def _free_hand(self) -> _Hand:
        """The worker with the fewest jobs, as soon as one has room."""
        while True:
            if self._problem is not None:
                raise self._problem
            hand = min(self._hands, key=lambda hand: len(hand.growing), default=None)
            if hand is not None and len(hand.growing) < self._room:
                return hand
            self._changed.clear()
            await self._changed.wait()

    # --- workers come and go -----------------------------------------------------------------------------------------

    async def _keep_one(self) -> None:
        """Keeps one worker at work: starts it, and another one whenever it is lost."""
        pause = 1.0
        while self._problem is None:
            try:
                hand = self._start()
            except OSError as error:
                self._end(
                    StorageError(f"{self._root}: cannot be written ({error.strerror}); mend that, then run it again")
                )
                return
            try:
                opened: Grown = await asyncio.wrap_future(hand.actor.open.remote().future())
            except asyncio.CancelledError:
                self._ray.kill(hand.actor)
                raise
            except self._ray.exceptions.RayError as error:
                self._trouble = first_line(getattr(error, "cause", None) or error)
                if "failed to import" in str(error) or "No module named" in str(error):
                    self._end(InputError(self._trouble, at="--ray", remedy="install intersafe on every machine"))
                self._ray.kill(hand.actor)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if opened.kind == "run":
                self._ray.kill(hand.actor)
                self._end(ENDS[opened.stage](opened.detail))
                return
            hand.node, pause = opened.detail, 1.0
            self._hands.append(hand)
            self._changed.set()
            await asyncio.wait([hand.lost])

    def _start(self) -> _Hand:
        """A new worker with a new file, made here so that it can tell whether it sees the driver's directory."""
        journal = f"journal/w-{secrets.token_hex(8)}.jsonl"
        path = self._root / journal
        path.parent.mkdir(exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        seal = hashlib.sha256((self._root / "recipe.json").read_bytes()).hexdigest()
        older = str(self._older.resolve()) if self._older else ""
        setup = Setup(str(self._root), self._recipe, self._prepared.manifest, seal, journal, versions_here(), older)
        # A restart by Ray would write the same file again: one that is lost stays lost.
        kind = self._ray.remote(Worker).options(
            num_cpus=1, max_restarts=0, max_concurrency=10 * self._room + 100, scheduling_strategy="SPREAD"
        )
        return _Hand(journal, kind.remote(msgspec.msgpack.encode(setup)))

    def _lose(self, hand: _Hand, error: BaseException) -> None:
        """Gives a worker up for good, once; its jobs are told when its journal was read."""
        if hand.lost.done():
            return
        hand.lost.set_result(None)
        self._hands.remove(hand)
        self._gone.append(hand)
        self._trouble = _why_lost(error)
        hand.left = asyncio.create_task(self._read_left(hand))
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(hand.actor)
        if not self._hands:
            self._alone_since = time.monotonic()
        if self._closing:
            return
        self._say(
            f"a worker on {hand.node} is lost ({self._trouble}): its {len(hand.growing)} jobs go on elsewhere from its "
            f"journal, {len(self._hands)} of {self._count} workers are left, another one is being started"
        )

    async def _read_left(self, hand: _Hand) -> dict[tuple[str, int], list[Entry]]:
        """What a lost worker's journal holds of the jobs that it had; its tallies become what the file says."""
        jobs, roles = set(hand.growing), dict[str, RoleTally]()

        def read() -> dict[tuple[str, int], list[Entry]]:
            found: dict[tuple[str, int], list[Entry]] = {}
            for entry in entries_of(self._root / hand.journal):
                tally(roles, entry, self._journal.prices)
                if (entry.line, entry.job) in jobs:
                    found.setdefault((entry.line, entry.job), []).append(entry)
            return found

        left = await asyncio.to_thread(read)
        hand.seen = Seen(roles, {}, [])
        return left

    def _end(self, problem: Exception) -> None:
        """Ends the run: every job that waits for a worker raises it."""
        self._problem = self._problem or problem
        self._changed.set()

    async def _close(self, hand: _Hand) -> str:
        """Closes a worker; what went wrong with its journal."""
        try:
            closing = asyncio.wrap_future(hand.actor.close.remote().future())
            hand.seen, problem = await asyncio.wait_for(closing, CLOSING)
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            self._lose(hand, error)
            return ""
        self._ray.kill(hand.actor)
        return str(problem)

    # --- how they are doing ------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Looks at the workers now and then: their calls, what they say, whether a budget is used up."""
        told, began, few = False, time.monotonic(), True
        while True:
            await asyncio.sleep(max(LOOK, self._count / 100))
            hands = list(self._hands)
            for hand in hands:
                if hand.looking is None or hand.looking.done():
                    hand.looking = asyncio.create_task(self._look(hand))
            if looks := [hand.looking for hand in hands if hand.looking]:
                await asyncio.wait(looks, timeout=LOOK)
            self._count_up()
            for text in dict.fromkeys(text for hand in hands for text in hand.news()):
                self._say(text)
            if few and time.monotonic() - began > STARTING / 2:
                few = False
                if len(self._hands) < self._count:
                    self._say(f"{len(self._hands)} of {self._count} workers are up; the others wait for free CPUs")
            if not self._hands and time.monotonic() - self._alone_since >= self._patience:
                self._end(
                    ServiceGone(
                        f"no worker came up for {self._patience:.0f} s ({self._trouble}); "
                        "mend the cluster, then run the same command again, with --ray or without: nothing is lost"
                    )
                )
            if not told:
                told = await self._stop_if_used_up(hands)

    async def _look(self, hand: _Hand) -> None:
        try:
            answer = asyncio.wrap_future(hand.actor.look.remote().future())
            hand.seen = await asyncio.wait_for(answer, self._silence)
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            self._lose(hand, error)

    async def _stop_if_used_up(self, hands: list[_Hand]) -> bool:
        try:
            self.budget.check()
        except BudgetReached as reached:
            stopping = [asyncio.wrap_future(hand.actor.stop.remote(str(reached)).future()) for hand in hands]
            await asyncio.gather(*stopping, return_exceptions=True)
            return True
        return False

    def _count_up(self) -> None:
        """Tallies of the run: what was there before, and what every worker says, the lost ones by their files."""
        roles = {role: msgspec.structs.replace(spent) for role, spent in self._before.items()}
        for hand in (*self._hands, *self._gone):
            for role, spent in hand.seen.roles.items():
                whole = roles.setdefault(role, RoleTally())
                for name in RoleTally.__struct_fields__:
                    setattr(whole, name, getattr(whole, name) + getattr(spent, name))
        self._journal.roles.update(roles)
        self.in_flight.clear()
        self.waiting.clear()
        for hand in self._hands:
            self.in_flight.update(hand.seen.in_flight)
            self.waiting.update(hand.seen.waiting)


def _outcome_of(grown: Grown, line: str) -> Outcome:
    """The record that a worker sent; raises what ended the job or the run."""
    if grown.kind == "run":
        raise ENDS[grown.stage](grown.detail)
    if grown.kind != "kept":
        kind = JobRejected if grown.kind == "rejected" else JobEnded
        raise kind(grown.stage, grown.reason, grown.detail)
    return msgspec.msgpack.decode(grown.record, type=KINDS[line][1])


def _why_lost(error: BaseException) -> str:
    """Ray's own words in brief."""
    if isinstance(error, TimeoutError):
        return "it did not answer any more"
    text = str(error)
    return "its machine is gone" if "node" in text and "dead" in text.lower() else "its process ended"
