"""The YAML front matter of a card: what the Hub reads from it, and the licence that it declares."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from intersafe.errors import InputError
from intersafe.release.licenses import OTHER, license_of
from intersafe.release.manifest import PACKAGE_AGAIN, ReleaseManifest
from intersafe.release.rows import COLUMNS, Column

DATASETS_URL = "https://huggingface.co/datasets/"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_TERMS = """\
This dataset is for defensive work: to train, test and study safer models. By asking for access you agree not to use \
it to cause harm, not to train models to produce harmful content, and not to pass it on."""


def render_front_matter(manifest: ReleaseManifest, repo_id: str, title: str) -> str:
    """The front matter of a release in the repository `ORG/NAME`, without the `---` lines."""
    import yaml

    configs = manifest.counts["configs"]
    rows = sum(counts["rows"] for counts in configs.values())
    license_id = license_of(manifest.licenses)
    link = {"license_name": "see-card", "license_link": f"{DATASETS_URL}{repo_id}#licences"}
    front: dict[str, Any] = {
        "pretty_name": title,
        "license": license_id,
        **(link if license_id == OTHER else {}),
        "language": ["en"],
        "task_categories": ["image-text-to-text", "visual-question-answering"],
        "size_categories": [next((size for most, size in _SIZES if rows < most), "n>1M")],
        "tags": ["safety", "red-teaming", "alignment", "multi-turn", "synthetic", "not-for-all-audiences"],
        "extra_gated_heading": "Access for safety research",
        "extra_gated_prompt": _TERMS,
        "extra_gated_fields": {
            "Name": "text",
            "Affiliation": "text",
            "Country": "country",
            "I will use it for": {
                "type": "select",
                "options": ["Safety training", "Evaluation", "Academic research", {"label": "Other", "value": "other"}],
            },
            "I agree to these terms": "checkbox",
        },
        "configs": [_config_entry(manifest, name, name == "dialogues") for name in configs],
        "dataset_info": [_info_entry(manifest, name, counts) for name, counts in configs.items()],
    }
    return str(yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000))


def read_front_matter(card: str, at: object) -> dict[str, Any]:
    """The front matter of a card; `InputError` names `at` if there is none that can be read."""
    import yaml

    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        loaded = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        loaded = None
    if not isinstance(loaded, dict):
        raise InputError("its YAML cannot be read", at=at, remedy=PACKAGE_AGAIN)
    return loaded


def ordered_splits(splits: Iterable[str]) -> list[str]:
    """The splits in the order of the card: train, then test."""
    return sorted(splits, reverse=True)


def _config_entry(manifest: ReleaseManifest, config: str, default: bool) -> dict[str, Any]:
    splits = manifest.counts["configs"][config]["splits"]
    files = [{"split": split, "path": f"data/{config}/{split}-*.parquet"} for split in ordered_splits(splits)]
    return {"config_name": config, "data_files": files} | ({"default": True} if default else {})


def _info_entry(manifest: ReleaseManifest, config: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    sizes = counts["bytes"]
    return {
        "config_name": config,
        "features": [{"name": column.name} | _feature(column) for column in COLUMNS[config]],
        "splits": [
            {"name": split, "num_bytes": sizes[split], "num_examples": counts["splits"][split]}
            for split in ordered_splits(counts["splits"])
        ],
        "download_size": sum(shard.bytes for shard in manifest.shards if shard.config == config),
        "dataset_size": sum(sizes.values()),
    }


def _feature(column: Column) -> dict[str, Any]:
    part = [{"name": "type", "dtype": "string"}, {"name": "text", "dtype": "string"}]
    kinds: dict[str, dict[str, Any]] = {
        "strings": {"list": "string"},
        "messages": {"list": [{"name": "role", "dtype": "string"}, {"name": "content", "list": part}]},
        "images": {"list": "image"},
    }
    return kinds.get(column.kind, {"dtype": column.kind})
