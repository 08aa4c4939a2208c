"""CPU time of a run's driver per dialogue, with Ray workers and without.   python bench/scale.py [--n 1000]

Generates the demo's dialogues three times: in one process, with one Ray worker, and with two; each time in a new
process. It prints dialogues/s, the CPU time of that process, both from the first accepted dialogue to the last, and the
digest of the bytes. Then it checks the dialogues by the gates and writes them again, as a driver does with results of
its workers, and reads the run as a driver that resumes it. Needs `pip install -e '.[ray]'`.
"""

import argparse
import asyncio
import hashlib
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from intersafe.gates.chain import Chain
from intersafe.generation.generate import generate_dialogues
from intersafe.generation.prepare import values_of
from intersafe.generation.progress import Display, Progress
from intersafe.generation.workers.ray_cluster import Cluster
from intersafe.recipe.load import load_recipe
from intersafe.recipe.override import override
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue
from intersafe.run.directory import Run
from intersafe.run.journal import Journal
from intersafe.run.outcomes import outcome_row
from intersafe.storage.bundled import bundled
from intersafe.storage.jsonl import GroupWriter


class Watch(Display):
    """Notes when the first and the latest dialogues were accepted."""

    interval = 0.1
    progress: Progress | None = None
    first = (0.0, 0.0, 0)
    last = (0.0, 0.0, 0)

    def begin(self, progress: Progress) -> None:
        """Takes the progress of the run."""
        self.progress = progress

    def look(self) -> None:
        """Notes the times and the count if there are new dialogues."""
        assert self.progress
        now = (time.monotonic(), time.process_time(), self.progress.funnel.accepted)
        if not self.first[2]:
            self.first = now
        if now[2] > self.last[2]:
            self.last = now


def recipe_of() -> Recipe:
    """The demo recipe without refusals."""
    return override(load_recipe(bundled("pipelines/demo.yaml")), no_refusals=True)


def grow(folder: Path, n: int, workers: int) -> None:
    """Makes one run and prints its figures."""
    watch = Watch()
    cluster = Cluster("local", workers) if workers else None
    run = generate_dialogues(recipe_of(), run=folder / f"run{workers}", n=n, display=watch, cluster=cluster)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    seconds, busy, kept = (last - first for last, first in zip(watch.last, watch.first, strict=True))
    digest = hashlib.sha256((run.path / "dialogues.jsonl").read_bytes()).hexdigest()
    calls = sum(tally.calls for tally in run.roles().values())
    what = f"{workers} workers" if workers else "in process"
    print(
        f"{what:<11} {kept / seconds:7.1f} dialogues/s  this process {1000 * busy / kept:6.2f} ms CPU per dialogue, "
        f"peak {peak} MB  {calls / n:.1f} calls per dialogue  sha256 {digest[:16]}",
        flush=True,
    )


def commit(folder: Path) -> None:
    """Decodes, checks and writes the dialogues of a run as its driver does, and prints the time."""
    run, recipe = Run(folder / "run0"), recipe_of()
    sent = [msgspec.msgpack.encode(dialogue) for dialogue in run.dialogues()]
    chain = Chain(recipe.gates, values_of(recipe, run.seeds()), lambda ref: int(ref[:16], 16))

    async def again() -> None:
        writer = GroupWriter(folder / "again")
        for one in sent:
            dialogue = msgspec.msgpack.decode(one, type=Dialogue)
            if chain.check(dialogue) is None:
                chain.add(dialogue)
                writer.add(*outcome_row(dialogue))
        await writer.close()

    began = time.process_time()
    asyncio.run(again())
    spent = time.process_time() - began
    size = sum(map(len, sent)) / len(sent)
    journal = sum(path.stat().st_size for path in (run.path / "journal").glob("*.jsonl"))
    turns = sum(len(dialogue.turns) for dialogue in run.dialogues())
    kept = (run.path / "dialogues.jsonl").stat().st_size / len(sent)
    print(f"gates and commit: {1000 * spent / len(sent):.2f} ms CPU per dialogue of {size / 1024:.1f} KiB on the wire")
    began = time.process_time()
    chain = Chain(recipe.gates, values_of(recipe, run.seeds()), lambda ref: int(ref[:16], 16))
    for outcome in run.outcomes():
        if isinstance(outcome, Dialogue):
            chain.add(outcome)
    outcomes, began = time.process_time() - began, time.process_time()
    Journal(GroupWriter(folder / "again")).load(run.path / "journal", {"dialogues": len(sent)})
    entries = time.process_time() - began
    print(
        f"resuming a run: {1000 * outcomes / len(sent):.2f} ms CPU per dialogue for the outcomes and the gates, "
        f"{1000 * entries / len(sent):.2f} for the journal"
    )
    print(
        f"a dialogue: {kept / 1024:.1f} KiB in dialogues.jsonl, {journal / len(sent) / 1024:.1f} KiB in the journal "
        f"({journal / turns / 1024:.1f} per turn), {turns / len(sent):.2f} turns"
    )
    for role, tally in sorted(run.roles().items()):
        print(
            f"  {role:<10} {tally.calls / len(sent):5.2f} calls, "
            f"{tally.prompt_tokens / len(sent):7.0f} + {tally.completion_tokens / len(sent):5.0f} tokens"
        )


def main() -> None:
    """All of it, or one run where `--workers` is given."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=1000)
    options.add_argument("--folder", type=Path)
    options.add_argument("--workers", type=int)
    given = options.parse_args()
    if given.workers is not None:
        grow(given.folder, given.n, given.workers)
        return
    with tempfile.TemporaryDirectory() as name:
        for workers in (0, 1, 2):
            words = ["--n", str(given.n), "--folder", name, "--workers", str(workers)]
            subprocess.run([sys.executable, __file__, *words], check=True)
        commit(Path(name))


if __name__ == "__main__":
    main()
