"""Cost, recall and false rejections of the duplicate gate in a run of a million dialogues.

    python bench/dedup_scale.py [--n 1000000] [--step 100000] [--grammar]
    python bench/dedup_scale.py --resume RUN [--n 100000]

The first form checks a stream of dialogues derived from a seed. One in ten is an edited copy of an earlier one, one in
ten a hard negative (half or more of it new). Each is added if the gate accepts it, as in a run. It prints for every
step: CPU time of check and add, memory, candidates compared, and the share of each kind that was rejected. Then it
builds the index again with the file of signatures, and without. `--grammar` makes all text from the phrases of
`dedup_quality.py`, which overlap far more than real texts.

The second form measures the time to resume a run of n accepted dialogues, by part. Its rows are those of RUN with other
user texts.
"""

import argparse
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import dedup_quality as quality
import msgspec
from dedup_quality import Messages

from intersafe.gates.chain import Chain
from intersafe.gates.dedup import SIGNATURES, DuplicateIndex, signature_of
from intersafe.generation.dialogues import DialogueGates
from intersafe.generation.job_kind import GateInputs
from intersafe.generation.kinds import DIALOGUES
from intersafe.generation.prepare import values_of
from intersafe.generation.resume import recall
from intersafe.recipe.gates import DuplicateSettings
from intersafe.recipe.sections import Recipe
from intersafe.records import Dialogue
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel
from intersafe.run.outcomes import outcome_row
from intersafe.storage.jsonl import lines_of

Write = Callable[[random.Random], str]

LETTERS = random.Random(1)
SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvw" for vowel in "aeiou"]
WORDS = [
    "".join(LETTERS.choices(SYLLABLES, k=LETTERS.randrange(1, 5))) + LETTERS.choice("nsrlt") for _ in range(20_000)
]
# The word of rank r has the weight 1 / (r + 3): roughly the word frequencies of a language.
WEIGHTS = list(accumulate(1 / (rank + 3) for rank in range(1, len(WORDS) + 1)))
KINDS = {8: "copy", 9: "half new"}
"""Kinds by the last digit of a dialogue's number; the others are originals."""
SAMPLE = 200
"""Dialogues over which the number of candidates is averaged."""


# --- the stream -------------------------------------------------------------------------------------------------------


def free(rng: random.Random) -> str:
    """A phrase of the grammar and 10 to 29 words by frequency: 20 to 40 words in most cases."""
    fill = {slot: rng.choice(texts) for slot, texts in quality.CHOICES.items()}
    phrase = fill[rng.choice(("opening", "frame", "detail"))].format(**fill)
    return f"{phrase} {' '.join(rng.choices(WORDS, cum_weights=WEIGHTS, k=rng.randrange(10, 30)))}."


def of_grammar(rng: random.Random) -> str:
    """Two to four phrases of the grammar."""
    return quality.message(rng, rng.choice(quality.CHOICES["topic"]))


def original(number: int, write: Write) -> Messages:
    """The user messages of that dialogue if it is an original."""
    rng = random.Random(number)
    return [write(rng) for _ in range(4)]


def edited(rng: random.Random, base: Messages) -> Messages:
    """A copy that a curator would call a duplicate."""
    edits: list[Callable[[], Messages]] = [
        lambda: quality.case_and_punctuation(rng, base, 0.3),
        lambda: quality.typos(rng, base, 0.05),
        lambda: quality.synonyms(rng, base, 1.0),
        lambda: quality.swaps(rng, base, 0.03),
        lambda: quality.sentences_dropped(rng, base, 1),
        lambda: base[::-1],
    ]
    return rng.choice(edits)()


def resembling(rng: random.Random, base: Messages, write: Write) -> Messages:
    """A hard negative: half or more of it is new, some turns or everything but the openings."""
    if rng.random() < 0.5:
        kept = rng.randrange(1, 3)
        return [*base[:kept], *(write(rng) for _ in base[kept:])]
    return [f"{re.split(r'(?<=[.?!]) ', text)[0]} {write(rng)}" for text in base]


def offered(number: int, write: Write) -> tuple[str, Dialogue]:
    """Kind and dialogue of a number in the stream."""
    kind = KINDS.get(number % 10, "original") if number >= 10 else "original"
    texts = original(number, write)
    if kind != "original":
        rng = random.Random(f"edit {number}")
        base = original(10 * rng.randrange(number // 10) + rng.randrange(8), write)
        texts = edited(rng, base) if kind == "copy" else resembling(rng, base, write)
    return kind, quality.dialogue(f"{number:016x}", texts)


class Tally:
    """The decisions of the gate by kind since the last line."""

    def __init__(self) -> None:
        self.checked, self.rejected = Counter[str](), Counter[str]()
        self.cpu = 0.0

    def line(self, number: int, memory: float, candidates: float) -> str:
        """A line of the table."""
        shares = "  ".join(f"{self.rejected[k] / self.checked[k]:>10.5f}" for k in ("copy", "half new", "original"))
        each = 1e6 * self.cpu / self.checked.total()
        return f"{number:>9,}  {each:>7.0f}  {memory / 2**20:>6.0f}  {candidates:>10.0f}  {shares}"


def stream(n: int, step: int, write: Write, file: Path) -> bytearray:
    """Checks and adds n dialogues and prints the table; returns 1 for each that was accepted, else 0."""
    kinds = "  ".join(f"{kind:>10}" for kind in ("copy", "half new", "original"))
    print(f"{'dialogues':>9}  {'us each':>7}  {'MiB':>6}  {'candidates':>10}  {kinds}  (share rejected)")
    before, accepted = quality.resident(), bytearray(n)
    index, tally = DuplicateIndex(DuplicateSettings(), file), Tally()
    for number in range(n):
        kind, one = offered(number, write)
        began = time.process_time()
        reason = index.check(one)
        if reason is None:
            index.add(one)
        tally.cpu += time.process_time() - began
        tally.checked[kind] += 1
        tally.rejected[kind] += reason is not None
        accepted[number] = reason is None
        if (number + 1) % step == 0:
            memory = quality.resident() - before
            sample = [index.candidates(offered(n + other, write)[1]) for other in range(SAMPLE)]
            print(tally.line(number + 1, memory, sum(sample) / SAMPLE), flush=True)
            tally = Tally()
    return accepted


def again(accepted: bytearray, write: Write, file: Path | None) -> float:
    """CPU seconds to build the index of the accepted dialogues."""
    index, cpu = DuplicateIndex(DuplicateSettings(), file), 0.0
    for number, kept in enumerate(accepted):
        if kept:
            one = offered(number, write)[1]
            began = time.process_time()
            index.add(one)
            cpu += time.process_time() - began
    return cpu


# --- resuming a run ---------------------------------------------------------------------------------------------------


def longer(run: Run, n: int, path: Path) -> Run:
    """A run of n accepted dialogues: the rows of `run` with other user texts."""
    path.mkdir()
    shutil.copy(run.path / "recipe.json", path)
    shutil.copy(run.path / "seeds.jsonl", path)
    rows = list(run.dialogues())
    replace = msgspec.structs.replace
    with (path / "dialogues.jsonl").open("wb") as out:
        for number in range(n):
            row, rng = rows[number % len(rows)], random.Random(number)
            turns = tuple(replace(turn, user=replace(turn.user, text=free(rng))) for turn in row.turns)
            row = replace(row, id=f"{number:016x}", job=number, turns=turns)
            out.write(msgspec.json.encode(outcome_row(row)[1]) + b"\n")
    return Run(path)


def parts(run: Run) -> Iterator[tuple[str, float]]:
    """CPU seconds of each part of reading a resumed run, then of all of it."""
    recipe = msgspec.convert(run.manifest.resolved, Recipe)
    values, settings = values_of(recipe, run.seeds()), DuplicateSettings()

    def remembering(root: Path) -> DialogueGates:
        return DialogueGates(GateInputs(recipe, values, lambda _: 0, root))

    def spent(work: Iterable[object]) -> float:
        began = time.process_time()
        for _ in work:
            pass
        return time.process_time() - began

    yield "lines read", spent(lines_of(run.path / "dialogues.jsonl"))
    yield "rows decoded twice, as before", spent(run.dialogues())
    yield "rows decoded once", spent(run.dialogues())
    some = list(run.dialogues())
    funnel, gates = Funnel(), Chain(recipe.gates, values, lambda _: 0)
    yield "funnel", spent(map(funnel.count, some))
    if gates.quota:
        yield "quotas", spent(map(gates.quota.add, some))
    yield "signatures", spent(signature_of([turn.user.text for turn in one.turns], settings) for one in some)
    del some
    for name in ("all, no file yet", "all, with the file"):
        yield name, spent(recall(run, DIALOGUES, remembering(run.path)) for _ in range(1))


def main() -> None:
    """Runs one of the two forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int)
    parser.add_argument("--step", type=int, default=100_000)
    parser.add_argument("--grammar", action="store_true")
    parser.add_argument("--resume", type=Path, metavar="RUN")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.resume:
            n = options.n or 100_000
            run = longer(Run(options.resume), n, Path(folder) / "run")
            for name, seconds in parts(run):
                print(f"{name:32} {seconds:7.2f} s  {1e6 * seconds / n:6.1f} us each", flush=True)
            return
        n, write, file = options.n or 1_000_000, of_grammar if options.grammar else free, Path(folder) / SIGNATURES
        accepted = stream(n, options.step, write, file)
        print(f"{sum(accepted):,} accepted, {file.stat().st_size / 2**20:.0f} MiB of signatures on the disk")
        print(f"built again with the file: {again(accepted, write, file):.1f} s of CPU", flush=True)
        few = accepted[: options.step]
        print(f"without it, the first {sum(few):,}: {again(few, write, None):.1f} s")


if __name__ == "__main__":
    main()
