"""One writer for a run at a time: an owner file that holds on NFS, and that a dead owner does not leave locked.

`<run>/.lock` names its owner (`Owner`). It comes into being whole, by `link()` of a temporary file, or by an exclusive
open where a file system has no hard links; of several that try at once exactly one succeeds on any of them. While the
owner lives it renews the file's time (the heartbeat). Whether an owner is dead is told, from certain to less certain,

- by its process, where it runs under the same kernel and in the same pid namespace: at once;
- by `flock`, which the kernel takes from the dead, under the same kernel and for the same folder: at once;
- by a heartbeat older than `LIMIT` beats on the file system's own clock, and still not renewed while we look on: so
  neither a machine's clock nor one that jumps decides.

A dead owner's successor is whoever makes the file `.lock-<its nonce>` first; renamed over `.lock` that is the new
owner's file. An owner that was stopped and wakes finds another's nonce there and writes no more.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from intersafe.errors import InputError, StorageError
from intersafe.run.owner import BEAT, Found, Owner, awake, flocked, in_words, life_of, myself, read_owner

LIMIT = 12
"""Heartbeats that an owner may miss before others may take it for dead."""
NAME = ".lock"

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


class Lease:
    """A run that is this process's to write, until `release`; a thread keeps its heartbeat."""

    def __init__(self, root: Path, owner: Owner, data: bytes, file: int, news: str) -> None:
        """Made by `lock`; `news` is what the user should know, or empty."""
        self.news = news
        self._root, self._path, self._data, self._file = root, root / NAME, data, file
        self._beat, self._lost, self._seen = owner.beat, "", awake()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """`StorageError` if another process has taken over; asks the disk only where a heartbeat was missed."""
        if not self._lost and awake() - self._seen > 2 * self._beat:
            try:
                self._renew()
            except OSError as error:
                raise StorageError(
                    f"{self._path}: {error.strerror}; mend it, then run the same command again"
                ) from None
        if self._lost:
            raise StorageError(self._lost)

    def release(self) -> None:
        """Gives the run back; what others have made of it meanwhile stays."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if not self._lost and self._path.read_bytes() == self._data:
                self._path.unlink()
        os.close(self._file)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._lost and not self._stop.wait(self._beat):
            with contextlib.suppress(OSError):  # a server that is away: `check` asks again, and says so
                self._renew()

    def _renew(self) -> None:
        found = read_owner(self._path)
        if found is None:
            self._lost = f"{self._root}: its lock file was deleted while it was written; run the same command again"
        elif found.data != self._data:
            who = f"taken over by another process while this one stood still ({in_words(found.owner)})"
            self._lost = f"{self._root}: {who}; it goes on there, this one writes no more"
        if self._lost:
            return
        try:
            os.utime(self._file)
        except OSError:
            os.pwrite(self._file, self._data, 0)  # the same bytes: where a time cannot be set, writing sets it
            os.fsync(self._file)
        self._seen = awake()


def lock(root: Path, *, beat: float = BEAT) -> Lease:
    """Takes the run for this process; `InputError` if another one has it, or the place holds no run.

    Waits some seconds only where another machine's owner seems dead: to see that it is.
    """
    _make(root)
    nonce = secrets.token_hex(16)
    temporary = root / f"{NAME}.{nonce}.tmp"
    try:
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            owner = myself(root, nonce, beat, flocked(file, fcntl.LOCK_EX) is True)
            data = msgspec.json.encode(owner) + b"\n"
            _fill(file, data)
            kept, news = _take(root, temporary, owner, file, data)
        except BaseException:
            os.close(file)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        if kept != file:
            os.close(file)
    except OSError as error:
        place = root if error.filename in (None, str(temporary)) else error.filename
        raise StorageError(f"{place}: cannot be written ({error.strerror}); mend it, or name another --run") from None
    _tidy(root, nonce, os.fstat(kept).st_mtime)
    return Lease(root, owner, data, kept, news)


@contextlib.contextmanager
def unwritten(root: Path) -> Iterator[None]:
    """`InputError` if another process writes the run now, or has written it by the end of the block.

    Makes no file and needs no right to write; whoever wants to write the run is not kept from it.
    """
    _fail_if_written(root)
    before = _state(root)
    yield
    _fail_if_written(root)
    if _state(root) != before:
        raise InputError("was written meanwhile", at=root, remedy="start again once it is not being written")


# --- taking it -------------------------------------------------------------------------------------------------------


def _make(root: Path) -> None:
    try:
        if root.is_dir() and not (root / "recipe.json").exists() and not all(e.name[0] == "." for e in root.iterdir()):
            raise InputError("the folder is not empty and no run", at=root, remedy="name another --run")
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError("not a folder", at=root, remedy="name another --run") from None
    except OSError as error:
        raise StorageError(f"{root}: cannot be written ({error.strerror}); mend it, or name another --run") from None


def _take(root: Path, temporary: Path, owner: Owner, file: int, data: bytes) -> tuple[int, str]:
    """The open file of the lock that is now ours, and the news; `InputError` if it is another's."""
    for attempt in itertools.count():
        time.sleep(0.01 * min(attempt, 10))
        chain = _chain(root)
        if not chain:
            if (made := _create(root / NAME, temporary, file, data)) is not None and _is_mine(root, data):
                return made, ""
            if (root / NAME).is_symlink():
                raise InputError("a link to nowhere", at=root / NAME, remedy="delete it")
            continue
        last = chain[-1]
        _refuse_if_alive(root, last, _now(file))
        claim = root / f"{NAME}-{last.nonce}"
        if (made := _create(claim, temporary, file, data)) is None:
            continue  # another one is taking over: now the question is whether that one lives
        again = read_owner(root / NAME)
        if not chain[0].same(again):  # it has taken over already: what we made belongs to nothing
            _drop(claim, made, file)
            continue
        with contextlib.suppress(FileNotFoundError):
            claim.replace(root / NAME)
        if _is_mine(root, data):
            gone = in_words(last.owner) if last.owner else "one that left no name"
            return made, f"{root}: taken over from a dead process: {gone}"
    raise AssertionError("not reached")


def _chain(root: Path) -> list[Found]:
    """The owner's file, and those of its successors as far as they got; empty if the run is free."""
    found, chain = read_owner(root / NAME), list[Found]()
    while found is not None and found.nonce not in {one.nonce for one in chain}:
        chain.append(found)
        found = read_owner(root / f"{NAME}-{found.nonce}")
    return chain


def _create(path: Path, temporary: Path, file: int, data: bytes) -> int | None:
    """Makes the file, whole, unless it is there; returns it open, or None."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_links(path, data)
    # An answer that NFS lost and asked for again says "exists" of a link that was made: the count knows.
    return file if os.fstat(file).st_nlink > 1 and _holds(path, data) else None


def _create_without_links(path: Path, data: bytes) -> int | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    for _ in range(100):
        if flocked(file, fcntl.LOCK_EX) is not False:
            break
        time.sleep(0.01)  # somebody looks at it just now
    _fill(file, data)
    return file


def _drop(claim: Path, made: int, file: int) -> None:
    claim.unlink(missing_ok=True)
    if made != file:
        os.close(made)


def _is_mine(root: Path, data: bytes) -> bool:
    return _holds(root / NAME, data)


def _holds(path: Path, data: bytes) -> bool:
    found = read_owner(path)
    return found is not None and found.data == data


def _fill(file: int, data: bytes) -> None:
    os.pwrite(file, data, 0)
    os.fsync(file)


def _now(file: int) -> float:
    """The file system's clock: what it writes beside a file that is touched now."""
    os.utime(file)
    return os.fstat(file).st_mtime


def _tidy(root: Path, nonce: str, now: float) -> None:
    """Takes away what killed processes left: claims on owners of the past, and temporary files that are old."""
    with contextlib.suppress(OSError):
        for path in root.glob(f"{NAME}[-.]*"):
            if path.name.startswith(f"{NAME}-"):
                old = path.name != f"{NAME}-{nonce}"
            else:
                old = abs(now - path.stat().st_mtime) > LIMIT * BEAT
            if old:
                path.unlink(missing_ok=True)


# --- who has it ------------------------------------------------------------------------------------------------------


def _refuse_if_alive(root: Path, found: Found, now: float) -> None:
    """`InputError` unless its owner is dead."""
    # An empty file is an earlier intersafe's, which had its flock alone; ours are empty for no more than a moment.
    life, limit = life_of(root, found), (1 if not found.data and found.unlocked else LIMIT) * found.beat
    age = now - found.time / 1e9
    if life == "unsure" and abs(age) > limit and (found.owner is None or not _renews(found)):
        life = "dead"
    if life == "dead":
        return
    remedy = "wait for it, or name another --run"
    if life == "unsure":
        remedy += f"; if it is dead: its last sign of life is {max(age, 0):.0f} s old, from {limit:.0f} s on this works"
    raise InputError(f"another process is writing this run: {in_words(found.owner)}", at=root, remedy=remedy)


def _renews(found: Found) -> bool:
    """Looks on for a beat and a half: True if the file changes."""
    until = time.monotonic() + 1.5 * found.beat
    while time.monotonic() < until:
        time.sleep(min(0.5, found.beat / 4))
        if not found.same(read_owner(found.path)):
            return True
    return False


def _fail_if_written(root: Path) -> None:
    chain = _chain(root) if root.is_dir() else []
    if not chain:
        return
    life = life_of(root, chain[-1])
    if life == "alive" or (life == "unsure" and chain[-1].owner is not None and _renews(chain[-1])):
        raise InputError(
            f"another process is writing this run: {in_words(chain[-1].owner)}", at=root, remedy="wait for it"
        )


def _state(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that a writer appends to."""
    files = [*root.glob("*.jsonl"), *root.glob("journal/*.jsonl")]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
