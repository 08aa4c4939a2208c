"""The budgets of the design in one table: our figure, the ratio to a bare loop, other libraries, met or NOT.

    python bench/budgets.py [--quick] [--no-libraries]        (`make bench`; all of it takes about 20 minutes)

Everything runs as a user would run it: in processes of their own on one core, against a model server on another core
(`bench/server.py`). What is compared takes turns, round by round. Exits with 1 if a budget is not met.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from compare import BARE, LIBRARIES, Comparison, Measured, Results, compare, median, once, print_comparison, problem
from server import LATENCY, SLOTS, Server, serving
from work import CORES, INTERSAFE, Child, Usage, demo_recipe, describe_machine, photo_seeds, run, seconds_of, wait_until

from intersafe.run.journal import entries_of
from intersafe.storage.jsonl import GROUP_LINES

MAIN_JOB = 11_270
AT_ONCE = (64, 96, 128)


class Size(NamedTuple):
    """The size of each measurement."""

    rounds: int
    dialogues: int
    """Dialogues of a run without latency."""
    bare_calls: int
    slow_dialogues: int
    """Dialogues of a run with 100 ms latency; 1,000 take half a minute."""
    slow_rounds: int
    kills: int
    main_job: int
    calls: int
    """Calls for each library and case."""
    library_rounds: int


WHOLE = Size(3, 600, 12_000, 2_000, 1, 5, MAIN_JOB, 1_500, 2)
QUICK = Size(2, 200, 4_000, 400, 1, 2, 300, 400, 1)


class Row(NamedTuple):
    """The result for one budget."""

    what: str
    budget: str
    ours: str
    ratio: str
    is_met: bool
    libraries: str = ""
    notes: tuple[str, ...] = ()


def generate(recipe: Path, folder: Path, n: int, at_once: int = SLOTS) -> list[str]:
    """The command of a run in `folder`."""
    words = ["generate", "--pipeline", str(recipe), "--run", str(folder / "run"), "--n", str(n)]
    return [*INTERSAFE, *words, "--concurrency", str(at_once)]


def grow(server: Server, n: int, at_once: int = SLOTS, *, painter: bool = False) -> Measured:
    """One run of `generate` from the recipe to the summary."""
    server.seen(forget=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = demo_recipe(folder / "bench.yaml", painter=painter, url=server.url)
        usage = run(generate(recipe, folder, n, at_once), folder)
    _check(usage)
    seen = server.seen()
    return Measured(usage, seen.answered, seen.steady, seen.again)


def _check(usage: Usage) -> None:
    if usage.code:
        sys.exit(f"intersafe ended with code {usage.code}:\n{usage.output[-2000:]}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


# --- the budgets -----------------------------------------------------------------------------------------------------


def cpu(size: Size, found: Comparison | None) -> Row:
    """CPU time per text call, everything included."""
    ours, ratios, painted = [], [], []
    with serving() as server:
        for number in range(size.rounds):
            runs: list[Callable[[], Measured]] = [
                lambda: once(BARE, server, size.bare_calls),
                lambda: grow(server, size.dialogues),
            ]
            order = [0, 1] if number % 2 == 0 else [1, 0]
            done = {place: runs[place]() for place in order}
            ours.append(done[1].ms)
            ratios.append(done[1].ms / done[0].ms)
            if number == 0:
                painted.append(grow(server, size.dialogues, painter=True).ms)
            _say(f"CPU: round {number + 1} of {size.rounds}")
    is_met = statistics.median(ours) <= 0.6
    note = (
        f"CPU: `generate` with {size.dialogues:,} dialogues, start-up, journal, rendering, verdicts and all gates; no "
        f"painter. With the painter of the demo, which draws in this process, {painted[0]:.2f} ms per call over HTTP."
    )
    return Row(
        "CPU per text call, everything included",
        "<= 0.6 ms",
        f"{_spread(ours, '.3f')} ms",
        f"{statistics.median(ratios):.1f}",
        is_met,
        _libraries(found, lambda c: c.fast, lambda done: done.ms, ".2f"),
        (note,),
    )


def share(size: Size, found: Comparison | None) -> Row:
    """Share of a server's ceiling."""
    ceiling, best, ratios = SLOTS / LATENCY, {}, {}
    whole: dict[int, list[float]] = {at_once: [] for at_once in AT_ONCE}
    for at_once in AT_ONCE:
        steady, bare, of_bare = [], [], []
        with serving(LATENCY) as server:
            for number in range(size.slow_rounds):
                calls = size.slow_dialogues * 10
                bare_run: Callable[[], tuple[float, float]] = lambda: _bare_share(server, calls, at_once)  # noqa: B023, E731
                our_run: Callable[[], tuple[float, float]] = lambda: _our_share(server, size, at_once)  # noqa: B023, E731
                runs = (bare_run, our_run) if number % 2 == 0 else (our_run, bare_run)
                done = {each: each() for each in runs}
                steady.append(done[our_run][0] / ceiling)
                whole[at_once].append(done[our_run][1] / ceiling)
                bare.append(done[bare_run][0] / ceiling)
                of_bare.append(done[our_run][0] / done[bare_run][0])
                _say(f"share with {at_once} at once: round {number + 1} of {size.slow_rounds}")
        best[at_once], ratios[at_once] = statistics.median(steady), statistics.median(of_bare)
    shares = ", ".join(f"{at_once}: {value:.3f}" for at_once, value in best.items())
    both = ", ".join(f"{at_once}: {statistics.median(values):.3f}" for at_once, values in whole.items())
    note = (
        f"Share: runs of {size.slow_dialogues:,} dialogues; steady between 5 % and 95 % of the calls. From the first "
        f"call to the last answer, start and tail included: {both}. The ratio is that of the steady rates."
    )
    return Row(
        f"share of a server's ceiling ({ceiling:.0f} calls/s), by dialogues at once",
        ">= 0.95",
        shares,
        ", ".join(f"{value:.2f}" for value in ratios.values()),
        max(best.values()) >= 0.95,
        _libraries(found, lambda c: c.slow, lambda done: done.rate / ceiling, ".2f"),
        (note,),
    )


def _our_share(server: Server, size: Size, at_once: int) -> tuple[float, float]:
    """Calls per second: in the steady part, and from the first call to the last answer."""
    done = grow(server, size.slow_dialogues, at_once)
    return done.rate, server.seen().whole


def _bare_share(server: Server, calls: int, at_once: int) -> tuple[float, float]:
    server.seen(forget=True)
    with tempfile.TemporaryDirectory() as name:
        words = [*BARE.command(server, calls, Path(name)), "--at-once", str(at_once)]
        _check(run(words, Path(name)))
    seen = server.seen()
    return seen.steady, seen.whole


def paid_again(size: Size, found: Comparison | None) -> Row:
    """Calls that are paid again after a SIGKILL, in one run that is killed several times."""
    allowed, again = [], []
    n = 100 * (size.kills + 1)
    with serving(LATENCY) as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = generate(demo_recipe(folder / "bench.yaml", url=server.url), folder, n)
        for kill in range(size.kills):
            child = Child(command, folder)
            target = 2_000 * (kill + 1)
            if not wait_until(lambda: server.seen().answered >= target, child):  # noqa: B023
                sys.exit(f"the run ended before kill {kill + 1}: {child.wait().output[-500:]}")
            allowed.append(server.seen().working + GROUP_LINES)
            child.kill()
            child.wait()
            _say(f"SIGKILL {kill + 1} of {size.kills}")
        _check(run(command, folder))
        again.append(server.seen().again)
    total, limit = sum(again), sum(allowed)
    note = (
        f"Paid again: {size.kills} SIGKILLs at every 2,000 calls, 64 dialogues at once; {total} calls came "
        f"twice; the limit of {limit} is the calls in flight plus {GROUP_LINES} replies for each kill."
    )
    return Row(
        "calls paid again for each SIGKILL",
        f"<= {limit / size.kills:.0f} (in flight + one group)",
        f"{total / size.kills:.1f}",
        "-",
        total <= limit,
        _libraries(found, lambda c: c.resumed, lambda done: done.again, ".0f"),
        (note,),
    )


def main_job(size: Size, found: Comparison | None) -> list[Row]:
    """Memory, journal and reopening of a run with large images."""
    with serving() as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _say(f"main job: {size.main_job:,} dialogues with 100 KB images")
        recipe = demo_recipe(folder / "bench.yaml", painter=True, seeds=photo_seeds(folder / "seeds"), url=server.url)
        command = generate(recipe, folder, size.main_job)
        usage = run(command, folder)
        _check(usage)
        journal = _journal(folder / "run")
        reopened = [seconds_of(command, folder) for _ in range(5)]
    memory = Row(
        f"peak RSS, {size.main_job:,} dialogues with 100 KB images",
        "<= 300 MB",
        f"{usage.peak:.0f} MB",
        "-",
        usage.peak <= 300,
        _libraries(found, lambda c: c.shown, lambda done: done.usage.peak, ",.0f"),
        (
            f"Peak RSS: attacker, victim and judge get a JPEG of 100 KB for every seed over HTTP, and the painter's "
            f"small images; {usage.wall:.0f} s. Libraries: {size.calls:,} single calls, one image each.",
        ),
    )
    reopening = Row(
        f"reopening a finished run of {size.main_job:,}",
        "<= 2 s",
        f"{statistics.median(reopened):.2f} s",
        "-",
        statistics.median(reopened) <= 2,
        "",
        ("Reopening: the same command again, median of 5; it also reads and checks the 308 images of the seeds.",),
    )
    return [memory, journal, reopening]


def _journal(path: Path) -> Row:
    """Bytes of the journal beyond the texts, per turn that a victim answered."""
    files = sorted((path / "journal").glob("*.jsonl"))
    size = sum(file.stat().st_size for file in files)
    texts = turns = 0
    for file in files:
        for entry in entries_of(file):
            texts += len(msgspec.json.encode(entry.text)) - 2
            turns += entry.role.startswith("victim")
    beyond = (size - texts) / turns
    note = (
        f"Journal: {size:,} bytes for {turns:,} turns, {texts / turns:,.0f} bytes of text each; images by their hash."
    )
    return Row(
        "journal per turn beyond the texts",
        "<= 5 KB",
        f"{beyond / 1000:.2f} KB",
        "-",
        beyond <= 5000,
        "",
        (note,),
    )


def show_help() -> Row:
    """The time of `intersafe --help`, and of the bare interpreter."""
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(11):
            bare.append(seconds_of([sys.executable, "-c", "pass"], Path(name)))
            ours.append(seconds_of([*INTERSAFE, "--help"], Path(name)))
    note = "`--help`: wall time of `python -m intersafe --help`, median of 11; the ratio is to `python -c pass`."
    return Row(
        "`intersafe --help`",
        "<= 0.15 s",
        f"{_spread(ours, '.3f')} s",
        f"{statistics.median(ours) / statistics.median(bare):.1f}",
        statistics.median(ours) <= 0.15,
        "",
        (note,),
    )


# --- printing --------------------------------------------------------------------------------------------------------


def _libraries(
    found: Comparison | None, case: Callable[[Comparison], Results], what: Callable[[Measured], float], form: str
) -> str:
    """The figures of the other libraries in one cell."""
    if found is None:
        return ""
    results = case(found)
    cells = []
    for one in LIBRARIES:
        value = median(results, one.name, what)
        if one.name in results:
            cells.append(f"{one.name} {problem(results, one.name) if value is None else format(value, form)}")
    return ", ".join(cells)


def print_rows(rows: list[Row]) -> None:
    """Prints the table and the notes on it."""
    print("\n| what | budget | ours | ratio to the bare loop | | libraries, in the same run |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        met = "ok" if row.is_met else "**NOT**"
        print(f"| {row.what} | {row.budget} | {row.ours} | {row.ratio} | {met} | {row.libraries} |")
    print()
    for note in (note for row in rows for note in row.notes):
        print(f"- {note}")


def main() -> None:
    """Exits with 1 if a budget is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a few minutes: short runs, in which start-up and tail count more"
    )
    parser.add_argument("--no-libraries", action="store_true", help="leave the other libraries out")
    options = parser.parse_args()
    size = QUICK if options.quick else WHOLE
    print(describe_machine())
    found = None if options.no_libraries else compare(size.calls, size.library_rounds, size.calls)
    os.sched_setaffinity(0, {CORES[-1]})  # not the core of what is measured
    rows = [cpu(size, found), share(size, found), paid_again(size, found), *main_job(size, found), show_help()]
    print_rows(rows)
    if found:
        print_comparison(found, size.calls, size.calls, size.library_rounds)
    sys.exit(0 if all(row.is_met for row in rows) else 1)


if __name__ == "__main__":
    main()
