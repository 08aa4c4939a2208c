"""A small Hugging Face Hub on 127.0.0.1: what huggingface_hub, hf_xet and datasets ask for when they push and load.

    with running_hub(folder, xet=True) as hub:      hub.hub_url is the HF_ENDPOINT, to be set before their import

Two listeners, as in reality: the Hub, and a store for large objects whose addresses are the right to use them (it
refuses an Authorization header, as S3 does). With `xet=True` large objects go to a `local://` store that hf_xet itself
keeps on disk; it takes one process at a time.
"""

import base64
import contextlib
import fnmatch
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.support.servers.hub_http import Handler, Server, Store
from tests.support.servers.hub_state import DATE, Commit, Entry, HubError, Repo, State, commit_of, git_sha

MOST_IN_PREUPLOAD = 256
LARGE = 10 * 2**20


class _Hub(Handler):
    """The API and the files."""

    def route(self) -> None:
        path = urlsplit(self.path).path
        for method, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path) if self.command in method.split("|") else None
            if found:
                getattr(self, name)(*(unquote(part or "") for part in found.groups()))
                return
        self.state.unknown.append(f"{self.command} {path}")
        raise HubError(404, message="Sorry, we can't find the page you are looking for.")

    def json(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.body or b"{}")
        return loaded

    # --- who may do what ---

    def user(self) -> tuple[str, str]:
        """Name and role behind the token; both empty without one."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.state.tokens:
            raise HubError(401, message="Invalid credentials in Authorization header")
        return self.state.tokens[given] if given else ("", "")

    def repo(self, repo_id: str, write: bool = False, gate: bool = False) -> Repo:
        """The repo if this user may see it; `write` and `gate` ask for more."""
        name, role = self.user()
        repo, own = self.state.repos.get(repo_id), name != "" and repo_id.split("/")[0] in (name, f"org-{name}")
        if repo is None or (repo.private and not own):
            raise HubError(404 if name else 401, "RepoNotFound", "Repository not found")
        if write and not (own and role == "write"):
            raise HubError(403, message="Forbidden: you must use a write token to upload to a repository.")
        if gate and repo.gated and not own:
            raise HubError(403 if name else 401, "GatedRepo", f"Access to dataset {repo_id} is restricted.")
        return repo

    def filling(self, repo_id: str) -> Repo:
        """The repo that something is sent to."""
        repo = self.repo(repo_id, write=True)
        if not (repo.private and repo.gated):
            self.state.exposed.append(f"{self.command} {self.path}")
        return repo

    def whoami(self) -> None:
        name, role = self.user()
        if not name:
            raise HubError(401, message="Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        self.send(200, {"type": "user", "name": name, "orgs": [{"name": f"org-{name}"}], "auth": token})

    def create(self) -> None:
        (name, role), body = self.user(), self.json()
        owner = body.get("organization") or name
        if role != "write" or owner not in (name, f"org-{name}"):
            raise HubError(403, message=f'You don\'t have the rights to create a dataset under the namespace "{owner}"')
        repo_id = f"{owner}/{body['name']}"
        url = {"url": f"{self.state.hub_url}/datasets/{repo_id}"}
        with self.state.lock:
            if repo_id in self.state.repos:
                self.send(409, {"error": "You already created this dataset repo", **url})
                return
            self.state.create(repo_id, private=body.get("visibility") == "private")
        self.send(200, url)

    def settings(self, repo_id: str) -> None:
        repo, body = self.repo(repo_id, write=True), self.json()
        repo.gated = body.get("gated", repo.gated)
        repo.private = body["visibility"] == "private" if "visibility" in body else repo.private
        self.send(200, {"private": repo.private, "gated": repo.gated})

    def auth_check(self, repo_id: str, write: str) -> None:
        self.repo(repo_id, write=bool(write), gate=True)
        self.send(200, {})

    # --- reading ---

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(repo_id)
        commit = repo.find(revision)
        self.send(200, {
            "_id": "0" * 24, "id": repo_id, "author": repo_id.split("/")[0], "sha": commit.oid, "lastModified": DATE,
            "createdAt": DATE, "private": repo.private, "gated": repo.gated, "disabled": False, "tags": [],
            "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        })  # fmt: skip

    def refs(self, repo_id: str) -> None:
        repo = self.repo(repo_id)
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}
        self.send(200, {"branches": [branch], "tags": tags, "converts": []})

    def tree(self, repo_id: str, revision: str, path: str = "") -> None:
        query = parse_qs(urlsplit(self.path).query)
        commit = self.repo(repo_id).find(revision)
        listed = self.listing(commit, path, recursive=query.get("recursive", [""])[0].lower() in ("true", "1"))
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if (end := start + self.state.page) < len(listed):
            kept = "&".join(f"{name}={values[0]}" for name, values in query.items() if name != "cursor")
            url = f"{self.state.hub_url}{urlsplit(self.path).path}?{kept}&cursor={end}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.send(200, listed[start:end], headers)

    def listing(self, commit: Commit, path: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below `path`."""
        prefix, xet, found = f"{path.rstrip('/')}/" if path else "", self.state.xet_files(), {}
        for name, entry in sorted(commit.tree.items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                found[folder] = {"type": "directory", "oid": git_sha(folder.encode()), "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                found[name] = self.described(name, entry, xet)
        if path and not found:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        return list(found.values())

    def described(self, path: str, entry: Entry, xet: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
        """One file as the API tells of it."""
        told: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
        if entry.sha256:
            told["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
        if entry.sha256 in xet:
            told["xetHash"] = xet[entry.sha256][0]
        return told

    def paths_info(self, repo_id: str, revision: str) -> None:
        commit, xet = self.repo(repo_id).find(revision), self.state.xet_files()
        text = self.body.decode()
        paths = [p.strip("/") for p in (json.loads(text) if text.startswith("{") else parse_qs(text)).get("paths", [])]
        files = [self.described(path, commit.tree[path], xet) for path in paths if path in commit.tree]
        folders = [
            {"type": "directory", "oid": git_sha(path.encode()), "size": 0, "path": path}
            for path in paths
            if any(name.startswith(f"{path}/") for name in commit.tree)
        ]
        self.send(200, files + folders)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.repo(repo_id, gate=True).find(revision)
        entry, headers = commit.tree.get(path), {"X-Repo-Commit": commit.oid}
        if entry is None:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        if not entry.sha256:
            self.send_bytes(self.state.blobs[entry.oid], headers | {"ETag": f'"{entry.oid}"'})
            return
        headers |= {
            "X-Linked-Size": str(entry.size),
            "X-Linked-Etag": f'"{entry.sha256}"',
            "Location": f"{self.state.store_url}/get/{entry.sha256}",
        }
        if known := self.state.xet_files().get(entry.sha256):
            route = f"{self.state.hub_url}/api/datasets/{repo_id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": known[0], "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
        self.send(302, b"", headers)

    # --- writing ---

    def validate_yaml(self) -> None:
        front = re.match(r"\s*---\r?\n(.*?)\r?\n---", self.json()["content"], re.DOTALL)
        try:
            yaml.safe_load(front[1] if front else "")
        except yaml.YAMLError as error:
            self.send(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        tree, files = self.filling(repo_id).tree(revision), self.json()["files"]
        if len(files) > MOST_IN_PREUPLOAD:
            raise HubError(413, message="too many files")
        attributes = self.state.blobs[tree[".gitattributes"].oid].decode() if ".gitattributes" in tree else ""
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        told = []
        for file in files:
            name = file["path"].rsplit("/", 1)[-1]
            large = file["size"] > LARGE or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            entry = tree.get(file["path"])
            there = {"oid": entry.sha256 or entry.oid} if entry else {}
            mode = "lfs" if large else "regular"
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **there})
        self.send(200, {"files": told})

    def lfs_batch(self, repo_id: str) -> None:
        self.filling(repo_id)
        objects = []
        for wanted in self.json()["objects"]:
            told = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if not self.state.has(wanted["oid"]):
                told["actions"] = {
                    "upload": {"href": f"{self.state.store_url}/put/{wanted['oid']}"},
                    "verify": {"href": f"{self.state.hub_url}/datasets/{repo_id}.git/info/lfs/verify", "header": {}},
                }
            objects.append(told)
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo_id: str) -> None:
        self.filling(repo_id)
        path = self.state.objects / self.json()["oid"]
        if not path.exists() or path.stat().st_size != self.json()["size"]:
            raise HubError(404, message="Object not found or wrong size")
        self.send(200, {})

    def xet_token(self, repo_id: str, kind: str, _revision: str) -> None:
        if kind == "write":
            self.filling(repo_id)
        else:
            self.repo(repo_id, gate=True)
        if not self.state.xet:
            raise HubError(404, message="no xet here")
        url, until = f"local://{self.state.cas}", int(time.time()) + 900
        told = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": kind, "X-Xet-Token-Expiration": str(until)}
        self.send(200, {"accessToken": kind, "exp": until, "casUrl": url}, told)

    def commit(self, repo_id: str, revision: str) -> None:
        repo, (header, operations) = self.filling(repo_id), commit_of(self.body)
        if not header.get("summary") or revision != "main":
            raise HubError(400, message="a commit needs a summary and a branch")
        missing = [v["path"] for key, v in operations if key == "lfsFile" and not self.state.has(v["oid"])]
        if missing:
            raise HubError(400, message=f"LFS pointer pointed to a file that does not exist: {missing[0]}")
        with self.state.lock:
            if header.get("parentCommit", repo.head) != repo.head:
                raise HubError(412, message="A commit has happened since. Please refresh and try again.")
            tree = dict(repo.tree())
            for _, value in (pair for pair in operations if pair[0] == "deletedFile"):
                if tree.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            for key, value in operations:
                if key == "file":
                    tree[value["path"]] = self.state.small(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    known = value.get("size") or self.state.large(value["oid"]).stat().st_size
                    tree[value["path"]] = Entry(git_sha(value["oid"].encode()), int(known), value["oid"])
            oid = repo.add_commit(tree, header["summary"])
        url = f"{self.state.hub_url}/datasets/{repo_id}/commit/{oid}"
        self.send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def tag(self, repo_id: str, revision: str) -> None:
        repo, name = self.repo(repo_id, write=True), self.json()["tag"]
        with self.state.lock:
            if name in repo.tags:
                raise HubError(409, message="Tag reference exists already")
            repo.tags[name] = repo.find(revision).oid
        self.send(200, {})


_D, _F = r"/api/datasets/([^/]+/[^/]+)", r"/datasets/([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, str], ...] = (
    ("GET", r"/api/whoami-v2", "whoami"), ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"), ("PUT", _D + "/settings", "settings"),
    ("GET", _D + "/auth-check(/write)?", "auth_check"), ("GET", _D + "/refs", "refs"),
    ("POST", _D + "/tag/([^/]+)", "tag"), ("POST", _D + "/preupload/([^/]+)", "preupload"),
    ("POST", _D + "/commit/([^/]+)", "commit"), ("POST", _D + "/paths-info/([^/]+)", "paths_info"),
    ("GET", _D + "/tree/([^/]+)(?:/(.*))?", "tree"), ("GET", _D + "/xet-(read|write)-token/([^/]+)", "xet_token"),
    ("GET", _D + "/revision/([^/]+)", "info"), ("GET", _D, "info"),
    ("POST", _F + r"\.git/info/lfs/objects/batch", "lfs_batch"), ("POST", _F + r"\.git/info/lfs/verify", "lfs_verify"),
    ("GET|HEAD", _F + "/resolve/([^/]+)/(.+)", "resolve"),
)  # fmt: skip


@contextlib.contextmanager
def running_hub(root: Path, xet: bool = False, page: int = 1000) -> Iterator[State]:
    """Runs a Hub in threads of this process until the block ends; on leaving it, no request was unknown."""
    state = State(root, xet, page)
    servers = []
    for who, handler in (("hub", _Hub), ("store", Store)):
        server = Server(("127.0.0.1", 0), handler)
        server.state, server.who = state, who
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    state.hub_url, state.store_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield state
    finally:
        state.stopping.set()
        for server in servers:
            server.shutdown()
            server.server_close()
    assert not state.unknown, state.unknown
