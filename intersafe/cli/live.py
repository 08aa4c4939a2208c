"""The display of a command that runs: a live panel on a terminal, one line every ten seconds elsewhere."""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TextIO

from intersafe.engines.metrics import Figures
from intersafe.generation.progress import Display, Progress
from intersafe.recipe.sections import Limits
from intersafe.wording import clock, counted, dollars

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


SOME = 20
"""Accepted dialogues from which on the totals of a run are estimated."""
_CLOSED = (OSError, ValueError)  # raised by a closed stream or terminal, which must not stop a run


def display_for(stream: TextIO | None) -> Display:
    """The live panel on a terminal that is wide enough, a line every ten seconds elsewhere; none without a stream."""
    if stream is None:
        return Display()
    wide = stream.isatty() and shutil.get_terminal_size().columns >= 90
    return LivePanel(stream) if wide else PlainLines(stream)


class PlainLines(Display):
    """One line every ten seconds, for logs."""

    interval = 10.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def begin(self, progress: Progress) -> None:
        """Prints what the run wants and what it has."""
        self._progress, self._began = progress, time.monotonic()
        again = f", resuming after {progress.before:,}" if progress.funnel.jobs else ""
        others = "".join(f" and {wanted:,} {kind}" for kind, (_, wanted) in progress.others.items())
        wanted = f"{counted(progress.n, 'dialogue')}{others}"
        self.say(f"generating {wanted} from at most {counted(progress.jobs, 'job')}{again}")

    def look(self) -> None:
        """Prints the progress in one line."""
        if self._progress:
            self.say(status_line(self._progress, time.monotonic() - self._began))

    def say(self, text: str) -> None:
        """Writes one line."""
        with contextlib.suppress(*_CLOSED):
            self._stream.write(f"{text}\n")
            self._stream.flush()


def status_line(progress: Progress, seconds: float) -> str:
    """The progress in one line: accepted, rate, time left, rejected, tokens, cost, calls in flight, outages."""
    funnel = progress.funnel
    calls = sum(tally.calls for tally in progress.journal.roles.values())
    flying = sum(progress.in_flight.values())
    rate, left = _rate(progress, seconds)
    others = "".join(f"{f.accepted:,}/{wanted:,} {kind}  " for kind, (f, wanted) in progress.others.items())
    lost = Counter(funnel.ended)
    for other, _ in progress.others.values():
        lost.update(other.ended)
    most = f", most by {lost.most_common(1)[0][0]}" if lost.total() >= 100 else ""
    used = "".join(f"  {words}" for words in used_of(progress))
    if engines := engines_of(progress):
        used += f"  {engines}"
    outages = "".join(f"  WAITING for {name}: {why}" for name, why in progress.waiting.items())
    return (
        f"{funnel.accepted:,}/{progress.n:,} accepted  {rate_of(rate)}  {left} left  {others}"
        f"{lost.total():,} rejected or failed{most}  {calls:,} calls{used}  {flying} in flight{outages}"
    )


def engines_of(progress: Progress) -> str:
    """The engines together: requests running and waiting, idle engines, and the hit rate of the prefix caches."""
    seen = [figures.latest for figures in progress.engines.values() if figures.latest]
    if not seen:
        return ""
    idle = sum(sample.running + sample.waiting == 0 for sample in seen)
    count = f"{len(seen)} engines" if len(seen) > 1 else "engine"
    unused = f", {idle} idle" if idle else ""
    running, waiting = sum(s.running for s in seen), sum(s.waiting for s in seen)
    return f"{count}: {running:.0f} running, {waiting:.0f} waiting{unused}{_hit_rate(progress.engines.values())}"


def _hit_rate(engines: Iterable[Figures]) -> str:
    """The share of the prompt tokens that the prefix caches had."""
    listed = list(engines)
    queries, hits = sum(figures.queries for figures in listed), sum(figures.hits for figures in listed)
    return f", prefix cache {hits / queries:.0%}" if queries else ""


def used_of(progress: Progress) -> list[str]:
    """Tokens, cost and time: used so far, the limit, and an estimate for the whole run."""
    roles = progress.journal.roles.values()
    tokens, usd = sum(t.prompt_tokens + t.completion_tokens for t in roles), sum(t.cost for t in roles)
    limits = Limits()
    if progress.budget:
        limits, (tokens, usd) = progress.budget.limits, progress.budget.spent
    done = fraction_done(progress)

    def words(used: float, limit: float | None, show: Callable[[float], str], unit: str) -> str:
        of = f" of {show(limit)}" if limit is not None else ""
        return f"{show(used)}{of} {unit}" + (f" (about {show(used / done)} in all)" if done else "")

    found = [words(tokens, limits.max_tokens, _short, "tokens")]
    if progress.journal.prices or usd:
        found.append(words(usd, limits.max_cost, dollars, "USD"))
    if progress.budget and limits.max_time is not None:
        found.append(f"{clock(progress.budget.seconds)} of {clock(limits.max_time)}")
    return found


def fraction_done(progress: Progress) -> float:
    """The accepted dialogues as a share of those wanted; 0 while they are too few for an estimate.

    Refusal samples and twins are not counted: they take few calls compared with a dialogue.
    """
    accepted = progress.funnel.accepted
    return 0.0 if accepted < min(SOME, progress.n) else min(1.0, accepted / progress.n)


def _short(number: float) -> str:
    """950, 12.3k, 4.56M, 1.23B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _rate(progress: Progress, seconds: float) -> tuple[float, str]:
    """Accepted dialogues per second in this process, and the time left at that rate."""
    rate = (progress.funnel.accepted - progress.before) / max(seconds, 0.001)
    if rate <= 0:
        return 0.0, "?"
    if progress.funnel.accepted >= progress.n and any(f.accepted < wanted for f, wanted in progress.others.values()):
        return rate, "?"
    return rate, clock((progress.n - progress.funnel.accepted) / rate)


def rate_of(per_second: float) -> str:
    """12.3/s; a slow rate per minute or per hour."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 0.1 or per_second <= 0:
            return f"{per_second * seconds:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


class LivePanel(Display):
    """The panel: progress, rejections by reason, use and limits, calls by role, engines, outages."""

    interval = 0.25

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._began = time.monotonic()

    def begin(self, progress: Progress) -> None:
        """Opens the panel."""
        from rich.console import Console
        from rich.live import Live

        self._progress, self._began = progress, time.monotonic()
        self._live = Live(self._panel(progress), console=Console(file=self._stream), auto_refresh=False)
        self._live.start()

    def look(self) -> None:
        """Draws the panel again."""
        if self._live and self._progress:
            with contextlib.suppress(*_CLOSED):
                self._live.update(self._panel(self._progress), refresh=True)

    def say(self, text: str) -> None:
        """Writes a line above the panel."""
        with contextlib.suppress(*_CLOSED):
            if self._live:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                self._stream.write(f"{text}\n")

    def end(self) -> None:
        """Closes the panel; its last state stays on the terminal."""
        if self._live:
            with contextlib.suppress(*_CLOSED):
                self._live.stop()
            self._live = None

    def _panel(self, progress: Progress) -> "Table":
        from rich.table import Table

        panel = Table.grid(padding=(0, 2))
        _add_progress(panel, progress, time.monotonic() - self._began)
        for number, words in enumerate(used_of(progress)):
            panel.add_row("" if number else "used", "", words)
        _add_services(panel, progress)
        return panel


def _add_progress(panel: "Table", progress: Progress, seconds: float) -> None:
    """One bar for each kind of job, and the most frequent reasons of rejection."""
    from rich.progress_bar import ProgressBar

    funnel = progress.funnel
    rate, left = _rate(progress, seconds)
    bar = ProgressBar(total=progress.n, completed=funnel.accepted, width=40)
    panel.add_row("accepted", f"{funnel.accepted:,}/{progress.n:,}", bar, rate_of(rate), f"{left} left")
    for kind, (other, wanted) in progress.others.items():
        bar = ProgressBar(total=wanted, completed=other.accepted, width=40)
        panel.add_row(kind, f"{other.accepted:,}/{wanted:,}", bar)
    for reason, number in sorted(funnel.ended.items(), key=lambda item: -item[1])[:8]:
        panel.add_row("", f"{number:,}", reason)


def _add_services(panel: "Table", progress: Progress) -> None:
    """Calls and tokens by role, the load of each engine, and the services that are away."""
    from rich.text import Text

    for role, tally in sorted(progress.journal.roles.items()):
        tokens = f"{tally.prompt_tokens:,} + {tally.completion_tokens:,} tokens"
        flying = f"{progress.in_flight.get(role, 0)} in flight"
        cost = f"{dollars(tally.cost)} USD" if role in progress.journal.prices else ""
        panel.add_row(role, f"{tally.calls:,}", f"calls, {tokens}", flying, cost)
    for name, figures in progress.engines.items():
        if now := figures.latest:
            load = f"{now.running:.0f} running, {now.waiting:.0f} waiting, KV cache {now.kv_usage:.0%}"
            panel.add_row("engine", "", Text(f"{name}: {load}{_hit_rate([figures])}"))
    for name, why in progress.waiting.items():
        panel.add_row("waiting", "", Text(f"for {name}: {why}", style="bold red"))
