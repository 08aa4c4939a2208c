"""A recipe with some values replaced, by flags or in a notebook."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from intersafe.errors import InputError
from intersafe.recipe.checks import validate_recipe
from intersafe.recipe.sections import Cast, Member, Model, Painter, Price, Recipe
from intersafe.recipe.specs import BACKENDS, OPENAI_URL, PAINTERS, parse_spec


def override(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values, checked again; raises `InputError`.

    `changes` are fields of the recipe, roles of the cast by model spec (`victims` takes several), fields of `limits`,
    `prices` by role, or `no_refusals`. None and empty values change nothing. A member with a new spec loses the API key
    and the price of the model before.
    """
    if changes.pop("no_refusals", False):
        # Only refusals and aligned answers use the responder; without them its API key is not needed.
        cast = recipe.cast if recipe.respond else msgspec.structs.replace(recipe.cast, responder=None)
        recipe = msgspec.structs.replace(recipe, refusals=None, cast=cast)
    cast = recipe.cast
    for role in ("attacker", "judge", "responder"):
        if (spec := changes.pop(role, None)) is not None:
            cast = msgspec.structs.replace(cast, **{role: _recast(getattr(cast, role) or Member(model=spec), spec)})
    if (spec := changes.pop("painter", None)) is not None:
        painter = cast.painter or Painter(model=spec)
        cast = msgspec.structs.replace(cast, painter=_recast(painter, spec))
    if specs := changes.pop("victims", None):
        cast = msgspec.structs.replace(cast, victims=tuple(_recast(cast.victims[0], spec) for spec in specs))
    cast = _priced(cast, changes.pop("prices", None) or {})
    limits = {name: changes.pop(name) for name in _LIMITS if changes.get(name) is not None}
    kept = {name: value for name, value in changes.items() if value not in (None, (), [])}
    return validate_recipe(
        msgspec.structs.replace(recipe, cast=cast, limits=msgspec.structs.replace(recipe.limits, **limits), **kept)
    )


_LIMITS = ("concurrency", "patience", "max_tokens", "max_cost", "max_time")
"""The fields of `limits` that can be changed."""
M = TypeVar("M", bound=Model)


def _priced(cast: Cast, prices: Mapping[str, Price]) -> Cast:
    """The cast with these prices by role; the price of `victim` is for every victim without its own."""
    roles = sorted({name for role in cast.models for name in (role, role.partition(":")[0])})
    for role in prices:
        if role not in roles:
            raise InputError(f"no role {role!r} in the cast", at="prices", remedy=f"roles: {', '.join(roles)}")

    def priced(role: str, model: M) -> M:
        price = prices.get(role) or prices.get(role.partition(":")[0])
        return msgspec.structs.replace(model, price=price) if price else model

    members = {role: priced(role, member) for role, member in cast.members.items()}
    victims = tuple(members.pop(f"victim:{number}") for number in range(len(cast.victims)))
    painter = priced("painter", cast.painter) if cast.painter else None
    return msgspec.structs.replace(cast, victims=victims, painter=painter, **members)


def _recast(member: M, spec: str) -> M:
    """The member with another model, without the API key and the price of the model before.

    A key must not go to a server that it was not meant for.
    """
    parsed = parse_spec(spec, PAINTERS if isinstance(member, Painter) else BACKENDS)
    key = "OPENAI_API_KEY" if parsed.urls == (OPENAI_URL,) else ""
    own = {"batch": False} if isinstance(member, Member) else {}  # not every server has a batch endpoint
    return msgspec.structs.replace(member, model=spec, key=key, revision="", extra={}, price=None, **own)
