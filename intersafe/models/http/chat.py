"""Any OpenAI-compatible chat server: one POST to `/chat/completions`, by the policy of `service.py`.

Images travel as the member's `send_images` says: as data URIs; as `file://` URLs of the run's own store, for a server
on the same disk; or by vLLM's `uuid`. Then a replica gets the bytes only once, and again if it no longer knows them.
"""

from collections.abc import Callable, Collection
from functools import partial

import msgspec

from intersafe.errors import CallFailed
from intersafe.images.store import ImageStore
from intersafe.models.base import Call, Hooks, Reply
from intersafe.models.http.completions import (
    Part,
    UuidParts,
    as_data,
    chat_body,
    chat_fields,
    estimated,
    read_reply,
    remember,
    tokens_ahead,
)
from intersafe.models.http.faults import Fault, refused_field
from intersafe.models.http.quirks import OptionalField
from intersafe.models.http.request import Request
from intersafe.models.http.service import ReplicaState, Service
from intersafe.recipe.sections import Limits, Member


class EndpointModel:
    """One chat model behind one or several URLs."""

    def __init__(self, member: Member, limits: Limits, images: ImageStore, hooks: Hooks) -> None:
        """Needs a running event loop."""
        self.identity = member.identity
        self._member, self._images, self._hooks = member, images, hooks
        self._refused: dict[str, frozenset[str]] = {}
        """Optional fields that the server refuses, by name of the call's schema."""
        self._told: set[str] = set()
        self._sent_images: dict[str, dict[str, None]] = {url: {} for url in member.spec.urls}
        """Images that each replica has received, by its URL, the latest used last; for `send_images: uuid`."""
        self._part = self._as_file if member.send_images == "file" else self._as_data
        self._service = Service(member, "/chat/completions", limits, hooks, probe=partial(HelloRequest, member))

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._service.aclose()

    def states(self) -> list[ReplicaState]:
        """How each replica does now."""
        return self._service.states()

    async def answer(self, call: Call) -> Reply:
        """The reply; waits out overload and outages, tries again after transient faults."""
        request = self._request(call)
        reply = await self._service.ask(call.job, request)
        if request.is_estimated:
            self._tell_once("usage", "{model} reports no tokens: they are counted by estimate, four characters a token")
        if request.refused:
            self._learn(call, request.refused)
        return reply

    def _request(self, call: Call) -> "ChatRequest":
        without = self._refused.get(_schema_name(call), frozenset()) if self._refused else frozenset()
        if self._member.send_images == "uuid":
            return UuidChatRequest(self._member, call, self._part, without, self._sent_images)
        return ChatRequest(self._member, call, self._part, without)

    def _learn(self, call: Call, refused: "dict[OptionalField, str]") -> None:
        """Leaves out from now on what the server answers only without.

        Each schema learns by itself: which calls had one must not depend on the order of the calls.
        """
        schema = _schema_name(call)
        for field, why in refused.items():
            self._refused[schema] = self._refused.get(schema, frozenset()) | {field.name}
            self._tell_once(field.name, field.notice, why)

    def _tell_once(self, what: str, notice: str, why: str = "") -> None:
        if what not in self._told:
            self._told.add(what)
            self._hooks.notify(notice.format(model=self.identity, why=why))

    def _as_data(self, ref: str) -> Part:
        return as_data(self._images, ref)

    def _as_file(self, ref: str) -> Part:
        return {"type": "image_url", "image_url": {"url": self._images.path(ref).absolute().as_uri()}}


def _schema_name(call: Call) -> str:
    return call.schema.name if call.schema else ""


class HelloRequest(Request[Reply]):
    """The health probe: a greeting of at most 16 tokens."""

    def __init__(self, member: Member, role: str) -> None:
        super().__init__(role)
        hello = {"model": member.spec.model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
        self._body = msgspec.json.encode(hello | member.extra)

    def body(self, url: str) -> bytes:
        """The same for every replica."""
        return self._body

    def read(self, data: bytes) -> Reply:
        """Whatever it says."""
        return read_reply(data)

    def blocked(self, message: str) -> Reply:
        """An answer all the same."""
        return _BLOCKED


class ChatRequest(Request[Reply]):
    """One call; a server that refuses an optional field is asked again without it."""

    def __init__(
        self, member: Member, call: Call, part: Callable[[str], Part], without: Collection[str] = frozenset()
    ) -> None:
        """`part` makes the part of a message out of an image's reference; `without` are fields to leave out."""
        super().__init__(call.role)
        self._member, self._call, self._part, self._without = member, call, part, without
        self.is_estimated = False
        """True if the server reported no tokens."""
        self.refused: dict[OptionalField, str] | None = None
        """Fields that the server refused, each with its words; None for none."""

    def body(self, url: str) -> bytes:
        """The body with all images whole."""
        return chat_body(self._member, self._call, self._part, self._without)

    def read(self, data: bytes) -> Reply:
        """The reply; its tokens by estimate where the server reports none, so that limits hold all the same."""
        reply = read_reply(data)
        if reply.tokens[0]:
            return reply
        self.is_estimated = True
        return msgspec.structs.replace(reply, tokens=estimated(self._call, reply))

    def blocked(self, message: str) -> Reply:
        """An empty reply that says so."""
        return _BLOCKED

    def fall_back(self, error: Fault | CallFailed) -> bool:
        """Leaves out the optional field that the server refuses, if the error is about one."""
        sent = chat_fields(self._member, self._call).keys() - self._without
        field = refused_field(error, sent)
        if field is None:
            return False
        self._without = {*self._without, field.name}
        self.refused = (self.refused or {}) | {field: str(error)}
        return True

    def tokens(self) -> int:
        """By estimate."""
        return tokens_ahead(self._call)

    def used(self, reply: Reply) -> int:
        """What the server reports; 0 for an estimate, which is no better than the first one."""
        return 0 if self.is_estimated else sum(reply.tokens)


class UuidChatRequest(ChatRequest):
    """A call whose images go by vLLM's `uuid`: without their bytes where the replica has received them before."""

    def __init__(
        self,
        member: Member,
        call: Call,
        part: Callable[[str], Part],
        without: Collection[str],
        sent: dict[str, dict[str, None]],
    ) -> None:
        """`sent` has the images that each replica has received, by its URL; this call adds its own."""
        super().__init__(member, call, part, without)
        self._sent = sent
        self._refs = dict.fromkeys(ref for message in call.messages for ref in message.images)
        self._known: dict[str, None] = {}
        """Images that the replica knows to which the latest body went."""
        self._has_omitted = self._is_whole = False

    def body(self, url: str) -> bytes:
        """The body for that replica."""
        self._known = self._sent[url]
        parts = UuidParts(self._part, {} if self._is_whole else self._known)
        body = chat_body(self._member, self._call, parts, self._without)
        self._has_omitted = parts.has_omitted
        return body

    def read(self, data: bytes) -> Reply:
        """The reply; the replica knows the images from now on."""
        reply = super().read(data)
        remember(self._known, self._refs)
        return reply

    def fall_back(self, error: Fault | CallFailed) -> bool:
        """Sends all bytes where some were left out: whatever the error says, it may be about them."""
        if self._is_whole or not self._has_omitted:
            return super().fall_back(error)
        self._is_whole = True
        for ref in self._refs:
            self._known.pop(ref, None)
        return True


_BLOCKED = Reply("", "blocked")
