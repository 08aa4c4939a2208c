"""What `doctor` finds: one finding per check, in groups, in one report."""

from typing import Literal

import msgspec

Status = Literal["ok", "info", "warn", "FAIL"]


class Finding(msgspec.Struct, frozen=True):
    """The result of one check; `remedy` is empty if there is nothing to do."""

    status: Status
    what: str
    says: str
    remedy: str = ""


class Group(msgspec.Struct, frozen=True):
    """The findings about one subject: the installation, this machine, or one replica of a model."""

    title: str
    findings: tuple[Finding, ...]
    roles: tuple[str, ...] = ()
    model: str = ""
    url: str = ""


class Report(msgspec.Struct, frozen=True):
    """All findings; `ok` unless one has the status FAIL."""

    ok: bool
    groups: tuple[Group, ...]
