"""How far a run is, and the interface of a display: `Progress` is read, a `Display` is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from intersafe.engines.metrics import Figures
from intersafe.run.budget import Budget
from intersafe.run.funnel import Funnel
from intersafe.run.journal import Journal


@dataclass
class Progress:
    """How far a run is. The same object all along, for a display to read."""

    n: int
    jobs: int
    """Number of all dialogue jobs."""
    funnel: Funnel
    """Of the dialogues."""
    journal: Journal
    in_flight: Mapping[str, int]
    """Calls in flight by role."""
    before: int = 0
    """Dialogues that were accepted before this process began."""
    others: dict[str, tuple[Funnel, int]] = field(default_factory=dict)
    """The other kinds: what they have and how many outcomes they want."""
    budget: Budget | None = None
    waiting: Mapping[str, str] = field(default_factory=dict)
    """The services that are away now, each with its reason: an outage's first cause, a batch API's latest fault."""
    engines: Mapping[str, Figures] = field(default_factory=dict)
    """vLLM's engines, in this process and behind URLs, with their latest metrics."""


class Display:
    """Shows the progress of a run; this one shows nothing."""

    interval = 60.0
    """Seconds between two calls of `look`."""

    def begin(self, progress: Progress) -> None:
        """The run begins or resumes."""

    def look(self) -> None:
        """Time to show the progress."""

    def say(self, text: str) -> None:
        """A message for the user."""

    def end(self) -> None:
        """Nothing more follows."""
