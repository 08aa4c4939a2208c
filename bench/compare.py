"""Compares libraries on the same work: single-turn calls of 6 KB against one model server.

    python bench/compare.py [--calls 2000] [--rounds 3]        (`make bench-peers` installs the libraries)

Each library runs as its manual shows (`bench/peers/`), in its own environment, as a process on one core, with the
server on another core. The order changes from round to round. CPU time is that of the process and its children,
start-up included. A library that is not installed is named and left out.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from server import LATENCY, SLOTS, Server, serving
from work import Child, Usage, describe_machine, photos, run, wait_until

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent / ".venv-bench"
IMAGES = 200
"""Number of different images of 100 KB in the case with images."""


class Contender(NamedTuple):
    """One library or loop that does the work."""

    name: str
    script: str
    package: str = ""
    """Distribution whose version is printed; empty for what runs in our own environment."""
    options: tuple[str, ...] = ()
    resumes: bool = True
    shows_images: bool = True

    @property
    def environment(self) -> str:
        """Name of the environment's folder."""
        return self.script

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return ENVIRONMENTS / self.environment / "bin" / "python" if self.package else Path(sys.executable)

    def command(self, server: Server, calls: int, folder: Path, images: Path | None = None) -> list[str]:
        """The command of a run."""
        words = [str(self.python), str(HERE / "peers" / f"run_{self.script}.py"), server.url, str(calls), str(folder)]
        return [*words, "--at-once", str(SLOTS), *(["--images", str(images)] if images else []), *self.options]

    def version(self) -> str:
        """Version of the package in its environment; empty if it is not installed."""
        if not self.python.exists():
            return ""
        code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=False)
        return done.stdout.strip()


BARE = Contender("bare aiohttp loop", "bare", resumes=False)
OURS = Contender("intersafe, a call with its journal", "intersafe")
LIBRARIES = (
    Contender("datatrove", "datatrove", "datatrove", resumes=False),
    Contender("datatrove with checkpoints", "datatrove", "datatrove", ("--checkpoints",)),
    Contender("curator", "curator", "bespokelabs-curator"),
    Contender("DataDesigner", "designer", "data-designer"),
    Contender("distilabel", "distilabel", "distilabel", shows_images=False),
)


class Measured(NamedTuple):
    """The figures of one run of one contender; a run that failed has a `problem` instead."""

    usage: Usage
    calls: int
    rate: float
    """Calls per second, between 5 % and 95 % of the calls."""
    again: int
    """Calls that were answered twice."""
    problem: str = ""

    @property
    def ms(self) -> float:
        """CPU milliseconds per call."""
        return self.usage.cpu / self.calls * 1000 if self.calls else 0.0


Results = Mapping[str, list[Measured]]


def installed() -> list[Contender]:
    """The bare loop, ours, and every library that is installed; prints their versions and what is missing."""
    versions = {one.name: one.version() for one in LIBRARIES}
    found = [one for one in LIBRARIES if versions[one.name]]
    missing = dict.fromkeys(one.package for one in LIBRARIES if not versions[one.name])
    named = dict.fromkeys(f"{one.package} {versions[one.name]}" for one in found)
    print(f"Libraries: {', '.join(named) or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else ""))
    return [BARE, OURS, *found]


# --- measuring -------------------------------------------------------------------------------------------------------


def patience(calls: int) -> float:
    """Most seconds of a run: 160 for 2,000 calls, which take at least 3.1 at 100 ms."""
    return 60 + calls / 20


def once(one: Contender, server: Server, calls: int, images: Path | None = None) -> Measured:
    """One run from an empty folder to its end."""
    server.seen(forget=True)
    with tempfile.TemporaryDirectory() as name:
        usage = run(one.command(server, calls, Path(name), images), Path(name), patience(calls))
    return _measured(one, server, calls, usage)


def killed(one: Contender, server: Server, calls: int) -> Measured:
    """Kills the whole process group once half of the calls are answered, and runs the same command again."""
    server.seen(forget=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = Child(one.command(server, calls, folder), folder)
        reached = wait_until(lambda: server.seen().answered >= calls // 2, child)
        child.kill()
        first = child.wait()
        if not reached:
            return Measured(first, calls, 0.0, 0, f"ended with {first.code} before the kill")
        # Half of the calls came before: answers beyond the number of calls were paid twice, whatever their bytes.
        usage = run(one.command(server, calls, folder), folder, patience(calls))
    return _measured(one, server, calls, usage)


def _measured(one: Contender, server: Server, calls: int, usage: Usage) -> Measured:
    seen = server.seen()
    late = f"did not end within {patience(calls):.0f} s"
    problem = "" if usage.code == 0 else late if usage.code == -9 else f"code {usage.code}"
    if not problem and seen.answered < calls:
        problem = f"{seen.answered} of {calls} calls"
    if problem:
        print(f"{one.name}: {problem}\n{usage.output[-800:]}", file=sys.stderr)
    return Measured(usage, calls, seen.steady, seen.again, problem)


def in_turn(
    contenders: Sequence[Contender], rounds: int, measure: Callable[[Contender], Measured], what: str
) -> Results:
    """Runs every contender once per round, each time starting with another one; one that failed is not run again."""
    results: dict[str, list[Measured]] = {one.name: [] for one in contenders}
    for number in range(rounds):
        start = number % len(contenders)
        for one in [*contenders[start:], *contenders[:start]]:
            if not any(done.problem for done in results[one.name]):
                results[one.name].append(measure(one))
        print(f"{what}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return results


class Comparison(NamedTuple):
    """The results of all contenders."""

    contenders: list[Contender]
    fast: Results
    """Without latency."""
    slow: Results
    """100 ms, 64 slots."""
    shown: Results
    """Each call with an image of 100 KB."""
    resumed: Results
    """After a SIGKILL."""


def compare(calls: int, rounds: int, image_calls: int) -> Comparison:
    """The four cases, one after the other."""
    contenders = installed()
    with tempfile.TemporaryDirectory() as name, serving() as fast, serving(LATENCY) as slow:
        images = Path(name)
        photos(images, IMAGES)
        with_images = [one for one in contenders if one.shows_images and "--checkpoints" not in one.options]
        resuming = [one for one in contenders if one.resumes]
        return Comparison(
            contenders,
            in_turn(contenders, rounds, lambda one: once(one, fast, calls), "no latency"),
            in_turn(contenders, rounds, lambda one: once(one, slow, calls), "100 ms"),
            in_turn(with_images, 1, lambda one: once(one, fast, image_calls, images), "images"),
            in_turn(resuming, 1, lambda one: killed(one, slow, calls), "SIGKILL"),
        )


# --- printing --------------------------------------------------------------------------------------------------------


def median(results: Results, name: str, what: Callable[[Measured], float]) -> float | None:
    """The median over the runs without a problem; None if there is none."""
    good = [what(done) for done in results.get(name, []) if not done.problem]
    return statistics.median(good) if good else None


def ratio(results: Results, name: str, what: Callable[[Measured], float]) -> float | None:
    """The median of the ratios to the bare loop of the same round; None if there is none."""
    pairs = zip(results.get(name, []), results[BARE.name], strict=False)
    good = [what(done) / what(bare) for done, bare in pairs if not (done.problem or bare.problem)]
    return statistics.median(good) if good else None


def problem(results: Results, name: str) -> str:
    """Why a contender has no figure."""
    return next((done.problem for done in results.get(name, []) if done.problem), "-")


def cell(value: float | None, form: str, otherwise: str = "-") -> str:
    """A figure in the format `form`, or `otherwise` if there is none."""
    return otherwise if value is None else format(value, form)


_COLUMNS = (
    "", "CPU ms per call", "ratio to bare", "calls/s, no latency", "share of 640/s", "seconds at 100 ms", "peak MB",
    "images: CPU ms per call", "images: peak MB", "sent again after SIGKILL",
)  # fmt: skip


def print_comparison(found: Comparison, calls: int, image_calls: int, rounds: int) -> None:
    """Prints a row for each contender."""
    ceiling = SLOTS / LATENCY
    print(f"\n{calls:,} calls of 6 KB, {SLOTS} at once, medians of {rounds} rounds; CPU and seconds include start-up.")
    print(f"Images: {image_calls:,} calls, one of 100 KB each. SIGKILL at half of the calls, then the same command.\n")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for one in found.contenders:
        row = [
            cell(median(found.fast, one.name, lambda done: done.ms), ".2f", problem(found.fast, one.name)),
            cell(ratio(found.fast, one.name, lambda done: done.ms), ".1f"),
            cell(median(found.fast, one.name, lambda done: done.rate), ",.0f"),
            cell(median(found.slow, one.name, lambda done: done.rate / ceiling), ".2f", problem(found.slow, one.name)),
            cell(median(found.slow, one.name, lambda done: done.usage.wall), ".1f"),
            cell(median(found.fast, one.name, lambda done: done.usage.peak), ",.0f"),
            cell(median(found.shown, one.name, lambda done: done.ms), ".2f", problem(found.shown, one.name)),
            cell(median(found.shown, one.name, lambda done: done.usage.peak), ",.0f"),
            cell(median(found.resumed, one.name, lambda done: done.again), ".0f", problem(found.resumed, one.name)),
        ]
        print(f"| {one.name} | " + " | ".join(row) + " |")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2_000)
    parser.add_argument("--image-calls", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(describe_machine())
    found = compare(options.calls, options.rounds, options.image_calls)
    print_comparison(found, options.calls, options.image_calls, options.rounds)


if __name__ == "__main__":
    main()
