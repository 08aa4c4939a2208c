"""What the work on a run shares: the request of a command, and the run directory that is opened for it."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from intersafe.engines.log import stderr_to
from intersafe.errors import StorageError
from intersafe.generation.prepare import Prepared, open_directory
from intersafe.generation.progress import Display
from intersafe.generation.workers.ray_cluster import Cluster
from intersafe.images.store import ImageStore
from intersafe.models.base import Hooks
from intersafe.recipe.sections import Recipe
from intersafe.run.budget import Budget, prices_of
from intersafe.run.incidents import SHOWN, Incidents, added_up, read_incidents
from intersafe.run.journal import Journal, ReuseIndex
from intersafe.run.kinds import RECORDS
from intersafe.run.lock import Lease, lock
from intersafe.run.outcomes import align_outcomes
from intersafe.storage.jsonl import GroupWriter
from intersafe.storage.loops import stopped_by_signals

ENGINE_LOG = "engines.log"
"""In the run directory: the output of engines in this process."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """What a command asks for, checked. Nothing is opened or written yet."""

    prepared: Prepared
    path: Path
    n: int
    display: Display
    older: Path | None = None
    """The run that this one reuses."""
    index: ReuseIndex | None = None
    """Its replies; None for a cluster, whose workers read them themselves."""
    cluster: Cluster | None = None
    tries: int | None = None
    """Jobs that may be tried per wanted outcome; None: all."""


@dataclass(frozen=True)
class RunContext:
    """Everything that the work on a run shares, opened and complete."""

    request: RunRequest
    workers: int
    """Number of Ray workers; 0 if this process grows the jobs."""
    lease: Lease
    undecided: Mapping[str, int]
    """The first undecided job of each kind."""
    images: ImageStore
    writer: GroupWriter
    journal: Journal
    budget: Budget
    hooks: Hooks
    incidents_before: Mapping[str, Incidents]
    """Those of the run's earlier commands."""

    @property
    def prepared(self) -> Prepared:
        """The recipe and its inputs."""
        return self.request.prepared

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.request.prepared.recipe

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.request.path

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Shows the user one line, and logs it."""
        _tell(self.request.display, text, level)

    def incidents(self) -> dict[str, Incidents]:
        """Those of all commands of the run so far, this one included."""
        return added_up(self.incidents_before, self.hooks.incidents)


@contextlib.contextmanager
def opened(request: RunRequest, workers: int) -> Iterator[RunContext]:
    """Locks the run and opens its directory for the length of the block.

    Raises `InputError` if another process writes the run, or if the directory holds another run. Signals stop the block
    as `KeyboardInterrupt`; an `OSError` in it becomes a `StorageError`.
    """
    began = time.monotonic()
    path, recipe = request.path, request.prepared.recipe
    notify = functools.partial(_tell, request.display)
    lease = lock(path)
    try:
        if lease.news:
            notify(lease.news)
        with contextlib.ExitStack() as ending, stopped_by_signals():
            ending.push(lambda kind, *_: _log_end(path, kind))
            state = open_directory(path, request.prepared, request.n)
            if state.versions:
                notify(f"{path} was begun by other versions ({', '.join(state.versions)}): its old part stays as it is")
            _log.info("%s %s: %d dialogues", "begin" if state.word == "new" else "resume", path, request.n)
            # A library in this process may write pages of output over the display.
            in_process = any(member.in_process for member in recipe.cast.members.values())
            with stderr_to(path / ENGINE_LOG) if in_process else contextlib.nullcontext():
                undecided = {kind: align_outcomes(path, kind) for kind in RECORDS}
                writer = GroupWriter(path, lease.check)
                journal = Journal(writer, prices=prices_of(recipe.cast))
                journal.load(path / "journal", undecided)
                budget = Budget(recipe.limits, journal.roles, began=began)
                hooks = Hooks(notify, request.display.say, may_send=budget.check if budget.is_bound else None)
                images, before = ImageStore(path / "images"), read_incidents(path)
                yield RunContext(
                    request=request,
                    workers=workers,
                    lease=lease,
                    undecided=undecided,
                    images=images,
                    writer=writer,
                    journal=journal,
                    budget=budget,
                    hooks=hooks,
                    incidents_before=before,
                )
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror}; fix it, then run the same command again"
        ) from None
    finally:
        lease.release()


def _log_end(path: Path, kind: type[BaseException] | None) -> None:
    _log.info("end %s: %s", path, "not complete" if kind else "complete")  # the command logs the error itself


def _tell(display: Display, text: str, level: int = logging.INFO) -> None:
    display.say(text)
    _log.log(level, "%s", text, extra=SHOWN)
