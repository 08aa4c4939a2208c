"""The client of the Hub for `push`, `pull` and `diff`: time-outs on every request, one retry policy, short failures.

huggingface_hub is imported when a connection is opened, because it reads `HF_ENDPOINT` at import. It retries uploads
and listings itself. The policy here covers every call, follows `Retry-After` and `RateLimit`, and ends at the deadline.
"""

import hashlib
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as OutOfTime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tenacity

from intersafe.errors import InputError, IntersafeError, StorageError
from intersafe.release.failures import (
    AccessRefused,
    NetworkGaveUp,
    causes,
    describe_error,
    is_passing,
    redacted_line,
    requested_wait,
    status_of,
)

ATTEMPTS = 8
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0
"""Seconds to connect, and between two reads."""
_REPO = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?/[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
)

Result = TypeVar("Result")


class RepoState(NamedTuple):
    """The state of a repository at one moment."""

    head: str
    """Commit of `main`."""
    private: bool
    gated: bool


class Blob(NamedTuple):
    """One file of a remote tree: `sha256` of a large file, empty for a small one, and `git`, the hash of git."""

    size: int
    sha256: str
    git: str

    def holds(self, data: bytes) -> bool:
        """True if the file has these bytes."""
        if self.sha256:
            return self.sha256 == hashlib.sha256(data).hexdigest()
        return self.git == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def holds_file(self, sha256: str, size: int, path: Path) -> bool:
        """As `holds`, for a local file with this sha256 and size in bytes; reads it only if the remote one is small."""
        return self.size == size and (self.sha256 == sha256 if self.sha256 else self.holds(path.read_bytes()))


def check_repo_id(repo_id: str) -> str:
    """Returns `ORG/NAME` unchanged; `InputError` if it is not the name of a repository."""
    if not _REPO.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise InputError(f"{redacted_line(repo_id)!r} is no repository name", remedy="write ORG/NAME")
    return repo_id


class Hub:
    """One dataset repository on the Hub; each call is retried until the deadline.

    Use it inside `within`, which ends calls that no time-out covers.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        endpoint: str | None = None,
        xet: bool = True,
        deadline: float = 3 * 3600.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`deadline` is in seconds from now. `endpoint` replaces the Hub's address for the whole process.

        `say` shows a line to the user. `InputError` if huggingface_hub is missing or cannot be used.
        """
        self.repo_id, self.say, self.seconds = check_repo_id(repo_id), say, deadline
        self.until, self.doing = time.monotonic() + deadline, "connecting"
        self.library, self.failures = _open_library(endpoint, xet)
        self.token: str | None = self.library.get_token()
        self.api: Any = self.library.HfApi(token=self.token or False, library_name="intersafe")
        self.endpoint: str = self.api.endpoint
        self.where = {"repo_id": self.repo_id, "repo_type": "dataset"}

    def within(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs in a thread; `NetworkGaveUp` at the deadline, whatever `work` waits for.

        Native code and name look-ups have no time-out. A thread that is left behind ends at its next call.
        """
        done: Future[Result] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001  carried over to the caller's thread, which raises it
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            return done.result(max(0.0, self.until - time.monotonic()))
        except OutOfTime:
            if done.done():
                raise
            raise self._late() from None

    def call(self, doing: str, request: Callable[[], Result]) -> Result:
        """The result of `request`, retried while that can help; `doing` is what the user reads about it.

        Raises a failure of `failures.py`, or `StorageError` for a failure of the local disk.
        """
        self.doing = doing
        if time.monotonic() >= self.until:
            raise self._late()
        policy = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            wait=_wait,
            stop=self._stop,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return policy(request)
        except IntersafeError:
            raise
        except self.failures as error:
            raise self._failure(error) from error

    # --- reading ---

    def state(self) -> RepoState | None:
        """The state of the repository; None if there is none that this token may see."""

        def ask() -> RepoState | None:
            try:
                info = self.api.repo_info(**self.where)
            except self.library.errors.RepositoryNotFoundError as error:
                if isinstance(error, self.library.errors.GatedRepoError) or error.response.status_code == 401:
                    raise
                return None
            return RepoState(info.sha, info.private is True, bool(info.gated))

        return self.call("reading the repository", ask)

    def tags(self) -> dict[str, str]:
        """The commit of each tag."""
        refs = self.call("reading the tags", lambda: self.api.list_repo_refs(**self.where))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def tree(self, revision: str) -> dict[str, Blob]:
        """Every file at a revision, by its path."""

        def ask() -> dict[str, Blob]:
            entries = self.api.list_repo_tree(recursive=True, revision=revision, **self.where)
            return {
                entry.path: Blob(entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
                for entry in entries
                if isinstance(entry, self.library.hf_api.RepoFile)
            }

        return self.call("listing the files", ask)

    def read(self, path: str, revision: str, tail: int = 0) -> bytes:
        """The bytes of a small file; with `tail`, the last `tail` bytes of any file."""

        def ask() -> bytes:
            url = self.library.hf_hub_url(filename=path, revision=revision, endpoint=self.endpoint, **self.where)
            headers = self.library.utils.build_hf_headers(token=self.token or False)
            headers |= {"Range": f"bytes=-{tail}"} if tail else {}
            response = self.library.utils.get_session().get(url, headers=headers)
            self.library.utils.hf_raise_for_status(response)
            return bytes(response.content)

        return self.call(f"reading {path}", ask)

    def download(self, path: str, revision: str, folder: Path) -> None:
        """Downloads one file to its own path below a folder; continues an earlier attempt that stopped."""
        self.call(
            f"downloading {path}",
            lambda: self.api.hf_hub_download(filename=path, revision=revision, local_dir=folder, **self.where),
        )

    # --- failures ---

    def _stop(self, state: tenacity.RetryCallState) -> bool:
        return state.attempt_number >= ATTEMPTS or time.monotonic() + state.upcoming_sleep >= self.until

    def _tell(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.say(f"{self.doing}: {describe_error(error)}; again in {state.upcoming_sleep:.1f} s")

    def _late(self) -> NetworkGaveUp:
        return NetworkGaveUp(f"gave up after {self.seconds:g} s while {self.doing}; run the same command again")

    def _failure(self, error: BaseException) -> IntersafeError:
        """The failure of this package for an error of one of the libraries."""
        for cause in causes(error):
            if isinstance(cause, IntersafeError):
                return cause
        said = f"{self.repo_id}: {self.doing}: {describe_error(error)}"
        status = status_of(error)
        if is_passing(error):
            hint = " (or with --no-xet)" if isinstance(error, ConnectionError) and not status else ""
            return NetworkGaveUp(f"{said}; run the same command again{hint}")
        if status == 401:
            return AccessRefused(f"{said}; the token is not accepted: create a new one and set HF_TOKEN")
        if status == 403:
            return AccessRefused(f"{said}; this token has no right to that")
        if isinstance(error, OSError) and not status:
            return StorageError(f"{said}; check the disk and run the same command again")
        return AccessRefused(f"{said}; the Hub refuses it")


def _open_library(endpoint: str | None, xet: bool) -> tuple[Any, tuple[type[Exception], ...]]:
    """huggingface_hub with time-outs, and the exceptions that it raises; `InputError` if it is missing or unusable."""
    if endpoint is not None:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint):
            raise InputError("not an address", at="--endpoint", remedy="write https://HOST")
        if "huggingface_hub" in sys.modules and os.environ.get("HF_ENDPOINT", "").rstrip("/") != endpoint.rstrip("/"):
            raise InputError("huggingface_hub is imported already", at="--endpoint", remedy="set HF_ENDPOINT")
        os.environ["HF_ENDPOINT"] = endpoint.rstrip("/")
    try:
        import httpx2
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.hf_api
        import huggingface_hub.utils.logging
    except ImportError:
        raise InputError("publishing needs huggingface_hub", remedy="pip install 'intersafe[hub]'") from None
    library: Any = huggingface_hub
    if library.constants.is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set", remedy="unset it")
    if not xet:
        library.constants.HF_HUB_DISABLE_XET = True
    library.utils.logging.set_verbosity_error()  # its warnings quote signed URLs
    limits = httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    library.set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=limits))
    if not sys.stderr.isatty():
        library.utils.disable_progress_bars()
    return library, (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: an exponential backoff, or longer if the server asks for it."""
    error = state.outcome.exception() if state.outcome else None
    backoff = min(30.0, 0.25 * 2.0 ** (state.attempt_number - 1)) * (1 + random.random() / 4)
    return max(backoff, requested_wait(error))
