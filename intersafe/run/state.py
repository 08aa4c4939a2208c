"""Whether a run directory is new, the same run, that run complete, or another run."""

from pathlib import Path
from typing import Literal, NamedTuple

from intersafe.errors import InputError
from intersafe.run.directory import Run
from intersafe.run.manifest import Manifest, differences

SHOWN = 4
"""Differences that a message names."""


class DirectoryState(NamedTuple):
    """What a directory holds, compared with the run that a command asks for."""

    word: Literal["new", "same", "complete", "another"]
    """`same`: the run, to be resumed or to be grown further; `complete`: it has exactly what is asked for."""
    changed: tuple[str, ...] = ()
    """Of another run: what differs, in words."""
    versions: tuple[str, ...] = ()
    """Packages whose version changed since the run began, in words."""
    problem: InputError | None = None
    """Why the command must not write there."""


def state_of(path: Path, manifest: Manifest, n: int | None = None) -> DirectoryState:
    """What is at `path`, for a run of that manifest and `n` dialogues; reads only.

    Without `n` nothing is `complete`, and no outcome file is read.
    """
    if not (path / "recipe.json").exists():
        return DirectoryState("new")
    run = Run(path)
    if changed := differences(run.manifest, manifest):
        return DirectoryState("another", tuple(changed), problem=_another(run, manifest, changed))
    versions = tuple(
        f"{name} {run.manifest.versions.get(name)} -> {version}"
        for name, version in manifest.versions.items()
        if run.manifest.versions.get(name) != version
    )
    summary = run.summary if n is not None else None
    if n is None or summary is None:
        return DirectoryState("same", versions=versions)
    if summary.funnel.accepted > n:
        return DirectoryState("same", versions=versions, problem=too_many(path, summary.funnel.accepted, n))
    is_complete = summary.complete and summary.funnel.accepted == n
    return DirectoryState("complete" if is_complete else "same", versions=versions)


def too_many(path: Path, accepted: int, n: int) -> InputError:
    """The error of a run that holds more dialogues than are asked for."""
    return InputError(f"holds {accepted} dialogues, more than --n {n}", at=path, remedy="name another --run")


def _another(run: Run, manifest: Manifest, changed: list[str]) -> InputError:
    remedy = f"name another --run, with --reuse {run.path} to take over what was paid for"
    if _holds_samples(run) and manifest.purpose != "estimate":
        what = "holds the samples of an estimate, which have other quotas than a run"
        return InputError(what, at=run.path, remedy=remedy)
    if manifest.purpose == "estimate" and not _holds_samples(run):
        what = "holds a run, and the samples of an estimate have other quotas than a run"
        return InputError(what, at=run.path, remedy=remedy)
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    what = f"made from something else: {', '.join(changed[:SHOWN])}{more}"
    return InputError(
        what,
        at=run.path,
        remedy=f"put it back, or name a new --run, with --reuse {run.path} to take over what was paid for",
    )


def _holds_samples(run: Run) -> bool:
    # Estimates of earlier versions are known by the name of their folder alone.
    return run.manifest.purpose == "estimate" or run.path.name.endswith("-estimate")
