"""The command that starts the models of a recipe as servers: `serve`; and the servers of `generate --serve`."""

import contextlib
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from intersafe.cli.options import recipe_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from intersafe.recipe.sections import Recipe


@click.command()
@recipe_option(required=True, positional=True)
@click.option(
    "--only", metavar="NAME", multiple=True, help="Serve only this model of the `serve` section. May be repeated."
)
@click.option(
    "--logs", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the logs. Default: outputs/serve-logs."
)
@click.option("--dry-run", is_flag=True, help="Print the commands and start nothing.")
def serve(recipe: "Recipe", only: tuple[str, ...], logs: Path | None, dry_run: bool) -> None:
    """Start the models in the `serve` section of a recipe as vLLM servers, until Ctrl-C.

    \b
    intersafe serve --recipe mine.yaml                                        all of them
    intersafe serve --recipe mine.yaml --only Qwen/Qwen2.5-VL-7B-Instruct     one of them, on another machine say
    intersafe serve --recipe mine.yaml --dry-run                              prints the commands, for Slurm say
    intersafe generate --recipe mine.yaml --serve                             serves, generates, stops the servers

    Each local URL that the cast names for such a model becomes one server at that port; several URLs are replicas. Each
    server has its log in --logs. If a server cannot start, the command ends with exit code 2 and says what to change. A
    server that dies later is restarted, three times at most; then the command ends with exit code 4. docs/engines.md
    lists the keys and the usual failures.
    """
    from intersafe.serving.plan import servers_of, unserved_urls

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
    """The servers of a recipe, for the time of a run; `InputError` at once if there are none to start."""
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
    with contextlib.suppress(OSError, ValueError):  # a closed terminal must not keep the servers from being stopped
        click.echo(text, err=True)
