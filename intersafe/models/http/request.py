"""One call on its way to a server: what it sends, and what becomes of each kind of answer.

`ChatRequest`, `ImageRequest` and `EmbeddingRequest` are the kinds. `Service` decides when a request is sent, and where.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from intersafe.errors import CallFailed
from intersafe.models.http.faults import Fault, Transient

A = TypeVar("A")
"""What a call gives in the end: a reply, an image, vectors."""


class Request(ABC, Generic[A]):
    """A call that may be sent several times, to one replica after the other."""

    max_body: ClassVar[int] = 16 * 2**20
    """Most bytes of an answer; a longer one is not read to its end."""

    def __init__(self, role: str) -> None:
        """`role` of the cast asks: for logs and counts."""
        self.role = role
        self.tries = 0
        """Tries that failed so far."""

    @abstractmethod
    def body(self, url: str) -> bytes:
        """The JSON body for the replica with that base URL.

        It is made when it is sent and not earlier: only calls in flight hold their images in memory.
        """

    @abstractmethod
    def read(self, data: bytes) -> A:
        """The outcome of a 200 with that body; `Transient` where it cannot be read."""

    @abstractmethod
    def blocked(self, message: str) -> A:
        """The outcome where a content filter blocked the call; `message` is the server's."""

    def too_long(self) -> A:
        """The outcome of a 200 with more than `max_body` bytes."""
        raise Transient(f"answer over {self.max_body // 2**20} MiB")

    def fall_back(self, error: Fault | CallFailed) -> bool:
        """Told what an answer of 4xx or 5xx means; True if the body has changed, so that it is sent again at once.

        It may be True a few times at most. It does not count as a try.
        """
        return False

    def tokens(self) -> int:
        """About how many tokens the call will cost; asked where a quota of tokens holds."""
        return 0

    def used(self, outcome: A) -> int:
        """Tokens that the outcome cost; 0 where the server does not say."""
        return 0
