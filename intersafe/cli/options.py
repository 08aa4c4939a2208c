"""Options that several commands share: the recipe, prices, the file of `--json`."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from intersafe.cli.values import JSON_TARGET, PRICE, by_role
from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.recipe.sections import Recipe

_Command = TypeVar("_Command", bound=Callable[..., Any])

_HERE = Path("pipelines/demo.yaml")
_DEFAULT = "Default: pipelines/demo.yaml here, else the demo recipe that ships with intersafe."


def default_recipe() -> Path:
    """The demo recipe of this folder, or the one that ships."""
    from intersafe.storage.bundled import bundled

    return _HERE if _HERE.exists() else bundled(str(_HERE))


class _Positional(click.Argument):
    """The recipe without its flag, as scripts may have it; the help shows the flag alone."""

    def get_usage_pieces(self, _: click.Context) -> list[str]:
        return []


def recipe_option(*, required: bool = False, positional: bool = False) -> Callable[[_Command], _Command]:
    """Adds `--recipe FILE`; the command gets the loaded `Recipe` as its argument `recipe`.

    `positional` accepts the file without the flag too. `InputError` for two recipes, or for none where it is required.
    """
    text = "Recipe file" + ("; the flag may be left out. " if positional else ". ")

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def with_recipe(*, recipe_flags: tuple[Path, ...], recipe_argument: Path | None = None, **values: Any) -> Any:
            files = [*([] if recipe_argument is None else [recipe_argument]), *recipe_flags]
            return command(recipe=_load(files, required), **values)

        option = click.option(
            *("--recipe", "--pipeline", "recipe_flags"),
            metavar="FILE",
            type=click.Path(path_type=Path),
            multiple=True,  # so that a second one is an error, not an override
            help=text + ("Required." if required else _DEFAULT),
        )
        argument = click.argument("recipe_argument", cls=_Positional, required=False, type=click.Path(path_type=Path))
        return cast(_Command, option(argument(with_recipe) if positional else with_recipe))

    return decorate


def _load(files: list[Path], required: bool) -> "Recipe":
    from intersafe.recipe.load import load_recipe

    if len(files) > 1:
        raise InputError(f"two recipes, {files[0]} and {files[1]}", at="--recipe", remedy="pass one")
    if required and not files:
        raise InputError("no recipe", at="--recipe", remedy="pass --recipe FILE")
    return load_recipe(files[0] if files else default_recipe())


_FLAGS = {"prices": "--price", "max_cost": "--max-cost"}
"""By argument of the library, where the names differ."""


def names_flags(command: _Command) -> _Command:
    """Lets an error about an argument of the library name the flag that it was passed with."""

    @functools.wraps(command)
    def named(**values: Any) -> None:
        try:
            command(**values)
        except InputError as error:
            flag = _FLAGS.get(str(error.at))
            if flag is None or not values[str(error.at)]:
                raise
            raise InputError(error.what, at=flag, remedy=error.remedy) from None

    return cast("_Command", named)


prices_option = click.option(
    "--price",
    "prices",
    metavar="ROLE=IN,OUT[,CALL]",
    type=PRICE,
    multiple=True,
    callback=by_role,
    help="USD per million prompt and completion tokens, and per call. Repeat it for several roles.",
)

json_option = click.option(
    "--json",
    "target",
    metavar="PATH",
    type=JSON_TARGET,
    help="Write the result as JSON too; with - as PATH, print the JSON and nothing else.",
)
