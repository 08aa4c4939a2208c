"""Counts over the published rows and figures of the run, for the card."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from intersafe.release.rows import PublishedRow, references_of
from intersafe.report.figures import ranked
from intersafe.report.stats import stats_of
from intersafe.run.directory import Run


@dataclass
class Tally:
    """Counts over the rows of one config."""

    splits: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    """By split: size of texts and images before compression."""
    seeds: set[str] = field(default_factory=set)
    columns: dict[str, Counter[str]] = field(default_factory=dict)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    sources: Counter[tuple[str, str]] = field(default_factory=Counter)
    safety: Counter[str] = field(default_factory=Counter)
    """Turns by the verdict on the reply."""
    refusals: Counter[str] = field(default_factory=Counter)
    withheld: int = 0
    aligned: int = 0
    unsafe: int = 0
    """Rows with an unsafe turn."""

    def add(self, row: PublishedRow, split: str, size: int) -> None:
        """Counts one published row of `size` bytes."""
        self.splits[split] += 1
        self.bytes[split] += size
        self.seeds.add(row["seed_id"])
        self.sources[row["seed_source"], row["source_license"]] += 1
        self.images[len(references_of(row))] += 1
        for name in _BY:
            if name in row:
                self.columns.setdefault(name, Counter())[row[name]] += 1
        if "turn_labels" not in row:
            return
        self.turns[row["n_turns"]] += 1
        self.aligned += len(row["aligned"])
        self.unsafe += row["first_unsafe_turn"] is not None
        for turn in msgspec.json.decode(row["turn_labels"]):
            self.safety[turn["safety"]] += 1
            self.refusals[turn["refusal"]] += 1
            self.withheld += turn["withheld"]

    def plain(self) -> dict[str, Any]:
        """The counts as JSON values; all keys are strings, so that they survive a round trip."""
        sources: dict[str, dict[str, int]] = {}
        for (source, license_name), count in sorted(self.sources.items()):
            sources.setdefault(source, {})[license_name] = count
        found = {
            "rows": sum(self.splits.values()),
            "splits": dict(sorted(self.splits.items())),
            "bytes": dict(sorted(self.bytes.items())),
            "seeds": len(self.seeds),
            **{name: ranked(counts) for name, counts in self.columns.items()},
            "images": {str(number): count for number, count in sorted(self.images.items())},
            "sources": sources,
        }
        if not self.turns:
            return found
        return found | {
            "turns": {str(number): count for number, count in sorted(self.turns.items())},
            "safety": ranked(self.safety),
            "refusals": ranked(self.refusals),
            "unsafe_rows": self.unsafe,
            "withheld": self.withheld,
            "aligned": self.aligned,
        }


_BY = ("category", "group", "strategy", "victim", "answered_by")


def figures_of(run: Run) -> dict[str, Any]:
    """The figures of the run for the card, as JSON values: where other jobs ended, attack success, diversity."""
    stats = stats_of(run)
    figures = {
        "state": stats.about.state,
        "cells_below_quota": len(stats.about.short),
        "ended": [[e.line, e.kind, e.stage, e.reason, e.count] for e in stats.losses.ended],
        "yielded": stats.losses.yielded,
        "seeds_excluded": stats.losses.seeds_excluded,
        "asr": stats.safety.asr,
        "aligned_safe": stats.aligned.safe,
        "over_refusal": stats.twins.over_refusal,
        "painted": stats.images.painted.mean,
        "distinct": stats.diversity.all,
        "self_bleu_4": stats.diversity.self_bleu_4,
    }
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(figures))
    return found


def licenses_of(tallies: Mapping[str, Tally]) -> dict[str, int]:
    """Number of rows by the licence of their seed, over all configs."""
    licenses: Counter[str] = Counter()
    for tally in tallies.values():
        for (_, license_name), count in tally.sources.items():
            licenses[license_name] += count
    return ranked(licenses)
