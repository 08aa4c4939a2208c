"""A fault at every single request of a push, over plain HTTP and over xet: nothing is ever half published.

The second version of a release is pushed (one shard as before, one new, one gone) and its k-th request meets a fault;
then the same command runs again without one. docs/release.md names the promises (a) to (g).
"""

import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.hub_releases import REPO, Bench, bench, make_release, rows, shards_of
from tests.support.servers.hub_state import Fault, Tree

FAULTS = ("kill", "kill late", "reset", "lose", "503")
AT_ONCE = 3


class Case(NamedTuple):
    """One fault at one request."""

    number: int
    fault: str
    at: int


@pytest.mark.timeout(300)
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_no_fault_at_any_request_breaks_a_promise(tmp_path: Path, xet: bool) -> None:
    first = make_release(tmp_path / "first", "1.0.0", [rows("a"), rows("b"), rows("c")])
    with bench(tmp_path / "count", xet) as clean:
        assert clean.push(first).code == 0
        before = len(clean.hub.log)
        assert clean.push(_second(tmp_path, 0)).code == 0
        requests = len(clean.hub.log) - before
    assert requests > 15
    cases = iter([Case(n + 1, *pair) for n, pair in enumerate(itertools.product(FAULTS, range(requests)))])
    turn = threading.Lock()

    def work(place: int) -> list[str]:
        broken: list[str] = []
        with bench(tmp_path / f"bench-{place}", xet) as own:
            assert own.push(first).code == 0
            while True:
                with turn:
                    case = next(cases, None)
                if case is None:
                    return broken
                broken += [f"{case}: {what}" for what in _problems(own, case, _second(tmp_path, case.number))]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert not list(itertools.chain(*pool.map(work, range(AT_ONCE))))


def _second(root: Path, number: int) -> Path:
    """Version 1.1.0, whose new shard is like no other case's."""
    return make_release(root / f"second-{number}", "1.1.0", [rows("a"), rows(f"new {number}")])


def _problems(own: Bench, case: Case, release: Path) -> list[str]:
    """Runs one case; every promise that does not hold."""
    repo, hub = f"alice/case-{case.number}", own.hub
    there = hub.clone(REPO, repo)
    old, log_start = there.tree(), len(hub.log)
    started = threading.Event()
    running: dict[str, Any] = {}

    def kill() -> None:
        started.wait()
        running["push"].kill()

    how = {"kill": "reset", "kill late": "lose", "503": "answer"}.get(case.fault, case.fault)
    call = kill if case.fault.startswith("kill") else None
    fault = Fault(how, after=case.at, call=call)  # type: ignore[arg-type]
    hub.faults.append(fault)
    running["push"] = own.commands.start("push", repo, release)
    started.set()
    one = running["push"].wait()
    hub.faults.clear()
    middle, tagged = there.tree(), "v1.1.0" in there.tags
    stored, committed = _stored(own), any(f"{repo}/commit/" in seen.path for seen in hub.log[log_start:])
    two = own.push(release, repo=repo)
    final: Tree = there.tree()
    sent = Counter(
        seen.path for seen in hub.log[log_start:] if seen.who == "store" and seen.method == "PUT" and seen.status == 200
    )
    return [
        what
        for what, holds in {
            f"the fault was not met: {one}": fault.used == 1,
            f"the first run: {one}": one.code == (-9 if call else 0),
            f"the second run: {two}": two.code == 0,
            "(a) the tag names something incomplete": not tagged or there.tags["v1.1.0"] == there.head,
            "(b) main was neither old nor new": middle in (old, final),
            "(c) the older tag moved": there.tree("v1.0.0") == old,
            "(d) main is not the new version": own.data(repo) == shards_of(release),
            "(d) another commit than one": len(there.commits) == len(hub.repos[REPO].commits) + 1,
            f"(d) sent twice: {sent}": all(count == 1 for count in sent.values()),
            f"(d) sent again: {one}": not committed or _stored(own) == stored,
            f"(e) sent to an open repository: {hub.exposed}": not hub.exposed,
            "(f) the tag is not the manifest's": own.data(repo, "v1.1.0") == shards_of(release),
            "(g) main is not the tag": there.tags.get("v1.1.0") == there.head,
        }.items()
        if not holds
    ]


def _stored(own: Bench) -> int:
    """Bytes that were sent and are in the store."""
    place = own.hub.cas / "xet" / "xorbs" / "xorbs" if own.hub.xet else own.hub.objects
    return sum(path.stat().st_size for path in place.iterdir())
