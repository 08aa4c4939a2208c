"""Generate: grows a run from a recipe, and resumes a run that was stopped.

The journal has every reply that was paid for. A job that is grown again after a kill takes its replies from there, and
continues at the call where it stopped.
"""

import contextlib
import logging
from pathlib import Path
from typing import Literal

from msgspec import UNSET, UnsetType

from intersafe.errors import InputError
from intersafe.generation.context import RunRequest, opened
from intersafe.generation.prepare import prepare
from intersafe.generation.progress import Display
from intersafe.generation.workers.ray_cluster import Cluster, check_recipe, joined
from intersafe.recipe.sections import Recipe
from intersafe.run.budget import check_prices
from intersafe.run.directory import Run, run_path
from intersafe.run.journal import ReuseIndex
from intersafe.run.state import state_of
from intersafe.storage.loops import run_anywhere

_log = logging.getLogger(__name__)


def generate_dialogues(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    n: int | None = None,
    reuse: str | Path | None = None,
    display: Display | None = None,
    cluster: Cluster | None = None,
    tries: int | None = None,
    servers: contextlib.AbstractContextManager[None] | None = None,
    purpose: Literal["estimate"] | UnsetType = UNSET,
) -> Run:
    """Grows dialogues until `n` are accepted (default: the recipe's) and returns the run; resumes an existing run.

    Raises `InputError`, `SeedsExhausted`, `ServiceGone`, `BudgetReached` or `StorageError`. All but the first leave a
    run that the same call resumes, as does Ctrl-C (`KeyboardInterrupt`). Works inside a notebook's event loop.
    `tries` limits the jobs of each kind per wanted outcome. `servers` are entered while models are asked, and not
    at all if the input is wrong or the run is complete. `purpose` marks the samples of an estimate.
    """
    check_prices(recipe)
    if cluster:
        check_recipe(recipe)
    path = run_path(run if run is not None else recipe.name)
    prepared = prepare(recipe, path, purpose)
    older = run_path(reuse) if reuse is not None else None
    index = ReuseIndex(older) if older and not cluster else None
    wanted = recipe.n if n is None else n
    if wanted < 1:
        raise InputError(f"n is {wanted}", remedy="ask for at least 1 dialogue")
    state = state_of(path, prepared.manifest, wanted)
    if state.problem:
        raise state.problem
    if state.word != "new":
        _check_images(path)
    if state.word != "complete":
        request = RunRequest(
            prepared=prepared,
            path=path,
            n=wanted,
            display=display or Display(),
            older=older,
            index=index,
            cluster=cluster,
            tries=tries,
        )
        with servers or contextlib.nullcontext():
            run_anywhere(lambda: _grow(request))
    else:
        _log.info("%s is complete: %d dialogues", path, wanted)
    return Run(path)


async def _grow(request: RunRequest) -> None:
    from intersafe.generation.session import grow_run  # it needs the HTTP client, which a complete run does not

    async with joined(request.cluster) as workers:
        with opened(request, workers) as context:
            await grow_run(context)


def _check_images(path: Path) -> None:
    """`InputError` if images that the run's records name are missing: only a new run can paint them again."""
    if lost := Run(path).lost_images():
        raise InputError(
            f"{len(lost)} images that its records name are missing, the first is {lost[0]}",
            at=path / "images",
            remedy=f"restore the folder, or name a new --run with --reuse {path}: it pays for these images only",
        )
