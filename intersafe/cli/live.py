"""How a run looks while it goes on: a live panel on a terminal, plain lines elsewhere."""

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
"""Dialogues from which on the rest of a run is foretold."""
_CLOSED = (OSError, ValueError)  # of a stream or a terminal that was closed: no reason to stop a run


def display_for(stream: TextIO | None) -> Display:
    """The live panel on a terminal that is wide enough, a line every ten seconds elsewhere; or nothing."""
    if stream is None:
        return Display()
    wide = stream.isatty() and shutil.get_terminal_size().columns >= 90
    return LivePanel(stream) if wide else PlainLines(stream)


class PlainLines(Display):
    """One line now and then, for logs."""

    interval = 10.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def begin(self, progress: Progress) -> None:
        """Says where the run stands."""
        self._progress, self._began = progress, time.monotonic()
        again = f", going on from {progress.before:,}" if progress.funnel.jobs else ""
        beside = "".join(f" and {wanted:,} {line}" for line, (_, wanted) in progress.others.items())
        self.say(
            f"growing {counted(progress.n, 'dialogue')}{beside} from at most {counted(progress.jobs, 'job')}{again}"
        )

    def look(self) -> None:
        """Says how far it is."""
        if self._progress:
            self.say(line_of(self._progress, time.monotonic() - self._began))

    def say(self, text: str) -> None:
        """Writes one line."""
        with contextlib.suppress(*_CLOSED):
            self._stream.write(f"{text}\n")
            self._stream.flush()


def line_of(progress: Progress, seconds: float) -> str:
    """Accepted, rate, time left, rejected, tokens, cost, in flight, and who is waited for: in one line."""
    funnel = progress.funnel
    calls = sum(tally.calls for tally in progress.journal.roles.values())
    flying = sum(progress.in_flight.values())
    rate, left = _rate(progress, seconds)
    beside = "".join(f"{f.accepted:,}/{wanted:,} {line}  " for line, (f, wanted) in progress.others.items())
    lost = Counter(funnel.ended)
    for other, _ in progress.others.values():
        lost.update(other.ended)
    most = f", most by {lost.most_common(1)[0][0]}" if lost.total() >= 100 else ""
    used = "".join(f"  {word}" for word in used_of(progress))
    if engines := engines_of(progress):
        used += f"  {engines}"
    away = "".join(f"  WAITING for {name}: {why}" for name, why in progress.waiting.items())
    return (
        f"{funnel.accepted:,}/{progress.n:,} accepted  {rate_of(rate)}  {left} left  {beside}"
        f"{lost.total():,} rejected or failed{most}  {calls:,} calls{used}  {flying} in flight{away}"
    )


def engines_of(progress: Progress) -> str:
    """How busy the engines are, all together: what runs, what waits, who has nothing to do, what the cache spared."""
    seen = [figures.latest for figures in progress.engines.values() if figures.latest]
    if not seen:
        return ""
    idle = sum(sample.running + sample.waiting == 0 for sample in seen)
    count = f"{len(seen)} engines" if len(seen) > 1 else "engine"
    none = f", {idle} idle" if idle else ""
    running, waiting = sum(s.running for s in seen), sum(s.waiting for s in seen)
    return f"{count}: {running:.0f} running, {waiting:.0f} waiting{none}{_found(progress.engines.values())}"


def _found(engines: Iterable[Figures]) -> str:
    """The share of the prompts that the prefix caches had."""
    all_ = list(engines)
    queries, hits = sum(figures.queries for figures in all_), sum(figures.hits for figures in all_)
    return f", prefix cache {hits / queries:.0%}" if queries else ""


def used_of(progress: Progress) -> list[str]:
    """Tokens, cost and time: so far, of what is allowed, and in all if the rest is like what was decided so far."""
    roles = progress.journal.roles.values()
    tokens, usd = sum(t.prompt_tokens + t.completion_tokens for t in roles), sum(t.cost for t in roles)
    limits = Limits()
    if progress.budget:
        limits, (tokens, usd) = progress.budget.limits, progress.budget.spent
    share = share_of(progress)

    def words(used: float, limit: float | None, show: Callable[[float], str], unit: str) -> str:
        of = f" of {show(limit)}" if limit is not None else ""
        return f"{show(used)}{of} {unit}" + (f" (about {show(used / share)} in all)" if share else "")

    found = [words(tokens, limits.max_tokens, _short, "tokens")]
    if progress.journal.prices or usd:
        found.append(words(usd, limits.max_cost, dollars, "USD"))
    if progress.budget and limits.max_time is not None:
        found.append(f"{clock(progress.budget.seconds)} of {clock(limits.max_time)}")
    return found


def share_of(progress: Progress) -> float:
    """How much of what is wanted was kept, this session or before; 0 while that says nothing about the rest.

    Refusal samples and twins take few calls beside a dialogue, so the dialogues are what is counted.
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
    """Dialogues a second in this process, and the time that the others need at that rate."""
    rate = (progress.funnel.accepted - progress.before) / max(seconds, 0.001)
    if rate <= 0:
        return 0.0, "?"
    if progress.funnel.accepted >= progress.n and any(f.accepted < wanted for f, wanted in progress.others.values()):
        return rate, "?"
    return rate, clock((progress.n - progress.funnel.accepted) / rate)


def rate_of(per_second: float) -> str:
    """12.3/s; slow ones by the minute or the hour."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 0.1 or per_second <= 0:
            return f"{per_second * seconds:.1f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


class LivePanel(Display):
    """The panel: progress, rejected by reason, what was used of what is allowed, calls by role, and what is away."""

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
        """Leaves the last state standing."""
        if self._live:
            with contextlib.suppress(*_CLOSED):
                self._live.stop()
            self._live = None

    def _panel(self, progress: Progress) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        funnel, seconds = progress.funnel, time.monotonic() - self._began
        rate, left = _rate(progress, seconds)
        panel = Table.grid(padding=(0, 2))
        panel.add_row(
            "accepted",
            f"{funnel.accepted:,}/{progress.n:,}",
            ProgressBar(total=progress.n, completed=funnel.accepted, width=40),
            rate_of(rate),
            f"{left} left",
        )
        for line, (other, wanted) in progress.others.items():
            bar = ProgressBar(total=wanted, completed=other.accepted, width=40)
            panel.add_row(line, f"{other.accepted:,}/{wanted:,}", bar)
        for place, number in sorted(funnel.ended.items(), key=lambda item: -item[1])[:8]:
            panel.add_row("", f"{number:,}", place)
        for number, words in enumerate(used_of(progress)):
            panel.add_row("" if number else "used", "", words)
        for role, tally in sorted(progress.journal.roles.items()):
            tokens = f"{tally.prompt_tokens:,} + {tally.completion_tokens:,} tokens"
            flying = f"{progress.in_flight.get(role, 0)} in flight"
            cost = f"{dollars(tally.cost)} USD" if role in progress.journal.prices else ""
            panel.add_row(role, f"{tally.calls:,}", f"calls, {tokens}", flying, cost)
        for name, figures in progress.engines.items():
            if now := figures.latest:
                busy = f"{now.running:.0f} running, {now.waiting:.0f} waiting, KV cache {now.kv_usage:.0%}"
                panel.add_row("engine", "", Text(f"{name}: {busy}{_found([figures])}"))
        for name, why in progress.waiting.items():
            panel.add_row("waiting", "", Text(f"for {name}: {why}", style="bold red"))
        return panel
