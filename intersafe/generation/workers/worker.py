"""A worker: a process, perhaps on another machine, that grows jobs for the driver of a run in its own event loop.

It has the stages, models and prompts that the driver would have, the run directory, which all machines share, and its
own journal there. It decides nothing: outcomes go back to the driver, once the replies that they rest on are on disk.
Only bytes and plain values cross the wire; `driver.py` is the other end.
"""

import asyncio
import contextlib
import hashlib
import importlib.metadata
import logging
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import structs

from intersafe.errors import BudgetReached, InputError, IntersafeError, JobEnded, ServiceGone, StorageError
from intersafe.generation.grower import Stages, open_cast
from intersafe.generation.job_kind import JobKind
from intersafe.generation.kinds import KINDS
from intersafe.generation.workers.worker_log import LogCollector, LogLine, collecting
from intersafe.images.store import ImageStore
from intersafe.models.base import Hooks
from intersafe.models.open import check_cast
from intersafe.recipe.sections import Model, Recipe
from intersafe.run.budget import Budget, prices_of
from intersafe.run.incidents import SHOWN, Incidents
from intersafe.run.journal import Entry, Journal, ReuseIndex, RoleTally
from intersafe.run.kinds import AnyJob
from intersafe.run.manifest import Manifest
from intersafe.storage.jsonl import GroupWriter
from intersafe.templates.load import load_prompts, needed_by

_logger = logging.getLogger(__name__)

ENDS: dict[str, type[IntersafeError]] = {
    kind.__name__: kind for kind in (BudgetReached, InputError, ServiceGone, StorageError)
}
"""Errors that end the run wherever they happen."""


class Setup(msgspec.Struct, frozen=True):
    """What a worker is given when it starts."""

    run: str
    """Path of the run directory, the same on every machine."""
    recipe: Recipe
    manifest: Manifest
    seal: str
    """sha256 of the run's recipe.json."""
    journal: str
    """The worker's own file, created by the driver; no other process ever writes it."""
    versions: dict[str, str]
    reuse: str
    """Path of the run to reuse, or empty."""
    log_level: int = logging.WARNING
    """The lowest level that the driver logs."""


class Grown(msgspec.Struct, frozen=True):
    """What became of a job."""

    kind: Literal["accepted", "rejected", "failed", "run"]
    """An outcome; a job that ended; or an error that ends the run."""
    record: bytes = b""
    hashes: dict[str, int] = {}
    """The perceptual hashes of its images, if the gates compare them."""
    stage: str = ""
    """The name of an error that ends the run."""
    reason: str = ""
    detail: str = ""


class Report(msgspec.Struct, frozen=True):
    """The state of a worker."""

    roles: dict[str, RoleTally]
    """What its own calls have cost since it started."""
    in_flight: dict[str, int]
    said: list[str]
    """Messages for the user since the last report."""
    waiting: dict[str, str] = {}
    """The services that are away from this machine, each with its reason."""
    incidents: dict[str, Incidents] = {}
    """Retries, throttling and outages by role since it started."""
    logged: list[LogLine] = []
    """What it logged since the last report."""


def versions_here() -> dict[str, str]:
    """What must be the same on every machine, since the bytes of the result may depend on it."""
    packages = {name: importlib.metadata.version(name) for name in ("intersafe", "msgspec", "pillow", "rensa")}
    return packages | {"python": platform.python_version()}


def share_of(recipe: Recipe, workers: int) -> Recipe:
    """The recipe of one of the workers: its part of every limit, and at least one call."""

    def part(model: Any) -> Any:
        fields: dict[str, Any] = {"concurrency": ceil(model.concurrency / workers)}
        for name in ("rpm", "tpm"):
            if (most := getattr(model, name)) is not None:
                fields[name] = max(1, most // workers)
        return structs.replace(model, **fields)

    parts: dict[str, Any] = {
        field: part(value) for field, value in structs.asdict(recipe.cast).items() if isinstance(value, Model)
    }
    parts["victims"] = tuple(part(victim) for victim in recipe.cast.victims)
    # Only the driver knows what the whole run has used; it says when to stop.
    limits = structs.replace(recipe.limits, max_tokens=None, max_cost=None, max_time=None)
    return structs.replace(recipe, cast=structs.replace(recipe.cast, **parts), limits=limits)


@dataclass(frozen=True)
class _Opened:
    """What the jobs of a worker share."""

    writer: GroupWriter
    images: ImageStore
    journal: Journal
    budget: Budget
    hooks: Hooks
    stages: Stages

    def hashes(self, images: tuple[str, ...]) -> dict[str, int]:
        """The perceptual hashes by image reference."""
        return {reference: self.images.perceptual_hash(reference) for reference in images}


class Worker:
    """Grows jobs, many at once; every method runs in the worker's event loop."""

    def __init__(self, setup: bytes) -> None:
        """Holds a `Setup`; nothing is opened yet."""
        self._setup = setup
        self._opened: _Opened | None = None
        self._said: list[str] = []
        self._log: LogCollector | None = None
        self._growing: set[asyncio.Task[Any]] = set()
        self._closing = contextlib.AsyncExitStack()

    async def open(self) -> Grown:
        """Opens what the jobs share; an error names the machine."""
        self._node = socket.gethostname()
        try:
            self._opened = self._open(msgspec.msgpack.decode(self._setup, type=Setup))
        except IntersafeError as error:
            await self._closing.aclose()
            return Grown("run", stage=_name_of(error), detail=f"worker on {self._node}: {error}")
        return Grown("accepted", detail=self._node)

    def _open(self, setup: Setup) -> _Opened:
        _check_versions(setup.versions)
        root, recipe, manifest = Path(setup.run), setup.recipe, setup.manifest
        _check_directory(root, setup)
        check_cast(recipe.cast, recipe.engine)
        prompts = load_prompts(root / "prompts", recipe.strategies, needed_by(recipe), alone=True)
        if dict(prompts.hashes) != manifest.prompts:
            raise InputError("prompts differ from the driver's", at=root / "prompts", remedy="mount the same directory")
        self._log = LogCollector(model.key for model in recipe.cast.models.values() if model.key)
        self._closing.enter_context(collecting(self._log, setup.log_level))
        writer, images = GroupWriter(root), ImageStore(root / "images")
        journal = Journal(writer, setup.journal, prices_of(recipe.cast))
        budget = Budget(recipe.limits, journal.roles)
        hooks = Hooks(self._notify, self._said.append, may_send=budget.check)
        older = Path(setup.reuse) if setup.reuse else None
        shared = open_cast(
            self._closing,
            recipe,
            prompts=prompts,
            journal=journal,
            images=images,
            budget=budget,
            hooks=hooks,
            index=ReuseIndex(older) if older else None,
            older=older,
        )
        return _Opened(writer, images, journal, budget, hooks, Stages(recipe, manifest, shared))

    def _notify(self, text: str) -> None:
        self._said.append(text)
        _logger.info("%s", text, extra=SHOWN)

    async def grow(self, kind: str, job: bytes, paid: bytes) -> Grown:
        """What becomes of a job; `paid` are the journal entries that it has in other journals."""
        task, opened = asyncio.current_task(), self._opened
        assert task is not None
        assert opened is not None, "jobs come after `open`"
        self._growing.add(task)
        one = msgspec.msgpack.decode(job, type=KINDS[kind].records.job)
        entries = msgspec.msgpack.decode(paid, type=list[Entry])
        try:
            with opened.journal.lent(entries):
                grown = await self._grow(opened, KINDS[kind], one)
            await opened.writer.settled()
        except IntersafeError as error:
            return Grown("run", stage=_name_of(error), detail=str(error))
        finally:
            self._growing.discard(task)
        return grown

    @staticmethod
    async def _grow(opened: _Opened, kind: JobKind, job: AnyJob) -> Grown:
        try:
            outcome = await opened.stages.grow(kind, job)
        except JobEnded as end:
            return Grown(end.kind, stage=end.stage, reason=end.reason, detail=end.detail)
        hashes: dict[str, int] = {}
        if kind.compares_images and len(outcome.images) > 1:
            hashes = await asyncio.to_thread(opened.hashes, outcome.images)
        return Grown("accepted", msgspec.msgpack.encode(outcome), hashes)

    async def report(self) -> Report:
        """The state of this worker; it is empty before `open`."""
        opened = self._opened
        if opened is None:
            return Report({}, {}, [])
        said, self._said[:] = list(self._said), []
        return Report(
            roles=opened.journal.roles,
            in_flight=dict(opened.stages.in_flight),
            said=said,
            waiting=dict(opened.hooks.outages),
            incidents=dict(opened.hooks.incidents),
            logged=self._log.taken() if self._log else [],
        )

    async def stop(self, why: str) -> None:
        """From now on no call starts; every job that needs one ends with `BudgetReached`."""
        if self._opened:
            self._opened.budget.stopped = why

    async def close(self) -> tuple[Report, str]:
        """Cancels the jobs and closes the journal; the last report, and what went wrong with the journal."""
        growing = list(self._growing)
        for task in growing:
            task.cancel()
        await asyncio.gather(*growing, return_exceptions=True)
        problem = ""
        try:
            if self._opened:
                await self._opened.writer.close()
        except StorageError as error:
            problem = str(error)
        await self._closing.aclose()
        return await self.report(), problem


def _name_of(error: IntersafeError) -> str:
    return next((name for name, kind in ENDS.items() if isinstance(error, kind)), "ServiceGone")


def _check_versions(wanted: Mapping[str, str]) -> None:
    here = versions_here()
    other = [
        f"{name} {here.get(name)} (the driver has {version})"
        for name, version in wanted.items()
        if here.get(name) != version
    ]
    if other:
        raise InputError(", ".join(other), remedy="install the same on every machine of the cluster")


def _check_directory(root: Path, setup: Setup) -> None:
    """`InputError` unless this is the directory that the driver writes."""
    remedy = "put the run on storage that every machine mounts at the same path, and name it: --run /shared/..."
    try:
        seal = hashlib.sha256((root / "recipe.json").read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"the run directory is missing ({error.strerror})", at=root, remedy=remedy) from None
    if seal != setup.seal or not (root / setup.journal).exists():
        raise InputError("not the run directory that the driver writes", at=root, remedy=remedy)
