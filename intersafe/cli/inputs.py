"""The commands about what a run is made from: `seeds` and `prompts`; and how a command is given its recipe."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from intersafe.errors import InputError
from intersafe.recipe.sections import Recipe

if TYPE_CHECKING:
    from intersafe.recipe.sections import Recipe

HERE = Path("pipelines/demo.yaml")

pipeline_option = click.option(
    "--pipeline",
    type=click.Path(path_type=Path),
    help="Recipe file. Default: pipelines/demo.yaml here, or else the one that ships with intersafe.",
)


def recipe_of(pipeline: Path | None) -> "Recipe":
    """The recipe of a file; without one the demo recipe of this folder, or the one that ships."""
    from intersafe.recipe.load import load_recipe
    from intersafe.storage.bundled import bundled

    if pipeline is None:
        pipeline = HERE if HERE.exists() else bundled("pipelines/demo.yaml")
    return load_recipe(pipeline)


# --- seeds -----------------------------------------------------------------------------------------------------------


@click.group()
def seeds() -> None:
    """Check and import seed files."""


@seeds.command("check")
@click.argument("path", type=click.Path(path_type=Path))
def seeds_check(path: Path) -> None:
    """Validate a seed file and its images; count what is excluded."""
    from intersafe.seeds.load import load_seeds
    from intersafe.wording import plain

    found = load_seeds([path])
    with_image = sum(seed.image is not None for seed in found.seeds)
    click.echo(f"{path}: {len(found.seeds)} seeds, {with_image} with an image, {len(found.excluded)} excluded")
    for title, values in (
        ("category", (seed.category for seed in found.seeds)),
        ("source", (plain(f"{seed.source} ({seed.license})") for seed in found.seeds)),
    ):
        for name, number in count(values).items():
            click.echo(f"{number:>8} {title} {name}")
    for excluded in found.excluded:
        click.echo(f"excluded by rule: {excluded}")


@seeds.group("import")
def seeds_import() -> None:
    """Turn a public benchmark that you have into a seed file."""


@seeds_import.command("figstep")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("seeds/figstep"), show_default=True)
def import_figstep(path: Path, out: Path) -> None:
    """FigStep (SafeBench or SafeBench-Tiny): the CSV and the images beside it."""
    from intersafe.seeds.figstep import import_figstep as figstep

    done = figstep(path, out)
    images = f"{done.with_images} with an image" + (f", {done.missing_images} missing" if done.missing_images else "")
    click.echo(f"{out / 'seeds.jsonl'}: {done.written} seeds, {images}, {done.excluded} excluded by rule")


# --- prompts ---------------------------------------------------------------------------------------------------------


@click.group()
def prompts() -> None:
    """List, lint and render the prompt files."""


@prompts.command("list")
@pipeline_option
def prompts_list(pipeline: Path | None) -> None:
    """Every prompt file: its role, hash and the variables that it is offered (* = it uses them)."""
    from intersafe.templates.load import load_prompts, needed_by

    recipe = recipe_of(pipeline)
    found = load_prompts(Path(recipe.prompts), None, needed_by(recipe))
    for name, prompt in found.prompts.items():
        blocks = ", ".join(prompt.role.blocks)
        click.echo(f"{click.style(name, bold=True)}   {prompt.sha256[:12]}   blocks: {blocks}")
        if name.startswith("attacker/"):
            click.echo(f"    {prompt.render('summary', {})}")
        for variable, meaning in prompt.role.variables.items():
            click.echo(f"    {'*' if variable in prompt.uses else ' '} {variable:<17} {meaning}")
    for family in found.rubrics:
        name = f"judge/rubrics/{family}"
        click.echo(f"{click.style(name, bold=True)}   {found.hashes[name + '.md'][:12]}   plain text")


@prompts.command("lint")
@pipeline_option
def prompts_lint(pipeline: Path | None) -> None:
    """Check every prompt file; one line for each problem with file, line and remedy."""
    from intersafe.templates.load import check_refusals, lint_prompts, load_prompts, needed_by

    recipe = recipe_of(pipeline)
    root, needed = Path(recipe.prompts), needed_by(recipe)
    problems = list(lint_prompts(root, needed))
    for problem in problems:
        click.echo(str(problem), err=True)
    if problems:
        raise InputError(f"{len(problems)} problem" + ("s" if len(problems) > 1 else ""), at=root)
    found = load_prompts(root, None, needed)
    if recipe.refusals:
        check_refusals(recipe.refusals, found)
    click.echo(f"{root}: {len(found.hashes)} files, all well")


@prompts.command("render")
@click.argument("name", metavar="NAME")
@pipeline_option
@click.option("--seed", "seed_id", metavar="ID", required=True, help="Id of a seed of the recipe.")
@click.option(
    "--turn", type=click.IntRange(min=1), default=1, show_default=True, help="Which turn, or step of the plan."
)
def prompts_render(name: str, pipeline: Path | None, seed_id: str, turn: int) -> None:
    """Print the messages that would be sent for NAME (judge/turn, attacker/role_play, ...) and one seed.

    The talk before TURN is grown by the scripted cast; everything else is as in a real run of the recipe.
    """
    from intersafe.generation.rehearse import rehearse
    from intersafe.wording import plain

    call = rehearse(recipe_of(pipeline), name.removesuffix(".md"), seed_id, turn)
    for message in call.messages:
        click.echo(click.style(f"--- {message.role}", bold=True))
        for reference in message.images:
            click.echo(f"[image {reference}]")
        click.echo(plain(message.text))
    if call.schema:
        import msgspec

        click.echo(click.style("--- response_format", bold=True))
        click.echo(msgspec.json.format(msgspec.json.encode(call.schema.schema)).decode())


def count(values: Iterable[str]) -> dict[str, int]:
    """How often each value stands, most frequent first."""
    return dict(Counter(values).most_common())
