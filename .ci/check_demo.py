"""Holds a finished demo run against what the README says of it.   python .ci/check_demo.py outputs/demo"""

import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

from intersafe import Dialogue, Run, open_run
from intersafe.checks.messages import fold
from intersafe.images.store import ImageStore, distance


def main() -> None:
    """Exits with 1 and the figures that are off."""
    run = open_run(sys.argv[1] if "/" in sys.argv[1] else f"./{sys.argv[1]}")
    store = ImageStore(run.path / "images")
    ids: set[str] = set()
    counts: Counter[str] = Counter()
    dialogues = turns = images = leaks = alike = without = removed = 0
    for dialogue in run.dialogues():
        dialogues += 1
        turns += len(dialogue.turns)
        images += len(dialogue.images)
        removed += len(dialogue.removed)
        ids.add(dialogue.id)
        counts[dialogue.seed.category] += 1
        leaks += leaked(dialogue)
        without += sum(tuple(o.image for o in turn.origins) != turn.user.images for turn in dialogue.turns)
        hashes = [store.perceptual_hash(ref) for ref in dialogue.images]
        alike += sum(distance(one, other) <= 4 for one, other in combinations(hashes, 2))
    missing = unknown(run)
    groups = Counter(sample.group for sample in run.refusals())
    most, least = max(counts.values()), min(counts.values())
    print(f"{dialogues:,} dialogues, {len(ids):,} ids, {turns / dialogues:.3f} turns, {images / dialogues:.3f} images")
    print(f"{len(counts)} categories, {least} to {most} each; refusals {dict(sorted(groups.items()))}")
    print(f"{leaks} texts with their image's description, {alike} pairs of similar images ({removed} were taken out)")
    print(f"{without} messages with an image of unknown origin, {missing} images missing or damaged")
    fine = dialogues == len(ids) == 11_270 and 3.8 <= turns / dialogues <= 4.2 and len(counts) == 14
    fine &= 1.43 <= images / dialogues <= 1.63 and groups == {"general": 300, "health": 100, "finance": 100}
    fine &= not (leaks or alike or without or missing) and most <= 1.1 * least
    if not fine:
        sys.exit("the demo run is not what the README says")


def leaked(dialogue: Dialogue) -> int:
    """User texts that hold a description which the painter was given for this dialogue."""
    descriptions = [fold(o.description) for turn in dialogue.turns for o in turn.origins if o.description]
    texts = [fold(turn.user.text) for turn in dialogue.turns]
    return sum(description in text for text in texts for description in descriptions)


def unknown(run: Run) -> int:
    """Images that a record names and the store does not hold whole."""
    store = ImageStore(Path(run.path) / "images")
    named = {ref for dialogue in run.dialogues() for ref in dialogue.images}
    named |= {ref for sample in run.refusals() for ref in sample.images}
    return sum(not store.is_sound(ref) for ref in named)


if __name__ == "__main__":
    main()
