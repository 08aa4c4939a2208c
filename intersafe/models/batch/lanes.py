"""The batch lanes of a run, and the model of each member with `batch: true`: a view on a lane that others may share."""

from pathlib import Path

from msgspec import structs

from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Reply
from intersafe.models.batch.api import BatchApi, Pace
from intersafe.models.batch.files import BatchFolder
from intersafe.models.batch.lane import Lane
from intersafe.models.http.completions import as_data, chat_body, estimated
from intersafe.recipe.sections import Limits, Member

FEW = 500
"""Dialogues at once below which a batch lane is hardly worth the wait."""


class Lanes:
    """The lanes of a run: members with the same model, URL and key share one."""

    def __init__(self, folder: Path, limits: Limits, hooks: Hooks, pace: Pace | None = None) -> None:
        """`folder` is `batches/` of the run directory; no other process may use it."""
        self._folder, self._limits, self._hooks, self._pace = BatchFolder(folder), limits, hooks, pace or Pace()
        self._lanes: dict[str, Lane] = {}

    def open(self, role: str, member: Member, images: ImageStore) -> "BatchModel":
        """The model of a member; the faults of a lane count for the role that opens it. Needs a running event loop."""
        name = f"{member.spec.model} {member.spec.urls[0]} {member.key}"
        if name not in self._lanes:
            service = BatchApi(member, self._limits, self._hooks, self._pace, role)
            self._lanes[name] = Lane(name, service, self._limits, self._folder, self._hooks, self._pace)
        return BatchModel(member, images, self._lanes[name])

    def begin(self) -> None:
        """Tells the user what to know before the first batch."""
        if self._lanes and self._limits.concurrency < FEW:
            self._hooks.notify(
                f"`batch: true` with limits.concurrency {self._limits.concurrency}: every turn of a dialogue waits for "
                "a batch, so grow thousands of dialogues at once (docs/batch.md)"
            )
        for name in {state.lane for state in self._folder.states if state.file} - self._lanes.keys():
            model, url, key = name.rsplit(" ", 2)
            self._hooks.notify(
                f"batches of {model} at {url} (key {key or 'none'}) stay with the provider, since no member of the "
                "cast has `batch: true` there any longer: their calls are asked again"
            )


class BatchModel:
    """One chat model behind a batch endpoint."""

    def __init__(self, member: Member, images: ImageStore, lane: Lane) -> None:
        self.identity = member.identity
        self._member, self._images, self._lane = member, images, lane

    async def answer(self, call: Call) -> Reply:
        """The reply, within a day; `CallFailed` if this call failed for good, `ServiceGone` if the service did."""
        reply = await self._lane.ask(call.role, call.key(self.identity, self._member.extra), lambda: self._body(call))
        is_counted = reply.tokens[0] or reply.finish == "blocked"
        return reply if is_counted else structs.replace(reply, tokens=estimated(call, reply))

    def _body(self, call: Call) -> bytes:
        return chat_body(self._member, call, lambda ref: as_data(self._images, ref))

    async def aclose(self) -> None:
        """Leaves unfinished batches to the provider."""
        await self._lane.aclose()
