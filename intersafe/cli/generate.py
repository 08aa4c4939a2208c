"""The commands that make runs: `generate`, `estimate` and `regate`, and the flags that change a recipe."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from intersafe.cli.options import names_flags, prices_option, recipe_option
from intersafe.cli.values import DURATION, TOKENS, USD, FiniteRange
from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.generation.progress import Display
    from intersafe.generation.workers.ray_cluster import Cluster
    from intersafe.recipe.sections import Recipe

_Command = TypeVar("_Command", bound=Callable[..., None])

_RECIPE_OPTIONS = (
    click.option("--attacker", metavar="SPEC", help="Model that plays the user, as backend:model[@url]."),
    click.option("--victim", "victims", metavar="SPEC", multiple=True, help="Model that answers. May be repeated."),
    click.option("--judge", metavar="SPEC", help="Model that scores steps, turns and dialogues."),
    click.option("--painter", metavar="SPEC", help="Text-to-image model that draws what the attacker describes."),
    click.option("--responder", metavar="SPEC", help="Model that writes refusals and aligned answers."),
    click.option("--no-refusals", is_flag=True, help="Generate dialogues only, without the recipe's refusal samples."),
    click.option("--seeds", type=click.Path(path_type=Path), multiple=True, help="Seed file. May be repeated."),
    click.option("--concurrency", type=click.IntRange(min=1), help="Dialogues in progress at once; changes no result."),
    click.option("--seed", type=int, help="Seed of all sampling."),
    click.option(
        "--patience", type=FiniteRange(min=0), help="Seconds to wait for a model's service that does not answer."
    ),
    prices_option,
    click.option(
        "--max-tokens", metavar="TOKENS", type=TOKENS, help="Stop when the run has used this many: 500k, 2M, 1.5B."
    ),
    click.option(
        "--max-cost", metavar="USD", type=USD, help="Stop when the run has cost this much; every model needs a price."
    ),
    click.option(
        "--max-time",
        metavar="TIME",
        type=DURATION,
        help="Stop this command after 90s, 30m, 8h, 1d, 7:30:00 or seconds.",
    ),
    click.option("--reuse", metavar="RUN", help="Take every unchanged model reply from this older run."),
)


def _recipe_options(command: _Command) -> _Command:
    """The flags that change a recipe."""
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


def _log_options(command: _Command) -> _Command:
    """The flags for the log of a command."""
    to_file = click.option(
        "--log-file",
        metavar="PATH",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Append retries, outages, failed jobs and messages to this file, with time stamps.",
    )
    verbose = click.option("--verbose", is_flag=True, help="Show all log lines on stderr, not only warnings.")
    return to_file(verbose(command))


def _log(recipe: "Recipe", log_file: Path | None, verbose: bool, display: "Display") -> AbstractContextManager[None]:
    """The log of the command, within the block."""
    from intersafe.cli.logs import command_log

    keys = [model.key for model in recipe.cast.models.values() if model.key]
    return command_log(log_file, verbose, display.say, keys)


def _changed(recipe: "Recipe", changes: dict[str, Any]) -> "Recipe":
    """The recipe with what the flags of `_recipe_options` say."""
    from intersafe.recipe.override import override

    seeds = tuple(str(path.resolve()) for path in changes.pop("seeds"))
    return override(recipe, seeds=seeds, **changes)


@click.command()
@recipe_option()
@click.option("--n", type=click.IntRange(1, 10**9), help="Dialogues to accept; exact. Default: the recipe's n.")
@click.option("--run", metavar="NAME|PATH", help="Run directory; a bare NAME is in outputs/. Default: recipe's name.")
@_recipe_options
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="local",
    help="Generate with Ray workers: on this machine, or at ADDRESS (auto, host:port, ray://host:port).",
)
@click.option("--ray-workers", type=click.IntRange(1, 100_000), help="Number of Ray workers. Default: one per core.")
@click.option("--serve", is_flag=True, help="Start the servers of the recipe's `serve` section, and stop them after.")
@_log_options
@names_flags
def generate(
    recipe: "Recipe",
    n: int | None,
    run: str | None,
    reuse: str | None,
    ray: str | None,
    ray_workers: int | None,
    serve: bool,
    log_file: Path | None,
    verbose: bool,
    **changes: Any,
) -> None:
    """Generate dialogues until N passed every gate, or resume a run that was stopped.

    \b
    intersafe generate --n 11270                                   the scripted cast, minutes on a laptop
    intersafe generate --recipe pipelines/intersafe_v.yaml         the published method, on your servers
    intersafe generate --run mine --victim openai:vlm@http://host:8000/v1     another victim
    intersafe generate --recipe mine.yaml --max-cost 50 --price judge=2.5,10     stops at 50 USD
    intersafe generate --recipe mine.yaml --serve     starts the models on this machine first
    intersafe generate --run /shared/mine --ray auto     on a Ray cluster; --ray alone: all cores here

    A model SPEC is backend:model[@url[,url]]. Backends: scripted, openai (any OpenAI-compatible URL), vllm (its server,
    or in this process without a URL), transformers (in this process), and for the painter diffusers (in this process).
    API keys come from the environment variables that the recipe names. Refusal samples are generated in the same run
    where the recipe asks for them.

    Ctrl-C stops the run cleanly; the same command resumes it. At a limit no further call starts, calls in flight are
    kept, and the exit code is 5: the same command with a larger limit resumes. --max-tokens and --max-cost count the
    whole run, also what it used before; --max-time counts this command alone. `intersafe estimate` predicts what a run
    takes. docs/budgets.md has examples.
    """
    from intersafe.cli.live import display_for
    from intersafe.cli.printing import print_funnel
    from intersafe.engines.log import own_stderr
    from intersafe.generation.generate import generate_dialogues

    recipe = _changed(recipe, changes)
    cluster = _cluster(ray, ray_workers)
    display = display_for(own_stderr())
    with _log(recipe, log_file, verbose, display):
        servers = _servers(recipe, ray, display.say) if serve else None
        made = generate_dialogues(recipe, run=run, n=n, reuse=reuse, display=display, cluster=cluster, servers=servers)
    print_funnel(made)
    click.echo(f"\n{made.path / 'dialogues.jsonl'}")


def _cluster(ray: str | None, workers: int | None) -> "Cluster | None":
    """The Ray cluster of `--ray`, None without it."""
    if ray is None:
        if workers is not None:
            raise InputError("workers without a cluster", at="--ray-workers", remedy="pass --ray too")
        return None
    from intersafe.generation.workers.ray_cluster import Cluster

    return Cluster(ray, workers)


def _servers(recipe: "Recipe", ray: str | None, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """The servers of `--serve`, started when entered."""
    from intersafe.cli.serve import served_for

    if ray not in (None, "local"):
        remedy = "start them where the workers are: `intersafe serve`"
        raise InputError("servers of this machine for a cluster", at="--serve, --ray", remedy=remedy)
    if ray:
        from intersafe.generation.workers.ray_cluster import library

        library()  # a missing Ray is an error now, not after models loaded for minutes
    return served_for(recipe, say)


@click.command()
@recipe_option(positional=True)
@click.option("--n", type=click.IntRange(1, 10**9), help="Dialogues to accept. Default: the recipe's n.")
@click.option(
    "--samples", type=click.IntRange(1, 1000), default=8, show_default=True, help="Dialogues to generate as samples."
)
@click.option("--run", metavar="NAME|PATH", help="Directory of the samples. Default: the recipe's name + `-estimate`.")
@_recipe_options
@_log_options
@names_flags
def estimate(
    recipe: "Recipe",
    n: int | None,
    samples: int,
    run: str | None,
    reuse: str | None,
    log_file: Path | None,
    verbose: bool,
    **changes: Any,
) -> None:
    """Predict what a run of N dialogues takes: calls, tokens, cost and time by role.

    \b
    intersafe estimate --n 11270                                     the scripted cast, in seconds
    intersafe estimate --recipe mine.yaml --n 10000 --price judge=2.5,10
    intersafe generate --recipe mine.yaml --n 10000 --reuse mine-estimate     reuses the samples

    Generates a few samples of each kind with the real cast, in a run of their own, and extrapolates. You pay for them
    once: the same command again calls no model, and `generate --reuse` takes their replies. More --samples extend the
    same run and narrow the spread.
    """
    from intersafe.cli.live import display_for
    from intersafe.cli.printing import print_estimate
    from intersafe.engines.log import own_stderr
    from intersafe.generation.estimate import estimate_run

    recipe = _changed(recipe, changes)
    display = display_for(own_stderr())
    with _log(recipe, log_file, verbose, display):
        found = estimate_run(recipe, n=n, samples=samples, run=run, reuse=reuse, display=display)
    print_estimate(found)


@click.command("regate")
@click.argument("run", metavar="RUN")
@recipe_option(required=True)
@click.option("--out", metavar="NAME|PATH", help="The new run. Default: RUN-regated.")
def regate_command(run: str, recipe: "Recipe", out: str | None) -> None:
    """Apply other gates to what RUN generated; calls no model.

    \b
    intersafe regate demo --recipe stricter.yaml --out demo2
    intersafe generate --recipe stricter.yaml --run demo2 --n 11270          fills up what is missing

    Only `gates` and `refusals.duplicates` of the recipe are used; all else is as in RUN. Dialogues that the old gates
    rejected are rebuilt from the journal, so looser gates can accept them. RUN is only read.
    """
    from intersafe.cli.printing import print_funnel
    from intersafe.generation.regate import regate

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        made = regate(run, recipe, out, lambda text: click.echo(text, err=True))
    except KeyboardInterrupt:
        click.echo("intersafe: stopped; nothing was written", err=True)
        raise SystemExit(130) from None
    print_funnel(made)
    click.echo(f"\n{made.path / 'dialogues.jsonl'}")
    click.echo("`intersafe generate --run` with the same gates fills it up and pays only for new jobs", err=True)
