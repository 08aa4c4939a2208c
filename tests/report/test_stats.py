"""The figures of a run: known values, sums that hold for any run, damage, and measures compared with other tools."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import pytest

from intersafe.cli.values import PRICE
from intersafe.errors import ServiceGone
from intersafe.models.base import Hooks
from intersafe.models.http.embeddings import Embedder, open_embedder
from intersafe.recipe.sections import Limits, Price, digest_of
from intersafe.records import (
    Aligned,
    Dialogue,
    Ended,
    ImageOrigin,
    Provenance,
    RefusalCheck,
    RefusalSample,
    RemovedImage,
    Seed,
    Verdict,
)
from intersafe.report.dispersion import PURE_PYTHON, mean_cosine_distance, vendi_score
from intersafe.report.diversity import NgramCounter, self_bleu, tokens_of
from intersafe.report.figures import Stats
from intersafe.report.stats import stats_of
from intersafe.report.table import sections
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel, Summary
from intersafe.run.journal import Entry
from intersafe.run.manifest import Manifest
from intersafe.run.outcomes import outcome_row
from tests.support.dialogues import dialogue, turn
from tests.support.runs import cli, refusal
from tests.support.servers.fault_server import Answer, FaultServer, Request, error, raw, reply

SAFE, FULL, SOFT = Verdict("safe"), Verdict("safe", "full"), Verdict("safe", "deflect")
UNSAFE, UNCLEAR = Verdict("unsafe"), Verdict("undetermined")
MADE_BY = Provenance({}, {}, {}, "recipe", {}, scripted=False)
REAL = {"attacker": "openai:a", "judge": "openai:j", "victim:0": "openai:v", "victim:1": "openai:w"}


def judged(
    number: int,
    *verdicts: Verdict,
    texts: Sequence[str] = (),
    images: str = "",
    victim: str = "v",
    category: str = "fraud",
    aligned: Sequence[Aligned | None] = (),
    removed: tuple[RemovedImage, ...] = (),
) -> Dialogue:
    """A dialogue; `images` has a letter for each turn: `s` the seed's image, `p` a painted one, `.` none."""
    turns = []
    for i, verdict in enumerate(verdicts):
        kind = images[i : i + 1]
        origins = {"s": (origin("seed"),), "p": (origin("painted"),)}.get(kind, ())
        text = texts[i] if texts else f"message {i} of dialogue {number}"
        turns.append(turn(text, "reply", verdict, origins=origins, aligned=aligned[i] if aligned else None))
    seed = Seed(f"seed-{number}", "query", category, "house", "MIT" if number % 2 else "CC0-1.0")
    names: dict[str, Any] = {"id": f"id-{number}", "job": number, "key": f"key-{number}"}
    return dialogue(turns, seed=seed, victim=victim, provenance=MADE_BY, removed=removed, **names)


def origin(source: Literal["seed", "painted"]) -> ImageOrigin:
    return ImageOrigin("0" * 64 + ".png", source)


def sample(number: int, group: str, image: bool = False) -> RefusalSample:
    seed = Seed(f"seed-{number}", "query", "fraud", "house", "MIT")
    check = RefusalCheck(in_group=True, refuses=True, names_harm=True, repeats_detail=False)
    origins = (origin("painted"),) if image else ()
    return RefusalSample(f"r-{number}", number, "key", group, seed, "q", "a", "template", check, MADE_BY, origins)


def ended(number: int, stage: str, reason: str, kind: Literal["rejected", "failed"] = "rejected") -> Ended:
    return Ended(number, f"key-{number}", "fraud", kind, stage, reason)


def lay(
    path: Path,
    *outcomes: Dialogue | RefusalSample | Ended,
    kind: str = "dialogues",
    cast: dict[str, str] | None = None,
    entries: Sequence[Entry] = (),
) -> Run:
    """A run of these outcomes, or an existing run with these as one more kind."""
    path.mkdir(parents=True, exist_ok=True)
    recipe = {"cast": {role: {"model": model} for role, model in (cast or REAL).items()}}
    manifest = Manifest("hand", recipe, {}, digest_of(recipe), {}, "", ("excluded-1",), {"intersafe": "0"})
    if cast or not (path / "recipe.json").exists():
        (path / "recipe.json").write_bytes(msgspec.json.encode(manifest))
    for outcome in outcomes:
        name, row = outcome_row(outcome, kind)
        append(path / name, row)
    for entry in entries:
        (path / "journal").mkdir(exist_ok=True)
        append(path / "journal/main.jsonl", entry)
    return Run(path)


def append(path: Path, row: Any) -> None:
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")


def text_of(stats: Stats) -> str:
    return "\n".join(line for section in sections(stats) for line in (section.title, *section.lines))


# --- known figures ---------------------------------------------------------------------------------------------------


def test_sizes_turns_and_images_are_counted_and_set_beside_the_published_ones(tmp_path: Path) -> None:
    gone = RemovedImage(1, origin("painted"), "0" * 64 + ".png")
    run = lay(
        tmp_path / "r",
        judged(1, SAFE, SAFE, images="sp", removed=(gone, gone)),
        judged(2, SAFE, SAFE, SAFE, SAFE, images="pp.s"),
        judged(3, SAFE, SAFE, SAFE, category="political"),
    )
    lay(run.path, sample(1, "general", image=True), sample(2, "general"), sample(3, "health"), kind="refusals")
    found = stats_of(run)
    assert found.turns.counts == {2: 1, 3: 1, 4: 1}
    assert found.turns.mean == 3
    images = found.images
    assert (images.all.counts, images.seed.counts, images.painted.counts) == (
        {0: 1, 2: 1, 3: 1},
        {0: 1, 1: 2},
        {0: 1, 1: 1, 2: 1},
    )
    assert images.all.mean == pytest.approx(5 / 3)
    assert (images.with_image.count, images.with_image.total) == (2, 3)
    assert found.categories == {"fraud": 2, "political": 1}
    assert found.sources == {"house": {"MIT": 2, "CC0-1.0": 1}}
    assert found.losses.images_removed == {"painted": 2}
    assert found.losses.seeds_excluded == 1
    assert found.sizes.seeds == 3
    assert found.sizes.refusals_answered_by == {"template": 3}
    assert found.sizes.refusal_groups == {"general": 2, "health": 1}
    assert (found.sizes.rows, found.sizes.refusals_with_image.count) == (6, 1)
    beside: dict[str, tuple[Any, ...]] = {
        row.figure: (row.ours, row.published, row.difference) for row in found.published
    }
    assert beside["dialogues"] == (3, 11_270, -11_267)
    assert beside["mean turns"] == (3, 4, -1)
    assert beside["mean images"] == (pytest.approx(5 / 3), 1.53, 0.1367)
    assert beside["categories"] == (2, 14, -12)
    assert beside["refusal samples"] == (3, 500, -497)
    assert beside["refusal samples, finance"] == (0, 100, -100)


def test_the_first_unsafe_turn_curve_lets_short_dialogues_leave(tmp_path: Path) -> None:
    run = lay(
        tmp_path / "r",
        judged(1, UNSAFE, SAFE),
        judged(2, SAFE, UNSAFE, UNSAFE, victim="w"),
        judged(3, SAFE, SAFE),
        judged(4, SAFE, SAFE, UNSAFE, SAFE),
        judged(5, UNCLEAR, SAFE, SAFE),
    )
    safety = stats_of(run).safety
    rows = [(p.turn, p.at_risk, p.unsafe, p.censored) for p in safety.first_unsafe]
    assert rows == [(1, 5, 1, 0), (2, 4, 1, 1), (3, 2, 1, 1)]
    # 1 - 1/5, times 1 - 1/4, times 1 - 1/2
    assert [p.survival for p in safety.first_unsafe] == pytest.approx([0.8, 0.6, 0.3])
    assert [p.hazard for p in safety.first_unsafe] == pytest.approx([0.2, 0.25, 0.5])
    assert (safety.asr.count, safety.asr.share) == (3, 0.6)
    assert {turns: (s.count, s.total) for turns, s in safety.asr_by_turns.items()} == {2: (1, 2), 3: (1, 2), 4: (1, 1)}
    assert {victim: (s.count, s.total) for victim, s in safety.asr_by_victim.items()} == {"v": (2, 4), "w": (1, 1)}
    assert safety.verdicts == {"safe": 9, "unsafe": 4, "undetermined": 1}


def test_a_dialogue_without_a_turn_is_never_at_risk(tmp_path: Path) -> None:
    found = stats_of(lay(tmp_path / "r", judged(1), judged(2, UNSAFE)))
    assert [(p.turn, p.at_risk, p.unsafe) for p in found.safety.first_unsafe] == [(1, 1, 1)]
    assert (found.safety.asr.count, found.safety.asr.total) == (1, 2)
    assert found.turns.counts == {0: 1, 1: 1}


def test_refusals_are_counted_by_turn(tmp_path: Path) -> None:
    safety = stats_of(lay(tmp_path / "r", judged(1, FULL, SAFE, SOFT), judged(2, FULL, FULL))).safety
    assert safety.refusals_by_turn == {1: {"full": 2}, 2: {"full": 1, "none": 1}, 3: {"deflect": 1}}
    assert safety.refusals == {"full": 3, "deflect": 1, "none": 1}


def test_aligned_answers_twins_and_losses(tmp_path: Path) -> None:
    good, back, bad = Aligned("a", FULL, False), Aligned("a", SOFT, True), Aligned("a", UNSAFE, True)
    run = lay(
        tmp_path / "r",
        judged(1, UNSAFE, UNSAFE, SAFE, aligned=(good, back, bad)),
        judged(2, SAFE),
        ended(3, "gates", "near_duplicate"),
        ended(4, "gates", "near_duplicate"),
        ended(5, "gates", "similar_images"),
        ended(6, "plan", "blocked", "failed"),
    )
    lay(run.path, judged(1, SAFE, FULL, FULL), judged(2, SAFE), judged(3, UNSAFE), kind="twins")
    lay(run.path, ended(1, "gates", "near_duplicate"), kind="refusals")
    found = stats_of(run)
    assert (found.aligned.answers, found.aligned.safe.count) == (3, 2)
    assert (found.aligned.recoveries_safe.count, found.aligned.recoveries_safe.total) == (1, 2)
    assert (found.twins.over_refusal.count, found.twins.over_refusal.total) == (1, 3)
    assert (found.twins.refused_turns.count, found.twins.refused_turns.total) == (2, 5)
    assert found.twins.unsafe.count == 1
    assert found.sizes.twins == 3
    assert found.sizes.dialogues == 2, "a twin is no dialogue"
    assert found.losses.near_duplicates == {"dialogues": 2, "refusals": 1, "twins": 0}
    assert found.losses.similar_images == 1
    assert (found.losses.yielded.count, found.losses.yielded.total) == (2, 6)
    listed = [(e.line, e.kind, e.stage, e.reason, e.count) for e in found.losses.ended]
    assert listed == [
        ("dialogues", "failed", "plan", "blocked", 1),
        ("dialogues", "rejected", "gates", "near_duplicate", 2),
        ("dialogues", "rejected", "gates", "similar_images", 1),
        ("refusals", "rejected", "gates", "near_duplicate", 1),
    ]


# --- any run ---------------------------------------------------------------------------------------------------------


def random_dialogues(seed: int) -> list[Dialogue]:
    dice = random.Random(seed)
    verdicts = (SAFE, FULL, SOFT, UNSAFE, UNCLEAR)
    return [
        judged(
            number,
            *dice.choices(verdicts, weights=(9, 3, 2, dice.randint(0, 5), 1), k=dice.randint(1, 6)),
            images="".join(dice.choices("sp..", k=6)),
            victim=dice.choice("vw"),
            category=dice.choice(("fraud", "political", "cybercrime")),
        )
        for number in range(dice.randint(1, 60))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_sums_hold_for_any_run(tmp_path: Path, seed: int) -> None:
    dialogues = random_dialogues(seed)
    found = stats_of(lay(tmp_path / "r", *dialogues))
    n, safety, curve = len(dialogues), found.safety, found.safety.first_unsafe
    assert found.sizes.dialogues == n
    for histogram in (found.turns, found.images.all, found.images.seed, found.images.painted):
        assert sum(histogram.counts.values()) == n
    for counts in (found.categories, found.strategies, found.victims):
        assert sum(counts.values()) == n
    total = sum(turns * count for turns, count in found.turns.counts.items())
    assert sum(safety.verdicts.values()) == total
    assert sum(count for kinds in safety.refusals_by_turn.values() for count in kinds.values()) == total
    for shares in (safety.asr_by_turns, safety.asr_by_victim):
        assert sum(share.count for share in shares.values()) == safety.asr.count == sum(p.unsafe for p in curve)
        assert sum(share.total for share in shares.values()) == n
    survival = [1.0, *(point.survival for point in curve)]
    assert all(later <= earlier for earlier, later in pairwise(survival))
    left = n
    for point in curve:
        assert point.at_risk == left
        left -= point.unsafe + point.censored
    assert left == 0
    assert found.images.all.mean == pytest.approx((found.images.seed.mean or 0) + (found.images.painted.mean or 0))


@pytest.mark.parametrize("seed", range(3))
def test_rows_in_another_order_give_the_same_bytes(tmp_path: Path, seed: int) -> None:
    dialogues = random_dialogues(seed)
    mixed = random.Random(seed + 100).sample(dialogues, len(dialogues))
    vectors = Embedder("e", lambda texts: [[1.0 + len(text), 1.0 + text.count("1")] for text in texts])
    one, other = (
        stats_of(lay(tmp_path / name / "r", *order), sample=7, embedder=vectors)
        for name, order in (("one", dialogues), ("other", mixed))
    )
    assert msgspec.json.encode(one) == msgspec.json.encode(other)
    assert one.diversity.sample == min(7, len(dialogues))


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_not_counted(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", judged(1, SAFE), judged(2, SAFE))
    summary = Summary(2, True, Funnel(2, 2), Funnel(), Funnel(), (), {}, 0, False)
    (run.path / "summary.json").write_bytes(msgspec.json.encode(summary))
    assert stats_of(run).about.state == "complete"
    path = run.path / "dialogues.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    found = stats_of(run)
    assert (found.sizes.dialogues, found.about.state) == (1, "incomplete")


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", judged(1, SAFE), judged(2, SAFE))
    path = run.path / "dialogues.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"job":2', b'"job":"two"'))
    assert "dialogues.jsonl:2" in refusal(lambda: stats_of(run))


def test_an_empty_run_has_no_means(tmp_path: Path) -> None:
    found = stats_of(lay(tmp_path / "r"), embedder=Embedder("e", lambda _: pytest.fail("nothing to embed")))
    assert (found.turns.mean, found.images.with_image.share, found.safety.asr.share) == (None, None, None)
    assert (found.safety.first_unsafe, found.diversity.self_bleu_4, found.costs.usd) == ((), None, None)
    shown = text_of(found)
    assert not re.search(r"\b(nan|inf|None)\b", shown)
    assert "NOT COMPLETE" in shown
    assert {row.figure: row.difference for row in found.published}["mean turns"] is None


def test_a_run_that_ended_short_says_so_and_a_complete_one_says_nothing(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", judged(1, SAFE))
    summary = Summary(1, True, Funnel(1, 1), Funnel(), Funnel(), (), {}, 0, False)
    (run.path / "summary.json").write_bytes(msgspec.json.encode(summary))
    assert stats_of(run).about.state == "complete"
    assert sections(stats_of(run))[0].lines == []
    summary.complete, summary.short = False, ("refusals health: 3 of 100",)
    (run.path / "summary.json").write_bytes(msgspec.json.encode(summary))
    shown = "\n".join(sections(stats_of(run))[0].lines)
    assert "USED UP" in shown
    assert "refusals health: 3 of 100" in shown


def test_a_script_in_the_cast_is_named_first(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", judged(1, SAFE), cast=REAL | {"judge": "scripted:demo"})
    found = stats_of(run)
    assert found.about.scripted == ("judge",)
    assert "SCRIPTED (judge): not real model output" in sections(found)[0].lines[0]


# --- diversity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't STOP, please!", ["don't", "stop", ",", "please", "!"]),
        ("\uff21\uff22 e\u0301t\u00e9 3.5", ["ab", "\u00e9t\u00e9", "3", ".", "5"]),
        ("\u4f60\u597d\uff0cworld", ["\u4f60", "\u597d", ",", "world"]),
        (" \n\t", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokens_of(text) == tokens


def test_distinct_n_counts_no_pair_across_two_texts() -> None:
    found = NgramCounter([["a", "b", "a", "b"], ["b", "a"], [], ["c"]]).distinct
    # words a, b, c and pairs ab, ba over 7 tokens; "a c" does not occur
    assert (found.tokens, found.distinct_1, found.distinct_2) == (7, 3 / 7, 2 / 7)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c d e", "a b c d e"], 1.0),
        (["a b c d", "e f g h"], 0.0),
        # 4/5, 3/4, 2/3, 1/2 for each of the two
        (["a b c d e", "a b c d f"], 0.2**0.25),
        # the shorter: all match, brevity exp(1 - 6/4); the longer: 4/6, 3/5, 2/4, 1/3
        (["a b c d", "a b c d e f"], (math.exp(-0.5) + (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25) / 2),
        # one word of four, and 0.1 in place of no pair, triple, quadruple: 1/4, 0.1/3, 0.1/2, 0.1/1
        (["a b c d", "a f g h"], (0.25 * 0.1 / 3 * 0.05 * 0.1) ** 0.25),
        # NLTK 3.10.4, sentence_bleu with SmoothingFunction().method1
        (
            ["the cat sat on the mat", "the cat sat on a red mat", "a dog ran in the park today", "the the the"],
            0.2549987840513433,
        ),
    ],
)
def test_self_bleu_of_known_texts(texts: list[str], expected: float) -> None:
    assert self_bleu([text.split() for text in texts]) == pytest.approx(expected, abs=1e-12)


def plain_self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """The definition, word for word, without the short cut over the two highest counts."""
    scores = []
    for i, text in enumerate(texts):
        others = [other for j, other in enumerate(texts) if j != i]
        score = 1.0
        for n in range(1, 5):
            grams = Counter(tuple(text[k : k + n]) for k in range(len(text) - n + 1))
            seen = [Counter(tuple(other[k : k + n]) for k in range(len(other) - n + 1)) for other in others]
            hits = sum(min(count, max(counts[gram] for counts in seen)) for gram, count in grams.items())
            score *= ((hits or (0.1 if n > 1 else 0)) / max(1, sum(grams.values()))) ** 0.25
        closest = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
        scores.append(score * math.exp(min(0.0, 1 - closest / len(text))))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_self_bleu_is_its_definition(seed: int) -> None:
    dice = random.Random(seed)
    letters = "abcdefghijklmnop"[: dice.choice((3, 6, 16))]
    texts = [dice.choices(letters, k=dice.randint(1, 20)) for _ in range(dice.randint(2, 9))]
    assert self_bleu(texts) == pytest.approx(plain_self_bleu(texts), abs=1e-12)


def test_one_text_has_no_self_bleu_and_an_empty_one_none_in_common() -> None:
    assert self_bleu([["a"]]) is None
    assert self_bleu([[], ["a", "b"]]) == 0


@pytest.mark.parametrize(
    ("vectors", "distance", "vendi"),
    [
        ([[1, 2, 3], [2, 4, 6], [0.1, 0.2, 0.3]], 0, 1),
        ([[1, 0, 0], [0, 5, 0], [0, 0, 0.1]], 1, 3),
        ([[1, 0], [-1, 0]], 2, 1),
        ([[1, 0], [1, 0], [0, 1], [0, 1]], 2 / 3, 2),
        # NumPy 2.4.6, eigvalsh
        ([[1, 0, 0], [1, 1, 0], [0, 1, 2], [-1, 0.5, 0.25]], 0.9612972807475592, 2.4563507026882383),
    ],
)
@pytest.mark.parametrize("numpy", [True, False])
def test_the_spread_of_known_vectors(
    vectors: list[list[float]], distance: float, vendi: float, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not numpy:
        monkeypatch.setitem(sys.modules, "numpy", None)
    assert mean_cosine_distance(vectors) == pytest.approx(distance, abs=1e-12)
    assert vendi_score(vectors) == pytest.approx(vendi, abs=1e-9)


def test_pure_python_and_numpy_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(7)
    vectors = [[dice.gauss(0.3, 1) for _ in range(24)] for _ in range(60)]
    with_numpy = (mean_cosine_distance(vectors), vendi_score(vectors))
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert (mean_cosine_distance(vectors), vendi_score(vectors)) == pytest.approx(with_numpy, abs=1e-9)


def test_without_numpy_the_vendi_score_of_a_large_sample_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogues = [judged(i, SAFE) for i in range(PURE_PYTHON + 1)]
    vectors = Embedder("e", lambda texts: [[1.0 + i % 7, 1.0] for i, _ in enumerate(texts)])
    run = lay(tmp_path / "r", *dialogues)
    exact = stats_of(run, sample=500, embedder=vectors).diversity.dispersion
    monkeypatch.setitem(sys.modules, "numpy", None)
    found = stats_of(run, sample=500, embedder=vectors)
    assert exact is not None
    assert exact.vendi is not None
    assert found.diversity.dispersion is not None
    assert found.diversity.dispersion.vendi is None
    assert found.diversity.dispersion.mean_cosine_distance == pytest.approx(exact.mean_cosine_distance, abs=1e-9)
    assert "Vendi score of more than 200: not measured; pip install 'intersafe[figures]'" in text_of(found)


# --- tokens and cost -------------------------------------------------------------------------------------------------

ENTRIES = [
    Entry(0, "a", "attacker", "", tokens=(1_000_000, 500_000)),
    Entry(0, "b", "victim:0", "", tokens=(2_000_000, 0)),
    Entry(0, "c", "victim:1", "", tokens=(0, 2_000_000)),
    Entry(0, "d", "painter", ""),
    Entry(0, "e", "painter", ""),
]


def prices_of(*texts: str) -> dict[str, Price]:
    return dict(PRICE.convert(text, None, None) for text in texts)


def test_cost_by_role_where_a_role_has_a_price(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", judged(1, SAFE), judged(2, SAFE), entries=ENTRIES)
    some = stats_of(run, prices=prices_of("victim=1,2", "victim:1=0,0", "painter=0,0,0.25")).costs
    assert {role: cost.usd for role, cost in some.roles.items()} == {
        "attacker": None, "painter": 0.5, "victim:0": 2.0, "victim:1": 0.0,
    }  # fmt: skip
    assert (some.usd, some.usd_per_dialogue, some.unpriced) == (2.5, None, ("attacker",))
    every = stats_of(run, prices=prices_of("victim=1,2", "attacker=1,2", "painter=0,0")).costs
    assert (every.usd, every.usd_per_dialogue, every.unpriced) == (8.0, 4.0, ())
    assert stats_of(run).costs.usd is None


@pytest.mark.parametrize(
    "price",
    ["judge", "judge=", "judge=1", "judge=1,2,3,4", "=1,2", "judge=1,-2", "judge=nan,1", "judge=inf,1"],
)
def test_a_price_that_is_none_is_refused(price: str) -> None:
    flag = click.Option(["--price"])
    assert refusal(lambda: PRICE.convert(price, flag, None)).startswith(f"--price: {price!r} is not a price; write")


def test_a_price_of_an_unknown_role_is_refused(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", judged(1, SAFE), entries=ENTRIES)
    message = refusal(lambda: stats_of(run, prices=prices_of("x=1,2")))
    assert message.startswith("prices: no role 'x' in this run; roles: attacker, ")
    done = cli("stats", "./r", "--price", "x=1,2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("intersafe: --price: no role 'x' in this run; roles: attacker, ")


def test_two_prices_for_a_role_are_refused(tmp_path: Path) -> None:
    lay(tmp_path / "r", judged(1, SAFE))
    done = cli("stats", "./r", "--price", "judge=1,2", "--price", "judge=1,2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "intersafe: --price: two prices for judge; pass one\n"


# --- an embedder over real HTTP --------------------------------------------------------------------------------------

NO_WAIT = Limits(timeout=5, patience=0, retries=2)


def vectors_of(request: Request) -> Answer:
    """One vector a text, by its length; last text first, since the index and not the place counts."""
    data = [{"index": i, "embedding": [float(len(t)), 1.0]} for i, t in enumerate(request.body["input"])]
    return raw(json.dumps({"data": data[::-1], "model": "m", "usage": {}}).encode())


def embedder_at(server: FaultServer, key: str = "") -> Embedder:
    return open_embedder(f"openai:some/m@{server.url}", key, Hooks(), NO_WAIT)


def test_texts_go_to_the_server_in_batches_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_EMBEDDER_KEY", "sk-secret")
    texts = ["x" * i for i in range(1, 131)]
    with FaultServer(vectors_of) as server:
        vectors = embedder_at(server, "TEST_EMBEDDER_KEY").embed(texts)
    assert vectors == [[float(i), 1.0] for i in range(1, 131)]
    assert {request.path for request in server.requests} == {"/v1/embeddings"}
    assert [text for request in server.requests for text in request.body["input"]] == texts
    assert {request.body["model"] for request in server.requests} == {"some/m"}
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer sk-secret"}


def test_the_dispersion_of_a_run_is_that_of_its_users_sides(tmp_path: Path) -> None:
    dialogues = [judged(i, SAFE, SAFE, texts=("a" * i, "b")) for i in range(1, 4)]
    with FaultServer(vectors_of) as server:
        found = stats_of(lay(tmp_path / "r", *dialogues), embedder=embedder_at(server)).diversity
    assert sorted(server.requests[0].body["input"]) == ["a\nb", "aa\nb", "aaa\nb"]
    assert "Authorization" not in server.requests[0].headers
    assert found.dispersion is not None
    assert (found.dispersion.embedder, found.dispersion.dimensions) == ("openai:some/m", 2)
    vectors = [[3.0, 1.0], [4.0, 1.0], [5.0, 1.0]]
    assert found.dispersion.mean_cosine_distance == pytest.approx(mean_cosine_distance(vectors), abs=1e-12)
    assert found.dispersion.vendi == pytest.approx(vendi_score(vectors), abs=1e-9)


def embeddings(*items: dict[str, Any]) -> Answer:
    return raw(json.dumps({"data": items}).encode())


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"<html>"),
        reply("I am a chat model"),
        embeddings({"index": 0, "embedding": [1.0]}),
        embeddings({"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}),
        embeddings({"index": 0, "embedding": [1.0, 2.0]}, {"index": 1, "embedding": [1.0]}),
        embeddings({"index": 0, "embedding": [0.0]}, {"index": 1, "embedding": [1.0]}),
        embeddings({"index": 0, "embedding": []}, {"index": 1, "embedding": []}),
        error(400, "input too long"),
        error(400, "blocked", code="content_filter"),
    ],
)
def test_an_answer_without_use_is_one_line(answer: Answer) -> None:
    with FaultServer(lambda _: answer) as server:
        assert "--embedder" in refusal(lambda: embedder_at(server).embed(["a", "b"]))


def test_a_server_that_is_away_is_no_bad_input_and_the_key_stays_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_EMBEDDER_KEY", "sk-secret")
    with FaultServer(lambda _: error(401, "wrong key sk-secret")) as server:
        with pytest.raises(ServiceGone) as caught:
            embedder_at(server, "TEST_EMBEDDER_KEY").embed(["a"])
        assert "sk-secret" not in str(caught.value)
        away = embedder_at(server)
    with pytest.raises(ServiceGone):
        away.embed(["a"])


def test_an_embedder_that_is_none_is_refused() -> None:
    bad: list[Callable[[], object]] = [
        lambda: open_embedder("scripted:demo", "", Hooks()),
        lambda: open_embedder("m", "", Hooks()),
        lambda: open_embedder("openai:m@http://127.0.0.1:1/v1", "TEST_NO_SUCH_VARIABLE", Hooks()),
    ]
    for act in bad:
        refusal(act)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_and_leaves_the_run_alone(tmp_path: Path) -> None:
    run = lay(tmp_path / "r", judged(1, SAFE, UNSAFE, victim="v\x1b[31m"), entries=ENTRIES)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    done = cli("stats", "./r", "--json", "out/figures.json", "--price", "painter=0,0,0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "dialogues with an unsafe turn (ASR)" in done.stdout
    assert "total 1.00 USD; without a price: attacker, victim:0, victim:1" in done.stdout
    assert "not measured; pass --embedder" in done.stdout
    alone = cli("stats", "./r", "--json", "-", "--price", "painter=0,0,0.5", cwd=tmp_path)
    assert alone.stdout == (tmp_path / "out/figures.json").read_text()
    assert msgspec.json.decode(alone.stdout, type=Stats).safety.asr.count == 1
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "words",
    [
        ("stats", "nowhere"),
        ("stats", "./r", "--json", "r/figures.json"),
        ("stats", "./r", "--json", "elsewhere/../r/x/figures.json"),
        ("stats", "./r", "--json", "."),
        ("stats", "./r", "--json", ""),
        ("stats", "./r", "--price", "painter=1,1"),
        ("stats", "./r", "--price", "judge=cheap"),
        ("stats", "./r", "--embedder", "scripted:demo"),
        ("stats", "./r", "--embedder-key", "KEY"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    lay(tmp_path / "r", judged(1, SAFE))
    files = sorted(tmp_path.rglob("*"))
    done = cli(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("intersafe: ")
    assert done.stderr.count("\n") == 1
    assert ";" in done.stderr
    assert sorted(tmp_path.rglob("*")) == files


def test_a_reader_that_left_is_no_traceback(tmp_path: Path) -> None:
    lay(tmp_path / "r", judged(1, SAFE))
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "intersafe", "stats", "./r"]
    done = subprocess.run(words, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(write)
    assert b"Traceback" not in done.stderr
