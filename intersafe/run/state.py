"""Whether a run directory is new, the same run, that run complete, or another run."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from intersafe.errors import InputError
from intersafe.run.directory import Run
from intersafe.run.manifest import Manifest, differences
from intersafe.run.outcomes import count_accepted

MOST_LISTED = 4
"""Differences that a message names."""
_OF_SAMPLES = re.compile(r"(gates\.coverage(\.[^:]+)?|refusals\.groups\.[^:]+\.n|twins\.ratio): ")
"""The settings that an estimate changes for its samples (`generation.estimate.sample_recipe`)."""


class DirectoryState(NamedTuple):
    """What a directory holds, compared with the run that a command asks for."""

    word: Literal["new", "same", "complete", "another"]
    """`same`: the run, to be resumed or to be grown further; `complete`: it has exactly what is asked for."""
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
        return DirectoryState("another", problem=_another(run, manifest, changed))
    versions = tuple(
        f"{name} {run.manifest.versions.get(name)} -> {version}"
        for name, version in manifest.versions.items()
        if run.manifest.versions.get(name) != version
    )
    if n is None:
        return DirectoryState("same", versions)
    summary = run.summary
    accepted = summary.funnel.accepted if summary else count_accepted(path)
    if accepted > n:
        what = f"holds {accepted} dialogues, more than --n {n}"
        return DirectoryState("same", versions, InputError(what, at=path, remedy="name another --run"))
    is_complete = summary is not None and summary.complete and accepted == n
    return DirectoryState("complete" if is_complete else "same", versions)


def _another(run: Run, manifest: Manifest, changed: list[str]) -> InputError:
    new = f"--run, with --reuse {run.path} to take over what was paid for"
    if what := _samples_or_run(run, manifest, changed):
        return InputError(what, at=run.path, remedy=f"name another {new}")
    if run.manifest.purpose != manifest.purpose:  # what the user changed comes first
        changed = sorted(changed, key=lambda change: bool(_OF_SAMPLES.match(change)))
    more = f" and {len(changed) - MOST_LISTED} more" if len(changed) > MOST_LISTED else ""
    what = f"made from something else: {', '.join(changed[:MOST_LISTED])}{more}"
    return InputError(what, at=run.path, remedy=f"put it back, or name a new {new}")


def _samples_or_run(run: Run, manifest: Manifest, changed: list[str]) -> str:
    """What the directory holds, if a run and the samples of its estimate were taken for each other; else empty."""
    if not all(_OF_SAMPLES.match(change) for change in changed):
        return ""
    # Estimates of versions before `purpose` are known by the name of their folder alone.
    holds_samples = run.manifest.purpose == "estimate" or run.path.name.endswith("-estimate")
    asks_for_samples = manifest.purpose == "estimate"
    if holds_samples and not asks_for_samples:
        return "holds the samples of an estimate, which have other quotas than a run"
    if asks_for_samples and not holds_samples:
        return "holds a run, and the samples of an estimate have other quotas than a run"
    return ""
