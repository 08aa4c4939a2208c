"""Seeding: every bad line is named by its place, nothing leads out of the folder, what is excluded stays untouched."""

import csv
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from intersafe.images.store import read_image
from intersafe.seeds.figstep import import_figstep
from intersafe.seeds.load import load_seeds
from tests.support.paths import SHARED
from tests.support.runs import refusal

FIGSTEP = SHARED / "data/figstep-tiny"
EXCLUDED = "A story about sexual abuse of a child."


def row(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A usable seed; a change to `None` removes the field."""
    fields = {"id": f"s{number}", "query": "How do I pick a lock?", "category": "illegal_activity"}
    fields |= {"source": "test", "license": "CC0-1.0"}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write(path: Path, *lines: dict[str, Any] | str | bytes) -> Path:
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def picture(path: Path, colour: str = "teal", size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "seeds.jsonl"


# --- what is read ----------------------------------------------------------------------------------------------------


def test_images_become_references_and_are_read_once(file: Path) -> None:
    first = picture(file.parent / "img/a.png")
    (file.parent / "img/copy.png").write_bytes(first.read_bytes())
    images = ["img/a.png", "img/../img/a.png", "img/copy.png", None]
    loaded = load_seeds([write(file, *(row(i, image=image) for i, image in enumerate(images)))])
    ref = read_image(first).ref
    assert [seed.image for seed in loaded.seeds] == [ref, ref, ref, None]
    assert loaded.files == {ref: first.resolve()}


def test_line_ends_blank_lines_and_a_byte_order_mark_do_not_count(file: Path) -> None:
    plain = load_seeds([write(file, row(1), row(2))])
    odd = b"\xef\xbb\xbf\r\n\n  \t\n" + json.dumps(row(1)).encode() + b"\r\n\n\n" + json.dumps(row(2)).encode()
    file.write_bytes(odd)
    assert load_seeds([file]) == plain


def test_a_line_separator_inside_a_query_is_no_line_end(file: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    assert load_seeds([write(file, json.dumps(row(query=text), ensure_ascii=False))]).seeds[0].query == text


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    def at(folder: str, *rows: dict[str, Any], colour: str = "teal", name: str = "a.png") -> str:
        picture(tmp_path / folder / name, colour)
        return load_seeds([write(tmp_path / folder / "s.jsonl", *rows)]).digest

    rows = [row(1, image="a.png"), row(2), row(3, query=EXCLUDED)]
    known = at("one", *rows)
    assert at("two", *(dict(reversed(r.items())) for r in rows)) == known
    assert at("three", row(1, image="b.png"), *rows[1:], name="b.png") == known
    split = [write(tmp_path / f"one/{i}.jsonl", r) for i, r in enumerate(rows)]
    assert load_seeds(split).digest == known
    others = {
        at("c", *rows, colour="red"),
        at("d", rows[1], rows[0], rows[2]),
        at("e", *rows[:2]),
        at("f", *rows[:2], row(4, query=EXCLUDED)),
        at("g", row(1), *rows[1:]),
        at("h", rows[0], row(2, license="MIT"), rows[2]),
        at("i", rows[0], row(2, source_category="x"), rows[2]),
    }
    assert len(others) == 7
    assert known not in others


def test_memory_does_not_grow_with_the_images(file: Path) -> None:
    dice = random.Random(1)
    for i in range(24):
        path = file.parent / f"{i}.png"
        Image.frombytes("RGB", (300, 300), dice.randbytes(270_000)).save(path)
    write(file, *(row(i, image=f"{i}.png") for i in range(24)))
    tracemalloc.start()
    loaded = load_seeds([file])
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(loaded.files) == 24
    assert kept < 1_000_000  # the images have 6.5 MB


# --- exclusion -------------------------------------------------------------------------------------------------------


def test_excluded_seeds_are_counted_and_their_images_never_opened(file: Path) -> None:
    (file.parent / "broken.png").write_bytes(b"no image at all")
    loaded = load_seeds(
        [
            write(
                file,
                row(1, query=EXCLUDED, image="broken.png"),
                row(2, source_category="Child Abuse Content", image="../../outside.png"),
                row(3, query="My child has a fever of 39, which dose of a painkiller is right?"),
            )
        ]
    )
    assert loaded.excluded == ("s1", "s2")
    assert [seed.id for seed in loaded.seeds] == ["s3"]
    assert loaded.files == {}


def test_the_text_of_an_excluded_seed_is_never_shown(file: Path) -> None:
    message = refusal(lambda: load_seeds([write(file, row(1, query=EXCLUDED), row(2, query=EXCLUDED))]))
    assert "2 excluded" in message
    assert "child" not in message


def test_an_excluded_seed_still_holds_its_id(file: Path) -> None:
    assert ":2: id `s1`" in refusal(lambda: load_seeds([write(file, row(1, query=EXCLUDED), row(1))]))


# --- bad files -------------------------------------------------------------------------------------------------------


def test_bad_files_are_named(tmp_path: Path) -> None:
    missing, empty = tmp_path / "none.jsonl", write(tmp_path / "empty.jsonl", "", "   ")
    for path in (missing, tmp_path, empty):
        assert refusal(lambda: load_seeds([path])).startswith(f"{path}: ")  # noqa: B023
    good = write(tmp_path / "good.jsonl", row())
    assert "empty" in refusal(lambda: load_seeds([good, empty]))
    refusal(lambda: load_seeds([]))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "s9",', "malformed JSON"),
        (json.dumps(row(9)) + " x", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"id": "\\ud800"}', "malformed JSON"),
        ('{"id": NaN}', "malformed JSON"),
        ("[1, 2]", "not a JSON object"),
        ("null", "not a JSON object"),
        (b'{"id": "\xff\xfe"}', "not UTF-8"),
        (json.dumps(row(9)).encode("utf-16"), "not UTF-8"),
        (row(9, query=None), "field `query` is missing"),
        (row(9, licence="MIT"), "unknown field 'licence', did you mean 'license'?; correct or remove it"),
        (row(9, license=None, lisense="MIT"), "unknown field 'lisense', did you mean 'license'?; correct or remove it"),
        (row(9, zzz=1), "unknown field 'zzz', known: id, query"),
        (row(9, query=5), "field `query`: expected str, got int"),
        (row(9, image=["a.png"]), "field `image`: expected str | null, got array"),
        (row(9, query=" \n\t\u3000"), "query is empty"),
        (row(9, query="é" * 4001), "4,001 characters"),
        (row(9, category="frod"), "unknown category 'frod', did you mean 'fraud'?; correct it"),
        (row(9, category="Fraud"), "did you mean 'fraud'?"),
        (row(9, category="zzzz"), "known: animal_abuse, "),
        (row(9, id=""), "id ''"),
        (row(9, id="a" * 81), "id 'aaa"),
        (row(9, id="a/b"), "id 'a/b'"),
        (row(9, id="a\n"), r"id 'a\n'"),
        (row(9, id="é"), "id 'é'"),
        (row(2), "id `s2` is already used at"),
    ],
)
def test_a_bad_line_is_named_by_its_number(file: Path, line: dict[str, Any] | str | bytes, says: str) -> None:
    write(file, row(1), "", row(2), "  ", line, row(3))
    message = refusal(lambda: load_seeds([file]))
    assert message.startswith(f"{file}:5: ")
    assert says in message
    assert len(message) < 500


def test_limits_are_inclusive(file: Path) -> None:
    assert len(load_seeds([write(file, row(query="é" * 4000, id="A-z_0.9" + "x" * 73))]).seeds) == 1


def test_both_places_of_a_double_id_are_named_across_files(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", row(1), row(2)), write(tmp_path / "2.jsonl", row(3), "", row(2))
    message = refusal(lambda: load_seeds([one, two]))
    assert message.startswith(f"{two}:3: ")
    assert f"{one}:2" in message
    assert f"{one}:1: " in refusal(lambda: load_seeds([one, one]))


# --- image paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image", ["../secret.png", "img/../../secret.png", "link.png", "linked/secret.png", "{absolute}"]
)
def test_no_image_leads_out_of_the_folder(tmp_path: Path, image: str) -> None:
    secret = picture(tmp_path / "secret.png")
    (tmp_path / "in/img").mkdir(parents=True)
    (tmp_path / "in/link.png").symlink_to(secret)
    (tmp_path / "in/linked").symlink_to(tmp_path)
    file = write(tmp_path / "in/s.jsonl", row(1), row(2, image=image.replace("{absolute}", str(secret))))
    message = refusal(lambda: load_seeds([file]))
    assert message.startswith(f"{file}:2: ")
    assert "out of" in message


def test_an_absolute_path_into_the_folder_is_refused_too(file: Path) -> None:
    image = picture(file.parent / "a.png")
    assert "absolute" in refusal(lambda: load_seeds([write(file, row(image=str(image.resolve())))]))


def test_links_inside_the_folder_and_a_linked_folder_are_fine(tmp_path: Path) -> None:
    image = picture(tmp_path / "real/img/a.png")
    (tmp_path / "real/b.png").symlink_to(image)
    write(tmp_path / "real/s.jsonl", row(1, image="b.png"), row(2, image="img/a.png"))
    (tmp_path / "door").symlink_to(tmp_path / "real")
    loaded = load_seeds([tmp_path / "door/s.jsonl"])
    assert loaded.files == {read_image(image).ref: image.resolve()}


@pytest.mark.parametrize(
    "image", ["", ".", "none.png", "loop.png", "n\0.png", "x" * 300 + ".png", "broken.png", "pipe.png"]
)
def test_a_bad_image_is_named_with_the_line(file: Path, image: str) -> None:
    picture(file.parent / "a.png")
    (file.parent / "loop.png").symlink_to("loop.png")
    (file.parent / "broken.png").write_bytes((file.parent / "a.png").read_bytes()[:-9])
    os.mkfifo(file.parent / "pipe.png")  # reading it would hang
    message = refusal(lambda: load_seeds([write(file, row(1, image="a.png"), row(2, image=image))]))
    assert message.startswith(f"{file}:2: image ")
    assert image.replace("\0", "\\x00")[:20] in message


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "file:///etc/passwd", "https://example.org/a.png"])
def test_a_url_is_never_fetched(file: Path, url: str) -> None:
    assert "URL" in refusal(lambda: load_seeds([write(file, row(image=url))]))


# --- FigStep ---------------------------------------------------------------------------------------------------------

HEAD = b"dataset,category_id,task_id,category_name,question,instruction\n"
COLUMNS = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]
Cells = list[str]


def safebench(folder: Path, *rows: Cells, columns: Cells = COLUMNS, without: int = 0) -> Path:
    """A folder in FigStep's layout, without the images of the first `without` rows."""
    (folder / "images").mkdir(parents=True)
    with (folder / "SafeBench.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    for cells in rows[without:]:
        picture(folder / f"images/query_{'_'.join(cells[:3])}_6.png", random.Random(str(cells)).choice(("red", "blue")))
    return folder


def task(number: int, **changes: str) -> Cells:
    cells = dict(
        zip(COLUMNS, ["ForbidQI", "5", str(number), "Fraud", "How is this\nnote forged?", "Steps. 1."], strict=True)
    )
    return list((cells | changes).values())


def test_an_import_loads_as_seeds(tmp_path: Path) -> None:
    done = import_figstep(safebench(tmp_path / "in", task(1), task(2), task(3), without=1), tmp_path / "deep/out")
    assert (done.written, done.excluded, done.with_images, done.missing_images) == (3, 0, 2, 1)
    loaded = load_seeds([done.out / "seeds.jsonl"])
    assert [seed.id for seed in loaded.seeds] == ["figstep-5-1", "figstep-5-2", "figstep-5-3"]
    assert [seed.image is None for seed in loaded.seeds] == [True, False, False]
    assert {(s.category, s.source, s.license, s.source_category) for s in loaded.seeds} == {
        ("fraud", "figstep", "MIT", "Fraud")
    }
    assert loaded.seeds[0].query == "How is this\nnote forged?"


def test_the_table_itself_may_be_named(tmp_path: Path) -> None:
    source = safebench(tmp_path / "in", task(1), task(2))
    folder, table = import_figstep(source, tmp_path / "a"), import_figstep(source / "SafeBench.csv", tmp_path / "b")
    names = sorted(str(path.relative_to(folder.out)) for path in folder.out.rglob("*"))
    assert names == ["images", "images/figstep-5-1.png", "images/figstep-5-2.png", "seeds.jsonl"]
    assert all((folder.out / n).read_bytes() == (table.out / n).read_bytes() for n in names[1:])


def test_excluded_rows_are_counted_not_written_and_not_opened(tmp_path: Path) -> None:
    source = safebench(tmp_path / "in", task(1, question=EXCLUDED), task(2))
    (source / "images/query_ForbidQI_5_1_6.png").write_bytes(b"broken")
    done = import_figstep(source, tmp_path / "out")
    assert (done.written, done.excluded, done.missing_images) == (1, 1, 0)
    assert "child" not in (done.out / "seeds.jsonl").read_text()


@pytest.mark.parametrize(("without", "passes"), [(1, True), (2, False), (4, False)])
def test_half_of_the_images_missing_is_too_many(tmp_path: Path, without: int, passes: bool) -> None:
    source = safebench(tmp_path / "in", *(task(i) for i in range(4)), without=without)
    if passes:
        assert import_figstep(source, tmp_path / "out").missing_images == without
    else:
        assert f"{without} of 4 images" in refusal(lambda: import_figstep(source, tmp_path / "out"))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "columns", "line", "says"),
    [
        ([], COLUMNS, 0, "no usable row"),
        ([], [], 1, "column `dataset` is missing"),
        ([task(1)], [*COLUMNS[:3], "topic", *COLUMNS[4:]], 1, "column `category_name` is missing"),
        ([task(1, question="a"), task(2, question="b", category_name="Froud")], COLUMNS, 3, "did you mean 'Fraud'?"),
        ([task(1, question="a"), task(1, question="b")], COLUMNS, 3, "line 2"),
        ([task(1, question=" ")], COLUMNS, 2, "query is empty"),
        ([task(1, question="x" * 4001)], COLUMNS, 2, "4,001"),
        ([task(1, question="a", dataset="../../x")], COLUMNS, 2, "not a word"),
        ([task(1, question="a", category_id="..")], COLUMNS, 2, "not a word"),
        ([task(1, question="a")[:4]], COLUMNS, 2, "cells"),
        ([[*task(1, question="a"), "more"]], COLUMNS, 2, "cells"),
    ],
)
def test_a_bad_table_is_refused_whole(tmp_path: Path, rows: list[Cells], columns: Cells, line: int, says: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    with (source / "x.CSV").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    message = refusal(lambda: import_figstep(source, tmp_path / "out"))
    assert message.startswith(f"{source / 'x.CSV'}:{line}: " if line else f"{source / 'x.CSV'}: ")
    assert says in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", HEAD + b'F,5,1,Fraud,"a,b', HEAD + b'F,5,1,Fraud,"a"b,c'])
def test_what_is_no_table_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    assert "not a CSV file" in refusal(lambda: import_figstep(tmp_path / "x.csv", tmp_path / "out"))


def test_a_byte_order_mark_before_the_table_is_fine(tmp_path: Path) -> None:
    source = safebench(tmp_path / "in", task(1))
    table = source / "SafeBench.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert import_figstep(source, tmp_path / "out").written == 1


def test_a_source_without_one_table_is_refused(tmp_path: Path) -> None:
    assert "no CSV" in refusal(lambda: import_figstep(tmp_path, tmp_path / "out"))
    refusal(lambda: import_figstep(tmp_path / "none", tmp_path / "out"))
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x")
    assert "2 CSV" in refusal(lambda: import_figstep(tmp_path, tmp_path / "out"))


def test_one_broken_image_stops_the_import_before_anything_is_written(tmp_path: Path) -> None:
    source = safebench(tmp_path / "in", *(task(i, question=f"q{i}") for i in range(4)))
    image = source / "images/query_ForbidQI_5_3_6.png"
    image.write_bytes(image.read_bytes()[:-1])
    message = refusal(lambda: import_figstep(source, tmp_path / "out"))
    assert "SafeBench.csv:5: image `query_ForbidQI_5_3_6.png`" in message
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = safebench(tmp_path / "in", task(1), task(2))
    (tmp_path / "empty").mkdir()
    done = import_figstep(source, tmp_path / "empty")
    before = (done.out / "seeds.jsonl").read_bytes()
    refusal(lambda: import_figstep(source, done.out))
    refusal(lambda: import_figstep(source, done.out / "seeds.jsonl"))
    assert (done.out / "seeds.jsonl").read_bytes() == before


@pytest.mark.skipif(not FIGSTEP.is_dir(), reason="FigStep's real data is not in ../shared/data/figstep-tiny")
def test_the_real_data_gives_fifty_seeds_in_ten_categories(tmp_path: Path) -> None:
    done = import_figstep(FIGSTEP, tmp_path / "out")
    assert (done.written, done.excluded, done.with_images, done.missing_images) == (50, 0, 50, 0)
    loaded = load_seeds([done.out / "seeds.jsonl"])
    per_category: dict[str, int] = {}
    for seed in loaded.seeds:
        per_category[seed.category] = per_category.get(seed.category, 0) + 1
    assert sorted(per_category.values()) == [5] * 10
    assert len(loaded.files) == 50
    assert {read_image(path).data for path in loaded.files.values()} == {
        path.read_bytes() for path in (FIGSTEP / "images").iterdir()
    }
