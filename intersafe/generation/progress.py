"""How far a run is, and what shows it: `Progress` is read, a `Display` is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from intersafe.engines.metrics import Figures
from intersafe.run.budget import Budget
from intersafe.run.funnel import Funnel
from intersafe.run.journal import Journal


@dataclass
class Progress:
    """How far a run is; the same object all along, for a display to look at."""

    n: int
    jobs: int
    """How many there are in all."""
    funnel: Funnel
    journal: Journal
    in_flight: dict[str, int]
    before: int = 0
    """Dialogues that were there when this process began."""
    beside: dict[str, tuple[Funnel, int]] = field(default_factory=dict)
    """The other lines: what they have kept and how much they want."""
    budget: Budget | None = None
    waiting: Mapping[str, str] = field(default_factory=dict)
    """The services that are away right now, each with what it said last; there as long as the outage lasts."""
    engines: Mapping[str, Figures] = field(default_factory=dict)
    """vLLM's engines, in this process and behind URLs, with what they say about themselves."""


class Display:
    """Shows how a run goes; this one shows nothing."""

    interval = 60.0
    """Seconds between two looks."""

    def begin(self, progress: Progress) -> None:
        """The run begins, or goes on."""

    def look(self) -> None:
        """Time to show how far it is."""

    def say(self, text: str) -> None:
        """Something that the user should know now."""

    def end(self) -> None:
        """Nothing more comes."""
