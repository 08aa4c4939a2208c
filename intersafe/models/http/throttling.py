"""What a server that throttles says: how long to wait, and which limits it holds the account to."""

import email.utils
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

from intersafe.models.http.quirks import LIMITS, PAUSE_MS_HEADERS, PAUSES, REQUESTED, RESET_HEADERS

LONGEST_WAIT = 3600.0
"""Seconds; a server that names more is taken to be wrong."""
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|mil|s|m|h)")


class Throttle(NamedTuple):
    """What a 429 or 503 says about limits; 0, None and False where it says nothing."""

    pause: float
    """Seconds until the next request may be accepted."""
    rpm: int | None
    """Requests a minute."""
    tpm: int | None
    """Tokens a minute."""
    too_large: bool
    """The request alone asks for more tokens than `tpm`."""


def throttle_of(headers: Mapping[str, str], text: str) -> Throttle:
    """What these headers and the body `text` of a 429 or 503 say; a header counts before the body."""
    limits = {what.lower(): int(number.replace(",", "")) for what, number in LIMITS.findall(text)}
    too_large = any(int(requested) > int(limit) > 0 for limit, requested in REQUESTED.findall(text))
    pause = _pause_in_headers(headers) or _pause_in_text(text)
    return Throttle(min(LONGEST_WAIT, pause), limits.get("requests") or None, limits.get("tokens") or None, too_large)


def _pause_in_headers(headers: Mapping[str, str]) -> float:
    for name in PAUSE_MS_HEADERS:
        if milliseconds := _number(headers.get(name, "")):
            return milliseconds / 1000
    if pause := seconds_of(headers.get("Retry-After", ""), headers.get("Date", "")):
        return pause
    spent = [reset for remaining, reset in RESET_HEADERS if headers.get(remaining) == "0"]
    return max((span_of(headers.get(reset, "")) for reset in spent), default=0.0)


def _number(text: str) -> float:
    """A positive number; 0 for anything else."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


def _pause_in_text(text: str) -> float:
    return max((span_of(span) for pattern in PAUSES for span in pattern.findall(text)), default=0.0)


def span_of(text: str) -> float:
    """Seconds of a span of time: `1s`, `6m0s`, `120ms`, `20 seconds`; 0 for nonsense."""
    parts = _PART.findall(text.lower())
    return sum(float(number) * _UNITS.get(unit.replace("mil", "ms"), 0.0) for number, unit in parts)


def seconds_of(retry_after: str, date: str = "") -> float:
    """A `Retry-After` header, in seconds or as a date (RFC 9110, 10.2.3), as 0 to 3600 seconds; 0 for nonsense.

    A date is compared with the answer's own `Date`, since our clock may be wrong.
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        until = _timestamp(retry_after)
        now = _timestamp(date) or time.time()
        seconds = until - now if until else 0.0
    return min(LONGEST_WAIT, max(0.0, seconds))


def _timestamp(date: str) -> float:
    """Seconds of an HTTP date since 1970; 0 for nonsense."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return 0.0
