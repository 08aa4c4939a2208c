"""The commands about the inputs of a run: `init`, `seeds` and `prompts`."""

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from intersafe.cli.options import recipe_option
from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.recipe.sections import Recipe


# --- init ------------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Copy the prompts, seeds and recipes that ship to DIRECTORY, to start your own from.

    \b
    intersafe init mine && cd mine && intersafe generate --n 20
    """
    from intersafe.storage.bundled import copy_bundled

    copied = copy_bundled(directory, ("prompts", "seeds", "pipelines"))
    click.echo(f"{directory}: {copied} files in prompts/, seeds/ and pipelines/")
    click.echo(f"next: cd {shlex.quote(str(directory))} && intersafe prompts lint && intersafe generate --n 20")


# --- seeds -----------------------------------------------------------------------------------------------------------


@click.group()
def seeds() -> None:
    """Check and import seed files.

    \b
    intersafe seeds check seeds/mine.jsonl
    intersafe seeds import figstep FigStep/data/question --out seeds/figstep
    """


@seeds.command("check")
@click.argument("path", type=click.Path(path_type=Path))
def seeds_check(path: Path) -> None:
    """Check a seed file and its images; count what is in it and what is excluded by rule."""
    from intersafe.seeds.load import load_seeds
    from intersafe.wording import plain

    found = load_seeds([path])
    with_image = sum(seed.image is not None for seed in found.seeds)
    click.echo(f"{path}: {len(found.seeds)} seeds, {with_image} with an image, {len(found.excluded)} excluded")
    for title, values in (
        ("category", (seed.category for seed in found.seeds)),
        ("source", (plain(f"{seed.source} ({seed.license})") for seed in found.seeds)),
    ):
        for name, number in Counter(values).most_common():
            click.echo(f"{number:>8} {title} {name}")
    for excluded in found.excluded:
        click.echo(f"excluded by rule: {excluded}")


@seeds.group("import")
def seeds_import() -> None:
    """Turn a public benchmark that you downloaded into a seed file."""


@seeds_import.command("figstep")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("seeds/figstep"), show_default=True, help="New folder."
)
def seeds_import_figstep(path: Path, out: Path) -> None:
    """Import FigStep (SafeBench or SafeBench-Tiny): PATH is its CSV file, or the folder with it and `images/`."""
    from intersafe.seeds.figstep import import_figstep

    done = import_figstep(path, out)
    images = f"{done.with_images} with an image" + (f", {done.missing_images} missing" if done.missing_images else "")
    click.echo(f"{done.out / 'seeds.jsonl'}: {done.written} seeds, {images}, {done.excluded} excluded by rule")


# --- prompts ---------------------------------------------------------------------------------------------------------


@click.group()
def prompts() -> None:
    """List, lint and render the prompt files.

    \b
    intersafe prompts list
    intersafe prompts lint --recipe mine.yaml
    intersafe prompts render judge/turn --seed fraud-001 --turn 2
    """


@prompts.command("list")
@recipe_option()
def prompts_list(recipe: "Recipe") -> None:
    """List every prompt file: its hash, its blocks and the variables that it may use (* = it uses them)."""
    from intersafe.templates.load import load_prompts, needed_by

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
@recipe_option()
def prompts_lint(recipe: "Recipe") -> None:
    """Check every prompt file; each problem is one line with file, line and remedy."""
    from intersafe.templates.load import check_refusals, lint_prompts, load_prompts, needed_by

    root, needed = Path(recipe.prompts), needed_by(recipe)
    problems = list(lint_prompts(root, needed))
    for problem in problems:
        click.echo(str(problem), err=True)
    if problems:
        raise InputError(f"{len(problems)} problem" + ("s" if len(problems) > 1 else ""), at=root)
    found = load_prompts(root, None, needed)
    if recipe.refusals:
        check_refusals(recipe.refusals, found)
    click.echo(f"{root}: {len(found.hashes)} files, no problem")


@prompts.command("render")
@click.argument("name", metavar="NAME")
@recipe_option()
@click.option("--seed", "seed_id", metavar="ID", required=True, help="Id of a seed of the recipe.")
@click.option(
    "--turn", type=click.IntRange(min=1), default=1, show_default=True, help="Which turn, or step of the plan."
)
def prompts_render(name: str, recipe: "Recipe", seed_id: str, turn: int) -> None:
    """Print the messages that a run would send for the prompt NAME (judge/turn, attacker/role_play, ...) and one seed.

    The scripted cast answers the turns before TURN; everything else is as in a real run of the recipe.
    """
    from intersafe.generation.rehearse import rehearse
    from intersafe.wording import plain

    call = rehearse(recipe, name.removesuffix(".md"), seed_id, turn)
    for message in call.messages:
        click.echo(click.style(f"--- {message.role}", bold=True))
        for reference in message.images:
            click.echo(f"[image {reference}]")
        click.echo(plain(message.text))
    if call.schema:
        import msgspec

        click.echo(click.style("--- response_format", bold=True))
        click.echo(msgspec.json.format(msgspec.json.encode(call.schema.schema)).decode())
