"""The figures as aligned plain text: sections with a title and a few lines, about 100 characters wide."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from intersafe.report.cost import Costs
from intersafe.report.dispersion import PURE_PYTHON
from intersafe.report.figures import Diversity, Histogram, ImageFigures, Losses, Proportion, SafetyFigures, Sizes, Stats
from intersafe.report.published import SOURCE

REFUSAL_KINDS = ("none", "partial", "deflect", "full")
NOTHING = "-"


class TableSection(NamedTuple):
    """A title and the lines under it."""

    title: str
    lines: list[str]


def sections(stats: Stats) -> list[TableSection]:
    """All sections, in the order in which a paper would use them."""
    return [
        _head(stats),
        TableSection(f"compared with {SOURCE}", _published(stats)),
        TableSection("sizes", _sizes(stats.sizes)),
        TableSection("turns per dialogue", [_histogram(stats.turns)]),
        TableSection("images per dialogue", _images(stats.images)),
        TableSection("categories", _categories(stats.categories)),
        TableSection("strategies", _counted(stats.strategies, stats.sizes.dialogues)),
        TableSection("victims", _counted(stats.victims, stats.sizes.dialogues)),
        TableSection("sources of the seeds", _sources(stats)),
        TableSection("safety of the victims", _safety(stats.safety)),
        TableSection("first unsafe turn", _curve(stats.safety)),
        TableSection("refusals by turn", _refusals(stats.safety)),
        TableSection("aligned answers", _aligned(stats)),
        TableSection("benign twins", _twins(stats)),
        TableSection("rejected and failed", _losses(stats.losses)),
        TableSection("diversity of the user messages", _diversity(stats.diversity)),
        TableSection("tokens and cost", _costs(stats.costs)),
        TableSection("retries and outages", _incidents(stats)),
    ]


# --- cells ----------------------------------------------------------------------------------------------------------


def _grid(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    listed = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in listed
    ]


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value == round(value) and abs(value) >= 100 else f"{value:,.{digits}f}"


def _percent(share: Proportion) -> str:
    return NOTHING if share.share is None else f"{share.share:.1%}"


def _of(share: Proportion) -> str:
    return f"{_percent(share)} ({share.count:,} of {share.total:,})"


def _shares(shares: Mapping[str, Proportion]) -> list[str]:
    return _grid((name, _percent(share), f"{share.count:,} of {share.total:,}") for name, share in shares.items())


def _histogram(histogram: Histogram) -> str:
    counts = "   ".join(f"{value}: {count:,}" for value, count in histogram.counts.items())
    return f"mean {_number(histogram.mean)}" + (f"   {counts}" if counts else "")


def _counted(counts: Mapping[str, int], total: int) -> list[str]:
    return _grid((name, f"{count:,}", _percent(Proportion.of(count, total))) for name, count in counts.items()) or [
        NOTHING
    ]


# --- sections --------------------------------------------------------------------------------------------------------


def _head(stats: Stats) -> TableSection:
    about = stats.about
    lines = []
    if about.scripted:
        lines.append(f"SCRIPTED ({', '.join(about.scripted)}): not real model output; no figure here is a finding")
    if about.state == "incomplete":
        lines.append("NOT COMPLETE: the run is in progress or was stopped; these are the figures so far")
    if about.state == "jobs_exhausted":
        lines.append("THE JOBS WERE USED UP before the run had all it was asked for")
    lines += [f"  short: {cell}" for cell in about.short]
    return TableSection(f"run {about.run}   recipe {about.recipe} {about.digest[:12]}", lines)


def _published(stats: Stats) -> list[str]:
    rows = [("", "this run", "published", "difference")]
    for figure in stats.published:
        whole = "mean" not in figure.figure
        digits = 0 if whole else 2
        difference = (
            NOTHING
            if figure.difference is None
            else f"{figure.difference or 0:{'+' if figure.difference else ''},.{digits}f}"
        )
        published = f"{figure.published:,.0f}" if figure.published == int(figure.published) else f"{figure.published:g}"
        rows.append((figure.figure, _number(figure.ours, digits), published, difference))
    return _grid(rows)


def _sizes(sizes: Sizes) -> list[str]:
    groups = ", ".join(f"{group} {count:,}" for group, count in sizes.refusal_groups.items())
    answered = ", ".join(f"by {who} {count:,}" for who, count in sizes.refusals_answered_by.items())
    refusals = f"{sizes.refusals:,}"
    if sizes.refusals:
        refusals += f": {groups}; with an image {_of(sizes.refusals_with_image)}; answered {answered}"
    return [
        f"dialogues        {sizes.dialogues:,} from {sizes.seeds:,} seeds",
        f"refusal samples  {refusals}",
        f"benign twins     {sizes.twins:,}",
    ]


def _images(images: ImageFigures) -> list[str]:
    return [
        f"all      {_histogram(images.all)}",
        f"seed's   {_histogram(images.seed)}",
        f"painted  {_histogram(images.painted)}",
        f"dialogues with an image  {_of(images.with_image)}",
    ]


def _categories(categories: Mapping[str, int]) -> list[str]:
    if not categories:
        return [NOTHING]
    counts = categories.values()
    span = f"{len(categories)} categories, smallest {min(counts):,}, largest {max(counts):,}"
    return [span, *_counted(categories, sum(counts))]


def _sources(stats: Stats) -> list[str]:
    named = {
        f"{source} ({licence})": count
        for source, licences in stats.sources.items()
        for licence, count in licences.items()
    }
    return _counted(named, stats.sizes.dialogues)


def _safety(safety: SafetyFigures) -> list[str]:
    turns = sum(safety.verdicts.values())
    shares = {f"turns {word}": Proportion.of(count, turns) for word, count in safety.verdicts.items()}
    shares["dialogues with an unsafe turn (ASR)"] = safety.asr
    shares |= {f"  of {number} turns": share for number, share in safety.asr_by_turns.items()}
    shares |= {f"  {victim}": share for victim, share in safety.asr_by_victim.items()}
    return _shares(shares)


def _curve(safety: SafetyFigures) -> list[str]:
    rows = [("turn", "at risk", "unsafe", "censored", "hazard", "still safe")]
    rows += [
        (str(p.turn), f"{p.at_risk:,}", f"{p.unsafe:,}", f"{p.censored:,}", f"{p.hazard:.3f}", f"{p.survival:.3f}")
        for p in safety.first_unsafe
    ]
    return _grid(rows) if safety.first_unsafe else [NOTHING]


def _refusals(safety: SafetyFigures) -> list[str]:
    rows: list[tuple[str, ...]] = [("turn", "turns", *REFUSAL_KINDS)]
    for turn, counts in (*safety.refusals_by_turn.items(), ("all", safety.refusals)) if safety.refusals else ():
        total = sum(counts.values())
        rows.append(
            (str(turn), f"{total:,}", *(_percent(Proportion.of(counts.get(kind, 0), total)) for kind in REFUSAL_KINDS))
        )
    return _grid(rows) if safety.refusals else [NOTHING]


def _aligned(stats: Stats) -> list[str]:
    aligned = stats.aligned
    if not aligned.answers:
        return ["none in this run"]
    kinds = {f"refusal {kind}": Proportion.of(count, aligned.answers) for kind, count in aligned.refusals.items()}
    return _shares({"safe": aligned.safe, "safe after an unsafe turn": aligned.recoveries_safe, **kinds})


def _twins(stats: Stats) -> list[str]:
    twins = stats.twins
    if not stats.sizes.twins:
        return ["none in this run"]
    return _shares(
        {
            "over-refusal (twins with a full refusal)": twins.over_refusal,
            "turns refused in full": twins.refused_turns,
            "twins with an unsafe turn": twins.unsafe,
        }
    )


def _losses(losses: Losses) -> list[str]:
    removed = ", ".join(f"{source} {count:,}" for source, count in losses.images_removed.items()) or "0"
    return [
        f"dialogues accepted of the decided jobs: {_of(losses.yielded)}; excluded seeds: {losses.seeds_excluded:,}",
        *_grid((f"{e.line}: {e.kind} {e.stage} {e.reason}", f"{e.count:,}") for e in losses.ended),
        f"near-duplicates rejected: {', '.join(f'{line} {n:,}' for line, n in losses.near_duplicates.items())}",
        f"similar images: {losses.similar_images:,} dialogues rejected; images removed from accepted ones: {removed}",
    ]


def _diversity(diversity: Diversity) -> list[str]:
    whole, part, found = diversity.all, diversity.of_sample, diversity.dispersion
    rows: list[tuple[str, ...]] = [("", "all", f"sample of {diversity.sample:,}")]
    rows.append(("tokens", f"{whole.tokens:,}", f"{part.tokens:,}"))
    rows.append(("distinct-1", _number(whole.distinct_1, 4), _number(part.distinct_1, 4)))
    rows.append(("distinct-2", _number(whole.distinct_2, 4), _number(part.distinct_2, 4)))
    rows.append(("self-BLEU-4", "", _number(diversity.self_bleu_4, 4)))
    if found:
        rows.append(("mean cosine distance", "", _number(found.mean_cosine_distance, 4)))
        rows.append(("Vendi score", "", _number(found.vendi, 1)))
        lines = [*_grid(rows), f"embeddings by {found.embedder}, {found.dimensions:,} dimensions"]
        missing = f"Vendi score of more than {PURE_PYTHON}: not measured; pip install 'intersafe[figures]'"
        return lines if found.vendi is not None else [*lines, missing]
    return [*_grid(rows), "embedding dispersion: not measured; pass --embedder openai:model@url"]


def _costs(costs: Costs) -> list[str]:
    rows = [("role", "calls", "prompt tokens", "completion tokens", "USD")]
    rows += [
        (role, f"{c.calls:,}", f"{c.prompt_tokens:,}", f"{c.completion_tokens:,}", _usd(c.usd))
        for role, c in costs.roles.items()
    ]
    if costs.usd is None:
        return [*_grid(rows), "no prices; pass --price ROLE=IN,OUT in USD per million tokens"]
    each = "" if costs.usd_per_dialogue is None else f", {costs.usd_per_dialogue:,.4f} per accepted dialogue"
    missing = f"; without a price: {', '.join(costs.unpriced)}" if costs.unpriced else ""
    return [*_grid(rows), f"total {_usd(costs.usd)} USD{each}{missing}"]


def _incidents(stats: Stats) -> list[str]:
    return [f"{role}: {incidents.words}" for role, incidents in stats.incidents.items()] or ["none"]


def _usd(amount: float | None) -> str:
    return NOTHING if amount is None else f"{amount:,.{2 if amount >= 1 else 4}f}"
