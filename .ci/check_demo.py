"""Holds a finished demo run against what the README says of it.   python .ci/check_demo.py outputs/demo"""

import sys
from collections import Counter

from intersafe import open_run


def main() -> None:
    """Exits with 1 and the figure that is off."""
    dialogues = turns = 0
    ids: set[str] = set()
    counts: Counter[str] = Counter()
    for dialogue in open_run(sys.argv[1] if "/" in sys.argv[1] else f"./{sys.argv[1]}").dialogues():
        dialogues += 1
        turns += len(dialogue.turns)
        ids.add(dialogue.id)
        counts[dialogue.seed.category] += 1
    categories = len(counts)
    mean, most, least = turns / dialogues, max(counts.values()), min(counts.values())
    spread = f"{categories} categories, {least} to {most} each"
    print(f"{dialogues:,} dialogues, {len(ids):,} ids, {mean:.3f} turns, {spread}")
    fine = dialogues == len(ids) == 11_270 and 3.8 <= mean <= 4.2 and categories == 14
    if not fine or most > 1.1 * least:
        sys.exit("the demo run is not what the README says")


if __name__ == "__main__":
    main()
