"""`pull` and `diff` against a Hub: a release comes back whole or not at all, and rows are told apart."""

import threading
from pathlib import Path

from intersafe.release.manifest import check_files, read_manifest
from tests.support.hub_releases import Bench, Started, fault, make_release, refused, rows, shards_of
from tests.support.servers.hub_state import Fault

# --- pull ------------------------------------------------------------------------------------------------------------


def test_a_release_comes_back(either: Bench, one: Path, two: Path, repo: str, tmp_path: Path) -> None:
    for release in (one, two):
        assert either.push(release, repo=repo).code == 0
    place = either.commands.scratch / "outputs" / repo.partition("/")[2] / "release"
    assert either.commands.run("pull", f"{repo}@v1.0.0").code == 0
    assert shards_of(place / "1.0.0") == shards_of(one)
    newest = either.commands.run("pull", repo, "--out", tmp_path / "out")
    assert (newest.code, newest.said) == (0, f"{tmp_path / 'out'}\n")
    check_files(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert shards_of(tmp_path / "out") == shards_of(two)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in two.iterdir())
    assert either.commands.run("pull", repo, "--out", tmp_path / "out").code == 0
    refused(either.commands.run("pull", f"{repo}@1.0.0", "--out", tmp_path / "out"), 2, "other content")
    refused(either.commands.run("pull", f"{repo}@v9.0.0"), 2, "v9.0.0", "v1.1.0")
    assert "already published" in either.push(place / "1.0.0", repo=repo).said


def test_a_pull_is_whole_or_not_at_all(either: Bench, one: Path, repo: str, tmp_path: Path) -> None:
    assert either.push(one, repo=repo).code == 0
    start = len(either.hub.log)
    assert either.commands.run("pull", repo, "--out", tmp_path / "clean").code == 0
    running: list[Started] = []
    started = threading.Event()

    def kill() -> None:
        started.wait(20)
        running[-1].kill()

    for at in range(len(either.hub.log) - start):
        out = tmp_path / f"killed-{at}"
        started.clear()
        with fault(either, Fault("reset", after=at, call=kill)):
            running.append(either.commands.start("pull", repo, "--out", out))
            started.set()
            assert running[-1].wait().code == -9
        assert not out.exists()
        assert either.commands.run("pull", repo, "--out", out).code == 0
        assert shards_of(out) == shards_of(one)


def test_a_damaged_version_is_not_brought_back(either: Bench, one: Path, repo: str, tmp_path: Path) -> None:
    assert either.push(one, repo=repo).code == 0
    there, out = either.hub.repos[repo], tmp_path / "out"
    good = either.hub.read(repo, "manifest.json")
    for path, bad in (
        ("data/dialogues/train-00000.parquet", b"PAR1"),
        ("manifest.json", good.replace(b"train-00000", b"../../../../train-00000")),
        ("manifest.json", good.replace(b'"1.0.0"', b'"2.0.0"')),
        ("manifest.json", b"[]"),
        ("CHANGELOG.md", b"other\n"),
    ):
        kept = dict(there.tree())
        there.tags["v1.0.0"] = either.hub.edit(repo, {path: bad})
        refused(either.commands.run("pull", repo, "--out", out), 4, repo)
        assert not list(tmp_path.glob("*out*"))
        there.commits[there.head].tree.update(kept)
    assert either.commands.run("pull", repo, "--out", out).code == 0


# --- diff ------------------------------------------------------------------------------------------------------------


def test_diff_counts_rows_by_category_and_label(either: Bench, one: Path, two: Path, repo: str) -> None:
    changed = [row | {"text": "other"} if row["id"] == "b-0" else row for row in rows("b", 3)]
    two = make_release(two.parent, "1.1.0", [rows("a"), [*changed, *rows("c", 2, "self_harm", "unsafe")]])
    for release in (one, two):
        assert either.push(release, repo=repo).code == 0
    local = either.commands.run("diff", one, two)
    start = len(either.hub.log)
    remote = either.commands.run("diff", f"{repo}@v1.0.0", "v1.1.0")
    assert local == remote
    lines = [line.split() for line in local.said.splitlines()]
    assert [" ".join(line) for line in lines] == [
        "dialogues: +2 added -2 removed ~1 changed 7 unchanged",
        "category fraud -2 removed ~1 changed",
        "category self_harm +2 added",
        "label safe -2 removed ~1 changed",
        "label unsafe +2 added",
    ]
    assert not [seen for seen in either.hub.log[start:] if seen.path.endswith("train-00000.parquet")]
    same = either.commands.run("diff", one, f"{repo}@v1.0.0")
    assert same.said == "dialogues: nothing changed, 10 unchanged\n"


def test_diff_of_rows_without_ids(either: Bench, one: Path, tmp_path: Path) -> None:
    twice = make_release(tmp_path / "t", "1.0.0", [[*rows("a", 1), *rows("a", 1)]])
    refused(either.commands.run("diff", one, twice), 2, "train-00000.parquet", "without an id")
