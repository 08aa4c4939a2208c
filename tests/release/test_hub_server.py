"""The test Hub against the real client libraries: what it refuses, so that a test that passes means something."""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers.hub import running_hub
from tests.support.servers.hub_state import Fault, State

REPO = "alice/ds"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[State]:
    with running_hub(tmp_path, page=2) as running:
        running.create(REPO, private=True, gated="manual")
        yield running


def ask(url: str, body: Any = None, token: str | None = "hf_writer", method: str | None = None) -> tuple[int, Any]:
    """Status and decoded body (or the error's message)."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {token}"} if token else {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, error.headers.get("X-Error-Message", "")


def commit(*operations: tuple[str, dict[str, Any]], **header: str) -> bytes:
    lines = [{"key": "header", "value": {"summary": "s", **header}}, *({"key": k, "value": v} for k, v in operations)]
    return b"\n".join(json.dumps(line).encode() for line in lines)


def test_a_commit_wants_its_parent_its_objects_and_its_files(hub: State) -> None:
    url, head = f"{hub.hub_url}/api/datasets/{REPO}/commit/main", hub.repos[REPO].head
    lost = ("lfsFile", {"path": "data/a.parquet", "algo": "sha256", "oid": "0" * 64, "size": 3})
    small = ("file", {"path": "a.txt", "content": "YQ==", "encoding": "base64"})
    assert ask(url, commit(lost, parentCommit=head))[0] == 400
    assert ask(url, commit(small, parentCommit="0" * 40))[0] == 412
    assert ask(url, commit(("deletedFile", {"path": "none"}), parentCommit=head))[0] == 404
    assert ask(url, commit(small, parentCommit=head), token="hf_reader")[0] == 403
    assert hub.repos[REPO].head == head
    assert ask(url, commit(small, parentCommit=head))[0] == 200
    assert hub.read(REPO, "a.txt") == b"a"


def test_the_store_checks_the_hash_and_refuses_tokens(hub: State) -> None:
    data = b"bytes"
    url = f"{hub.store_url}/put/{hashlib.sha256(data).hexdigest()}"
    assert ask(url, data, method="PUT")[0] == 400
    assert ask(url, data + b"!", token=None, method="PUT")[0] == 400
    assert not hub.has(url[-64:])
    assert ask(url, data, token=None, method="PUT")[0] == 200
    assert hub.has(url[-64:])


def test_a_tag_is_set_once_and_listings_come_in_pages(hub: State) -> None:
    api = f"{hub.hub_url}/api/datasets/{REPO}"
    assert ask(f"{api}/tag/main", {"tag": "v1.0.0"})[0] == 200
    assert ask(f"{api}/tag/main", {"tag": "v1.0.0"})[0] == 409
    assert ask(f"{api}/revision/v9")[1] == "Invalid rev id: v9"
    hub.edit(REPO, {f"{name}.txt": b"x" for name in "abc"})
    assert len(ask(f"{api}/tree/main?recursive=true")[1]) == 2


def test_strangers_see_nothing_and_sending_to_an_open_repository_is_noticed(hub: State) -> None:
    api = f"{hub.hub_url}/api/datasets/{REPO}"
    assert ask(api, token="hf_other")[0] == 404
    assert ask(api, token=None)[0] == 401
    assert ask(api, token="hf_unknown")[0] == 401
    hub.repos[REPO].gated = False
    assert ask(f"{api}/preupload/main", {"files": [{"path": "a.parquet", "size": 3}]})[0] == 200
    assert hub.exposed == [f"POST /api/datasets/{REPO}/preupload/main"]


def test_a_fault_before_is_without_effect_and_one_after_is_not(hub: State) -> None:
    url = f"{hub.hub_url}/api/datasets/{REPO}/tag/main"
    for how, tags in (("reset", set()), ("lose", {"v1"})):
        hub.faults.append(Fault(how))  # type: ignore[arg-type]
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            ask(url, {"tag": "v1"})
        assert set(hub.repos[REPO].tags) == tags


def test_an_unknown_route_fails_the_test_that_met_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="never-heard-of"), running_hub(tmp_path) as hub:
        assert ask(f"{hub.hub_url}/api/never-heard-of")[0] == 404
