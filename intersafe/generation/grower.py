"""Growers take jobs through the stages: `Stages` in this process, `RayWorkers` (`workers/driver.py`) in others."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from intersafe.generation.job_kind import JobKind, Met
from intersafe.generation.provenance import provenance_of
from intersafe.images.store import ImageStore
from intersafe.models.base import ChatModel, Hooks
from intersafe.models.cast import JobCast, Record, Replies, SharedCast
from intersafe.models.open import open_models, open_painter
from intersafe.recipe.sections import Recipe
from intersafe.records import Provenance
from intersafe.run.budget import Budget
from intersafe.run.kinds import AnyJob, Outcome
from intersafe.run.manifest import Manifest
from intersafe.templates.load import Prompts


class Grower(Protocol):
    """Takes jobs of any kind through their stages."""

    @property
    def in_flight(self) -> dict[str, int]:
        """Calls in flight by role; always the same object."""
        ...

    @property
    def waiting(self) -> dict[str, str]:
        """The services that are away, each with its reason; always the same object."""
        ...

    @property
    def models(self) -> Mapping[str, ChatModel]:
        """The models of this process, by role."""
        ...

    async def grow(self, kind: JobKind, job: AnyJob) -> Outcome:
        """The outcome of a job; `JobEnded` if nothing comes of it."""
        ...


class Stages:
    """Grows jobs in this process."""

    def __init__(self, recipe: Recipe, manifest: Manifest, shared: SharedCast) -> None:
        self.in_flight, self.waiting, self.models = shared.in_flight, shared.hooks.outages, shared.models
        self._recipe, self._manifest, self._shared = recipe, manifest, shared
        self._provenances: dict[Met, Provenance] = {}

    async def grow(self, kind: JobKind, job: AnyJob) -> Outcome:
        """The outcome of a job; `JobEnded` if nothing comes of it."""
        cast = JobCast(self._shared, job, kind.name)
        return await kind.grow(job, cast, self._recipe, self._provenance(kind.met(self._recipe, job)))

    def _provenance(self, met: Met) -> Provenance:
        """The same object for all jobs that can meet the same models and prompts."""
        if met not in self._provenances:
            self._provenances[met] = provenance_of(self._recipe, self._manifest, met)
        return self._provenances[met]


def open_cast(
    closing: contextlib.AsyncExitStack,
    recipe: Recipe,
    *,
    prompts: Prompts,
    journal: Record,
    images: ImageStore,
    budget: Budget,
    hooks: Hooks,
    index: Replies | None,
    older: Path | None,
    batches: Path | None = None,
) -> SharedCast:
    """Opens the models and the painter; `closing` closes them. Needs a running event loop.

    `index` and `older` are the replies and the directory of the run that this one reuses; `batches` is the folder for
    batches in progress.
    """
    models = open_models(recipe.cast, recipe.limits, images, hooks, folder=batches, engine_of=recipe.engine)
    for model in set(models.values()):
        closing.push_async_callback(model.aclose)
    painter = open_painter(recipe.cast.painter, recipe.limits, hooks) if recipe.cast.painter else None
    if painter:
        closing.push_async_callback(painter.aclose)
    return SharedCast(
        cast=recipe.cast,
        models=models,
        prompts=prompts,
        journal=journal,
        hooks=hooks,
        budget=budget,
        older=index,
        painter=painter,
        images=images,
        older_images=ImageStore(older / "images") if older else None,
    )
