"""The card, the changelog and Croissant: what machines read in them, what they must not hold, what survives."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec import structs

from intersafe.release.card import KEEP, KEEP_END, card_files, kept_text, render_card
from intersafe.release.licenses import is_noncommercial, license_of
from intersafe.release.manifest import ReleaseManifest, Version
from intersafe.release.package import Packaged, PackageOptions, package, set_repository
from intersafe.release.rows import COLUMNS
from intersafe.release.shards import check_release
from intersafe.run.directory import Run
from tests.support.packaged_runs import digests, grown, kept_turns, rows_of, shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    run = grown(tmp_path_factory.mktemp("card") / "run")
    return package(run, PackageOptions(test_share=0.2, include_unsafe=True))


@pytest.fixture(scope="module")
def run(made: Packaged) -> Run:
    return Run(made.path.parent.parent)


def front(card: str) -> dict[str, Any]:
    """The YAML of a card."""
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def body(card: str) -> str:
    return card.split("---\n", 2)[2]


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_the_hubs_own_reader_takes_the_yaml(made: Packaged) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.DatasetCard((made.path / "README.md").read_text())
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert {"not-for-all-audiences", "synthetic", "safety"} <= set(data["tags"])
    assert data["extra_gated_fields"]
    assert data["task_categories"][0] == "image-text-to-text"


def test_the_patterns_of_the_yaml_find_every_shard_once_and_in_its_split(made: Packaged) -> None:
    found: list[Path] = []
    for config in front((made.path / "README.md").read_text())["configs"]:
        for files in config["data_files"]:
            matched = sorted(made.path.glob(files["path"]))
            assert matched
            assert all(path.parent.name == config["config_name"] for path in matched)
            assert all(path.name.startswith(f"{files['split']}-") for path in matched)
            found += matched
    assert sorted(found) == shards(made.path)


def test_the_yaml_counts_the_rows_and_names_the_columns(made: Packaged) -> None:
    for info in front((made.path / "README.md").read_text())["dataset_info"]:
        config = info["config_name"]
        assert [feature["name"] for feature in info["features"]] == [column.name for column in COLUMNS[config]]
        for split in info["splits"]:
            assert split["num_examples"] == len(rows_of(made.path, config, split["name"]))
        assert info["download_size"] == sum(path.stat().st_size for path in shards(made.path, config))


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_scripted_release_says_so_first(made: Packaged) -> None:
    first = body((made.path / "README.md").read_text()).splitlines()[0]
    assert "nothing in this release is real model output" in first
    real = structs.replace(made.manifest, scripted=False)
    assert "nothing in this release is real" not in render_card(real, "a/b")


def test_no_text_of_the_data_is_in_card_changelog_croissant_or_manifest(made: Packaged, run: Run) -> None:
    texts = {text for record in (*run.dialogues(), *run.twins()) for text in kept_turns(record)}
    texts |= {turn.aligned.text for d in run.dialogues() for turn in d.turns if turn.aligned}
    texts |= {text for sample in run.refusals() for text in (sample.question, sample.answer)}
    texts |= {dialogue.seed.query for dialogue in run.dialogues()} | {sample.seed.query for sample in run.refusals()}
    pieces = {piece for text in texts for piece in re.split(r"(?<=[.?!]) ", text) if len(piece) > 20}
    for path in made.path.iterdir():
        if path.is_file():
            text = path.read_text()
            assert not [piece for piece in pieces if piece in text], path.name


def test_the_figures_are_those_of_the_rows(made: Packaged) -> None:
    card = (made.path / "README.md").read_text()
    dialogues = rows_of(made.path, "dialogues")
    unsafe = sum(row["first_unsafe_turn"] is not None for row in dialogues)
    withheld = sum(label["withheld"] for row in dialogues for label in json.loads(row["turn_labels"]))
    assert f"{unsafe} of {len(dialogues)}" in card
    assert f"{withheld:,} replies" in card
    for category in {row["category"] for row in dialogues}:
        count = sum(row["category"] == category for row in dialogues)
        assert f"| {category} | {count} |" in card
    for line in (run_line for run_line in card.splitlines() if run_line.startswith("load_dataset(")):
        assert f'revision="v{made.manifest.version}"' in line
    for ended in made.manifest.counts["figures"]["ended"]:
        assert f"| {ended[3]} | {ended[4]} |" in card


def test_words_from_outside_cannot_break_a_table_or_add_markup(made: Packaged) -> None:
    counts = json.loads(json.dumps(made.manifest.counts))
    counts["configs"]["dialogues"]["sources"] = {"a|b\n# Heading <script>": {"MIT | --- |": 40}}
    hostile = structs.replace(made.manifest, counts=counts, name="`x`\n# Heading", models={"judge": "a|b\n<img>"})
    card = render_card(hostile, "a/b")
    assert "<script>" not in card
    assert "<img>" not in card
    assert "\n# Heading" not in card
    rows = [line for line in card.splitlines() if "a\\|b" in line]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 6) for line in rows)


# --- what a person wrote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_text_between_the_markers_survives(made: Packaged, seed: int) -> None:
    draw = random.Random(seed)
    words = [
        "---",
        "# Thanks",
        "| a | b |",
        "```",
        KEEP,
        "",
        "é 漢 🙂",
        "license: mit",
        "<b>",
        "\\",
        "%s {x}",
        "trailing  ",
    ]
    text = "\n".join(draw.choice(words) for _ in range(draw.randrange(8))).strip("\n")
    card = render_card(made.manifest, "a/b", text)
    assert kept_text(card) == text
    assert render_card(made.manifest, "a/b", kept_text(card)) == card
    assert front(card) == front(render_card(made.manifest, "a/b"))


@pytest.mark.parametrize("card", ["", "no markers", KEEP, KEEP_END, f"{KEEP_END} x {KEEP}"])
def test_a_card_without_both_markers_keeps_nothing(card: str) -> None:
    assert kept_text(card) == ""


def test_addressing_a_release_fills_in_the_repository_and_is_stable(made: Packaged, tmp_path: Path) -> None:
    shutil.copytree(made.path, tmp_path / "release")
    set_repository(tmp_path / "release", "ada/safe-talk", "Kept.")
    check_release(tmp_path / "release")
    first = digests(tmp_path / "release")
    card = (tmp_path / "release/README.md").read_text()
    assert 'load_dataset("ada/safe-talk", "dialogues", revision="v1.0.0")' in card
    assert "ORG/NAME" not in card + (tmp_path / "release/croissant.json").read_text()
    set_repository(tmp_path / "release", "ada/safe-talk")
    assert digests(tmp_path / "release") == first


def test_the_changelog_is_continued(made: Packaged, tmp_path: Path) -> None:
    shutil.copytree(made.path.parent.parent, tmp_path / "run")
    log = tmp_path / "run/release/1.0.0/CHANGELOG.md"
    log.write_text(log.read_text() + "\nA line by hand.\n")
    done = package(Run(tmp_path / "run"), PackageOptions(Version(1, 0, 1), include_unsafe=True))
    text = (done.path / "CHANGELOG.md").read_text()
    assert text.count("# Changelog\n") == 1
    assert text.index("## 1.0.1") < text.index("## 1.0.0") < text.index("A line by hand.")
    assert "The rows are those of 1.0.0" in text


# --- licences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "license_id"),
    [
        (["MIT"], "mit"),
        (["CC0-1.0", "MIT", "Apache-2.0"], "apache-2.0"),
        (["CC-BY-4.0", "MIT"], "cc-by-4.0"),
        (["CC-BY-NC-4.0", "MIT", "CC-BY-4.0"], "cc-by-nc-4.0"),
        (["CC-BY-SA-4.0", "CC-BY-4.0"], "cc-by-sa-4.0"),
        (["CC-BY-NC-SA-4.0", "CC-BY-NC-4.0"], "cc-by-nc-sa-4.0"),
        (["CC-BY-NC-4.0", "CC-BY-SA-4.0"], "other"),
        (["CC-BY-NC-SA-4.0", "CC-BY-SA-4.0"], "other"),
        (["ODbL-1.0", "CC-BY-SA-4.0"], "other"),
        (["CC-BY-ND-4.0"], "other"),
        (["CC-BY-NC-ND-4.0", "MIT"], "other"),
        (["my own", "MIT"], "other"),
        ([""], "other"),
        ([], "other"),
    ],
)
def test_the_strictest_licence_wins_and_a_conflict_is_other(sources: list[str], license_id: str) -> None:
    for order in (sources, sources[::-1]):
        assert license_of(dict.fromkeys(order, 3)) == license_id


def test_no_rows_of_a_licence_do_not_count() -> None:
    assert license_of({"MIT": 1, "CC-BY-NC-4.0": 0}) == "mit"


KNOWN = (
    "CC0-1.0", "MIT", "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0", "ODbL-1.0", "CC-BY-NC-ND-4.0", "proprietary", "Non-Commercial",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(50))
def test_non_commercial_rows_never_get_a_permissive_licence(seed: int) -> None:
    draw = random.Random(seed)
    sources = {name: draw.randrange(3) for name in draw.sample(KNOWN, 4)}
    if is_noncommercial(sources):
        assert license_of(sources) == "other" or "-nc" in license_of(sources)


def test_a_mixed_release_has_a_table_and_every_row_its_licence(made: Packaged) -> None:
    mixed = structs.replace(made.manifest, licenses={"CC-BY-NC-4.0": 3, "CC-BY-SA-4.0": 2})
    card = render_card(mixed, "a/b")
    assert front(card)["license"] == "other"
    assert front(card)["license_name"]
    assert "No single licence holds" in card


# --- Croissant -------------------------------------------------------------------------------------------------------


def croissant(manifest: ReleaseManifest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(card_files(manifest, "ada/safe-talk")["croissant.json"])
    return found


def test_croissant_describes_every_column_of_every_config(made: Packaged) -> None:
    data = croissant(made.manifest)
    assert "http://mlcommons.org/croissant/RAI/1.0" in data["conformsTo"]
    sets = {each["@id"]: each for each in data["recordSet"]}
    assert set(sets) == {path.parent.name for path in shards(made.path)}
    for config, each in sets.items():
        assert [f["@id"] for f in each["field"]] == [f"{config}/{column.name}" for column in COLUMNS[config]]


def test_every_reference_in_croissant_leads_somewhere(made: Packaged) -> None:
    data = croissant(made.manifest)
    ids, references = set(), set()

    def walk(value: Any, place: str) -> None:
        if isinstance(value, dict):
            if set(value) == {"@id"}:
                references.add(value["@id"])
            elif "@id" in value and "@type" in value:
                assert value["@id"] not in ids, "named twice"
                ids.add(value["@id"])
            for name, inner in value.items():
                walk(inner, name)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, place)

    walk({name: value for name, value in data.items() if name != "@context"}, "")
    assert references
    assert references <= ids
    includes = [each["includes"] for each in data["distribution"] if each["@type"] == "cr:FileSet"]
    assert sorted(path for pattern in includes for path in made.path.glob(pattern)) == shards(made.path)


def test_croissant_answers_the_responsible_ai_questions(made: Packaged) -> None:
    data = croissant(made.manifest)
    for name in ("dataCollection", "dataLimitations", "dataBiases", "dataUseCases", "personalSensitiveInformation"):
        assert len(data[f"rai:{name}"]) > 20
    assert "nothing in it is real model output" in data["rai:dataCollection"]
    assert "in full" in data["rai:dataManipulationProtocol"]


def test_mlcroissant_takes_it(made: Packaged, tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    (tmp_path / "croissant.json").write_text(json.dumps(croissant(made.manifest)))
    dataset = mlcroissant.Dataset(jsonld=str(tmp_path / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
