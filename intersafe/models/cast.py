"""The cast as one job sees it: every question goes through the journal, so every reply is paid for once.

A job asks its questions one after the other, so the ordinal of a call is the same each time the job is grown. A reply
that the journal holds is handed out again; the others are asked, written to the journal and then used. Structured
answers that cannot be read are asked for again here, with the problem named.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import structs

from intersafe.errors import CallFailed, JobRejected
from intersafe.journal import Entry
from intersafe.models import Call, ChatModel, Reply, Sampling
from intersafe.records import Job, Message
from intersafe.replies import A, ReplyError, Schema, parse, schema_of
from intersafe.settings import Cast, Member
from intersafe.taxonomy import excluded
from intersafe.templates import Prompts


class Replies(Protocol):
    """Where paid replies are kept: a journal, or an older run."""

    def take(self, key: str) -> Entry | None:
        """The entry of that call, if there is one."""
        ...


class Record(Replies, Protocol):
    """A journal that can be written."""

    def add(self, entry: Entry) -> None:
        """Appends the entry."""
        ...


Observer = Callable[[Call, Reply], None]


class Unanswered(Exception):
    """All tries are used up and none gave the structured answer; `reason` is one word of a small set."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclass
class Company:
    """What all jobs of a run share: the models, the prompts, the journal, and who is being asked right now."""

    cast: Cast
    models: Mapping[str, ChatModel]
    prompts: Prompts
    journal: Record
    older: Replies | None = None
    """Journal of an older run (`--reuse`)."""
    observe: Observer | None = None
    in_flight: Counter[str] = field(default_factory=Counter)
    members: Mapping[str, Member] = field(init=False)
    """The cast's members by role, looked up for every call."""

    def __post_init__(self) -> None:
        self.members = self.cast.members


class JobCast:
    """The cast of one job."""

    def __init__(self, company: Company, job: Job) -> None:
        """Calls are numbered from 0 in the order in which the job asks."""
        self._company, self._job, self._ordinal = company, job, 0
        self.prompts = company.prompts
        self.victim = f"victim:{job.victim}"
        self.has_second_judge = company.cast.second_judge is not None

    async def ask(self, role: str, prompt: str, messages: Sequence[Message], schema: Schema | None = None) -> Reply:
        """One reply of that member of the cast; `CallFailed` if the call failed for good."""
        company = self._company
        member, model = company.members[role], company.models[role]
        seed = (self._job.random_seed + 0x9E3779B1 * (self._ordinal + 1)) & 0x7FFFFFFF
        sampling = Sampling(member.temperature, member.top_p, member.max_tokens, seed)
        call = Call(role, prompt, tuple(messages), sampling, schema, self._job.key, self._ordinal)
        self._ordinal += 1
        key = call.key(model.identity, member.extra)
        entry = company.journal.take(key)
        if entry is None:
            older = company.older.take(key) if company.older else None
            entry = structs.replace(older, job=self._job.index) if older else await self._pay(model, call, key)
            company.journal.add(entry)
        reply = Reply(entry.text, entry.finish, entry.tokens)
        if company.observe:
            company.observe(call, reply)
        return reply

    async def _pay(self, model: ChatModel, call: Call, key: str) -> Entry:
        in_flight = self._company.in_flight
        in_flight[call.role] += 1
        began = time.perf_counter()
        try:
            reply = await model.answer(call)
        except CallFailed as error:
            # A failure may be the server's and costs nothing: no journal entry, so an undecided job asks again.
            raise CallFailed(call.role.partition(":")[0], error.reason, error.detail) from None
        finally:
            in_flight[call.role] -= 1
        ms = round((time.perf_counter() - began) * 1000)
        return Entry(self._job.index, key, call.role, reply.text, reply.finish, reply.tokens, ms)

    async def answer(
        self,
        role: str,
        prompt: str,
        values: Mapping[str, Any],
        kind: type[A],
        *,
        images: Sequence[str] = (),
        tries: int,
        items: int | None = None,
    ) -> A:
        """A structured answer to a prompt file; asked again with the problem named, `Unanswered` after `tries`."""
        file = self.prompts[prompt]
        asked = (
            Message("system", file.render("system", values)),
            Message("user", file.render("user", values), tuple(images)),
        )
        schema = schema_of(kind, items)
        messages: tuple[Message, ...] = asked
        reason, detail = "unparseable", ""
        for _ in range(tries):
            reply = await self.ask(role, prompt, messages, schema)
            if reply.finish == "stop":
                try:
                    found = parse(reply.text, kind)
                except ReplyError as error:
                    if excluded(reply.text):  # it would be sent back with the correction
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
