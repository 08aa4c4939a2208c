"""The Hub as `push`, `pull` and `diff` see it: time-outs on every request, one retry policy, failures in one line.

huggingface_hub is imported when a connection is opened, never before: it reads `HF_ENDPOINT` as it is imported. Its own
retries cover uploads and listings; the policy here lies around every call, knows `Retry-After` (seconds or a date) and
`RateLimit`, and ends at the deadline. Exit codes: 3 the tag is there with other content, 4 somebody else changed the
repository, 5 no right to do that, 6 the network gave up (safe to run again); 2 is the user's own input.
"""

import hashlib
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as OutOfTime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tenacity

from intersafe.errors import InputError, IntersafeError, StorageError
from intersafe.wording import printable

ATTEMPTS = 8
PASSING = frozenset({408, 409, 425, 429})
"""Statuses after which the same request may succeed, beside all of 500 and above."""
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
_REPO = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?/[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
)
_RATE = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,6})")
_SECRET = re.compile(r"\bhf_\w+|(?<=[?&])(?:X-Amz-[\w-]+|Signature|Policy)=[^\s&'\"]+")

Result = TypeVar("Result")


class TagConflict(IntersafeError):
    """The version is published with other content; a tag is never moved."""

    exit_code = 3


class RemoteChanged(IntersafeError):
    """The repository holds, or got meanwhile, what this push must not replace."""

    exit_code = 4


class AccessRefused(IntersafeError):
    """No token, a token without the right, a repository that is open, or a request that the Hub refuses for good."""

    exit_code = 5


class NetworkGaveUp(IntersafeError):
    """The Hub did not answer until the deadline, or failed too often; nothing is half published."""

    exit_code = 6


class RepoState(NamedTuple):
    """A repository at one moment."""

    head: str
    """Commit of `main`."""
    private: bool
    gated: bool


class Blob(NamedTuple):
    """One file of a remote tree: `sha256` of a large object, empty for a small one, which has git's own hash."""

    size: int
    sha256: str
    git: str

    def holds(self, data: bytes) -> bool:
        """True if these are its bytes."""
        if self.sha256:
            return self.sha256 == hashlib.sha256(data).hexdigest()
        return self.git == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def holds_file(self, sha256: str, size: int, path: Path) -> bool:
        """The same for a file whose sha256 and size are known; reads it only where the Hub kept it as a small one."""
        return self.size == size and (self.sha256 == sha256 if self.sha256 else self.holds(path.read_bytes()))


def check_repo_id(repo_id: str) -> str:
    """`ORG/NAME` as it came; `InputError` otherwise."""
    if not _REPO.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise InputError(f"{one_line(repo_id)!r} is no repository", remedy="write ORG/NAME")
    return repo_id


def one_line(text: str, most: int = 240) -> str:
    """A foreign text as one printable line without anything that opens a door."""
    return " ".join(printable(_SECRET.sub("***", text)).split())[:most]


class Hub:
    """One dataset repository on the Hub; every call is retried by the one policy until the deadline.

    `within` must surround all use: it is what ends a call that no time-out reaches.
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
        """`deadline` in seconds from now; `endpoint` replaces the Hub's address for the whole process."""
        self.repo_id, self.say, self.seconds = check_repo_id(repo_id), say, deadline
        self.until, self.doing = time.monotonic() + deadline, "connecting"
        self.library, self.failures = _open_library(endpoint, xet)
        self.token: str | None = self.library.get_token()
        self.api: Any = self.library.HfApi(token=self.token or False, library_name="intersafe")
        self.endpoint: str = self.api.endpoint
        self.where = {"repo_id": self.repo_id, "repo_type": "dataset"}

    def within(self, work: Callable[[], Result]) -> Result:
        """Runs `work` and gives up at the deadline, whatever holds it: native code and name look-ups have no time-out.

        The thread that is left behind ends at its next call.
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
        """The result of `request`, tried again while that can help; one of this module's failures otherwise."""
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
        """The repository now; None if there is none that this token may see."""

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
        """Tags with the commits that they name."""
        refs = self.call("reading the tags", lambda: self.api.list_repo_refs(**self.where))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def tree(self, revision: str) -> dict[str, Blob]:
        """Every file at a revision."""

        def ask() -> dict[str, Blob]:
            entries = self.api.list_repo_tree(recursive=True, revision=revision, **self.where)
            return {
                entry.path: Blob(entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
                for entry in entries
                if isinstance(entry, self.library.hf_api.RepoFile)
            }

        return self.call("listing the files", ask)

    def read(self, path: str, revision: str, tail: int = 0) -> bytes:
        """The bytes of a small file, or with `tail` the last so many bytes of any."""

        def ask() -> bytes:
            url = self.library.hf_hub_url(filename=path, revision=revision, endpoint=self.endpoint, **self.where)
            headers = self.library.utils.build_hf_headers(token=self.token or False)
            headers |= {"Range": f"bytes=-{tail}"} if tail else {}
            response = self.library.utils.get_session().get(url, headers=headers)
            self.library.utils.hf_raise_for_status(response)
            return bytes(response.content)

        return self.call(f"reading {path}", ask)

    def download(self, path: str, revision: str, folder: Path) -> None:
        """Fetches one file into a folder, below its own path; goes on where an earlier attempt stopped."""
        self.call(
            f"downloading {path}",
            lambda: self.api.hf_hub_download(filename=path, revision=revision, local_dir=folder, **self.where),
        )

    # --- failures ---

    def _stop(self, state: tenacity.RetryCallState) -> bool:
        return state.attempt_number >= ATTEMPTS or time.monotonic() + state.upcoming_sleep >= self.until

    def _tell(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.say(f"{self.doing}: {_said(error)}; again in {state.upcoming_sleep:.1f} s")

    def _late(self) -> NetworkGaveUp:
        return NetworkGaveUp(f"gave up after {self.seconds:g} s while {self.doing}; run the same command again")

    def _failure(self, error: BaseException) -> IntersafeError:
        """The failure of the house behind one of the libraries."""
        for cause in _causes(error):
            if isinstance(cause, IntersafeError):
                return cause
        said = f"{self.repo_id}: {self.doing}: {_said(error)}"
        status = status_of(error)
        if is_passing(error):
            hint = " (or with --no-xet)" if isinstance(error, ConnectionError) and not status else ""
            return NetworkGaveUp(f"{said}; run the same command again{hint}")
        if status == 401:
            return AccessRefused(f"{said}; the token is not accepted: make a new one and set HF_TOKEN")
        if status == 403:
            return AccessRefused(f"{said}; this token has no right to that")
        if isinstance(error, OSError) and not status:
            return StorageError(f"{said}; mend the disk and run the same command again")
        return AccessRefused(f"{said}; the Hub refuses it")


def _open_library(endpoint: str | None, xet: bool) -> tuple[Any, tuple[type[Exception], ...]]:
    """huggingface_hub with time-outs on, and what it raises; `InputError` if it is missing or cannot be used."""
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
    library.utils.logging.set_verbosity_error()  # its warnings quote addresses that are keys
    limits = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    library.set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=limits))
    if not sys.stderr.isatty():
        library.utils.disable_progress_bars()
    return library, (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def status_of(error: BaseException | None) -> int:
    """The HTTP status behind an error, 0 if there is none."""
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            return int(response.status_code)
    return 0


def is_passing(error: BaseException) -> bool:
    """True if the same request may succeed later: told so by its status, or no answer came at all."""
    import httpx2

    if status := status_of(error):
        return status in PASSING or status >= 500
    return any(isinstance(cause, httpx2.TransportError | ConnectionError) for cause in _causes(error))


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the server asks for, or else longer each time."""
    error = state.outcome.exception() if state.outcome else None
    backoff = min(30.0, 0.25 * 2.0 ** (state.attempt_number - 1)) * (1 + random.random() / 4)
    return max(backoff, _asked_for(error))


def _asked_for(error: BaseException | None) -> float:
    """Seconds that the answer behind an error asks to wait: `RateLimit`, or `Retry-After` in either notation."""
    for cause in _causes(error):
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


def _said(error: BaseException | None) -> str:
    """What went wrong, in one line: the status and the Hub's own words, or the innermost error."""
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            words = getattr(cause, "server_message", None) or ""
            return one_line(f"{response.status_code} {words}".strip())
    innermost = list(_causes(error))[-1] if error else None
    return one_line(f"{type(innermost).__name__}: {innermost}")
