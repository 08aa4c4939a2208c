"""How well the duplicate gate separates edited copies from dialogues that only resemble each other.

    python bench/dedup_quality.py [--figstep DIR] [--bases 1000] [--full]

The labelled set is derived from a seed: base dialogues from a phrase grammar, copies that are duplicates (light edits)
and copies that are not (same topic, same openings, half of the turns new). The gate holds all bases and checks every
copy. It prints the share rejected by kind of edit, time and memory. `--full` adds exact similarities, and recall,
precision and F1 by shingle and threshold. The topics are the FigStep questions (50) if `--figstep` has them, else a
list of harmless topics.
"""

import argparse
import csv
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from intersafe.gates.dedup import DuplicateIndex, shingles
from intersafe.recipe.gates import DuplicateSettings
from intersafe.records import Check, Dialogue, Message, Plan, Provenance, Seed, Turn, Verdict

Messages = list[str]
SHINGLES = (("word", 1), ("word", 2), ("word", 3), ("char", 4), ("char", 5), ("char", 7), ("char", 9))
THRESHOLDS = (0.4, 0.5, 0.55, 0.6, 0.7, 0.8)

GRAMMAR = {
    "topic": "growing tomatoes on a shaded balcony|the history of lighthouses on the northern coast|"
    "repairing an old bicycle gearbox|how migrating geese find their way|"
    "baking bread with very little salt|mapping caves with a tape and a compass|"
    "restoring water damaged photographs|the rules of a village chess club|"
    "choosing paint for a wooden boat|why bridges have expansion joints|keeping bees near an orchard|"
    "the tides in a narrow bay|sorting a stamp collection",
    "opening": "I came across this picture while cleaning out a drawer.|"
    "My colleague put this photograph on our notice board.|"
    "Looking at the image above, something caught my eye.|"
    "For a school project I have to describe this scene.|"
    "This poster was hanging in the station this morning.|"
    "Please take a careful look at what is shown here.|"
    "We talked about a picture like this at dinner yesterday.|"
    "A friend sent me this image without any comment.|"
    "I am writing a short piece for our local newspaper.|"
    "There is one detail in here that I cannot place.|Thanks, that was clearer than I had expected.|"
    "Let us go on from where we stopped before.|"
    "That makes sense so far, though I have one more question.|Going back to the picture for a moment.",
    "frame": "Which {thing} would a {person} notice first when it comes to {topic}?|"
    "Could you tell me how {topic} is usually discussed among {group} in {place}?|"
    "What role does the {adj} {thing} play in stories about {topic}?|"
    "I wonder why {group} have such {adj} opinions on {topic}.|"
    "Suppose a {person} wanted to write about {topic}, which {thing} should they begin with?|"
    "How did people in {place} think about {topic} a few decades ago?|"
    "Is there a {adj} reason that {topic} keeps coming up among {group}?|"
    "Compare the view of a {person} with that of {group} regarding {topic}.|"
    "Who, apart from a {person}, has a say in {topic} these days?|"
    "Explain the {adj} background of {topic} to {group} without using jargon.",
    "detail": "The {thing} on the left looks rather {adj} to me.|"
    "Somebody in {place} told me it was all quite {adj}.|A {person} would surely point at the {thing}.|"
    "I have read that {group} disagree about the {thing}.|"
    "Keep in mind that a {person} may read your answer.|"
    "It reminds me of a {adj} {thing} I once saw in {place}.|"
    "Neither the {person} nor the {group} could explain the {thing}.|"
    "In {place} they call it the {adj} {thing}.|My {person} friend thinks the {thing} matters most.|"
    "Feel free to mention a {adj} example from {place}.|"
    "Perhaps the {thing} was only added later by {group}.|"
    "Someone has drawn a {adj} line under the {thing}.",
    "thing": "lamp|ledger|banner|window|notebook|signature|shadow|staircase|headline|clock|fence|receipt|uniform|"
    "map|suitcase|mirror|bench|cable|stamp|doorway|chimney|bottle|ticket|blackboard|frame|bucket|"
    "footprint|badge|radio|letter",
    "person": "librarian|nurse|carpenter|historian|neighbour|journalist|student|gardener|translator|"
    "retired teacher|sailor|pharmacist|photographer|tourist|bus driver|musician|surveyor|baker|engineer|"
    "curator|farmer|clerk",
    "group": "researchers|city planners|parents|young voters|shop owners|local officials|volunteers|museum guides|"
    "commuters|amateur writers|older residents|engineers|reporters|philosophers|union members|hikers|"
    "insurers",
    "place": "a harbour town|the northern provinces|a small mountain village|the capital|a university library|"
    "a market hall|the old factory district|an island community|a suburb|the border region|a night train|"
    "a seaside resort",
    "adj": "peculiar|cautious|practical|heated|forgotten|technical|surprising|gentle|official|uneasy|colourful|"
    "narrow|obvious|delicate|modern|contradictory|quiet|elaborate|everyday|controversial|rusty|cheerful|"
    "formal|vague",
    "synonym": "picture=image|image=picture|wonder=ask myself|explain=clarify|begin=start|notice=spot|"
    "usually=normally|which=what|reason=cause|people=folks|mention=name|look=glance|looks=seems|"
    "surely=certainly|quite=rather|rather=quite|view=opinion|told=informed|perhaps=maybe|"
    "regarding=concerning|thinks=believes|begins=starts|example=instance|disagree=differ|once=formerly|"
    "would=might|shown=displayed",
}
CHOICES = {slot: texts.split("|") for slot, texts in GRAMMAR.items()}
SYNONYMS = dict(pair.split("=") for pair in CHOICES.pop("synonym"))


# --- the labelled set ------------------------------------------------------------------------------------------------


def message(rng: random.Random, topic: str) -> str:
    """Two to four sentences on the topic, 20 to 60 words."""
    kinds = ["opening", "frame", *["detail"] * rng.randrange(3)]
    chosen = [{slot: rng.choice(texts) for slot, texts in CHOICES.items()} | {"topic": topic} for _ in kinds]
    return " ".join(fill[kind].format(**fill) for kind, fill in zip(kinds, chosen, strict=True))


def user_turns(rng: random.Random, topic: str) -> Messages:
    """The user messages of a dialogue of four turns."""
    return [message(rng, topic) for _ in range(4)]


def each_word(rng: random.Random, base: Messages, share: float, edit: Callable[[str], str]) -> Messages:
    """Applies `edit` to that share of the words."""
    return [" ".join(edit(w) if rng.random() < share else w for w in text.split()) for text in base]


def typos(rng: random.Random, base: Messages, share: float) -> Messages:
    """Drops, doubles or swaps a character in that share of the words."""

    def edit(word: str) -> str:
        i = rng.randrange(len(word))
        return (
            rng.choice(
                (
                    word[:i] + word[i + 1 :],
                    word[:i] + word[i] + word[i:],
                    word[:i] + word[i : i + 2][::-1] + word[i + 2 :],
                )
            )
            or word
        )

    return each_word(rng, base, share, edit)


def synonyms(rng: random.Random, base: Messages, share: float) -> Messages:
    """Replaces that share of the words by synonyms, if the table has them."""
    return each_word(rng, base, share, lambda word: SYNONYMS.get(word.casefold(), word))


def case_and_punctuation(rng: random.Random, base: Messages, share: float) -> Messages:
    """Changes the case and punctuation of that share of the words."""
    return each_word(
        rng, base, share, lambda word: rng.choice((word.upper(), word.rstrip(".,?!"), word + " --", word.title()))
    )


def swaps(rng: random.Random, base: Messages, share: float) -> Messages:
    """Swaps that share of the words with their neighbours."""
    out = []
    for text in base:
        words = text.split()
        for i in range(len(words) - 1):
            if rng.random() < share:
                words[i], words[i + 1] = words[i + 1], words[i]
        out.append(" ".join(words))
    return out


def sentences_dropped(rng: random.Random, base: Messages, count: int) -> Messages:
    """Drops a sentence from each of `count` messages."""
    out = list(base)
    for i in rng.sample(range(len(out)), count):
        sentences = re.split(r"(?<=[.?!]) ", out[i])
        del sentences[rng.randrange(len(sentences))]
        out[i] = " ".join(sentences)
    return out


def turns_replaced(rng: random.Random, base: Messages, topic: str, count: int) -> Messages:
    """Replaces `count` turns by new messages on the same topic."""
    out = list(base)
    for i in rng.sample(range(len(out)), count):
        out[i] = message(rng, topic)
    return out


def shared_openings(rng: random.Random, base: Messages, topic: str) -> Messages:
    """Keeps the first sentence of each message and continues with another topic."""
    first = [re.split(r"(?<=[.?!]) ", text)[0] for text in base]
    return [f"{start} {message(rng, topic).split('. ', 1)[-1]}" for start in first]


class Copy(NamedTuple):
    """A copy of a base dialogue: the kind of edit, and whether a curator would call it a duplicate."""

    kind: str
    duplicate: bool
    dialogue: Dialogue


def copies(rng: random.Random, base: Messages, topic: str, other: str) -> Iterator[tuple[str, bool, Messages]]:
    """One copy of each kind."""
    yield "case, punctuation", True, case_and_punctuation(rng, base, 0.3)
    for share in (0.02, 0.05, 0.10):
        yield f"typos {share:.0%}", True, typos(rng, base, share)
    for share in (0.5, 1.0):
        yield f"synonyms {share:.0%}", True, synonyms(rng, base, share)
    for share in (0.03, 0.10):
        yield f"word swaps {share:.0%}", True, swaps(rng, base, share)
    yield "turns reordered", True, [base[0], base[2], base[1], base[3]]
    yield "1 sentence dropped", True, sentences_dropped(rng, base, 1)
    yield "2 sentences dropped", True, sentences_dropped(rng, base, 2)
    yield "1 of 4 turns new", True, turns_replaced(rng, base, topic, 1)
    yield "2 of 4 turns new", False, turns_replaced(rng, base, topic, 2)
    yield "3 of 4 turns new", False, turns_replaced(rng, base, topic, 3)
    yield "same topic", False, user_turns(rng, topic)
    yield "same openings", False, shared_openings(rng, base, other)


def dialogue(name: str, messages: Messages) -> Dialogue:
    """A dialogue with these user messages."""
    turns = tuple(Turn(Message("user", m), Message("assistant", "An answer."), Verdict("safe")) for m in messages)
    seed = Seed(name, "a question", "fraud", "bench", "CC0-1.0")
    origin = Provenance({}, {}, {}, "", {}, scripted=True)
    return Dialogue(
        name, 0, name, seed, "none", "none", 0, Plan(()), turns, (), Check(risk=False, coherent=True), origin
    )


def labelled(topics: list[str], bases: int) -> tuple[list[Dialogue], list[Copy]]:
    """The base dialogues and their copies, the same for the same topics."""
    rng = random.Random(11)
    base_dialogues, found = [], []
    for number in range(bases):
        topic, other = rng.sample(topics, 2)
        base = user_turns(rng, topic)
        base_dialogues.append(dialogue(f"base-{number}", base))
        found += [Copy(k, d, dialogue(f"copy-{number}", m)) for k, d, m in copies(rng, base, topic, other)]
    return base_dialogues, found


def read_topics(folder: Path) -> tuple[list[str], str]:
    """The topics, and a text that names their source."""
    path = folder / "SafeBench-Tiny.csv"
    if not path.exists():
        return CHOICES["topic"], f"{len(CHOICES['topic'])} harmless topics (no {path.name})"
    with path.open(encoding="utf-8", newline="") as file:
        questions = [row["question"] for row in csv.DictReader(file)]
    return [q.rstrip("?. ").casefold() for q in questions], f"{len(questions)} FigStep questions"


# --- the measurements ------------------------------------------------------------------------------------------------


def flagged(settings: DuplicateSettings, bases: list[Dialogue], found: list[Copy]) -> dict[str, float]:
    """The share of the copies of each kind that the gate rejects while it holds all bases."""
    index = DuplicateIndex(settings)
    for base in bases:
        index.add(base)
    counts: dict[str, int] = {}
    for copy in found:
        counts[copy.kind] = counts.get(copy.kind, 0) + (index.check(copy.dialogue) is not None)
    return {kind: count / len(bases) for kind, count in counts.items()}


def scores(shares: dict[str, float], duplicate: dict[str, bool]) -> tuple[float, float, float]:
    """Recall, precision and F1; every kind has the same number of copies."""
    hits = sum(share for kind, share in shares.items() if duplicate[kind])
    recall = hits / sum(duplicate.values())
    precision = hits / (sum(shares.values()) or 1)
    return recall, precision, 2 * recall * precision / (recall + precision or 1)


def similarity_table(bases: list[Dialogue], found: list[Copy]) -> None:
    """Prints the exact Jaccard similarity of copy and base by kind, which a threshold must separate."""
    names = [f"{unit} {size}" for unit, size in SHINGLES]
    print("\nexact Jaccard similarity to the base, mean (5 % .. 95 %)\n")
    print(f"{'kind':20} dup  " + "  ".join(f"{name:>16}" for name in names))
    by_kind: dict[str, list[list[float]]] = {}
    settings = [DuplicateSettings(unit=unit, size=size) for unit, size in SHINGLES]  # type: ignore[arg-type]
    base_sets = {
        base.id: [shingles([turn.user.text for turn in base.turns], s) for s in settings] for base in bases[:300]
    }
    for copy in found[: 300 * len({c.kind for c in found})]:
        pairs = zip(base_sets[copy.dialogue.id.replace("copy", "base")], settings, strict=True)
        ours = [(a, shingles([turn.user.text for turn in copy.dialogue.turns], s)) for a, s in pairs]
        by_kind.setdefault(copy.kind, []).append([len(a & b) / len(a | b) for a, b in ours])
    duplicate = {copy.kind: copy.duplicate for copy in found}
    for kind, rows in by_kind.items():
        columns = [sorted(column) for column in zip(*rows, strict=True)]
        cells = [f"{sum(c) / len(c):.2f} ({c[len(c) // 20]:.2f}..{c[-1 - len(c) // 20]:.2f})" for c in columns]
        print(f"{kind:20} {'yes' if duplicate[kind] else 'no ':3}  " + "  ".join(f"{cell:>16}" for cell in cells))


def threshold_table(bases: list[Dialogue], found: list[Copy], default: DuplicateSettings) -> None:
    """Prints recall, precision and F1 by shingle and threshold."""
    duplicate = {copy.kind: copy.duplicate for copy in found}
    print("\nrecall / precision / F1\n")
    print(f"{'shingle':8} " + "  ".join(f"{f'at {threshold}':>17}" for threshold in THRESHOLDS))
    for unit, size in SHINGLES:
        cells = []
        for threshold in THRESHOLDS:
            settings = msgspec.structs.replace(default, threshold=threshold, unit=unit, size=size)
            recall, precision, f1 = scores(flagged(settings, bases, found), duplicate)
            cells.append(f"{recall:.3f} {precision:.3f} {f1:.3f}")
        print(f"{unit} {size:<3} " + "  ".join(cells))


def kind_table(bases: list[Dialogue], found: list[Copy], default: DuplicateSettings) -> None:
    """Prints the share of copies that the default settings reject, by kind."""
    print(f"\nshare rejected by the defaults ({default.unit} {default.size}, threshold {default.threshold})\n")
    duplicate = {copy.kind: copy.duplicate for copy in found}
    for kind, share in flagged(default, bases, found).items():
        print(f"{kind:20} {'duplicate' if duplicate[kind] else 'different':10} {share:.3f}")


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cost(topics: list[str], default: DuplicateSettings, count: int = 11_270) -> None:
    """Prints the cost of a run of `count` accepted dialogues: check and add of each, and the index in memory."""
    rng = random.Random(12)
    dialogues = [dialogue(str(n), user_turns(rng, rng.choice(topics))) for n in range(count)]
    index, rejected, before = DuplicateIndex(default), 0, resident()
    start = time.perf_counter()
    for one in dialogues:
        rejected += index.check(one) is not None
        index.add(one)
    spent = time.perf_counter() - start
    grown = resident() - before
    print(f"\n{count} unrelated dialogues: {rejected} rejected, {1e3 * spent / count:.3f} ms each (check and add),")
    print(f"{grown / count:.0f} bytes of index each, {grown / 2**20:.0f} MiB in all")


def main() -> None:
    """Makes the labelled set and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figstep = Path(__file__).resolve().parents[1] / "../shared/data/figstep-tiny"
    parser.add_argument("--figstep", type=Path, default=figstep, help="folder with SafeBench-Tiny.csv")
    parser.add_argument("--bases", type=int, default=1000)
    parser.add_argument("--full", action="store_true", help="every shingle and threshold, not only the defaults")
    options = parser.parse_args()
    topics, source = read_topics(options.figstep)
    bases, found = labelled(topics, options.bases)
    duplicate = {copy.kind: copy.duplicate for copy in found}
    print(f"{len(bases)} dialogues on {source}; {len(found)} copies of {len(duplicate)} kinds of edit")
    default = DuplicateSettings()
    if options.full:
        similarity_table(bases, found)
        threshold_table(bases, found, default)
    kind_table(bases, found, default)
    cost(topics, default)


if __name__ == "__main__":
    main()
