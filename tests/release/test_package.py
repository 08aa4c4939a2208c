"""A run as a release: what is in it, what must not be, the same bytes always, and whole or not at all."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec import structs

from intersafe.cli.values import SHARD_SIZE
from intersafe.errors import InputError
from intersafe.generation.generate import generate_dialogues
from intersafe.recipe.sections import digest_of
from intersafe.release.card import KEEP, KEEP_END
from intersafe.release.manifest import MANIFEST, Version, read_manifest, sha256_of, write_manifest
from intersafe.release.package import Packaged, PackageOptions, VersionTaken, package
from intersafe.release.rows import COLUMNS, public_identity, refusal_row, split_of
from intersafe.release.shards import check_release, write_shard
from intersafe.run.directory import Run
from tests.support.chat_and_images import both_servers, few
from tests.support.packaged_runs import digests, grown, kept_turns, published, rows_of, shards, unsafe_texts
from tests.support.runs import cli, refusal, rows
from tests.support.seeds import seeds_in

PARTS = PackageOptions(test_share=0.2, shard_bytes=60_000, allow_incomplete=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return grown(tmp_path_factory.mktemp("package") / "run")


@pytest.fixture
def run(original: Run, tmp_path: Path) -> Run:
    """A copy to package."""
    shutil.copytree(original.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def made(original: Run, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    path = tmp_path_factory.mktemp("made") / "run"
    shutil.copytree(original.path, path)
    return package(Run(path), PARTS)


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_run(original: Run, made: Packaged) -> None:
    dialogues = {d.id: d for d in original.dialogues()}
    found = rows_of(made.path, "dialogues")
    assert sorted(row["id"] for row in found) == sorted(dialogues)
    for row in found:
        dialogue = dialogues[row["id"]]
        texts = [message["content"][-1]["text"] for message in row["messages"]]
        kinds = [part["type"] for message in row["messages"] for part in message["content"]]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * len(dialogue.turns)
        assert kinds.count("image") == len(row["images"]) == len(dialogue.images)
        assert [image["path"] for image in row["images"]] == list(dialogue.images)
        assert all(image["bytes"] == original.image(image["path"]) for image in row["images"])
        assert row["aligned"] == [turn.aligned.text for turn in dialogue.turns if turn.aligned]
        assert row["first_unsafe_turn"] == dialogue.first_unsafe_turn
        labels = json.loads(row["turn_labels"])
        assert [label["safety"] for label in labels] == [turn.verdict.safety for turn in dialogue.turns]
        for said, text, place in zip(kept_turns(dialogue), texts, range(len(texts)), strict=True):
            assert (said != text) is (place % 2 == 1 and labels[place // 2]["withheld"])
    assert {r["id"]: (r["question"], r["answer"]) for r in rows_of(made.path, "refusal_vqa")} == {
        s.id: (s.question, s.answer) for s in original.refusals()
    }
    assert {r["id"]: (r["twin_of"], r["goal"]) for r in rows_of(made.path, "twins")} == {
        t.id: (t.twin_of, t.goal) for t in original.twins()
    }


def test_every_content_part_has_exactly_type_and_text_and_no_list_is_null(made: Packaged) -> None:
    for row in (*rows_of(made.path, "dialogues"), *rows_of(made.path, "twins")):
        assert row["images"] is not None
        assert row["aligned"] is not None
        for message in row["messages"]:
            assert message.keys() == {"role", "content"}
            for part in message["content"]:
                assert part.keys() == {"type", "text"}
                assert (part["text"] is None) == (part["type"] == "image")


def test_a_withheld_reply_is_named_by_its_hash_its_length_and_its_labels(original: Run, made: Packaged) -> None:
    rows = {row["id"]: row for row in rows_of(made.path, "dialogues")}
    seen = 0
    for dialogue in original.dialogues():
        for place, turn in enumerate(dialogue.turns):
            text = rows[dialogue.id]["messages"][2 * place + 1]["content"][0]["text"]
            if turn.verdict.safety == "safe":
                assert text == turn.reply.text
                continue
            seen += 1
            assert text.startswith("[WITHHELD unsafe reply, ")
            assert hashlib.sha256(turn.reply.text.encode()).hexdigest() in text
            assert f", {len(turn.reply.text)} characters, " in text
    assert seen > 10


def test_no_seed_is_in_two_splits_of_any_config(made: Packaged) -> None:
    seeds = {
        split: {row["seed_id"] for config in COLUMNS for row in rows_of(made.path, config, split)}
        for split in ("train", "test")
    }
    assert seeds["train"]
    assert seeds["test"]
    assert not seeds["train"] & seeds["test"]


def test_a_larger_share_only_moves_seeds_into_test() -> None:
    seeds = [f"seed-{number}" for number in range(4000)]
    sizes = []
    before: set[str] = set()
    for share in (0.0, 0.01, 0.05, 0.2, 0.5):
        test = {seed for seed in seeds if split_of(seed, share) == "test"}
        assert before <= test
        sizes.append(len(test) / len(seeds))
        before = test
    assert sizes == pytest.approx([0, 0.01, 0.05, 0.2, 0.5], abs=0.02)


def test_row_groups_are_small_and_images_are_stored_as_they_are(made: Packaged) -> None:
    for path in shards(made.path):
        meta = pq.ParquetFile(path).metadata
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            assert group.num_rows <= 100
            for place in range(group.num_columns):
                column = group.column(place)
                assert (column.compression == "UNCOMPRESSED") == column.path_in_schema.endswith(".bytes")
                assert column.has_offset_index


# --- what must not be in it ------------------------------------------------------------------------------------------


def test_unsafe_texts_are_in_no_byte(original: Run, made: Packaged) -> None:
    texts = unsafe_texts(original)
    assert len(texts) > 10
    everything = published(made.path)
    assert not [text for text in texts if text.encode() in everything]
    assert b"scripted placeholder for an unsafe reply" not in everything


def test_queries_plans_descriptions_reasons_and_pruned_turns_are_in_no_byte(original: Run, made: Packaged) -> None:
    texts: set[str] = set()
    for record in (*original.dialogues(), *original.twins()):
        said = {message.text for message in record.messages}
        texts.add(record.seed.query)
        texts |= {step.text for step in record.plan.steps} - said
        texts |= {origin.description for turn in record.turns for origin in turn.origins}
        texts |= {pruned.turn.user.text for pruned in record.pruned} | {p.turn.reply.text for p in record.pruned}
        texts |= {turn.verdict.reason for turn in record.turns} | {record.check.reason}
    everything = published(made.path)
    assert not [text for text in texts - {""} if text.encode() in everything]


def test_with_include_unsafe_the_full_texts_are_in_their_own_config_alone(original: Run, run: Run) -> None:
    done = package(run, PARTS._replace(include_unsafe=True))
    assert done.manifest.includes_unsafe
    everything = published(done.path, but="dialogues_unsafe")
    assert not [text for text in unsafe_texts(original) if text.encode() in everything]
    full = {row["id"]: row for row in rows_of(done.path, "dialogues_unsafe")}
    assert set(full) == {d.id for d in original.dialogues() if d.first_unsafe_turn}
    for dialogue in original.dialogues():
        if dialogue.first_unsafe_turn:
            texts = [message["content"][-1]["text"] for message in full[dialogue.id]["messages"]]
            assert texts == kept_turns(dialogue)
    pruned = {p.turn.reply.text for d in original.dialogues() for p in d.pruned} - {
        turn.reply.text for d in original.dialogues() for turn in d.turns
    }
    assert not [text for text in pruned if text.encode() in published(done.path)]
    after = package(run, PARTS)
    assert not after.manifest.includes_unsafe
    assert not shards(after.path, "dialogues_unsafe")


def test_no_path_host_user_url_or_key_is_in_any_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEASE_TEST_KEY", "sk-very-secret-0123456789")
    with both_servers() as both:
        recipe = both.recipe(seeds_in(tmp_path / "where-seeds-lie"), images=few(1))
        member = structs.replace(recipe.cast.attacker, key="RELEASE_TEST_KEY", revision="main")
        recipe = structs.replace(recipe, cast=structs.replace(recipe.cast, attacker=member))
        run = generate_dialogues(recipe, run=tmp_path / "a-run", n=8)
        urls = [both.chat.url, both.images.url]
    done = package(run, PackageOptions(test_share=0.3))
    everything = published(done.path)
    words = [str(tmp_path), str(Path.cwd()), str(Path.home()) + "/", socket.gethostname(), "127.0.0.1", "localhost"]
    words += [*urls, "RELEASE_TEST_KEY", "sk-very-secret", "where-seeds-lie", "a-run", "/tmp/", sys.prefix]
    assert not [word for word in words if word.encode() in everything]
    assert b"openai:scripted#main" in everything


@pytest.mark.parametrize(
    ("identity", "public"),
    [
        ("openai:Qwen/Qwen2.5-VL-7B-Instruct", "openai:Qwen/Qwen2.5-VL-7B-Instruct"),
        ("diffusers:/home/ada/models/qwen-image", "diffusers:qwen-image"),
        ("diffusers:~/models/qwen-image/", "diffusers:qwen-image"),
        ("diffusers:../models/qwen-image#v2", "diffusers:qwen-image#v2"),
        ("openai:accounts/x/models/y", "openai:accounts/x/models/y"),
    ],
)
def test_a_model_in_a_folder_loses_the_way_to_it(identity: str, public: str) -> None:
    assert public_identity(identity) == public


def test_a_model_in_a_folder_is_published_without_the_way_to_it(run: Run) -> None:
    for name in NAMES:
        text = b"".join(lines(run, name)).replace(b"scripted:", b"diffusers:/home/ada/models/")
        (run.path / name).write_bytes(text)
    path = run.path / "recipe.json"
    recipe = json.loads(path.read_bytes().replace(b"scripted:", b"diffusers:/home/ada/models/"))
    path.write_text(json.dumps(recipe | {"digest": digest_of(recipe["recipe"])}))
    done = package(Run(run.path), PARTS)
    everything = published(done.path)
    assert b"diffusers:careful" in everything
    assert b"/home/ada" not in everything


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes_in_any_process(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "elsewhere" / "copy")
    done = package(run, PackageOptions())
    out = cli("package", "./copy", cwd=tmp_path / "elsewhere", PYTHONHASHSEED="7", TZ="Asia/Tokyo", LC_ALL="C")
    assert out.returncode == 0, out.stderr
    assert digests(tmp_path / "elsewhere/copy/release/1.0.0") == digests(done.path)
    assert str(done.path.relative_to(tmp_path / "run")) in out.stdout


def test_packaging_again_changes_nothing(run: Run) -> None:
    first = package(run, PackageOptions())
    before = digests(run.path)
    for version in (None, Version(1, 0, 0)):
        again = package(run, PackageOptions(version))
        assert (again.path, again.made) == (first.path, False)
    assert digests(run.path) == before


def lines(run: Run, name: str) -> list[bytes]:
    return (run.path / name).read_bytes().splitlines(keepends=True)


def edited(line: bytes, mark: str) -> bytes:
    """A dialogue, twin or sample whose row is another one: a label, or the question."""
    row = json.loads(line)
    if "turns" in row:
        row["turns"][0]["user"]["text"] += f" {mark}"
    else:
        row["question"] += f" {mark}"
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def asked(row: dict[str, Any]) -> str:
    """What `edited` changes, of a row of the run or of the release."""
    if "question" in row:
        return str(row["question"])
    return str(row["turns"][0]["user"]["text"] if "turns" in row else row["messages"][0]["content"][-1]["text"])


NAMES = {"dialogues.jsonl": "dialogues", "refusals.jsonl": "refusal_vqa", "twins.jsonl": "twins"}


@pytest.mark.parametrize("seed", range(6))
def test_after_any_edits_only_the_shards_of_edited_rows_change(run: Run, seed: int) -> None:
    draw = random.Random(seed)
    pool = {name: lines(run, name) for name in NAMES}
    held = {name: all_lines[: max(1, 2 * len(all_lines) // 3)] for name, all_lines in pool.items()}
    for name in NAMES:
        (run.path / name).write_bytes(b"".join(held[name]))
    before = package(run, PARTS)
    for step in range(3):
        touched: set[str] = set()
        old_lines = dict(held)
        for name in NAMES:
            new = []
            for line in held[name]:
                fate = draw.random()
                if fate < 0.06:
                    touched.add(json.loads(line)["id"])
                    if fate < 0.03:
                        new.append(edited(line, f"edit {step}"))
                else:
                    new.append(line)
            extra = [line for line in pool[name] if json.loads(line)["id"] not in {json.loads(x)["id"] for x in new}]
            new += draw.sample(extra, min(len(extra), draw.randrange(4)))
            held[name] = new or held[name]
            (run.path / name).write_bytes(b"".join(held[name]))
        after = package(run, PARTS)
        old = {path.relative_to(before.path): path for path in shards(before.path)}
        now = {path.relative_to(after.path): path for path in shards(after.path)}
        standing = {line["id"] for name in NAMES for line in map(json.loads, held[name])}
        for place, path in old.items():
            ids = {row["id"] for row in pq.ParquetFile(path).read(columns=["id"]).to_pylist()}
            if not ids & touched and ids <= standing:
                assert sha256_of(now[place]) == sha256_of(path)
        for name, config in NAMES.items():
            assert {row["id"]: asked(row) for row in rows_of(after.path, config)} == {
                row["id"]: asked(row) for row in map(json.loads, held[name])
            }
            was, is_now = ({json.loads(line)["id"] for line in each[name]} for each in (old_lines, held))
            changed = {json.loads(line)["id"] for line in set(held[name]) - set(old_lines[name])} & was
            counts = after.manifest.counts["changes"][config]
            assert counts == [len(is_now - was), len(changed), len(was - is_now)]
        check_release(after.path)
        before = after


def test_without_its_first_row_most_of_a_shard_of_text_is_the_same(original: Run, tmp_path: Path) -> None:
    draw = random.Random(5)
    row = refusal_row(next(iter(original.refusals()))) | {"image": None}
    words = ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(4000)]
    rows = [row | {"id": f"{i:05d}", "answer": " ".join(draw.choices(words, k=150))} for i in range(4000)]
    write_shard(tmp_path / "all.parquet", "refusal_vqa", rows, original.image)
    write_shard(tmp_path / "rest.parquet", "refusal_vqa", rows[1:], original.image)
    whole, rest = (tmp_path / "all.parquet").read_bytes(), (tmp_path / "rest.parquet").read_bytes()
    places = [draw.randrange(len(whole) - 64) for _ in range(300)]
    assert sum(whole[place : place + 64] in rest for place in places) > 200


def test_a_run_that_has_grown_adds_shards_and_keeps_the_others(tmp_path: Path) -> None:
    run = grown(tmp_path / "run", 20)
    first = package(run, PackageOptions())
    grown(tmp_path / "run", 30)
    second = package(run, PackageOptions())
    assert second.path.name == "1.1.0"
    assert second.manifest.parent_version == "1.0.0"
    old, new = digests(first.path), digests(second.path)
    kept = {name for name in old if name.startswith("data/dialogues/")}
    assert kept
    assert {name: new[name] for name in kept} == {name: old[name] for name in kept}
    assert second.manifest.counts["changes"]["dialogues"] == [10, 0, 0]
    assert (second.path / "CHANGELOG.md").read_text().index("## 1.1.0") < (
        (second.path / "CHANGELOG.md").read_text().index("## 1.0.0")
    )
    check_release(second.path)


def test_a_release_from_elsewhere_can_be_continued(run: Run, original: Run, tmp_path: Path) -> None:
    first = package(run, PackageOptions())
    shutil.copytree(first.path, tmp_path / "pulled")
    shutil.copytree(original.path, tmp_path / "other")
    (tmp_path / "other/dialogues.jsonl").write_bytes(b"".join(lines(original, "dialogues.jsonl")[:-1]))
    done = package(Run(tmp_path / "other"), PackageOptions(parent=tmp_path / "pulled", allow_incomplete=True))
    assert done.path.name == "1.1.0"
    assert done.manifest.counts["changes"]["dialogues"] == [0, 0, 1]
    assert done.taken_over == len(done.manifest.shards) - 1
    (tmp_path / "pulled/data/dialogues/train-00000.parquet").write_bytes(b"PAR1")
    options = PackageOptions(Version(2, 0, 0), parent=tmp_path / "pulled", allow_incomplete=True)
    assert "not the bytes" in refusal(lambda: package(Run(tmp_path / "other"), options))


def test_a_manifest_from_elsewhere_names_no_file_outside(made: Packaged, tmp_path: Path) -> None:
    shutil.copytree(made.path, tmp_path / "pulled")
    for place in ("../../secret.parquet", "/etc/passwd", "data/dialogues/../../x.parquet"):
        shard = structs.replace(made.manifest.shards[0], path=place)
        write_manifest(tmp_path / "pulled", structs.replace(made.manifest, shards=(shard,)))
        assert "not a path of a release" in refusal(lambda: read_manifest(tmp_path / "pulled"))


# --- whole or not at all ---------------------------------------------------------------------------------------------

STAGES = ("data", "data/*/train-00000.parquet", "data/twins/*.parquet", "README.md", "manifest.json", "../1.0.0")


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_leaves_nothing_half_made(run: Run, stage: str, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "clean")
    process = subprocess.Popen([sys.executable, "-m", "intersafe", "package", str(run.path)], cwd=tmp_path)
    place = run.path / "release" if stage.startswith("../") else run.path / "release/.staging"
    while process.poll() is None and not list(place.glob(stage.removeprefix("../"))):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = [path for path in (run.path / "release").glob("*") if path.name != ".staging"]
    for path in there:
        check_release(path)
    done = package(run, PackageOptions())
    assert [path.name for path in done.path.parent.iterdir()] == ["1.0.0"]
    assert digests(done.path) == digests(package(Run(tmp_path / "clean"), PackageOptions()).path)


def test_a_full_disk_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    before = digests(run.path)
    for room in (1_000, 40_000, 125_000):  # the first byte, a first shard, a later one
        done = subprocess.run(
            [sys.executable, "-m", "intersafe", "package", str(run.path)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room)),
        )
        assert done.returncode == 4, done.stderr
        assert done.stderr.count("\n") == 1
        assert "cannot be written" in done.stderr
        assert digests(run.path) == before
        assert not (run.path / "release").exists()


def test_two_at_once_do_not_meet(run: Run) -> None:
    import fcntl

    handle = os.open(run.path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another process" in refusal(lambda: package(run, PackageOptions()))
    os.close(handle)
    assert package(run, PackageOptions()).made


# --- the check -------------------------------------------------------------------------------------------------------


@contextmanager
def doctored(
    made: Packaged, folder: Path, config: str, change: Callable[[list[dict[str, Any]]], None]
) -> Iterator[Path]:
    """A release of which one shard was changed and the manifest made to agree."""
    shutil.copytree(made.path, folder)
    shard = next(shard for shard in made.manifest.shards if shard.config == config)
    table = pq.ParquetFile(folder / shard.path).read()
    values = table.to_pylist()
    change(values)
    (folder / shard.path).unlink()
    pq.write_table(pa.Table.from_pylist(values, schema=table.schema), folder / shard.path)
    other = structs.replace(
        shard, sha256=sha256_of(folder / shard.path), bytes=(folder / shard.path).stat().st_size, rows=shard.rows
    )
    named = tuple(other if each.path == shard.path else each for each in made.manifest.shards)
    write_manifest(folder, structs.replace(made.manifest, shards=named))
    yield folder


def no_bytes(values: list[dict[str, Any]]) -> None:
    next(row for row in values if row["images"])["images"][0]["bytes"] = None


def other_pixels(values: list[dict[str, Any]]) -> None:
    next(row for row in values if row["images"])["images"][0]["bytes"] = b"\x89PNG\r\n\x1a\n"


def undecodable(values: list[dict[str, Any]]) -> None:
    data = b"\x89PNG\r\n\x1a\nno picture"
    image = {"bytes": data, "path": hashlib.sha256(data).hexdigest() + ".png"}
    next(row for row in values if row["images"])["images"][0] = image


def lost_row(values: list[dict[str, Any]]) -> None:
    values.pop()


def doubled_id(values: list[dict[str, Any]]) -> None:
    values[1]["id"] = values[0]["id"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (no_bytes, "without bytes"),
        (other_pixels, "does not hash"),
        (undecodable, "truncated"),
        (lost_row, "rows"),
        (doubled_id, "twice"),
    ],
)
def test_the_check_finds_what_a_manifest_cannot(
    made: Packaged, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], word: str
) -> None:
    with doctored(made, tmp_path / "release", "dialogues", change) as folder:
        assert word in refusal(lambda: check_release(folder))


def test_the_check_finds_a_seed_in_two_splits(made: Packaged, tmp_path: Path) -> None:
    other = rows_of(made.path, "dialogues", "test")[0]["seed_id"]

    def move(values: list[dict[str, Any]]) -> None:
        values[0]["seed_id"] = other

    with doctored(made, tmp_path / "release", "refusal_vqa", move) as folder:
        assert "two splits" in refusal(lambda: check_release(folder))


def test_the_check_finds_every_truncated_flipped_missing_and_stray_file(made: Packaged, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    shutil.copytree(made.path, folder)
    draw = random.Random(1)
    for path in [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]:
        whole = path.read_bytes()
        for damaged in (whole[: draw.randrange(len(whole))], flipped(whole, draw.randrange(len(whole))), None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            refusal(lambda: check_release(folder))
        path.write_bytes(whole)
        check_release(folder)
    (folder / "data/dialogues/train-99999.parquet").write_bytes(b"")
    assert "does not name it" in refusal(lambda: check_release(folder))


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# --- bad input -------------------------------------------------------------------------------------------------------


def one_line(run: Run, *words: str, code: int = 2) -> str:
    """What the command says on stderr: one line; the run stays as it was."""
    before = digests(run.path)
    done = cli("package", str(run.path), *words, cwd=run.path.parent)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert digests(run.path) == before
    return done.stderr


def test_versions_only_go_up(run: Run) -> None:
    assert "MAJOR.MINOR.PATCH" in one_line(run, "--version", "1.0")
    package(run, PackageOptions(Version(1, 2, 0)))
    assert "1.2.1 or higher" in one_line(run, "--version", "1.1.9")
    kept = lines(run, "dialogues.jsonl")
    (run.path / "dialogues.jsonl").write_bytes(b"".join(kept[:-1]))
    assert "other content" in one_line(run, "--version", "v1.2.0", "--allow-incomplete", code=3)
    with pytest.raises(VersionTaken):
        package(run, PackageOptions(Version(1, 2, 0), allow_incomplete=True))
    assert package(run, PackageOptions(Version(1, 2, 1), allow_incomplete=True)).path.name == "1.2.1"
    assert package(run, PackageOptions(Version(3, 0, 0), allow_incomplete=True)).taken_over


def test_a_run_that_is_not_complete_needs_leave(run: Run) -> None:
    (run.path / "summary.json").unlink()
    assert "--allow-incomplete" in one_line(run)
    done = package(run, PackageOptions(allow_incomplete=True))
    assert "not complete" in (done.path / "README.md").read_text()


def test_bad_input_is_one_line_with_the_place(run: Run, original: Run) -> None:
    def restored(name: str, data: bytes) -> None:
        for path in (run.path / "dialogues.jsonl", run.path / "twins.jsonl"):
            path.write_bytes((original.path / path.name).read_bytes())
        (run.path / name).write_bytes(data)

    whole = lines(run, "dialogues.jsonl")
    restored("dialogues.jsonl", b"".join([*whole[:3], b'{"v":2}\n', *whole[3:]]))
    assert "dialogues.jsonl:4" in one_line(run, "--allow-incomplete")
    restored("twins.jsonl", b"nonsense\n")
    assert "twins.jsonl:1" in refusal(lambda: package(run, PARTS))
    restored("dialogues.jsonl", b"")
    assert "no accepted dialogue" in refusal(lambda: package(run, PARTS))
    restored("dialogues.jsonl", b"".join([*whole, whole[0]]))
    assert "twice" in refusal(lambda: package(run, PARTS))
    restored("dialogues.jsonl", b"".join(whole))
    ref = next(d.images[0] for d in original.dialogues() if d.images)
    image = run.path / "images" / ref[:2] / ref
    image.write_bytes(image.read_bytes()[:-1])
    assert "corrupt" in one_line(run)
    image.unlink()
    assert "missing from the store" in one_line(run)
    assert not (run.path / "release").exists()


@pytest.mark.parametrize("size", ["", "x", "0", "-3MB", "300TB", "1MB1", "6GB", "0.5MB", "1" * 40])
def test_a_size_is_a_size(size: str) -> None:
    message = refusal(lambda: SHARD_SIZE.convert(size, click.Option(["--max-shard-size"]), None))
    assert message.startswith(f"--max-shard-size: {size!r} is not a shard size; write 1MB to 5GB")


def test_sizes() -> None:
    assert [SHARD_SIZE.convert(s, None, None) for s in ("300MB", "1.5 GB", "2000000", "5000k")] == [
        3 * 10**8,
        15 * 10**8,
        2 * 10**6,
        5 * 10**6,
    ]


def test_without_pyarrow_it_says_what_to_install(run: Run) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None; from intersafe.cli.main import main; "
        f"main(['package', {str(run.path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install 'intersafe[hub]'" in done.stderr


def test_nothing_loads_pyarrow_before_it_is_needed() -> None:
    code = (
        "import sys, intersafe.cli.main, intersafe.release.package, intersafe.release.shards\n"
        "print([name for name in ('pyarrow', 'huggingface_hub', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pyarrow" not in done.stdout
    assert "huggingface_hub" not in done.stdout


def test_a_card_that_was_edited_is_taken_up(run: Run) -> None:
    done = package(run, PackageOptions())
    card = done.path / "README.md"
    card.write_text(
        card.read_text().replace("<!-- intersafe:keep -->\n", "<!-- intersafe:keep -->\nBy hand: thanks.\n")
    )
    with pytest.raises(InputError):
        check_release(done.path)
    again = package(run, PackageOptions())
    assert not again.made
    check_release(done.path)
    assert "By hand: thanks." in card.read_text()
    assert "By hand: thanks." in (package(run, PackageOptions(Version(1, 5, 0))).path / "README.md").read_text()


def test_the_row_version_of_every_row_is_checked(run: Run) -> None:
    row = rows(run.path / "dialogues.jsonl")[0] | {"v": 1}
    (run.path / "dialogues.jsonl").write_bytes(msgspec.json.encode(row) + b"\n")
    assert "row version" in refusal(lambda: package(run, PARTS))


def test_seeds_that_were_held_out_stay_held_out(tmp_path: Path) -> None:
    run = grown(tmp_path / "run", 20)
    package(run, PackageOptions(test_share=0.3))
    assert "below the 0.3" in refusal(lambda: package(run, PackageOptions(test_share=0.1)))
    assert [path.name for path in (run.path / "release").iterdir() if path.name[0] != "."] == ["1.0.0"]


def test_a_card_with_torn_markers_is_left_as_it_is(tmp_path: Path) -> None:
    run = grown(tmp_path / "run", 20)
    card = package(run, PackageOptions()).path / "README.md"
    card.write_text(card.read_text().replace(KEEP, f"{KEEP}\nwritten by a person").replace(KEEP_END, ""))
    before = card.read_text()
    assert "not a pair" in refusal(lambda: package(run, PackageOptions()))
    assert card.read_text() == before
