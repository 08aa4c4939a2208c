"""How a run looks while it goes on: a live panel on a terminal, plain lines elsewhere."""

import contextlib
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING, TextIO

from intersafe.conductor import Display, Progress

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


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
        beside = "".join(f" and {wanted:,} {line}" for line, (_, wanted) in progress.beside.items())
        self.say(f"growing {progress.n:,} dialogues{beside} from at most {progress.jobs:,} jobs{again}")

    def look(self) -> None:
        """Says how far it is."""
        if self._progress:
            self.say(line_of(self._progress, time.monotonic() - self._began))

    def say(self, text: str) -> None:
        """Writes one line; a stream that was closed is no reason to stop a run."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(f"{text}\n")
            self._stream.flush()


def line_of(progress: Progress, seconds: float) -> str:
    """Accepted, rate, time left, rejected, in flight: in one line."""
    funnel = progress.funnel
    calls = sum(tally.calls for tally in progress.journal.roles.values())
    flying = sum(progress.in_flight.values())
    rate, left = _rate(progress, seconds)
    beside = "".join(f"{f.accepted:,}/{wanted:,} {line}  " for line, (f, wanted) in progress.beside.items())
    lost = Counter(funnel.ended)
    for other, _ in progress.beside.values():
        lost.update(other.ended)
    most = f", most by {lost.most_common(1)[0][0]}" if lost.total() >= 100 else ""
    return (
        f"{funnel.accepted:,}/{progress.n:,} accepted  {rate:.1f}/s  {left} left  {beside}"
        f"{lost.total():,} rejected or failed{most}  {calls:,} calls  {flying} in flight"
    )


def _rate(progress: Progress, seconds: float) -> tuple[float, str]:
    """Dialogues a second in this process, and the time that the others need at that rate."""
    rate = (progress.funnel.accepted - progress.before) / max(seconds, 0.001)
    if rate <= 0:
        return 0.0, "?"
    if progress.funnel.accepted >= progress.n and any(f.accepted < wanted for f, wanted in progress.beside.values()):
        return rate, "?"
    left = round((progress.n - progress.funnel.accepted) / rate)
    return rate, f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


class LivePanel(Display):
    """The panel: progress, rejected by reason, calls and tokens by role."""

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
            with contextlib.suppress(OSError, ValueError):  # a terminal that was closed is no reason to stop a run
                self._live.update(self._panel(self._progress), refresh=True)

    def say(self, text: str) -> None:
        """Writes a line above the panel."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._stream.write(f"{text}\n")

    def end(self) -> None:
        """Leaves the last state standing."""
        if self._live:
            self._live.stop()
            self._live = None

    def _panel(self, progress: Progress) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        funnel, seconds = progress.funnel, time.monotonic() - self._began
        rate, left = _rate(progress, seconds)
        panel = Table.grid(padding=(0, 2))
        panel.add_row(
            "accepted",
            f"{funnel.accepted:,}/{progress.n:,}",
            ProgressBar(total=progress.n, completed=funnel.accepted, width=40),
            f"{rate:.1f}/s",
            f"{left} left",
        )
        for line, (other, wanted) in progress.beside.items():
            bar = ProgressBar(total=wanted, completed=other.accepted, width=40)
            panel.add_row(line, f"{other.accepted:,}/{wanted:,}", bar)
        for place, number in sorted(funnel.ended.items(), key=lambda item: -item[1])[:8]:
            panel.add_row("", f"{number:,}", place)
        for role, tally in sorted(progress.journal.roles.items()):
            tokens = f"{tally.prompt_tokens:,} + {tally.completion_tokens:,} tokens"
            flying = f"{progress.in_flight.get(role, 0)} in flight"
            panel.add_row(role, f"{tally.calls:,}", f"calls, {tokens}", flying)
        return panel
