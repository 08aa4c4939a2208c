"""What can fail between here and the Hub: the failures, what an HTTP error means, and how long to wait for a retry."""

import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from intersafe.errors import IntersafeError
from intersafe.wording import printable

PASSING = frozenset({408, 409, 425, 429})
"""HTTP statuses after which the same request may succeed, in addition to all from 500 on."""
_RATE = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,6})")
_SECRET = re.compile(r"\bhf_\w+|(?<=[?&])(?:X-Amz-[\w-]+|Signature|Policy)=[^\s&'\"]+")


class TagConflict(IntersafeError):
    """The version is published with other content; a tag is never moved."""

    exit_code = 3


class RemoteChanged(IntersafeError):
    """The repository holds, or received meanwhile, something that this push must not replace."""

    exit_code = 4


class AccessRefused(IntersafeError):
    """No token, a token without the right, a repository that is open, or a request that the Hub refuses for good."""

    exit_code = 5


class NetworkGaveUp(IntersafeError):
    """The Hub did not answer before the deadline, or failed too often; nothing is half published."""

    exit_code = 6


def redacted_line(text: str, most: int = 240) -> str:
    """Untrusted text as one printable line of at most `most` characters, without tokens and signatures of URLs."""
    return " ".join(printable(_SECRET.sub("***", text)).split())[:most]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the errors behind it (`__cause__`), outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: BaseException | None) -> int:
    """The HTTP status behind an error; 0 if there is none."""
    for cause in causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            return int(response.status_code)
    return 0


def is_passing(error: BaseException) -> bool:
    """True if the same request may succeed later: its status says so, or no answer came at all."""
    import httpx2

    if status := status_of(error):
        return status in PASSING or status >= 500
    return any(isinstance(cause, httpx2.TransportError | ConnectionError) for cause in causes(error))


def requested_wait(error: BaseException | None) -> float:
    """Seconds that the answer behind an error asks to wait, by `RateLimit` or either form of `Retry-After`; or 0."""
    for cause in causes(error):
        if (response := getattr(cause, "response", None)) is None:
            continue
        rate = _RATE.search(response.headers.get("RateLimit", ""))
        if response.status_code == 429 and rate:
            return float(rate[1]) + 0.5
        text = response.headers.get("Retry-After", "").strip()
        if text.isdigit():
            return float(text)
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time()) if text else 0.0
        except ValueError:
            return 0.0
    return 0.0


def describe_error(error: BaseException | None) -> str:
    """What went wrong, in one line: the HTTP status and the Hub's own message, or else the innermost error."""
    innermost = error
    for cause in causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            message = getattr(cause, "server_message", None) or ""
            return redacted_line(f"{response.status_code} {message}".strip())
        innermost = cause
    return redacted_line(f"{type(innermost).__name__}: {innermost}")
