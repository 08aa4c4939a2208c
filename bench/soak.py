"""Whether the memory of a long run stays flat: RSS at a tenth of the dialogues, and at the end.

    python bench/soak.py [--n 100000] [--painter] [--no-duplicates] [--keep FOLDER]

Runs the demo recipe with more samples, without refusals, in one process, and reads its RSS from /proc twice a second.
Exits with 1 if the RSS at the end is more than 10 % above that at a tenth.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from subprocess import Popen

import msgspec
from work import demo_recipe, describe_machine

LIMIT = 1.10
EVERY = 0.5


class Lines:
    """Counts the lines of a growing file; reads only what was added since the last count."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self.count = path, 0, 0

    def look(self) -> int:
        """The number of lines now."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while data := file.read(2**20):
                    self._offset += len(data)
                    self.count += data.count(b"\n")
        return self.count


def rss_of(pid: int) -> float:
    """Resident megabytes of a process; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


def grow(recipe: Path, folder: Path, n: int) -> tuple[list[tuple[int, float]], float]:
    """Dialogues and megabytes at every sample, and the seconds that the run took."""
    command = [sys.executable, "-m", "intersafe", "generate", "--pipeline", str(recipe), "--no-refusals"]
    seen: list[tuple[int, float]] = []
    lines, began = Lines(folder / "run" / "dialogues.jsonl"), time.monotonic()
    with (
        (folder / "output.txt").open("w") as output,
        Popen([*command, "--n", str(n), "--run", "./run"], cwd=folder, stdout=output, stderr=output) as process,
    ):
        while process.poll() is None:
            time.sleep(EVERY)
            if megabytes := rss_of(process.pid):
                seen.append((lines.look(), megabytes))
                if len(seen) % 120 == 0:
                    print(f"{time.monotonic() - began:6.0f} s {seen[-1][0]:>8,} {megabytes:7.1f} MB", file=sys.stderr)
    if process.returncode:
        sys.exit((folder / "output.txt").read_text()[-2000:])
    return seen, time.monotonic() - began


def at(seen: list[tuple[int, float]], dialogues: float) -> float:
    """The highest RSS of the looks around that many dialogues (5 % of them before and after)."""
    near = [megabytes for count, megabytes in seen if 0.95 * dialogues <= count <= 1.05 * dialogues]
    return max(near) if near else min(seen, key=lambda look: abs(look[0] - dialogues))[1]


def report(seen: list[tuple[int, float]], seconds: float, folder: Path, n: int) -> float:
    """Prints the table; returns the ratio of the end to the first tenth."""
    summary = msgspec.json.decode((folder / "run" / "summary.json").read_bytes())
    calls = sum(role["calls"] for role in summary["roles"].values())
    print(f"{n:,} dialogues, {summary['funnel']['jobs']:,} jobs, {calls:,} calls in {seconds:,.0f} s\n")
    print("| dialogues | RSS MB |\n|---|---|")
    for tenth in range(1, 11):
        print(f"| {n * tenth // 10:,} | {at(seen, n * tenth / 10):.1f} |")
    first, last = at(seen, n / 10), at(seen, n)
    ratio = last / first
    print(f"\n{(last - first) * 1e6 / (0.9 * n):,.0f} bytes a dialogue from a tenth on")
    print(f"at the end / at a tenth: {ratio:.3f} (budget {LIMIT:.2f}): {'ok' if ratio <= LIMIT else 'NOT'}")
    return ratio


def main() -> None:
    """Exits with 1 where memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--painter", action="store_true", help="draw pictures too, as the demo does")
    parser.add_argument(
        "--no-duplicates", action="store_true", help="without the index of duplicates, to tell its share"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the run there")
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        samples = 2 + options.n // 2_000  # 3,080 jobs a sample, and some are lost
        duplicates = not options.no_duplicates
        recipe = demo_recipe(folder / "soak.yaml", samples=samples, painter=options.painter, duplicates=duplicates)
        seen, seconds = grow(recipe, folder, options.n)
        sys.exit(0 if report(seen, seconds, folder, options.n) <= LIMIT else 1)


if __name__ == "__main__":
    main()
