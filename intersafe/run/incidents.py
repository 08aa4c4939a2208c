"""Incidents: how often a role's calls were retried, throttled, or cut off by an outage."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from intersafe.storage.files import write_whole
from intersafe.wording import counted

FILE = "incidents.json"
"""In the run directory: the incidents of all commands that have ended, by role; absent while there were none."""

SHOWN = {"shown": True}
"""`extra` of a log record whose event the display shows in its own words: a terminal need not show it twice."""


class Incidents(msgspec.Struct):
    """Counts of one role."""

    retries: int = 0
    """Calls that were sent again after a passing fault (5xx, time-out, unreadable body)."""
    throttled: int = 0
    """Answers 429, 503 or 529: the rate limiter slowed down."""
    outages: int = 0
    """Times that every replica was away."""
    replicas_out: int = 0
    """Times that one of several replicas was taken out."""

    @property
    def words(self) -> str:
        """The counts above 0, as `3 retries, 1 outage`; empty if there are none."""
        parts = [
            f"{self.retries:,} {'retry' if self.retries == 1 else 'retries'}" if self.retries else "",
            f"{self.throttled:,} throttled" if self.throttled else "",
            counted(self.outages, "outage") if self.outages else "",
            f"{counted(self.replicas_out, 'replica')} taken out" if self.replicas_out else "",
        ]
        return ", ".join(part for part in parts if part)


def added_up(*parts: Mapping[str, Incidents]) -> dict[str, Incidents]:
    """The sum by role, of the roles that had any."""
    total: dict[str, Incidents] = {}
    for part in parts:
        for role, more in part.items():
            so_far = total.setdefault(role, Incidents())
            for name in Incidents.__struct_fields__:
                setattr(so_far, name, getattr(so_far, name) + getattr(more, name))
    return {role: incidents for role, incidents in sorted(total.items()) if incidents != Incidents()}


def over_workers(*parts: Mapping[str, Incidents]) -> dict[str, Incidents]:
    """The counts of workers that share the servers: the sum of retries and throttling, the maximum of the others.

    All workers see the same outage of a server, so a sum would count it once per worker.
    """
    total = added_up(*parts)
    for role, incidents in total.items():
        for name in ("outages", "replicas_out"):
            setattr(incidents, name, max(getattr(part[role], name) for part in parts if role in part))
    return total


def read_incidents(root: Path) -> dict[str, Incidents]:
    """Those of the commands that have ended; none if the file is absent or damaged."""
    try:
        return msgspec.json.decode((root / FILE).read_bytes(), type=dict[str, Incidents])
    except (OSError, msgspec.DecodeError):
        return {}


def write_incidents(root: Path, incidents: Mapping[str, Incidents]) -> None:
    """Writes the file whole, if there are any; `StorageError` if it cannot be written."""
    if incidents:
        write_whole(root / FILE, msgspec.json.format(msgspec.json.encode(incidents)) + b"\n")
