"""The commands that make runs: `generate`, `estimate` before it, and `regate` after it; and the flags they share."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from intersafe.cli.inputs import pipeline_option, recipe_of
from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.generation.progress import Display
    from intersafe.recipe.sections import Recipe

F = TypeVar("F", bound=Callable[..., None])

_RECIPE_OPTIONS = (
    click.option("--attacker", metavar="SPEC", help="Model that plays the user, as backend:model[@url]."),
    click.option(
        "--victim", "victims", metavar="SPEC", multiple=True, help="Model that answers; may be given several times."
    ),
    click.option("--judge", metavar="SPEC", help="Model that scores steps, turns and dialogues."),
    click.option("--painter", metavar="SPEC", help="Text-to-image model that draws what the attacker describes."),
    click.option("--responder", metavar="SPEC", help="Model that writes refusals and aligned answers."),
    click.option("--no-refusals", is_flag=True, help="Grow dialogues alone, without the recipe's refusal samples."),
    click.option(
        "--seeds", type=click.Path(path_type=Path), multiple=True, help="Seed file; may be given several times."
    ),
    click.option(
        "--concurrency", type=click.IntRange(min=1), help="Dialogues grown at once; changes no byte of the result."
    ),
    click.option("--seed", type=int, help="Seed of all sampling."),
    click.option("--patience", type=click.FloatRange(min=0), help="Seconds that a model's service may stay away."),
    click.option(
        "--price",
        "prices",
        metavar="ROLE=IN,OUT[,CALL]",
        multiple=True,
        help="USD per million prompt and completion tokens, and per call; may be given several times.",
    ),
    click.option("--max-tokens", metavar="TOKENS", help="Stop at so many tokens of the whole run, as 500k, 2M, 1.5B."),
    click.option("--max-cost", metavar="USD", help="Stop at this cost of the whole run; needs a price for each model."),
    click.option("--max-time", metavar="TIME", help="Stop this command after 90s, 30m, 8h, 1d, 7:30:00 or seconds."),
    click.option("--reuse", metavar="RUN", help="Take every unchanged model reply from this older run."),
)


def _recipe_options(command: F) -> F:
    """The flags that change a recipe."""
    for option in reversed(_RECIPE_OPTIONS):
        command = option(command)
    return command


def _log_options(command: F) -> F:
    """The flags for the log of a command."""
    to_file = click.option(
        "--log-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Append retries, outages, failed jobs and messages to this file, with time stamps.",
    )
    verbose = click.option("--verbose", is_flag=True, help="Show all log lines on stderr, not only warnings.")
    return to_file(verbose(command))


def _log(recipe: "Recipe", log_file: Path | None, verbose: bool, display: "Display") -> None:
    """Starts the log of a command."""
    from intersafe.cli.logs import configure_logging

    keys = [model.key for model in recipe.cast.models.values() if model.key]
    configure_logging(log_file, verbose, display.say, keys)


def _changed(recipe: "Recipe", changes: dict[str, Any]) -> "Recipe":
    """The recipe with what the flags of `_recipe_options` say."""
    from intersafe.cli.values import limits_of, parse_prices
    from intersafe.recipe.override import override

    texts = {name: changes.pop(name) for name in ("max_tokens", "max_cost", "max_time")}
    prices = parse_prices(changes.pop("prices"))
    seeds = tuple(str(path.resolve()) for path in changes.pop("seeds"))
    return override(recipe, seeds=seeds, prices=prices, **changes, **limits_of(texts))


@click.command()
@pipeline_option
@click.option("--n", type=click.IntRange(1, 10**9), help="Dialogues to keep; exact. Default: the recipe's n.")
@click.option(
    "--run", metavar="NAME|PATH", help="Where it goes; a bare name lives in outputs/. Default: recipe's name."
)
@_recipe_options
@click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="local",
    help="Grow with Ray workers: of this machine, or of the cluster at ADDRESS (auto, host:port, ray://host:port).",
)
@click.option(
    "--serve", is_flag=True, help="Start the servers of the recipe's `serve` section first, and stop them at the end."
)
@click.option("--ray-workers", type=click.IntRange(1, 100_000), help="How many. Default: one for each core.")
@_log_options
def generate(
    pipeline: Path | None,
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
    """Grow dialogues until N passed every gate, or go on with a run that was stopped.

    \b
    intersafe generate --n 11270                                     the scripted cast, minutes on a laptop
    intersafe generate --pipeline pipelines/intersafe_v.yaml         the published method, on your servers
    intersafe generate --run mine --victim openai:vlm@http://host:8000/v1     one model replaced
    intersafe generate --pipeline mine.yaml --max-cost 50 --price judge=2.5,10     stops at 50 USD
    intersafe generate --pipeline mine.yaml --serve     starts its models on this machine first, stops them at the end
    intersafe generate --run /shared/mine --ray auto     the nodes of a Ray cluster; --ray alone: all cores here

    A model SPEC is backend:model[@url[,url]]; backends: scripted, openai (any OpenAI-compatible URL), vllm (its server,
    or in process without a URL), transformers (in process), and for the painter diffusers (in process). Keys come from
    the environment variable that the recipe names. Refusal samples grow beside the dialogues where the recipe asks for
    them. Ctrl-C stops cleanly; the same command goes on.

    At a limit no further call starts, those in flight are kept, and the exit code is 5: the same command with a larger
    limit goes on. --max-tokens and --max-cost count the whole run, what it spent before included; --max-time counts
    this command alone. `intersafe estimate` says beforehand what a run will take; docs/budgets.md has the commands.
    """
    recipe = _changed(recipe_of(pipeline), changes)
    from intersafe.cli.live import display_for
    from intersafe.cli.printing import print_funnel
    from intersafe.engines.log import own_stderr
    from intersafe.generation.generate import generate_dialogues

    if ray is None and ray_workers is not None:
        raise InputError("workers without a cluster", at="--ray-workers", remedy="give --ray too")
    cluster = None
    if ray is not None:
        from intersafe.generation.workers.ray_cluster import Cluster

        cluster = Cluster(ray, ray_workers)
    display, servers = display_for(own_stderr()), None
    _log(recipe, log_file, verbose, display)
    if serve:
        from intersafe.cli.serve import served_for

        if ray not in (None, "local"):
            remedy = "start them where the workers are: `intersafe serve`"
            raise InputError("servers of this machine for a cluster", at="--serve, --ray", remedy=remedy)
        if cluster:
            from intersafe.generation.workers.ray_cluster import library

            library()  # before models load for minutes
        servers = served_for(recipe, display.say)
    made = generate_dialogues(recipe, run=run, n=n, reuse=reuse, display=display, cluster=cluster, servers=servers)
    print_funnel(made)
    click.echo(f"\n{made.path / 'dialogues.jsonl'}")


@click.command()
@click.argument("recipe_file", metavar="[RECIPE]", type=click.Path(path_type=Path), required=False)
@pipeline_option
@click.option("--n", type=click.IntRange(1, 10**9), help="Dialogues to keep. Default: the recipe's n.")
@click.option(
    "--samples", type=click.IntRange(1, 1000), default=8, show_default=True, help="Dialogues to grow for the estimate."
)
@click.option("--run", metavar="NAME|PATH", help="Where the samples go. Default: the recipe's name and `-estimate`.")
@_recipe_options
@_log_options
def estimate(
    recipe_file: Path | None,
    pipeline: Path | None,
    n: int | None,
    samples: int,
    run: str | None,
    reuse: str | None,
    log_file: Path | None,
    verbose: bool,
    **changes: Any,
) -> None:
    """Say what a run of N dialogues will take: calls, tokens, cost and time by role.

    \b
    intersafe estimate --n 11270                                     the scripted cast, in seconds
    intersafe estimate mine.yaml --n 10000 --price judge=2.5,10
    intersafe generate --pipeline mine.yaml --n 10000 --reuse mine-estimate     takes the samples over

    Grows a few jobs of each kind with the real cast, in a run of their own, and works out the rest from them. They are
    paid for once: the same command again asks no model, and `generate --reuse` takes their replies over. More --samples
    go on with the same run and narrow the spread.
    """
    if recipe_file is not None and pipeline is not None:
        raise InputError("two recipes", at="RECIPE, --pipeline", remedy="give one")
    recipe = _changed(recipe_of(recipe_file or pipeline), changes)
    from intersafe.cli.live import display_for
    from intersafe.cli.printing import print_estimate
    from intersafe.engines.log import own_stderr
    from intersafe.generation.estimate import estimate_run

    display = display_for(own_stderr())
    _log(recipe, log_file, verbose, display)
    found = estimate_run(recipe, n=n, samples=samples, run=run, reuse=reuse, display=display)
    print_estimate(found)


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--pipeline", type=click.Path(path_type=Path), required=True, help="The recipe with the changed gates.")
@click.option("--out", metavar="NAME|PATH", help="The new run. Default: RUN-regated.")
def regate(run: str, pipeline: Path, out: str | None) -> None:
    """Hold what RUN grew to other gates; no model is asked anything.

    \b
    intersafe regate demo --pipeline stricter.yaml --out demo2
    intersafe generate --pipeline stricter.yaml --run demo2 --n 11270          fills up what is missing

    Of the recipe only `gates` and `refusals.duplicates` are used; all else is as RUN has it. Dialogues that the old
    gates turned down are grown again from the journal, so looser gates find them too. RUN is only read.
    """
    from intersafe.cli.printing import print_funnel
    from intersafe.generation.regate import regate as gate_again

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        made = gate_again(run, recipe_of(pipeline), out, lambda text: click.echo(text, err=True))
    except KeyboardInterrupt:
        click.echo("intersafe: stopped; nothing was written", err=True)
        raise SystemExit(130) from None
    print_funnel(made)
    click.echo(f"\n{made.path / 'dialogues.jsonl'}")
    click.echo("`intersafe generate --run` with the same gates fills it up and pays for new jobs alone", err=True)
