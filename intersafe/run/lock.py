"""One writer per run at a time: a lock file that works on NFS and that does not stay locked after its owner dies.

`<run>/.lock` names its owner (`Owner`). The file appears whole: by `link()` of a temporary file, or by an exclusive
open on a file system without hard links. If several processes try at once, exactly one succeeds. A live owner renews
the file's time (the heartbeat). Three signs show that an owner is dead, from certain to less certain:

- its process is gone, for the same kernel and pid namespace: at once;
- its `flock` is free, for the same kernel and folder, since the kernel releases it at death: at once;
- its heartbeat is older than `LIMIT` beats on the file system's clock, and is not renewed while we watch. So no
  machine's clock decides, nor a clock that jumps.

The first process that creates `.lock-<nonce of the dead owner>` is the successor; it renames that file over `.lock`.
An owner that was suspended and wakes up finds another nonce in `.lock` and stops writing.
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
from intersafe.run.owner import BEAT, Owner, OwnerFile, awake, flocked, in_words, life_of, myself, read_owner

LIMIT = 12
"""Heartbeats that an owner may miss before others may consider it dead."""
NAME = ".lock"

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


class Lease:
    """This process's right to write a run, until `release`; a thread renews the heartbeat."""

    def __init__(self, root: Path, owner: Owner, data: bytes, file: int, news: str) -> None:
        """Made by `lock`; `news` is a message for the user, or empty."""
        self.news = news
        self._root, self._path, self._data, self._file = root, root / NAME, data, file
        self._beat, self._lost, self._seen = owner.beat, "", awake()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """`StorageError` if another process has taken over; reads the disk only after a missed heartbeat."""
        if not self._lost and awake() - self._seen > 2 * self._beat:
            try:
                self._renew()
            except OSError as error:
                raise StorageError(f"{self._path}: {error.strerror}; fix it, then run the same command again") from None
        if self._lost:
            raise StorageError(self._lost)

    def release(self) -> None:
        """Releases the run; a lock file that another process has written meanwhile stays."""
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
            with contextlib.suppress(OSError):  # the file server is away: `check` tries again and reports it
                self._renew()

    def _renew(self) -> None:
        found = read_owner(self._path)
        if found is None:
            self._lost = f"{self._root}: its lock file was deleted while it was written; run the same command again"
        elif found.data != self._data:
            who = f"taken over by another process while this one was suspended ({in_words(found.owner)})"
            self._lost = f"{self._root}: {who}; that process continues the run, this one has stopped"
        if self._lost:
            return
        try:
            os.utime(self._file)
        except OSError:
            os.pwrite(self._file, self._data, 0)  # the same bytes: if the time cannot be set, writing sets it
            os.fsync(self._file)
        self._seen = awake()


def lock(root: Path, *, beat: float = BEAT) -> Lease:
    """Locks the run for this process; `InputError` if another process has it, or if the folder holds no run.

    Waits some seconds if an owner on another machine seems dead, to be sure.
    """
    _make_folder(root)
    nonce = secrets.token_hex(16)
    temporary = root / f"{NAME}.{nonce}.tmp"
    try:
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            owner = myself(root, nonce, beat, flocked(file, fcntl.LOCK_EX) is True)
            data = msgspec.json.encode(owner) + b"\n"
            _fill(file, data)
            held, news = _take(root, temporary, owner, file, data)
        except BaseException:
            os.close(file)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        if held != file:
            os.close(file)
    except OSError as error:
        where = root if error.filename in (None, str(temporary)) else error.filename
        raise StorageError(f"{where}: cannot be written ({error.strerror}); fix it, or name another --run") from None
    _tidy(root, nonce, os.fstat(held).st_mtime)
    return Lease(root, owner, data, held, news)


@contextlib.contextmanager
def unwritten(root: Path) -> Iterator[None]:
    """`InputError` if another process writes the run now, or has written it by the end of the block.

    Creates no file, needs no write permission, and does not block a writer.
    """
    _fail_if_written(root)
    before = _state(root)
    yield
    _fail_if_written(root)
    if _state(root) != before:
        raise InputError("was written meanwhile", at=root, remedy="start again when no process writes it")


# --- locking ---------------------------------------------------------------------------------------------------------


def _make_folder(root: Path) -> None:
    try:
        if root.is_dir() and not (root / "recipe.json").exists() and not all(e.name[0] == "." for e in root.iterdir()):
            raise InputError("the folder is not empty and no run", at=root, remedy="name another --run")
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError("not a folder", at=root, remedy="name another --run") from None
    except OSError as error:
        raise StorageError(f"{root}: cannot be written ({error.strerror}); fix it, or name another --run") from None


def _take(root: Path, temporary: Path, owner: Owner, file: int, data: bytes) -> tuple[int, str]:
    """The open lock file of this process, and a message; `InputError` if another process owns the run."""
    for attempt in itertools.count():
        time.sleep(0.01 * min(attempt, 10))
        chain = _chain(root)
        if not chain:
            if (made := _create(root / NAME, temporary, file, data)) is not None and _is_mine(root, data):
                return made, ""
            if (root / NAME).is_symlink():
                raise InputError("a broken link", at=root / NAME, remedy="delete it")
            continue
        last = chain[-1]
        _refuse_if_alive(root, last, _now(file))
        claim = root / f"{NAME}-{last.nonce}"
        if (made := _create(claim, temporary, file, data)) is None:
            continue  # another process is taking over: check that one next
        again = read_owner(root / NAME)
        if not chain[0].same(again):  # another process has taken over already: our claim is void
            _drop(claim, made, file)
            continue
        with contextlib.suppress(FileNotFoundError):
            claim.replace(root / NAME)
        if _is_mine(root, data):
            gone = in_words(last.owner) if last.owner else "its name is unknown"
            return made, f"{root}: taken over from a dead process: {gone}"
    raise AssertionError("not reached")


def _chain(root: Path) -> list[OwnerFile]:
    """The owner's file and the claims of its successors, in order; empty if the run is free."""
    found, chain = read_owner(root / NAME), list[OwnerFile]()
    while found is not None and found.nonce not in {one.nonce for one in chain}:
        chain.append(found)
        found = read_owner(root / f"{NAME}-{found.nonce}")
    return chain


def _create(path: Path, temporary: Path, file: int, data: bytes) -> int | None:
    """Creates the file whole and returns it open; None if it exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_links(path, data)
    # NFS may lose an answer and repeat the request, which then fails with "exists": the link count tells.
    return file if os.fstat(file).st_nlink > 1 and _holds(path, data) else None


def _create_without_links(path: Path, data: bytes) -> int | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    for _ in range(100):
        if flocked(file, fcntl.LOCK_EX) is not False:
            break
        time.sleep(0.01)  # another process is probing it
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
    """The file system's clock: the time that it gives to a file touched now."""
    os.utime(file)
    return os.fstat(file).st_mtime


def _tidy(root: Path, nonce: str, now: float) -> None:
    """Deletes what killed processes left: claims on former owners, and old temporary files."""
    with contextlib.suppress(OSError):
        for path in root.glob(f"{NAME}[-.]*"):
            if path.name.startswith(f"{NAME}-"):
                old = path.name != f"{NAME}-{nonce}"
            else:
                old = abs(now - path.stat().st_mtime) > LIMIT * BEAT
            if old:
                path.unlink(missing_ok=True)


# --- the owner -------------------------------------------------------------------------------------------------------


def _refuse_if_alive(root: Path, found: OwnerFile, now: float) -> None:
    """`InputError` unless the owner is dead."""
    # Earlier versions left the file empty and used flock alone; ours is empty for a moment at most.
    life, limit = life_of(root, found), (1 if not found.data and found.unlocked else LIMIT) * found.beat
    age = now - found.time / 1e9
    if life == "unsure" and abs(age) > limit and (found.owner is None or not _renews(found)):
        life = "dead"
    if life == "dead":
        return
    remedy = "wait for it, or name another --run"
    if life == "unsure":
        remedy += f"; its last sign of life is {max(age, 0):.0f} s old: after {limit:.0f} s it counts as dead"
    raise InputError(f"another process is writing this run: {in_words(found.owner)}", at=root, remedy=remedy)


def _renews(found: OwnerFile) -> bool:
    """Watches the file for one and a half heartbeats: True if it changes."""
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
