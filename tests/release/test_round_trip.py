"""From a run to the Hub and back into `datasets`: every row of two versions, and only new shards are sent again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from intersafe.release.package import PackageOptions, package
from tests.support.hub_releases import REPO, bench, shards_of
from tests.support.load_release import summary
from tests.support.packaged_runs import grown, rows_of
from tests.support.paths import SUPPORT

READ = """
import json, sys
sys.path.insert(0, sys.argv[1])
from datasets import load_dataset
from load_release import summary
found = {}
for version in ("v1.0.0", "v1.1.0"):
    for config in ("dialogues", "refusal_vqa", "twins"):
        for split, table in load_dataset(sys.argv[2], config, revision=version).items():
            rows = (row for batch in table.with_format("arrow").iter(50) for row in batch.to_pylist())
            found[f"{version}/{config}/{split}"] = summary(rows)
print(json.dumps(found))
"""


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_both_versions_load_row_by_row_and_the_second_sends_new_shards_alone(xet: bool, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    first = package(grown(tmp_path / "run", 150), PackageOptions(test_share=0.2)).path
    second = package(grown(tmp_path / "run", 165), PackageOptions(test_share=0.2)).path
    with bench(tmp_path / "hub", xet=xet) as hub:
        sent = []
        for release in (first, second):
            before = len(hub.hub.log)
            done = hub.push(release, "--allow-scripted")
            assert done.code == 0, done.said
            sent.append([r.path for r in hub.hub.log[before:] if r.method == "PUT" and r.who == "store"])
        if not xet:
            new = {path: sha256 for path, sha256 in shards_of(second).items() if path not in shards_of(first)}
            assert new
            assert sorted(path.rpartition("/")[2] for path in sent[1]) == sorted(new.values())
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        env |= {"HF_ENDPOINT": hub.hub.hub_url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        words = [sys.executable, "-c", READ, str(SUPPORT), REPO]
        read = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert read.returncode == 0, read.stderr[-2000:]
        assert hub.hub.unknown == []
    expected = {
        f"v{release.name}/{config}/{split}": summary(rows)
        for release in (first, second)
        for config in ("dialogues", "refusal_vqa", "twins")
        for split in ("train", "test")
        if (rows := rows_of(release, config, split))
    }
    assert json.loads(read.stdout) == expected
    assert sum(found["rows"] for name, found in expected.items() if name.startswith("v1.1.0/dialogues")) == 165
