"""Tokens and cost by role, at the prices of the recipe or of flags; intersafe has no price list."""

import math
from collections.abc import Iterable, Mapping

import msgspec

from intersafe.errors import InputError
from intersafe.recipe.sections import Price
from intersafe.run.journal import RoleTally


class RoleCost(msgspec.Struct, frozen=True):
    """The use of one role; `usd` is None without a price."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None


class Costs(msgspec.Struct, frozen=True):
    """All roles; `usd` is the sum of those with a price, None if no role has one."""

    roles: dict[str, RoleCost]
    usd: float | None
    usd_per_dialogue: float | None
    """Per accepted dialogue; None unless every role has a price."""
    unpriced: tuple[str, ...]
    """Roles with calls and without a price."""


def check_roles(prices: Iterable[str], roles: Iterable[str]) -> None:
    """`InputError` for a price of a role that the run does not have."""
    known = {name for role in roles for name in (role, _family(role))}
    for role in prices:
        if role not in known:
            raise InputError(f"no role {role!r} in this run", at="prices", remedy=f"roles: {', '.join(sorted(known))}")


def with_flags(known: Mapping[str, Price], given: Mapping[str, Price]) -> dict[str, Price]:
    """The prices of a run, replaced by those of flags; `victim` stands for every victim."""
    return {role: price for role, price in known.items() if _family(role) not in given} | dict(given)


def costs_of(roles: Mapping[str, RoleTally], prices: Mapping[str, Price], accepted: int) -> Costs:
    """Tokens and cost of a run with `accepted` dialogues.

    The price of `victim` is for every victim (victim:0, victim:1, ...) without its own.
    """
    costs = {role: _cost(roles[role], prices.get(role) or prices.get(_family(role))) for role in sorted(roles)}
    priced = [cost.usd for cost in costs.values() if cost.usd is not None]
    usd = math.fsum(priced) if priced else None
    unpriced = tuple(role for role, cost in costs.items() if cost.usd is None)
    return Costs(costs, usd, usd / accepted if usd is not None and accepted and not unpriced else None, unpriced)


def _family(role: str) -> str:
    return role.partition(":")[0]


def _cost(tally: RoleTally, price: Price | None) -> RoleCost:
    usd = None
    if price is not None:
        usd = price.of((tally.prompt_tokens, tally.completion_tokens), tally.calls)
    return RoleCost(tally.calls, tally.prompt_tokens, tally.completion_tokens, usd)
