"""The cast as one job sees it: every call goes through the journal, so every reply is paid for once.

A job makes its calls one after the other, so the ordinal of a call is the same each time the job is grown. A reply in
the journal is used again; any other call is sent, its reply written to the journal and then used. A structured answer
that cannot be read is asked for again here, with the problem named. An image is verified and stored before the journal
names it.
"""

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import structs

from intersafe.errors import CallFailed, InputError, JobRejected
from intersafe.exclusions import excluded
from intersafe.images.store import ImageStore, distance, normalise
from intersafe.models.base import Call, ChatModel, Hooks, Painted, PaintModel, Reply, Sampling
from intersafe.recipe.sections import Cast, Member, Painter
from intersafe.records import ImageOrigin, Job, Message, RefusalJob
from intersafe.replies import A, ReplyError, Schema, parse, schema_of
from intersafe.run.budget import Budget
from intersafe.run.journal import Entry
from intersafe.templates.load import Prompts


class Replies(Protocol):
    """Paid replies by key: a journal, or an older run."""

    def take(self, key: str) -> Entry | None:
        """The entry of that call, if there is one."""
        ...


class Record(Replies, Protocol):
    """A journal that can be written to."""

    def add(self, entry: Entry) -> None:
        """Appends the entry."""
        ...


Observer = Callable[[Call, Reply], None]


class Unanswered(Exception):
    """All tries are used up without a structured answer; `reason` is one word of a small set."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class Unpainted(Exception):
    """The painter gave no usable image; `reason` is one of the problems of `Painted`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass(kw_only=True)
class SharedCast:
    """What all jobs of a run share: the models, the prompts, the journal, and the calls in flight."""

    cast: Cast
    models: Mapping[str, ChatModel]
    """By role."""
    prompts: Prompts
    journal: Record
    hooks: Hooks = field(default_factory=Hooks)
    """The ones that the models have."""
    budget: Budget | None = None
    """Checked before every call that is not in the journal."""
    older: Replies | None = None
    """Replies of an older run (`--reuse`)."""
    observe: Observer | None = None
    """Told of every call and its reply, whether paid for now or before."""
    painter: PaintModel | None = None
    images: ImageStore | None = None
    """Receives the painted images; needed where there is a painter."""
    older_images: ImageStore | None = None
    """Images of the older run."""
    in_flight: Counter[str] = field(default_factory=Counter)
    """Calls in flight by role; the same object for the whole run."""
    members: Mapping[str, Member] = field(init=False)
    """The cast's members by role, computed once, since every call needs one."""

    def __post_init__(self) -> None:
        self.members = self.cast.members


class JobCast:
    """The cast of one job."""

    def __init__(self, shared: SharedCast, job: Job | RefusalJob, kind: str = "dialogues") -> None:
        """Calls are numbered from 0 in the order in which the job makes them; `kind` is the job's kind."""
        self._shared, self._job, self._kind, self._ordinal = shared, job, sys.intern(kind), 0
        self.prompts = shared.prompts
        self.victim = f"victim:{job.victim}" if isinstance(job, Job) else ""
        self.has_second_judge = shared.cast.second_judge is not None
        self.has_painter = shared.painter is not None

    async def ask(self, role: str, prompt: str, messages: Sequence[Message], schema: Schema | None = None) -> Reply:
        """One reply of that member of the cast; `CallFailed` if the call failed for good."""
        member, model = self._shared.members[role], self._shared.models[role]
        sampling = Sampling(member.temperature, member.top_p, member.max_tokens, self._next_seed())
        call = Call(
            role=role,
            prompt=prompt,
            messages=tuple(messages),
            sampling=sampling,
            schema=schema,
            job=self._job.key,
            ordinal=self._ordinal,
        )
        self._ordinal += 1
        key = call.key(model.identity, member.extra)
        entry = self._paid(key)
        if entry is None:
            with self._in_flight(call) as began:
                answer = await model.answer(call)
            entry = self._entry(call, key, began, text=answer.text, finish=answer.finish, tokens=answer.tokens)
            # A victim's block ends the job as a failed call does. Neither is journalled: the server may be at fault.
            if not (answer.finish == "blocked" and role == self.victim):
                self._shared.journal.add(entry)
        reply = Reply(entry.text, entry.finish, entry.tokens)
        if self._shared.observe:
            self._shared.observe(call, reply)
        return reply

    async def paint(self, description: str, *, last: bool = False) -> ImageOrigin:
        """The painter's image, verified and stored; `Unpainted` without a usable one, `CallFailed` as for `ask`.

        A problem of the `last` try ends the job and is not journalled, so a resumed job asks again.
        """
        settings, model, store = self._shared.cast.painter, self._shared.painter, self._shared.images
        assert settings is not None
        assert model is not None
        assert store is not None
        sampling = Sampling(0.0, 1.0, 0, self._next_seed())
        call = Call(
            role="painter",
            prompt="",
            messages=(Message("user", description),),
            sampling=sampling,
            schema=None,
            job=self._job.key,
            ordinal=self._ordinal,
        )
        self._ordinal += 1
        options = (settings.size, settings.steps, settings.guidance, settings.negative_prompt, settings.extra)
        key = call.key(model.identity, {"painter": options})
        found = self._shared.journal.take(key)
        entry = found or self._older(key)
        # After a power loss the journal may name an image that never reached the disk: then it is drawn again.
        if entry is None or (entry.image and not await asyncio.to_thread(self._is_there, entry.image, store)):
            with self._in_flight(call) as began:
                painted = await model.paint(call)
            image, problem = await asyncio.to_thread(_stored, painted, store)
            entry = self._entry(call, key, began, text=problem, image=image)
            if image or not last:
                self._shared.journal.add(entry)
        elif found is None:
            self._shared.journal.add(entry)  # now that the image is here
        if self._shared.observe:
            self._shared.observe(call, Reply(entry.text or f"[image {entry.image}]"))
        if not entry.image:
            reason, _, detail = entry.text.partition(": ")
            raise Unpainted(reason, detail)
        return ImageOrigin(entry.image, "painted", description, model.identity, _seed_of(settings, sampling))

    def _is_there(self, image: str, store: ImageStore) -> bool:
        """True if the image is in the store; it may be copied from the older run's."""
        older = self._shared.older_images
        if store.is_sound(image):
            return True
        if older is None:
            return False
        try:
            return store.put(normalise(older.read(image), at=older.root)) == image
        except InputError:
            return False

    def difference(self, one: str, other: str) -> int:
        """Bits, of 64, in which the perceptual hashes of two images differ."""
        store = self._shared.images
        assert store is not None
        return distance(store.perceptual_hash(one), store.perceptual_hash(other))

    def _next_seed(self) -> int:
        return (self._job.random_seed + 0x9E3779B1 * (self._ordinal + 1)) & 0x7FFFFFFF

    def _paid(self, key: str) -> Entry | None:
        """The entry of a call that this run, or the older one that it reuses, has paid for."""
        shared = self._shared
        entry = shared.journal.take(key)
        if entry is None and (entry := self._older(key)):
            shared.journal.add(entry)
        return entry

    def _older(self, key: str) -> Entry | None:
        """The entry of that call in the older run, as one of this job."""
        older = self._shared.older.take(key) if self._shared.older else None
        return structs.replace(older, job=self._job.index, kind=self._kind) if older else None

    def _entry(self, call: Call, key: str, began: float, **fields: Any) -> Entry:
        ms = round((time.perf_counter() - began) * 1000)
        return Entry(job=self._job.index, key=key, role=call.role, ms=ms, kind=self._kind, **fields)

    @contextlib.contextmanager
    def _in_flight(self, call: Call) -> Iterator[float]:
        """Counts the call while it is in flight; yields when it began. `BudgetReached` where it may not start."""
        if self._shared.budget:
            self._shared.budget.check()
        in_flight = self._shared.in_flight
        in_flight[call.role] += 1
        try:
            yield time.perf_counter()
        except CallFailed as error:
            # The conversation itself is too long, and stays so. The first prompt of a job contains none of it.
            if error.reason == "too_long" and call.ordinal:
                raise JobRejected(call.role.partition(":")[0], "too_long", error.detail) from None
            # The server may be at fault, and nothing was paid: no journal entry, so a resumed job asks again.
            raise CallFailed(call.role.partition(":")[0], error.reason, error.detail) from None
        finally:
            in_flight[call.role] -= 1

    async def answer(
        self,
        role: str,
        prompt: str,
        values: Mapping[str, Any],
        kind: type[A],
        *,
        images: Sequence[str] = (),
        tries: int,
        sizes: tuple[tuple[str, int], ...] = (),
    ) -> A:
        """A structured answer of that `kind` to a prompt file.

        It is asked for again with the problem named; `Unanswered` after that many `tries`.
        """
        file = self.prompts[prompt]
        asked = (
            Message("system", file.render("system", values)),
            Message("user", file.render("user", values), tuple(images)),
        )
        schema = schema_of(kind, sizes)
        messages: tuple[Message, ...] = asked
        reason, detail = "unparseable", ""
        for _ in range(tries):
            reply = await self.ask(role, prompt, messages, schema)
            if reply.finish == "stop":
                try:
                    found = parse(reply.text, kind)
                except ReplyError as error:
                    if excluded(reply.text):  # the correction would send it back
                        raise JobRejected(role, "excluded") from None
                    reason, detail = "unparseable", str(error)
                    correction = (
                        f"That could not be read: {detail}. Answer again with the one JSON object and nothing else."
                    )
                    messages = (*asked, Message("assistant", reply.text), Message("user", correction))
                    continue
                return found
            messages = asked
            reason, detail = ("truncated" if reply.finish == "length" else reply.finish), reply.text[:200]
        raise Unanswered(reason, detail)


def _seed_of(settings: Painter, sampling: Sampling) -> int:
    """The seed in the painter's request; 0 where the recipe leaves it out."""
    if settings.spec.backend != "openai":
        return sampling.seed
    seed = settings.extra.get("seed", sampling.seed)
    return seed if isinstance(seed, int) else 0


def _stored(painted: Painted, store: ImageStore) -> tuple[str, str]:
    """The reference of the stored image and "", or "" and the problem."""
    if painted.problem:
        return "", ": ".join(part for part in (painted.problem, " ".join(painted.detail.split())[:200]) if part)
    try:
        reference = store.put(normalise(painted.data, at="painter"))
        store.perceptual_hash(reference)  # computed now, in this thread: the gates ask for it later
        return reference, ""
    except InputError as error:
        return "", f"bad_image: {error.what}"
