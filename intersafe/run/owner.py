"""Owners: which process writes a run, as its lock file says, and whether that process is alive.

The certain signs come first: the process itself, for the same kernel and pid namespace; then its `flock`, for the same
kernel and folder, since the kernel releases it at death. Host names decide nothing, since containers and cloned
machines share them. Otherwise the heartbeat decides (`lock.py`).
"""

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from intersafe.wording import printable

BEAT = 10.0
"""Seconds between two heartbeats."""

_NONCE = re.compile(r"[0-9a-f]{32}")

Life = Literal["alive", "dead", "unsure"]


class Owner(msgspec.Struct, frozen=True):
    """The process that writes a run; texts are empty if the system does not provide them."""

    host: str
    boot: str
    """The kernel's random boot id."""
    pids: str
    """The pid namespace: each container has its own."""
    pid: int
    started: str
    """Start of the process in the kernel's ticks since boot: tells a reused pid from the owner."""
    folder: tuple[int, int]
    """Device and inode of the run: a copied run is not the owner's."""
    flock: bool
    """True if it holds a flock on the lock file."""
    beat: float
    """Seconds between its heartbeats."""
    begun: str
    nonce: str


class OwnerFile(NamedTuple):
    """A lock file as it was read; `owner` is None if it names none."""

    path: Path
    data: bytes
    time: int
    owner: Owner | None
    unlocked: bool | None
    """True if no process of this kernel holds a flock on it; None if the file system has no flock."""

    @property
    def nonce(self) -> str:
        """The owner's nonce, or one made of the file's name and bytes, so that empty files differ."""
        if self.owner:
            return self.owner.nonce
        return hashlib.sha256(self.path.name.encode() + self.data).hexdigest()[:32]

    @property
    def beat(self) -> float:
        """Seconds between the owner's heartbeats."""
        return min(max(self.owner.beat, 0.05), BEAT) if self.owner else BEAT

    def same(self, other: "OwnerFile | None") -> bool:
        """True if the file has not changed."""
        return other is not None and (self.data, self.time) == (other.data, other.time)


def read_owner(path: Path) -> OwnerFile | None:
    """The lock file, or None. Opens it each time, since NFS then asks the server."""
    try:
        with path.open("rb") as file:
            data = file.read(4096)
            unlocked = flocked(file.fileno(), fcntl.LOCK_SH)
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    try:
        owner: Owner | None = msgspec.json.decode(data, type=Owner)
    except msgspec.DecodeError:
        owner = None
    if owner is not None and not _NONCE.fullmatch(owner.nonce):
        owner = None
    return OwnerFile(path, data, status.st_mtime_ns, owner, unlocked)


def flocked(file: int, how: int) -> bool | None:
    """True if the flock was acquired, False if another process has it, None if there is no flock."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def life_of(root: Path, found: OwnerFile) -> Life:
    """Whether an owner is alive, as far as that can be known without a clock."""
    owner = found.owner
    if owner is None:  # by an earlier version, which used flock alone; or torn, or not yet written
        return "alive" if found.unlocked is False else "unsure"
    same_folder = owner.folder == _identity(root)
    if owner.boot != _boot() or (not owner.boot and owner.host != socket.gethostname()):
        return "unsure"
    if owner.pids == _pids():
        gone = _is_gone(owner)
        if gone is not None:
            return "dead" if gone else "alive" if same_folder else "unsure"
    if owner.flock and same_folder:
        return "alive" if found.unlocked is False else "dead" if found.unlocked else "unsure"
    return "unsure"


def _is_gone(owner: Owner) -> bool | None:
    """True if the owner's process has ended; None if that is unknown."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # a process of another user: it exists
    started = _started(owner.pid)
    if not owner.started or started is None:
        return None
    return started != owner.started


def in_words(owner: Owner | None) -> str:
    """The owner, in words; any process may have written the file, so the texts are made printable."""
    if owner is None:
        return "its lock file names no process"
    host, begun = (printable(text, instead="")[:64] for text in (owner.host, owner.begun))
    return f"process {owner.pid} on {host}, since {begun}"


def myself(root: Path, nonce: str, beat: float, flock: bool) -> Owner:
    """This process as the owner of a run."""
    pid, begun = os.getpid(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Owner(
        host=socket.gethostname(),
        boot=_boot(),
        pids=_pids(),
        pid=pid,
        started=_started(pid) or "",
        folder=_identity(root),
        flock=flock,
        beat=beat,
        begun=begun,
        nonce=nonce,
    )


def _identity(root: Path) -> tuple[int, int]:
    status = root.stat()
    return status.st_dev, status.st_ino


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pids() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/self/ns/pid").readlink().name
    return ""


def _started(pid: int) -> str | None:
    """Start of a process in ticks since boot; empty for a zombie, None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in ("Z", "X") else fields[19]


def awake() -> float:
    """Seconds on a clock that also counts while the machine is suspended, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
