"""Errors for values of a recipe that do not match their type: the line of the value, and what to write instead."""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import msgspec

from intersafe.errors import InputError
from intersafe.recipe.base import Section
from intersafe.recipe.sections import Recipe

_HINTS = {
    "^[1-9][0-9]{1,3}x": "write WIDTHxHEIGHT, for example 1024x1024",
    "^([A-Za-z_]": "write the NAME of an environment variable, never the key",
    "^[A-Za-z0-9][A-Za-z0-9._-]": "write letters, digits, dots, - and _, at most 60",
}
"""What to write for a pattern, by the beginning of the pattern."""


def mismatch(error: msgspec.ValidationError, at: object, lines: Mapping[str, int], raw: Any = None) -> InputError:
    """The error for a value of the wrong type or size, with its line.

    `lines` has the line of each place (`$.cast.judge`), `raw` the values as they were read.
    """
    what, _, where = str(error).partition(" - at `")
    where = _named(where.rstrip("`"), raw)
    name = where.removeprefix("$.") or "recipe"
    remedy = next((hint for start, hint in _HINTS.items() if start in what), "docs/recipes.md lists the keys")
    if remedy in _HINTS.values():
        what = "not in the right format"
    if what.startswith(("Expected `int", "Expected `float")) and what.endswith("got `str`"):
        remedy = "write a plain number: no unit, no exponent, no quotes"
    options = _options_at(where)
    if options and what.startswith("Invalid enum value"):
        what, remedy = what.lower(), f"one of {', '.join(map(str, options))}"
    return InputError(f"{name}: {what}", at=at, line=line_of(where, lines), remedy=remedy)


def _named(where: str, raw: Any) -> str:
    """The place with the key that msgspec leaves out of a mapping (`groups[...]`): the first wrong one."""
    place, dots, _ = where.partition("[...]")
    if not dots or raw is None:
        return where
    keys = place.removeprefix("$.").split(".")
    inner = raw
    for key in keys:
        inner = inner[key]
    for name in inner:
        alone = {name: inner[name]}
        for key in reversed(keys):
            alone = {key: alone}
        try:
            msgspec.convert({**raw, keys[0]: alone[keys[0]]}, Recipe)
        except msgspec.ValidationError as error:
            if f"{place}[...]" in str(error):
                return where.replace("[...]", f".{name}")
    return where


def _options_at(where: str) -> tuple[Any, ...]:
    """The words that a place allows, if it takes one of a fixed set."""
    kind: Any = Recipe
    for key in re.sub(r"\[\d+\]", "", where).removeprefix("$.").split("."):
        section = section_in(kind)
        of_dict = dict_values(kind)
        if of_dict is not None and not (isinstance(kind, type) and issubclass(kind, Section)):
            kind = of_dict
        elif section:
            kind = next((f.type for f in msgspec.structs.fields(section) if f.name == key), None)
    return _literals(kind)


def _literals(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((found for inner in get_args(kind) if (found := _literals(inner))), ())


def dict_values(kind: Any) -> Any:
    """The type of the values if the annotation is a mapping, else None."""
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return next((found for inner in get_args(kind) if (found := dict_values(inner)) is not None), None)


def section_in(kind: Any) -> type[Section] | None:
    """The `Section` inside an annotation such as `Annotated[tuple[Member, ...], ...]` or `Gates | None`."""
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind
    return next((found for inner in get_args(kind) if (found := section_in(inner))), None)


def line_of(where: str, lines: Mapping[str, int]) -> int | None:
    """The line of `where`, or of the nearest place around it that has one."""
    while where and where not in lines:
        where = where[: max(where.rfind("."), where.rfind("["), 0)]
    return lines.get(where)
