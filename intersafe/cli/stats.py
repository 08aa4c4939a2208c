"""The command that prints the figures of a run: `stats`."""

from typing import TYPE_CHECKING

import click

from intersafe.cli.options import json_option, names_flags, prices_option
from intersafe.cli.values import JsonTarget
from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.models.http.embeddings import Embedder
    from intersafe.recipe.sections import Price
    from intersafe.report.figures import Stats


@click.command()
@click.argument("run", metavar="RUN")
@json_option
@click.option(
    "--sample",
    type=click.IntRange(2, 500),
    default=200,
    show_default=True,
    help="Dialogues for self-BLEU and the embeddings. The Vendi score of more than 200 needs `intersafe[figures]`.",
)
@click.option("--embedder", metavar="SPEC", help="Embedding model, as openai:model@url, for the embedding dispersion.")
@click.option("--embedder-key", metavar="ENVVAR", default="", help="Environment variable with its API key.")
@prices_option
@names_flags
def stats(
    run: str,
    target: JsonTarget | None,
    sample: int,
    embedder: str | None,
    embedder_key: str,
    prices: "dict[str, Price]",
) -> None:
    """Print the figures of a run that a paper needs, next to the published ones.

    \b
    intersafe stats demo
    intersafe stats demo --json figures.json --price victim=0.1,0.3 --price judge=0.4,1.6
    intersafe stats demo --embedder openai:bge-m3@http://localhost:8000/v1

    A --price replaces the recipe's price of that role. Nothing is written into the run. docs/stats.md says what each
    figure means and what it does not show.
    """
    from intersafe.report.cost import with_flags
    from intersafe.report.stats import stats_of
    from intersafe.run.directory import Run

    if embedder_key and not embedder:
        raise InputError("a key without a model", at="--embedder-key", remedy="pass --embedder too")
    opened = Run(run)
    priced = with_flags(opened.prices(), prices)
    if target:
        target.check_outside(opened.path)
    model = _embedder(embedder, embedder_key) if embedder else None
    found = stats_of(opened, sample=sample, prices=priced, embedder=model)
    if target:
        target.write(found)
    if not target or target.path:
        _print(found)


def _embedder(spec: str, key: str) -> "Embedder":
    from intersafe.models.base import Hooks
    from intersafe.models.http.embeddings import open_embedder

    return open_embedder(spec, key, Hooks(lambda text: click.echo(text, err=True)))


def _print(found: "Stats") -> None:
    from intersafe.report.table import sections
    from intersafe.wording import plain

    for number, section in enumerate(sections(found)):
        click.echo(("\n" if number else "") + click.style(plain(section.title), bold=True))
        for line in section.lines:
            click.echo(f"  {plain(line)}".rstrip())
