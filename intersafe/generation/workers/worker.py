"""A worker: an event loop in a process of its own, perhaps on another machine, that grows jobs for a run's driver.

It has the same stages, models and prompts as the driver would have, the run directory, which all machines share, and a
journal of its own there. It decides nothing: outcomes go back to the driver. An outcome leaves only when the replies
that it rests on are on the disk. What crosses the wire is bytes and plain values; `driver.py` is the other end.
"""

import asyncio
import hashlib
import importlib.metadata
import platform
import socket
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import structs

from intersafe.errors import BudgetReached, InputError, IntersafeError, JobEnded, ServiceGone, StorageError
from intersafe.generation.grow import Stages
from intersafe.images.store import ImageStore
from intersafe.models.base import ChatModel, Hooks, PaintModel
from intersafe.models.cast import SharedCast
from intersafe.models.open import check_cast, open_models, open_painter
from intersafe.recipe.sections import Model, Recipe
from intersafe.records import Dialogue, Job, RefusalJob, RefusalSample
from intersafe.run.budget import Budget, prices_of
from intersafe.run.journal import Entry, Journal, ReuseIndex, RoleTally
from intersafe.run.manifest import Manifest
from intersafe.storage.jsonl import GroupWriter
from intersafe.templates.load import load_prompts, needed_by

KINDS: dict[str, tuple[type[Job | RefusalJob], type[Dialogue | RefusalSample]]] = {
    "": (Job, Dialogue),
    "refusals": (RefusalJob, RefusalSample),
    "twins": (Job, Dialogue),
}
"""What a line's jobs are and what comes of them."""

ENDS: dict[str, type[IntersafeError]] = {
    kind.__name__: kind for kind in (BudgetReached, InputError, ServiceGone, StorageError)
}
"""What ends the run wherever it happens."""


class Setup(msgspec.Struct, frozen=True):
    """What a worker is told when it starts."""

    run: str
    """Path of the run directory, the same on every machine."""
    recipe: Recipe
    manifest: Manifest
    seal: str
    """sha256 of the run's recipe.json."""
    journal: str
    """The worker's own file, made by the driver; no other process ever writes it."""
    versions: dict[str, str]
    reuse: str
    """Path of the older run, or nothing."""


class Grown(msgspec.Struct, frozen=True):
    """What became of a job."""

    kind: Literal["kept", "rejected", "failed", "run"]
    """A record; a job that ended; or an error that ends the run."""
    record: bytes = b""
    hashes: dict[str, int] = {}
    """The perceptual hashes of its images, where the gates look at them."""
    stage: str = ""
    """Of an error that ends the run its name."""
    reason: str = ""
    detail: str = ""


class Seen(msgspec.Struct, frozen=True):
    """How a worker is doing."""

    roles: dict[str, RoleTally]
    """What its own calls have cost since it started."""
    in_flight: dict[str, int]
    said: list[str]
    """What the user should know, since the last look."""
    waiting: dict[str, str] = {}
    """The services that are away from here, and why."""


def versions_here() -> dict[str, str]:
    """What must be the same on every machine, or the bytes of the result may not be."""
    packages = {name: importlib.metadata.version(name) for name in ("intersafe", "msgspec", "pillow", "rensa")}
    return packages | {"python": platform.python_version()}


def share_of(recipe: Recipe, workers: int) -> Recipe:
    """The recipe of one of so many workers: of every limit it has its part, and at least one call."""

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
    # Only the driver knows the whole of what is used; it says when to stop.
    limits = structs.replace(recipe.limits, max_tokens=None, max_cost=None, max_time=None)
    return structs.replace(recipe, cast=structs.replace(recipe.cast, **parts), limits=limits)


class Worker:
    """Grows jobs, many at once; every method runs in the worker's event loop."""

    def __init__(self, setup: bytes) -> None:
        """Holds a `Setup`; nothing is opened yet."""
        self._setup = setup
        self._said: list[str] = []
        self._waiting: dict[str, str] = {}
        self._growing: set[asyncio.Task[Any]] = set()
        self._models: list[ChatModel | PaintModel] = []

    async def open(self) -> Grown:
        """Opens what the jobs share; where something is wrong here, the error says so and names the machine."""
        self._node = socket.gethostname()
        try:
            self._open(msgspec.msgpack.decode(self._setup, type=Setup))
        except IntersafeError as error:
            return Grown("run", stage=_name_of(error), detail=f"worker on {self._node}: {error}")
        return Grown("kept", detail=self._node)

    def _open(self, setup: Setup) -> None:
        _check_versions(setup.versions)
        root, recipe, manifest = Path(setup.run), setup.recipe, setup.manifest
        _check_directory(root, setup)
        check_cast(recipe.cast, recipe.engine)
        prompts = load_prompts(root / "prompts", recipe.strategies, needed_by(recipe), alone=True)
        if dict(prompts.hashes) != manifest.prompts:
            raise InputError("prompts differ from the driver's", at=root / "prompts", remedy="mount the same directory")
        prices = prices_of(recipe.cast)
        self._writer = GroupWriter(root)
        self._journal = Journal(self._writer, setup.journal, prices)
        images = ImageStore(root / "images")
        self._budget = Budget(recipe.limits, self._journal.roles)
        hooks = Hooks(self._said.append, self._waiting, self._budget.check)
        models = open_models(recipe.cast, recipe.limits, images, hooks)
        painter = recipe.cast.painter
        opened = open_painter(painter, recipe.limits, hooks) if painter else None
        self._models = [*set(models.values()), *([opened] if opened else [])]
        older = Path(setup.reuse) if setup.reuse else None
        self._company = SharedCast(
            cast=recipe.cast,
            models=models,
            prompts=prompts,
            journal=self._journal,
            hooks=hooks,
            budget=self._budget,
            older=ReuseIndex(older) if older else None,
            painter=opened,
            images=images,
            older_images=ImageStore(older / "images") if older else None,
        )
        self._stages = Stages(recipe, manifest, self._company)

    async def grow(self, line: str, job: bytes, original: bytes, paid: bytes) -> Grown:
        """What becomes of a job; `paid` are the journal entries that it has already, in journals of others."""
        task = asyncio.current_task()
        assert task is not None
        self._growing.add(task)
        one = msgspec.msgpack.decode(job, type=KINDS[line][0])
        twin_of = msgspec.msgpack.decode(original, type=Dialogue) if original else None
        entries = msgspec.msgpack.decode(paid, type=list[Entry])
        try:
            with self._journal.lent(entries):
                grown = await self._grow(line, one, twin_of)
            await self._writer.settled()
        except IntersafeError as error:
            return Grown("run", stage=_name_of(error), detail=str(error))
        finally:
            self._growing.discard(task)
        return grown

    async def _grow(self, line: str, job: Job | RefusalJob, original: Dialogue | None) -> Grown:
        try:
            outcome = await self._stages.grow(line, job, original)
        except JobEnded as end:
            return Grown(end.kind, stage=end.stage, reason=end.reason, detail=end.detail)
        hashes: dict[str, int] = {}
        if not line and self._company.images and len(outcome.images) > 1:
            find = self._company.images.perceptual_hash
            hashes = await asyncio.to_thread(lambda: {ref: find(ref) for ref in outcome.images})
        return Grown("kept", msgspec.msgpack.encode(outcome), hashes)

    async def look(self) -> Seen:
        """How it is doing."""
        said, self._said[:] = list(self._said), []
        return Seen(self._journal.roles, dict(self._company.in_flight), said, dict(self._waiting))

    async def stop(self, why: str) -> None:
        """From now on no call starts; every job that needs one ends with `BudgetReached`."""
        self._budget.stopped = why

    async def close(self) -> tuple[Seen, str]:
        """Breaks off what is being grown and closes the journal; what it has paid for, and what went wrong."""
        growing = list(self._growing)
        for task in growing:
            task.cancel()
        await asyncio.gather(*growing, return_exceptions=True)
        problem = ""
        try:
            await self._writer.close()
        except StorageError as error:
            problem = str(error)
        await asyncio.gather(*(model.aclose() for model in self._models))
        return await self.look(), problem


def _name_of(error: IntersafeError) -> str:
    return next((name for name, kind in ENDS.items() if isinstance(error, kind)), "ServiceGone")


def _check_versions(wanted: Mapping[str, str]) -> None:
    here = versions_here()
    other = [f"{name} {here.get(name)} (the driver has {version})" for name, version in wanted.items()]
    other = [text for text, (name, version) in zip(other, wanted.items(), strict=True) if here.get(name) != version]
    if other:
        raise InputError(", ".join(other), remedy="install the same on every machine of the cluster")


def _check_directory(root: Path, setup: Setup) -> None:
    """`InputError` unless this is the very directory that the driver writes."""
    remedy = "put the run on storage that every machine mounts at the same path, and name it: --run /shared/..."
    try:
        seal = hashlib.sha256((root / "recipe.json").read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"the run directory is not there ({error.strerror})", at=root, remedy=remedy) from None
    if seal != setup.seal or not (root / setup.journal).exists():
        raise InputError("not the run directory that the driver writes", at=root, remedy=remedy)
