"""Budgets: the limits of a run on tokens, cost and time, and the check before each call.

Tokens and cost are counted over the whole run, by its journals; time is counted per command. The check comes before a
call starts and never ends a call, so a run exceeds a limit by the calls in flight at most.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from msgspec import structs

from intersafe.errors import BudgetReached, InputError
from intersafe.recipe.sections import Cast, Limits, Member, Price, Recipe
from intersafe.run.journal import RoleTally
from intersafe.wording import clock, dollars

GRACE = 60.0
"""Seconds that calls in flight have to end after the time limit."""


class Spent(NamedTuple):
    """What a run has used so far."""

    tokens: int = 0
    usd: float = 0.0


class Budget:
    """The limits of a run and what it has used of them."""

    def __init__(
        self, limits: Limits, roles: Mapping[str, RoleTally], *, began: float | None = None, grace: float = GRACE
    ) -> None:
        """`roles` is the journal's tally, read at each check; `began` is the command's start on the monotonic clock."""
        self.limits = limits
        self._roles, self._grace = roles, grace
        self._began = time.monotonic() if began is None else began
        self.stopped = ""
        """Why no call may start, set in a worker by the process that counts the whole run; empty if calls may start."""

    @property
    def spent(self) -> Spent:
        """Tokens and USD of the whole run so far."""
        tokens, usd = 0, 0.0
        for tally in self._roles.values():
            tokens += tally.prompt_tokens + tally.completion_tokens
            usd += tally.cost
        return Spent(tokens, usd)

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self._began

    @property
    def is_bound(self) -> bool:
        """True if any limit is set."""
        limits = self.limits
        return not (limits.max_tokens is None and limits.max_cost is None and limits.max_time is None)

    def check(self) -> None:
        """Called before every call to a model: `BudgetReached` once a limit is reached."""
        if why := self.reached():
            raise BudgetReached(why)

    def reached(self) -> str:
        """Which limit is reached, how much is used, and how to continue; empty if none is reached."""
        limits = self.limits
        if self.stopped:
            return self.stopped
        if limits.max_time is not None and self.seconds >= limits.max_time:
            return f"the {_span(limits.max_time)} of --max-time are over; run the same command again to continue"
        if limits.max_tokens is None and limits.max_cost is None:
            return ""
        tokens, usd = self.spent
        if limits.max_tokens is not None and tokens >= limits.max_tokens:
            return _used(f"{tokens:,}", f"{limits.max_tokens:,} tokens", "--max-tokens")
        if limits.max_cost is not None and usd >= limits.max_cost:
            return _used(dollars(usd), f"{dollars(limits.max_cost)} USD", "--max-cost")
        return ""

    @contextlib.asynccontextmanager
    async def lasting(self) -> AsyncIterator[None]:
        """Cancels the block `grace` seconds after the time limit and raises `BudgetReached`."""
        left = None
        if self.limits.max_time is not None:
            left = max(0.0, self.limits.max_time - self.seconds) + self._grace
        try:
            async with asyncio.timeout(left) as timeout:
                yield
        except TimeoutError:
            if timeout.expired():
                self.check()
            raise


def _span(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 60 else clock(seconds)


def _used(used: str, limit: str, flag: str) -> str:
    return f"{used} of {limit} are used; run the same command with a larger {flag} to continue"


def prices_of(cast: Cast) -> dict[str, Price]:
    """The price of every role that has one, as charged: a batch costs half."""
    found = {}
    for role, model in cast.models.items():
        if price := model.price:
            half = 0.5 if isinstance(model, Member) and model.batch else 1.0
            fields = {name: half * amount for name, amount in structs.asdict(price).items()}
            found[role] = Price(**fields)
    return found


def check_prices(recipe: Recipe) -> None:
    """`InputError` if the cost is limited and a model that is asked over the network has no price."""
    if recipe.limits.max_cost is None:
        return
    roles = [role for role, model in recipe.cast.models.items() if model.spec.urls and model.price is None]
    if roles:
        flag = f"--price {roles[0].partition(':')[0]}=IN,OUT"
        raise InputError(
            f"the cost is limited, and there is no price for {', '.join(roles)}",
            at="max_cost",
            remedy=f"add {flag} or `price` in the recipe; zeros for a server of your own",
        )
