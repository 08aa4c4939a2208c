"""From the members of a cast to models: which backend answers for which spec, and what it needs to start."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from intersafe.errors import InputError
from intersafe.images.store import ImageStore
from intersafe.models.base import ChatModel, Hooks, PaintModel
from intersafe.recipe.engine import Engine
from intersafe.recipe.sections import Cast, Limits, Member, Painter

if TYPE_CHECKING:
    from intersafe.models.batch.lanes import Lanes


def open_models(
    cast: Cast,
    limits: Limits,
    images: ImageStore,
    hooks: Hooks,
    *,
    folder: Path | None = None,
    engine_of: Callable[[str], Engine] = lambda _: Engine(),
) -> dict[str, ChatModel]:
    """One model for each role of the cast; members with the same settings share one. Needs a running event loop.

    `folder` is for the batches of members with `batch: true`; no other process may use it. `engine_of` gives the
    settings of a model that runs in this process (`Recipe.engine`).
    """
    shared: dict[str, ChatModel] = {}
    members = list(cast.members.values())
    if lanes := _lanes(cast, limits, hooks, folder):
        for role, member in cast.members.items():
            if member.batch:
                shared.setdefault(_share_key(member), lanes.open(role, member, images))
        lanes.begin()
    if any(member.in_process for member in members):  # last: they begin to load
        from intersafe.models.local.open import open_engines

        shared |= open_engines(members, _share_key, images, hooks, engine_of)
    return {
        role: _open(_within_limits_of_all(member, members), limits, images, hooks, shared)
        for role, member in cast.members.items()
    }


def _lanes(cast: Cast, limits: Limits, hooks: Hooks, folder: Path | None) -> "Lanes | None":
    """The lanes of the members with `batch: true`; also there where an earlier process left batches in the folder."""
    wanted = any(member.batch for member in cast.members.values())
    if folder is None and wanted:
        raise InputError("`batch: true` needs a run directory for its batches", remedy="remove it")
    if folder is None or not (wanted or folder.exists()):
        return None
    from intersafe.models.batch.lanes import Lanes

    return Lanes(folder, limits, hooks)


def clear_batches(folder: Path) -> None:
    """Deletes the results of batches once all jobs of the run are decided; keeps the records of unfinished batches."""
    if folder.exists():
        from intersafe.models.batch.files import clear

        clear(folder)


def _within_limits_of_all(member: Member, members: list[Member]) -> Member:
    """The member with the lowest `concurrency`, `rpm` and `tpm` of those that share its model."""
    sharing = [other for other in members if _share_key(other) == _share_key(member)]
    return structs.replace(
        member,
        concurrency=min(other.concurrency for other in sharing),
        rpm=min((other.rpm for other in sharing if other.rpm), default=None),
        tpm=min((other.tpm for other in sharing if other.tpm), default=None),
    )


def _share_key(member: Member) -> str:
    """The same text for members that can share one model."""
    apart = (member.revision, member.key, member.json_schema, member.send_images, member.batch, member.extra)
    return f"{member.model} {apart}"


def _open(member: Member, limits: Limits, images: ImageStore, hooks: Hooks, shared: dict[str, ChatModel]) -> ChatModel:
    backend = member.spec.backend
    key = _share_key(member)
    if key not in shared:
        if backend == "scripted":
            from intersafe.models.scripted.chat import ScriptedModel

            shared[key] = ScriptedModel(member.spec.model)
        else:
            from intersafe.models.http.chat import EndpointModel

            shared[key] = EndpointModel(member, limits, images, hooks)
    return shared[key]


def open_painter(painter: Painter, limits: Limits, hooks: Hooks) -> PaintModel:
    """The painter of a cast. Needs a running event loop."""
    backend, name, _ = painter.spec
    if backend == "scripted":
        from intersafe.models.scripted.painter import ScriptedPainter

        return ScriptedPainter(name, painter.size)
    if backend == "diffusers":
        from intersafe.models.local.diffusers import DiffusersPainter

        return DiffusersPainter(painter)
    from intersafe.models.http.images import ImagesEndpoint

    return ImagesEndpoint(painter, limits, hooks)


def check_cast(cast: Cast, engine_of: Callable[[str], Engine] = lambda _: Engine()) -> None:
    """`InputError` for a key variable that is not set, an unknown scripted name, a missing library or missing weights.

    It contacts no service and loads nothing.
    """
    for role, member in cast.models.items():
        if member.key and not os.environ.get(member.key):
            raise InputError(
                f"cast.{role}: the environment variable {member.key} is not set", remedy=f"export {member.key}=..."
            )
        key = os.environ.get(member.key, "")
        if member.key and not (key.strip() and key.strip().isprintable()):
            raise InputError(
                f"cast.{role}: the environment variable {member.key} holds no key (blank, or more than one line)",
                remedy=f"export {member.key}=...",
            )
        if member.spec.backend == "diffusers":
            from intersafe.models.local.diffusers import check_diffusers

            check_diffusers()
        elif isinstance(member, Member) and member.in_process:
            from intersafe.models.local.open import check_engine

            check_engine(role, member, engine_of(member.spec.model))
        elif member.spec.backend == "scripted" and role == "painter":
            from intersafe.models.scripted.painter import check_painter_name

            check_painter_name(member.spec.model)
        elif member.spec.backend == "scripted":
            from intersafe.models.scripted.profiles import check_name

            check_name(member.spec.model)
