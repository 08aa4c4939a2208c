"""Dialogues against a server that answers every fifth request with a fault.   python bench/faults.py [--n 2000]

Generates the demo's dialogues over HTTP twice, without faults and with a mixture of twenty kinds. It compares the
number accepted, the ids, every byte, and call by call the good answers of the server with the journal. Exits with 1 if
anything differs; `--json` prints the figures for a program.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import structs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the server is the tests'

from intersafe.generation.generate import generate_dialogues
from intersafe.generation.jobs import jobs
from intersafe.generation.prepare import prepare
from intersafe.generation.progress import Display
from intersafe.generation.scheduler import WINDOW
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Recipe
from intersafe.run.directory import Run
from intersafe.run.journal import entries_of
from intersafe.storage.bundled import bundled
from tests.support.servers.chaos_server import AWAY, FAULTS, Running, running_chaos

ALL_KINDS = 1_000
"""Dialogues from which on every kind of fault must occur."""
OUTCOMES = ("dialogues.jsonl", "rejected.jsonl", "failed.jsonl")


class Quiet(Display):
    """Keeps what the run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        """Remembers it."""
        self.said.append(text)


def recipe_for(url: str, concurrency: int, timeout: float, **changes: Any) -> Recipe:
    """The demo's dialogues, without painter and refusals, with the whole cast at one URL (or several)."""
    recipe, spec = load_recipe(bundled("pipelines/demo.yaml")), f"openai:scripted@{url}"
    cast = structs.replace(recipe.cast, painter=None, responder=None)
    limits = structs.replace(recipe.limits, timeout=timeout, patience=120.0)
    recipe = structs.replace(recipe, cast=cast, refusals=None, limits=limits)
    return override(recipe, attacker=spec, judge=spec, victims=(spec,), concurrency=concurrency, **changes)


def digest(run: Path) -> str:
    """sha256 of the outcome files, concatenated."""
    files = [run / name for name in OUTCOMES if (run / name).exists()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


class Ledger(NamedTuple):
    """The good answers of the server, compared with the journal."""

    journal: int
    """Lines of the journal."""
    twice: int
    """Of these, lines whose key occurred before."""
    unpaid: int
    """Of these, replies that the server never gave."""
    answered: int
    """Requests with a good answer."""
    again: int
    """Of these, requests whose body had a good answer before."""
    dropped: int
    """Answered calls that are not in the journal because they were in flight when the last job was decided."""
    lost: int
    """Other answered calls that are not in the journal; must be 0."""


def ledger(recipe: Recipe, run: Path, good: dict[str, list[Any]]) -> Ledger:
    """The ledger of a finished run; `good` are the good answers that the server counted, by body."""
    entries = [entry for path in sorted((run / "journal").glob("*.jsonl")) for entry in entries_of(path)]
    texts: dict[int, list[str]] = {}
    for entry in entries:
        texts.setdefault(entry.job, []).append(entry.text)
    last = max(job for job, _ in _decided(run))
    journal: Counter[tuple[int, str]] = Counter()
    open_calls: set[int] = set()
    for job in jobs(recipe, prepare(recipe).seeds.seeds):
        if job.index > last + 1 + WINDOW * recipe.limits.concurrency:
            break
        paid = texts.get(job.index, [])
        # A job numbers its calls from 0, and the number decides the seed that a request names.
        seeds = [(job.random_seed + 0x9E3779B1 * (ordinal + 1)) & 0x7FFFFFFF for ordinal in range(len(paid) + 1)]
        journal.update(zip(seeds, paid, strict=False))
        if job.index > last:
            open_calls.add(seeds[-1])
    answered = Counter((seed, message["content"]) for _, seed, message in good.values())
    missing = answered - journal
    return Ledger(
        journal=len(entries),
        twice=len(entries) - len({entry.key for entry in entries}),
        unpaid=(journal - answered).total(),
        answered=sum(count for count, *_ in good.values()),
        again=sum(count - 1 for count, *_ in good.values()),
        dropped=sum(count for (seed, _), count in missing.items() if seed in open_calls),
        lost=sum(count for (seed, _), count in missing.items() if seed not in open_calls),
    )


def _decided(run: Path) -> Iterator[tuple[int, str]]:
    """Job and id (empty if it has none) of every row of the outcome files."""
    for name in OUTCOMES:
        if (run / name).exists():
            for line in (run / name).read_bytes().splitlines():
                row = json.loads(line)
                yield row["job"], row.get("id", "")


def grow(chaos: Running, folder: Path, recipe: Recipe, n: int, **settings: object) -> dict[str, Any]:
    """The figures of one run against the server with these settings."""
    chaos.set(reset=True, **settings)
    display, began, cpu = Quiet(), time.monotonic(), time.process_time()
    run = generate_dialogues(recipe, run=folder, n=n, display=display)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    log = chaos.log(whole=True)
    names = [name for _, name in _decided(folder) if name]
    figures = {"seconds": seconds, "cpu": cpu, "sha256": digest(folder), "accepted": Run(folder).funnel().accepted}
    figures |= {"ids": len(set(names)), "ended": run.funnel().ended, "kinds": log["kinds"], "said": len(display.said)}
    figures |= {"requests": log["requests"], "most_in_flight": log["most_in_flight"]}
    return figures | ledger(recipe, folder, log["good"])._asdict()


def check(figures: dict[str, dict[str, Any]], n: int, concurrency: int) -> list[str]:
    """The problems found, in words."""
    problems = [] if len({run["sha256"] for run in figures.values()}) == 1 else ["the bytes differ"]
    for name, run in figures.items():
        if not run["accepted"] == run["ids"] == n:
            problems.append(f"{name}: {run['accepted']} accepted with {run['ids']} ids, {n} expected")
        if run["lost"] or run["twice"] or run["unpaid"] or run["dropped"] > concurrency:
            problems.append(f"{name}: the journal and the server disagree")
    unmet = [kind for kind in FAULTS if kind not in figures["faults"]["kinds"]]
    return problems + [f"no request met {kind!r}" for kind in unmet if n >= ALL_KINDS]


def main() -> None:
    """Exits with 1 if there is a problem."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=2_000)
    options.add_argument("--concurrency", type=int, default=64)
    options.add_argument("--faults", type=float, default=0.2, help="share of the requests")
    options.add_argument("--timeout", type=float, default=2.0, help="of the client, in seconds")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    figures = {}
    with running_chaos(seed=given.seed) as chaos, tempfile.TemporaryDirectory() as folder:
        recipe = recipe_for(chaos.url, given.concurrency, given.timeout)
        for name, faults in (("quiet", 0.0), ("faults", given.faults)):
            figures[name] = grow(chaos, Path(folder) / name, recipe, given.n, faults=faults)
            if not given.json:
                show(name, figures[name])
    problems = check(figures, given.n, given.concurrency)
    if given.json:
        print(json.dumps(figures | {"short": problems}))
    else:
        print("; ".join(problems) or "the same bytes, nothing lost, nothing in the journal twice")
    sys.exit(1 if problems else 0)


def show(name: str, run: dict[str, Any]) -> None:
    """Prints the figures of one run."""
    print(
        f"{name}: {run['accepted']:,} accepted with {run['ids']:,} ids; {run['requests']:,} requests, "
        f"{run['answered']:,} good answers ({run['again']} again), {run['journal']:,} in the journal "
        f"({run['twice']} twice), {run['dropped']} dropped at the end, {run['lost']} lost; "
        f"{run['seconds']:.0f} s, {run['cpu']:.0f} s of CPU, at most {run['most_in_flight']} in flight"
    )
    met = sorted(run["kinds"].items(), key=lambda item: -item[1])
    if met:
        share = sum(count for kind, count in met if kind not in AWAY) / run["requests"]
        print(f"  {share:.0%} of the requests: " + ", ".join(f"{kind} {count}" for kind, count in met))
    print(f"  sha256 {run['sha256']}", flush=True)


if __name__ == "__main__":
    main()
