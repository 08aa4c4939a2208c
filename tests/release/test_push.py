"""`push` against a Hub: what is published, what is refused, and what bad input gets."""

import email.utils
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from intersafe.release.card import KEEP, KEEP_END
from intersafe.release.manifest import check_files, read_manifest, write_manifest
from intersafe.release.staged import open_release
from tests.support.hub_releases import Bench, Done, copy_of, fault, make_release, refused, rows, shards_of
from tests.support.runs import refusal
from tests.support.servers.hub_state import Entry, Fault


def untouched(on: Bench, repo: str) -> None:
    """Nothing was ever sent there."""
    assert repo not in on.hub.repos or not on.data(repo)
    assert not [seen for seen in on.hub.log if seen.method == "POST" and f"{repo}/" in seen.path]


# --- what is published -----------------------------------------------------------------------------------------------


def test_two_versions_are_private_gated_tagged_and_sent_once(either: Bench, one: Path, two: Path, repo: str) -> None:
    hub, first = either.hub, either.push(one, "--verify", "full", repo=repo)
    assert first.code == 0, first
    there = hub.repos[repo]
    assert (there.private, there.gated) == (True, "manual")
    hub.edit(repo, {"notes.txt": b"a person's"})
    start = len(hub.log)
    second = either.push(two, repo=repo)
    assert second.code == 0, second
    assert f'load_dataset("{repo}", "dialogues", revision="v1.1.0")' in second.said
    assert either.data(repo, "v1.0.0") == shards_of(one)
    assert either.data(repo, "v1.1.0") == either.data(repo) == shards_of(two)
    assert hub.read(repo, "notes.txt") == b"a person's"
    puts = [seen for seen in hub.log[start:] if seen.method == "PUT" and seen.who == "store"]
    assert len(puts) == (0 if hub.xet else 2)
    receipt = json.loads((two.parent / f"1.1.0.{repo.replace('/', '--')}.receipt.json").read_text())
    assert receipt["commit"] == there.tags["v1.1.0"]
    assert not hub.exposed
    again = either.push(one, repo=repo)
    assert (again.code, "already published" in again.said) == (0, True)


def test_the_manifest_on_the_hub_names_the_bytes_on_the_hub(lfs: Bench, one: Path, repo: str, tmp_path: Path) -> None:
    assert lfs.push(one, repo=repo).code == 0
    for path in lfs.hub.repos[repo].tree():
        (tmp_path / "there" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / path).write_bytes(lfs.hub.read(repo, path))
    there = read_manifest(tmp_path / "there")
    check_files(tmp_path / "there", there)
    assert there.shards == read_manifest(one).shards
    assert repo in (tmp_path / "there" / "README.md").read_text()


def test_kept_text_in_the_card_survives(lfs: Bench, one: Path, two: Path, repo: str) -> None:
    assert lfs.push(one, repo=repo).code == 0
    card = lfs.hub.read(repo, "README.md").decode()
    lfs.hub.edit(repo, {"README.md": card.replace(f"{KEEP}\n", f"{KEEP}\nAsk Ada first. é\n").encode()})
    assert lfs.push(two, repo=repo).code == 0
    assert f"{KEEP}\nAsk Ada first. é\n" in lfs.hub.read(repo, "README.md", "v1.1.0").decode()
    torn = lfs.hub.read(repo, "README.md").replace(KEEP_END.encode(), b"")
    lfs.hub.edit(repo, {"README.md": torn})
    third = make_release(two.parent, "1.2.0", [rows("a")])
    refused(lfs.push(third, repo=repo), 4, "README.md", "markers")
    assert lfs.hub.read(repo, "README.md") == torn


def test_a_dry_run_only_reads(lfs: Bench, one: Path, two: Path, repo: str) -> None:
    said = lfs.push(one, "--dry-run", repo=repo).said
    assert "add    data/dialogues/train-00000.parquet" in said
    assert repo not in lfs.hub.repos
    assert lfs.push(two, repo=repo).code == 0
    lower = make_release(two.parent, "2.0.0", [rows("a")])
    start, head = len(lfs.hub.log), lfs.hub.repos[repo].head
    done = lfs.push(lower, "--dry-run", repo=repo)
    assert "delete data/dialogues/train-00002.parquet" in done.said
    assert {seen.method for seen in lfs.hub.log[start:]} == {"GET"}
    assert lfs.hub.repos[repo].head == head


def test_status_tells_what_is_here_and_there(lfs: Bench, one: Path, two: Path, repo: str) -> None:
    run = one.parent.parent
    assert "not found" in lfs.push(run, "--status", repo=repo).said
    assert lfs.push(run, "--version", "1.0.0", repo=repo).code == 0
    lfs.hub.repos[repo].gated = False
    said = lfs.push(run, "--status", repo=repo).said
    assert "private, NOT GATED" in said
    assert re.search(r"v1\.0\.0 +published\n", said)
    assert re.search(r"v1\.1\.0 +not published\n", said)
    other = make_release(one.parent.parent.parent / "other" / "release", "1.0.0", [rows("x")])
    assert "OTHER CONTENT" in lfs.push(other, "--status", repo=repo).said


def test_bump_takes_the_newest_release_and_is_safe_to_run_again(lfs: Bench, one: Path, two: Path, repo: str) -> None:
    run = one.parent.parent
    refused(lfs.push(run, "--bump", "major", repo=repo), 2, "--bump", "--version 1.0.0")
    assert lfs.push(run, "--version", "1.0.0", repo=repo).code == 0
    assert lfs.push(run, "--bump", "minor", repo=repo).code == 0
    assert "already published" in lfs.push(run, "--bump", "minor", repo=repo).said
    assert set(lfs.hub.repos[repo].tags) == {"v1.0.0", "v1.1.0"}
    refused(lfs.push(run, "--version", "7.0.0", repo=repo), 2, "7.0.0", "package")


# --- nothing goes to an open repository ------------------------------------------------------------------------------


def test_an_open_repository_gets_nothing(lfs: Bench, one: Path, repo: str) -> None:
    there = lfs.hub.create(repo, private=False, gated="manual")
    refused(lfs.push(one, repo=repo), 5, "public", "--public")
    there.private, there.gated = True, False
    with fault(lfs, Fault("answer", match="PUT .*/settings", status=200)):  # says yes and does nothing
        refused(lfs.push(one, repo=repo), 5, "no gate")
    untouched(lfs, repo)
    assert lfs.push(one, repo=repo).code == 0
    assert str(there.gated) == "manual"


def test_a_repository_that_is_opened_on_the_way_gets_no_tag(lfs: Bench, one: Path, repo: str) -> None:
    there = lfs.hub.create(repo, private=True, gated="manual")
    with fault(lfs, Fault("pass", match=f"{repo}/commit/", call=lambda: setattr(there, "private", False))):
        refused(lfs.push(one, repo=repo), 5, "public")
    assert not there.tags
    lfs.hub.exposed.clear()


def test_public_must_be_confirmed_by_its_name(lfs: Bench, one: Path, repo: str) -> None:
    refused(lfs.push(one, "--public", repo=repo), 2, "nothing was sent")  # stdin is empty
    refused(lfs.push(one, "--no-gate", "--yes-really", "alice/other", repo=repo), 2, "nothing was sent")
    untouched(lfs, repo)
    assert lfs.push(one, "--public", "--yes-really", repo, repo=repo).code == 0
    assert (lfs.hub.repos[repo].private, lfs.hub.repos[repo].gated) == (False, "manual")
    lfs.hub.exposed.clear()


def test_unsafe_replies_go_behind_a_gate_alone(lfs: Bench, tmp_path: Path, repo: str) -> None:
    unsafe = make_release(tmp_path, "1.0.0", [rows("a")], includes_unsafe=True)
    refused(lfs.push(unsafe, "--no-gate", "--yes-really", repo, repo=repo), 2, "unsafe")
    refused(lfs.push(unsafe, "--public", "--yes-really", repo, repo=repo), 2, "unsafe")
    untouched(lfs, repo)
    assert lfs.push(unsafe, repo=repo).code == 0


# --- tags and other people -------------------------------------------------------------------------------------------


def test_a_version_is_never_replaced(lfs: Bench, one: Path, two: Path, repo: str, tmp_path: Path) -> None:
    assert lfs.push(two, repo=repo).code == 0
    before = (dict(lfs.hub.repos[repo].tags), lfs.hub.repos[repo].head)
    other = make_release(tmp_path / "other", "1.1.0", [rows("a")])
    refused(lfs.push(other, repo=repo), 3, "v1.1.0", "higher version")
    refused(lfs.push(one, repo=repo), 2, "v1.0.0 is lower than v1.1.0")
    assert (lfs.hub.repos[repo].tags, lfs.hub.repos[repo].head) == before


def test_others_may_add_files_meanwhile_and_not_data(lfs: Bench, one: Path, two: Path, repo: str) -> None:
    assert lfs.push(one, repo=repo).code == 0
    edits = iter([{"notes.txt": b"1"}, {"README.md": lfs.hub.read(repo, "README.md") + b"more\n"}])
    with fault(
        lfs, Fault("pass", f"{repo}/commit/", times=2, call=lambda: void(lfs.hub.edit(repo, dict(next(edits)))))
    ):
        assert lfs.push(two, repo=repo).code == 0
    assert lfs.hub.read(repo, "notes.txt", "v1.1.0") == b"1"
    assert lfs.data(repo, "v1.1.0") == shards_of(two)
    three = make_release(one.parent, "1.2.0", [rows("z")])
    mine = {"data/dialogues/train-00009.parquet": b"mine"}
    with fault(lfs, Fault("pass", f"{repo}/commit/", call=lambda: void(lfs.hub.edit(repo, dict(mine))))):
        refused(lfs.push(three, repo=repo), 4, "somebody else")
    assert lfs.hub.read(repo, "data/dialogues/train-00009.parquet") == b"mine"
    refused(lfs.push(three, repo=repo), 4, "--take-over")
    assert lfs.push(three, "--take-over", repo=repo).code == 0
    assert lfs.data(repo) == lfs.data(repo, "v1.2.0") == shards_of(three)


def void(_: object) -> None:
    pass


def test_equal_pushes_at_once_make_one_version(lfs: Bench, one: Path, repo: str, tmp_path: Path) -> None:
    lfs.hub.create(repo, private=True, gated="manual")
    meet = threading.Barrier(2)
    with fault(lfs, Fault("pass", f"{repo}/commit/", times=2, call=lambda: void(meet.wait(20)))):
        both = [lfs.commands.start("push", repo, copy_of(one, tmp_path / name)) for name in "xy"]
        assert [started.wait().code for started in both] == [0, 0]
    assert len(lfs.hub.repos[repo].commits) == 2
    assert lfs.hub.repos[repo].tags == {"v1.0.0": lfs.hub.repos[repo].head}


@pytest.mark.parametrize("versions", [("1.0.0", "1.0.0"), ("1.0.0", "1.1.0")])
def test_of_different_pushes_at_once_one_wins(lfs: Bench, repo: str, tmp_path: Path, versions: tuple[str, str]) -> None:
    lfs.hub.create(repo, private=True, gated="manual")
    ours = [make_release(tmp_path / name, version, [rows(name)]) for name, version in zip("xy", versions, strict=True)]
    meet = threading.Barrier(2)
    with fault(lfs, Fault("pass", f"{repo}/commit/", times=2, call=lambda: void(meet.wait(20)))):
        both = [lfs.commands.start("push", repo, release) for release in ours]
        done = [started.wait() for started in both]
    winner = next(place for place, end in enumerate(done) if end.code == 0)
    refused(done[1 - winner], 4, "somebody else")
    assert list(lfs.hub.repos[repo].tags.values()) == [lfs.hub.repos[repo].head]
    assert lfs.data(repo) == shards_of(ours[winner])


def test_a_push_between_commit_and_tag_is_not_overtaken(lfs: Bench, one: Path, repo: str, tmp_path: Path) -> None:
    at_tag, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        at_tag.set()
        go_on.wait(20)

    with fault(lfs, Fault("pass", f"POST .*{repo}/tag/", call=wait)):
        slow = lfs.commands.start("push", repo, one)
        assert at_tag.wait(20)
        other = make_release(tmp_path / "other", "1.0.0", [rows("x")])
        refused(lfs.push(other, repo=repo), 4, "v1.0.0, which has no tag")
        go_on.set()
        assert slow.wait().code == 0
    assert lfs.data(repo) == lfs.data(repo, "v1.0.0") == shards_of(one)


def test_a_tag_that_somebody_else_sets_meanwhile_is_left_alone(lfs: Bench, one: Path, repo: str) -> None:
    there = lfs.hub.create(repo, private=True, gated="manual")
    first = there.head
    with fault(lfs, Fault("pass", f"POST .*{repo}/tag/", call=lambda: there.tags.update({"v1.0.0": first}))):
        refused(lfs.push(one, repo=repo), 3, "v1.0.0")
    assert there.tags == {"v1.0.0": first}


# --- bad input -------------------------------------------------------------------------------------------------------


def test_tokens_that_will_not_do(lfs: Bench, one: Path, repo: str) -> None:
    for token, words in ((None, "no token"), ("hf_expired", "not accepted"), ("hf_reader", "may only read")):
        refused(lfs.push(one, repo=repo, env={"HF_TOKEN": token}), 5, words)
    refused(lfs.push(one, repo="bob/ds"), 5, "no right")
    assert lfs.push(one, repo=repo).code == 0
    refused(lfs.push(one, repo=repo, env={"HF_TOKEN": "hf_other"}), 5, "no right")
    refused(lfs.commands.run("pull", repo, env={"HF_TOKEN": "hf_other"}), 2, "no repository")


@pytest.mark.parametrize("where", ["preupload", "/xet-write-token/|objects/batch", "commit/"])
def test_a_token_that_runs_out_on_the_way(either: Bench, one: Path, repo: str, where: str) -> None:
    tokens = either.hub.tokens
    tokens["hf_brief"] = tokens["hf_writer"]
    with fault(either, Fault("pass", where, call=lambda: void(tokens.pop("hf_brief")))):
        refused(either.push(one, repo=repo, env={"HF_TOKEN": "hf_brief"}), 5, "token")
    assert not either.hub.repos[repo].tags
    assert not either.data(repo)


def test_a_damaged_release_reaches_no_hub(lfs: Bench, one: Path, repo: str) -> None:
    shard, manifest = one / "data/dialogues/train-00001.parquet", one / "manifest.json"
    data, text = shard.read_bytes(), manifest.read_text()
    start = len(lfs.hub.log)
    shard.write_bytes(data[:-9])
    refused(lfs.push(one, repo=repo), 2, "train-00001.parquet", "package the run again")
    shard.unlink()
    refused(lfs.push(one, repo=repo), 2, "train-00001.parquet", "missing")
    shard.write_bytes(data)
    for bad in (
        text.replace('"version": "1.0.0"', '"version": "1.0.7"'),
        text.replace("train-00001", "../../etc/train-00001"),
        text.replace("train-00001", "train-00000"),
        text.replace('"rows": 5,', '"rows": 6,', 1) if '"rows": 5,' in text else text.replace('"rows": 5', '"rows": 6'),
        text.replace('"shards"', '"chards"'),
        text.replace('"configs"', '"config"'),
        text[:-20],
        "",
    ):
        assert bad != text
        manifest.write_text(bad)
        refused(lfs.push(one, repo=repo), 2, "1.0.0")
    manifest.write_text(text)
    (one / "CHANGELOG.md").write_text("# Changelog\n\nanother\n")
    refused(lfs.push(one, repo=repo), 2, "CHANGELOG.md")
    assert not [seen for seen in lfs.hub.log[start:] if seen.method != "GET"]


def test_what_may_not_be_published(lfs: Bench, tmp_path: Path, repo: str) -> None:
    scripted = make_release(tmp_path / "s", "1.0.0", [rows("a")], scripted=True)
    refused(lfs.push(scripted, repo=repo), 2, "script", "--allow-scripted")
    strict = make_release(tmp_path / "n", "1.0.0", [rows("a")], licenses={"CC-BY-NC-4.0": 3, "MIT": 2})
    card = (strict / "README.md").read_text()
    (strict / "README.md").write_text(re.sub(r"(?m)^license: .*$", "license: mit", card))
    refused(lfs.push(strict, repo=repo), 2, "README.md", "mit", "commercial")
    (strict / "README.md").write_text("# no YAML\n")
    refused(lfs.push(strict, repo=repo), 2, "README.md", "YAML")
    untouched(lfs, repo)
    assert lfs.push(scripted, "--allow-scripted", repo=repo).code == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("push", "nameless"), "ORG/NAME"),
        (("push", "a/b/c"), "ORG/NAME"),
        (("push", "alice/..", "--status"), "ORG/NAME"),
        (("push", "alice/ds", "nowhere"), "no release"),
        (("push", "alice/ds", "{one}", "--version", "one"), "not a version"),
        (("push", "alice/ds", "{one}", "--endpoint", "ftp://x"), "--endpoint"),
        (("pull", "alice/ds@v1"), "not a version"),
        (("pull", "alice/never-made@v1.0.0"), "no repository"),
        (("diff", "{one}", "nowhere"), "no release"),
    ],
)
def test_slips_of_the_keyboard(lfs: Bench, one: Path, argv: tuple[str, ...], words: str) -> None:
    refused(lfs.commands.run(*(part.format(one=one) for part in argv)), 2, words)


def test_a_shard_that_changes_while_it_is_sent(either: Bench, tmp_path: Path, repo: str) -> None:
    one = make_release(tmp_path, "1.0.0", [rows(f"{repo} a"), rows(f"{repo} b")])  # not in the store yet
    shard = one / "data/dialogues/train-00001.parquet"
    data = shard.read_bytes()

    def spoil() -> None:
        shard.write_bytes(data[:200] + b"!" + data[201:])

    for where in ("preupload", "objects/batch" if not either.hub.xet else "xet-write-token"):
        with fault(either, Fault("pass", where, call=spoil)):
            refused(either.push(one, repo=repo), 2, "train-00001.parquet", "changed while")
        shard.write_bytes(data)
        assert not either.data(repo)
    assert either.push(one, repo=repo).code == 0


# --- a bad network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["whoami", "/tree/", "preupload", "commit/", "resolve"])
def test_a_hub_that_hangs_meets_the_deadline(lfs: Bench, one: Path, repo: str, where: str) -> None:
    with fault(lfs, Fault("hang", where, times=99)):
        refused(lfs.push(one, "--deadline", "1", repo=repo), 6, "gave up after 1 s", "run the same command again")
    assert repo not in lfs.hub.repos or not lfs.hub.repos[repo].tags
    assert lfs.push(one, repo=repo).code == 0


@pytest.mark.alone
def test_hf_xet_that_hangs_meets_the_deadline(xet: Bench, one: Path, repo: str) -> None:
    # Native code that waits has no time-out, and must not hold up the end of the process either.
    env = {"HF_ENDPOINT": xet.hub.hub_url, "HF_TOKEN": "hf_writer", "HF_HOME": str(one.parent), "PATH": ""}
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    command = [sys.executable, "-m", "intersafe", "push", repo, str(one), "--deadline", "3"]
    with fault(xet, Fault("hang", "xet-write-token", times=99)):
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=40)
    refused(Done(done.returncode, done.stderr), 6, "gave up after 3 s while sending the shards")
    assert not xet.data(repo)
    assert xet.push(one, repo=repo).code == 0


def test_xet_can_be_switched_off(xet: Bench, one: Path, repo: str) -> None:
    start = len(xet.hub.log)
    assert xet.push(one, "--no-xet", repo=repo).code == 0
    assert not [seen for seen in xet.hub.log[start:] if "xet" in seen.path]


def test_a_hub_that_is_not_there(lfs: Bench, one: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "intersafe", "push", "alice/ds", str(one), "--deadline", "1"]
    for more in ([], ["--endpoint", "http://127.0.0.1:9/"]):
        here = {"HF_TOKEN": "hf_x", "HF_HOME": str(one.parent), "PATH": ""} | ({} if more else env)
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=here, check=False)
        refused(Done(done.returncode, done.stderr), 6, "run the same command again")


@pytest.mark.parametrize("status", [409, 429, 503])
def test_every_call_is_tried_again(lfs: Bench, one: Path, repo: str, status: int) -> None:
    calls = ("whoami", "repos/create", "settings", "refs", "commit/", "/tag/", f"GET /api/datasets/{repo}$")
    faults = [Fault("answer", call, status=status) for call in calls if (status, call) != (409, "repos/create")]
    with fault(lfs, *faults):
        done = lfs.push(one, repo=repo)
    assert done.code == 0, done
    assert done.said.count("again in") >= len(faults)
    assert lfs.hub.repos[repo].tags == {"v1.0.0": lfs.hub.repos[repo].head}


@pytest.mark.parametrize("header", ["Retry-After: 3600", "Retry-After: date", 'RateLimit: "api";r=0;t=3600'])
def test_the_hub_says_how_long_to_wait(lfs: Bench, one: Path, repo: str, header: str) -> None:
    # Asked to wait beyond the deadline it gives up at once; our own steps are far below that.
    name, _, value = header.partition(": ")
    later = email.utils.formatdate(time.time() + 3600, usegmt=True)
    with fault(lfs, Fault("answer", "/refs", status=429, headers={name: later if value == "date" else value})):
        refused(lfs.push(one, "--deadline", "600", repo=repo), 6, "429")
    with fault(lfs, Fault("answer", "/refs", status=429, headers={name: "tomorrow"})):
        assert "again in 0." in lfs.push(one, repo=repo).said


def test_a_store_that_loses_what_it_got(lfs: Bench, one: Path, repo: str) -> None:
    there = lfs.hub.create(repo, private=True, gated="manual")

    def spoil() -> None:
        tree = there.tree()
        path = "data/dialogues/train-00000.parquet"
        tree[path] = Entry("0" * 40, tree[path].size, "0" * 64)

    with fault(lfs, Fault("pass", f"{repo}/tree/", after=1, call=spoil)):
        refused(lfs.push(one, repo=repo), 4, "not what was sent")
    assert not there.tags
    del lfs.hub.repos[repo]


# --- the library -----------------------------------------------------------------------------------------------------


def test_help_needs_no_library() -> None:
    heavy = ["huggingface_hub", "hf_xet", "httpx2", "pyarrow", "msgspec"]
    code = (
        "import sys, click.testing, intersafe.cli.main as c\n"
        "for name in ('push', 'pull', 'diff'):\n"
        "    assert click.testing.CliRunner().invoke(c.main, [name, '-h']).exit_code == 0\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_receipts_hold_no_key(lfs: Bench, one: Path, repo: str) -> None:
    assert lfs.push(one, repo=repo).code == 0
    (receipt,) = one.parent.glob("*.receipt.json")
    assert b"hf_" not in receipt.read_bytes()
    assert msgspec.json.decode(receipt.read_bytes())["repo"] == repo


def test_a_manifest_that_denies_what_it_names_is_not_pushed(tmp_path: Path) -> None:
    denied = make_release(tmp_path, "1.0.0", [rows("a")], models={"judge": "scripted:demo"}, scripted=False)
    assert "contradicts itself" in refusal(lambda: open_release(denied, allow_scripted=True))
    full = make_release(tmp_path, "2.0.0", [rows("a")])
    manifest = read_manifest(full)
    unsafe = tuple(msgspec.structs.replace(shard, config="dialogues_unsafe") for shard in manifest.shards)
    write_manifest(full, msgspec.structs.replace(manifest, shards=unsafe))
    assert "contradicts itself" in refusal(lambda: open_release(full))
