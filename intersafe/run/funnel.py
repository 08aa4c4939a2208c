"""How many jobs were accepted and where the others ended; the summary of a complete run."""

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, UnsetType

from intersafe.engines.metrics import Figures
from intersafe.recipe.sections import Price
from intersafe.records import Ended, RefusalSample
from intersafe.run.incidents import Incidents
from intersafe.run.journal import RoleTally
from intersafe.run.kinds import Outcome


class Funnel(msgspec.Struct):
    """How many jobs of a kind were accepted, and where the others ended."""

    jobs: int = 0
    accepted: int = 0
    ended: dict[str, int] = {}
    """`kind stage reason` to count, for example `rejected gates near_duplicate`."""
    categories: dict[str, int] = {}
    turns: dict[int, int] = {}
    groups: dict[str, int] = {}
    """Refusal samples by group."""
    images: int = 0
    painted: int = 0
    """Of the images those that the painter drew."""
    unsafe: int = 0
    """Dialogues with an unsafe turn."""
    verdicts: dict[str, int] = {}
    """Turns by safety, and by refusal kind where the victim refused."""

    def count(self, outcome: Outcome | Ended) -> None:
        """Counts one decided job."""
        self.jobs += 1
        if isinstance(outcome, Ended):
            where = f"{outcome.kind} {outcome.stage} {outcome.reason}"
            self.ended[where] = self.ended.get(where, 0) + 1
            return
        self.accepted += 1
        self.images += len(outcome.images)
        if isinstance(outcome, RefusalSample):
            self.painted += sum(origin.source == "painted" for origin in outcome.origins)
            self.groups[outcome.group] = self.groups.get(outcome.group, 0) + 1
            return
        self.painted += sum(origin.source == "painted" for turn in outcome.turns for origin in turn.origins)
        self.unsafe += outcome.first_unsafe_turn is not None
        for turn in outcome.turns:
            verdict = turn.verdict
            for word in (verdict.safety, *((f"refusal {verdict.refusal}",) if verdict.refusal != "none" else ())):
                self.verdicts[word] = self.verdicts.get(word, 0) + 1
        category, turns = outcome.seed.category, len(outcome.turns)
        self.categories[category] = self.categories.get(category, 0) + 1
        self.turns[turns] = self.turns.get(turns, 0) + 1

    @property
    def mean_turns(self) -> float:
        """Turns per dialogue."""
        return sum(n * count for n, count in self.turns.items()) / self.accepted if self.accepted else 0.0


class Summary(msgspec.Struct):
    """`summary.json`."""

    n: int
    complete: bool
    """True if every kind has what was asked for; False if its jobs were used up before."""
    funnel: Funnel
    """Of the dialogues."""
    refusals: Funnel
    twins: Funnel
    short: tuple[str, ...]
    """The cells that stayed below their quota, in words, with what was lost there."""
    roles: dict[str, RoleTally]
    excluded_seeds: int
    scripted: bool
    v: int = 1
    prices: dict[str, Price] = {}
    """By role, as they were charged; a role without one has no cost."""
    engines: dict[str, Figures] = {}
    """What vLLM's engines reported during the command that completed the run."""
    incidents: dict[str, Incidents] = {}
    """Retries, throttling and outages by role, over all commands of the run."""
    others: dict[str, Funnel] | UnsetType = UNSET
    """The funnels of further kinds, by name."""

    @property
    def funnels(self) -> Mapping[str, Funnel]:
        """By job kind; a kind that the run does not have is absent or empty."""
        own = {"dialogues": self.funnel, "refusals": self.refusals, "twins": self.twins}
        return own if isinstance(self.others, UnsetType) else own | self.others
