"""The command that starts the models of a recipe as servers: `serve`; and how `generate` does so for itself."""

import contextlib
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from intersafe.cli.inputs import recipe_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from intersafe.recipe.sections import Recipe


@click.command()
@click.argument("pipeline", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option(
    "--only", metavar="NAME", multiple=True, help="Serve this model of `serve` alone; may be given several times."
)
@click.option(
    "--logs", metavar="DIR", type=click.Path(path_type=Path), help="Where the logs go. Default: outputs/serve-logs."
)
@click.option("--dry-run", is_flag=True, help="Print the commands and start nothing.")
def serve(pipeline: Path, only: tuple[str, ...], logs: Path | None, dry_run: bool) -> None:
    """Start the models in the `serve` section of RECIPE as vLLM servers; Ctrl-C stops them.

    \b
    intersafe serve mine.yaml                                        all of them, until Ctrl-C
    intersafe serve mine.yaml --only Qwen/Qwen2.5-VL-7B-Instruct     a part, for example on another machine
    intersafe serve mine.yaml --dry-run                              the commands, for Slurm or a container
    intersafe generate --pipeline mine.yaml --serve                  serve, grow, and stop the servers again

    Each local URL that the cast names for such a model becomes one server at that port; several are replicas. Each has
    its log in --logs. One that cannot be started ends the command with exit code 2 and what to change; one that dies
    later is started again, three times, and then ends it with exit code 4. docs/engines.md has the keys and what
    failures say.
    """
    from intersafe.serving.plan import servers_of, unserved_urls

    recipe = recipe_of(pipeline)
    servers = servers_of(recipe, only, is_here=not dry_run)
    for line in unserved_urls(recipe):
        click.echo(line, err=True)
    if dry_run:
        for server in servers:
            click.echo(server.shown)
        return
    from intersafe.serving.supervisor import CHECK_SECONDS, serving

    try:
        with serving(servers, logs or _logs(), _say) as supervisor:
            _say(f"{len(servers)} of {len(servers)} answer; Ctrl-C stops them")
            while True:
                supervisor.check()
                time.sleep(CHECK_SECONDS)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def served_for(recipe: "Recipe", say: "Callable[[str], None]") -> AbstractContextManager[None]:
    """The servers of a recipe, for as long as a run needs them; `InputError` at once if there are none to start."""
    from intersafe.serving.plan import servers_of, unserved_urls
    from intersafe.serving.supervisor import serving_in_background

    servers = servers_of(recipe)
    for line in unserved_urls(recipe):
        say(line)
    return serving_in_background(servers, _logs(), say)


def _logs() -> Path:
    from intersafe.run.directory import RUNS

    return RUNS / "serve-logs"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that was closed: the servers are stopped all the same
        click.echo(text, err=True)
