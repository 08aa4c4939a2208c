"""Tokens by role, and what they cost at the prices of the recipe or the flags; intersafe knows no price list."""

import math
from collections.abc import Iterable, Mapping

import msgspec

from intersafe.errors import InputError
from intersafe.recipe.sections import Price
from intersafe.run.journal import RoleTally


class RoleCost(msgspec.Struct, frozen=True):
    """What one role used; `usd` is None without a price."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None


class Costs(msgspec.Struct, frozen=True):
    """All roles; `usd` is the sum of those with a price, None if there is none."""

    roles: dict[str, RoleCost]
    usd: float | None
    usd_per_dialogue: float | None
    """Over the dialogues kept; None unless every role has a price."""
    unpriced: tuple[str, ...]
    """Roles with calls and without a price."""


def check_roles(prices: Iterable[str], roles: Iterable[str]) -> None:
    """`InputError` for the price of a role that the run does not have."""
    known = {name for role in roles for name in (role, _family(role))}
    for role in prices:
        if role not in known:
            raise InputError(f"no role {role!r} in this run", at="prices", remedy=f"roles: {', '.join(sorted(known))}")


def with_flags(known: Mapping[str, Price], given: Mapping[str, Price]) -> dict[str, Price]:
    """The prices of a run, and in their place those that flags give; `victim` stands for every victim."""
    return {role: price for role, price in known.items() if _family(role) not in given} | dict(given)


def costs_of(roles: Mapping[str, RoleTally], prices: Mapping[str, Price], kept: int) -> Costs:
    """Tokens and cost of a run that kept so many dialogues.

    The price of `victim` holds for victim:0, victim:1 ... that have none of their own.
    """
    costs = {role: _cost(roles[role], prices.get(role) or prices.get(_family(role))) for role in sorted(roles)}
    priced = [cost.usd for cost in costs.values() if cost.usd is not None]
    usd = math.fsum(priced) if priced else None
    unpriced = tuple(role for role, cost in costs.items() if cost.usd is None)
    return Costs(costs, usd, usd / kept if usd is not None and kept and not unpriced else None, unpriced)


def _family(role: str) -> str:
    return role.partition(":")[0]


def _cost(tally: RoleTally, price: Price | None) -> RoleCost:
    usd = None
    if price is not None:
        usd = price.of((tally.prompt_tokens, tally.completion_tokens), tally.calls)
    return RoleCost(tally.calls, tally.prompt_tokens, tally.completion_tokens, usd)
