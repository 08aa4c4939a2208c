"""Calls, replies, and the models that answer.

A model is anything with an `identity` and an async `answer`. A call has everything that decides its reply. Its `key`
names it in the journal, so a reply is paid for once. Images are references; each backend reads the bytes when it sends
them.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from intersafe.records import Finish, Message
from intersafe.replies import Schema
from intersafe.run.incidents import Incidents

logging.getLogger("intersafe").addHandler(logging.NullHandler())  # silent where the application sets no logging up


class Sampling(msgspec.Struct, frozen=True):
    """How the reply is sampled; `seed` has 31 bits."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int


class Call(msgspec.Struct, frozen=True):
    """One call to one model."""

    role: str
    """Member of the cast: attacker, judge, second_judge, victim:0, ..."""
    prompt: str
    """Name of the prompt file that it was rendered from; not part of the key."""
    messages: tuple[Message, ...]
    sampling: Sampling
    schema: Schema | None
    job: str
    """Key of the job: a dialogue stays on one replica of a model."""
    ordinal: int
    """Number of the call in its job, from 0."""

    def key(self, identity: str, extra: Mapping[str, Any]) -> str:
        """32 hex digits over all that decides the reply, with the model's identity (not its URL) and `extra` fields."""
        parts = (self.role, identity, extra, self.sampling, self.messages, self.schema, self.job, self.ordinal)
        return hashlib.blake2b(msgspec.json.encode(parts, order="sorted"), digest_size=16).hexdigest()


class Reply(msgspec.Struct, frozen=True):
    """One answer; `tokens` are prompt and completion as the server counted them."""

    text: str
    finish: Finish = "stop"
    tokens: tuple[int, int] = (0, 0)


@dataclass
class Hooks:
    """What models tell a run while they answer, and what they ask it. Every field has a default that does nothing."""

    notify: Callable[[str], None] = lambda _: None
    """Tells the user one line, for example that a service is away or back."""
    show: Callable[[str], None] | None = None
    """Like `notify`, for a line whose event the log has already; None: `notify`."""
    outages: dict[str, str] = field(default_factory=dict)
    """The services that are away right now, by name, each with its reason; the same object for the whole run."""
    may_send: Callable[[], None] | None = None
    """Raises `BudgetReached` once no further call may be sent."""
    incidents: dict[str, Incidents] = field(default_factory=dict)
    """Retries, throttling and outages by role."""

    def incidents_of(self, role: str) -> Incidents:
        """The counts of a role, which begin at 0."""
        return self.incidents.setdefault(role, Incidents())

    def tell(self, text: str, *, logged: bool) -> None:
        """Tells the user one line; `logged`: the log has its event already."""
        (self.show if logged and self.show else self.notify)(text)


class ChatModel(Protocol):
    """Anything that answers calls."""

    @property
    def identity(self) -> str:
        """Backend, name and revision."""
        ...

    async def answer(self, call: Call) -> Reply:
        """The reply; `CallFailed` if this call failed for good, `ServiceGone` if the service is."""
        ...

    async def aclose(self) -> None:
        """Closes connections and frees devices."""
        ...


class Painted(msgspec.Struct, frozen=True):
    """What a painter returned: the bytes of an image, unverified, or the `problem` in one word.

    Problems: `no_image`, `image_url` (a link instead of bytes, never fetched), `blocked` (by the service's filter),
    `bad_image` (cannot be decoded, truncated, too large; found where the bytes are verified).
    """

    data: bytes = b""
    problem: str = ""
    detail: str = ""


class PaintModel(Protocol):
    """Anything that draws; `call.messages[-1].text` is the description, `call.sampling.seed` decides the noise."""

    @property
    def identity(self) -> str:
        """Backend, name and revision."""
        ...

    async def paint(self, call: Call) -> Painted:
        """The image; `CallFailed` if this call failed for good, `ServiceGone` if the service is."""
        ...

    async def aclose(self) -> None:
        """Closes connections and frees devices."""
        ...
