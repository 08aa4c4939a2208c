"""Croissant (mlcommons.org/croissant/1.0) with the responsible-AI vocabulary (croissant/RAI/1.0): `croissant.json`."""

import json
from typing import Any

from intersafe.release.manifest import ReleaseManifest
from intersafe.release.rows import COLUMNS, UNSAFE, Column

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant_of(manifest: ReleaseManifest, repo_id: str, description: str, license_id: str, citation: str) -> bytes:
    """The JSON-LD of a release as UTF-8. It has no date, so the same release has the same bytes on any day."""
    url = f"https://huggingface.co/datasets/{repo_id}"
    configs = list(manifest.counts["configs"])
    metadata = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": "".join(c if c.isalnum() or c in "-_" else "-" for c in repo_id.rpartition("/")[2]),
        "description": description,
        "version": manifest.version,
        "url": url,
        "license": f"{url}#licences" if license_id == "other" else f"https://choosealicense.com/licenses/{license_id}/",
        "creator": {"@type": "sc:Organization", "name": repo_id.partition("/")[0]},
        "citeAs": citation,
        "inLanguage": "en",
        "isLiveDataset": False,
        "keywords": ["safety", "vision-language", "multi-turn", "synthetic", "red-teaming", "alignment"],
        **_responsible(manifest),
        "distribution": [_repository(url, manifest), *(_file_set(config) for config in configs)],
        "recordSet": [_record_set(config) for config in configs],
    }
    return json.dumps(metadata, indent=2, ensure_ascii=False).encode() + b"\n"


def _repository(url: str, manifest: ReleaseManifest) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": "repo",
        "name": "repo",
        "description": "The repository on the Hugging Face Hub, at the tag of this version.",
        "contentUrl": f"{url}/tree/v{manifest.version}",
        "encodingFormat": "git+https",
        # A git repository has no single hash; the Hub's own Croissant files name this issue here too.
        "sha256": "https://github.com/mlcommons/croissant/issues/80",
    }


def _file_set(config: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": f"{config}-files",
        "containedIn": {"@id": "repo"},
        "encodingFormat": "application/x-parquet",
        "includes": f"data/{config}/*.parquet",
    }


def _record_set(config: str) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": config,
        "key": {"@id": f"{config}/id"},
        "field": [_field(config, column) for column in COLUMNS[config]],
    }


def _field(config: str, column: Column) -> dict[str, Any]:
    name = f"{config}/{column.name}"
    source = {"fileSet": {"@id": f"{config}-files"}, "extract": {"column": column.name}}
    field: dict[str, Any] = {"@type": "cr:Field", "@id": name, "description": column.about}
    if column.kind in ("strings", "images", "messages"):
        field["repeated"] = True
    if column.kind == "messages":
        return field | {
            "subField": [
                {
                    "@type": "cr:Field",
                    "@id": f"{name}/{part}",
                    "dataType": "sc:Text",
                    "source": source | {"transform": {"jsonPath": part}},
                }
                for part in ("role", "content")
            ]
        }
    kind = {"int32": "sc:Integer", "image": "sc:ImageObject", "images": "sc:ImageObject"}.get(column.kind, "sc:Text")
    transform = {"transform": {"jsonPath": "bytes"}} if kind == "sc:ImageObject" else {}
    return field | {"dataType": kind, "source": source | transform}


def _responsible(manifest: ReleaseManifest) -> dict[str, Any]:
    """The fields of the responsible-AI vocabulary."""
    models = [f"{role}: {model}" for role, model in sorted(manifest.models.items())]
    manipulated = (
        f"in full in the config {UNSAFE}."
        if manifest.includes_unsafe
        else "withheld: their hash, length and labels remain."
    )
    fields: dict[str, Any] = {
        **_RESPONSIBLE,
        "dataCollection": _RESPONSIBLE["dataCollection"] + (_SCRIPTED if manifest.scripted else ""),
        "dataManipulationProtocol": f"Splits are by seed. Replies that the judge did not call safe are {manipulated}",
        "machineAnnotationTools": [model for model in models if "judge" in model.partition(":")[0]],
    }
    return {f"rai:{name}": value for name, value in fields.items()}


_SCRIPTED = " A script played the models: nothing in it is real model output."
_RESPONSIBLE: dict[str, Any] = {
    "dataCollection": "Grown by models from seed questions and images: an attacker leads a conversation step by step, "
    "a victim answers, a judge scores each turn.",
    "dataCollectionType": ["Synthetic data generation", "Software collection"],
    "dataPreprocessingProtocol": "Images are verified, stripped of metadata and named by their sha256. Rules, quotas "
    "and near-duplicate removal (MinHash) decide what is accepted.",
    "dataImputationProtocol": "None: what a judge left undetermined was asked again or rejected, never filled in.",
    "dataAnnotationProtocol": "A judge model labels every reply: safe or unsafe, kind of refusal, harmless and "
    "helpful from 1 to 5, by a rubric for the category. No person annotated the data.",
    "annotationsPerItem": "1",
    "dataAnnotationPlatform": "intersafe",
    "dataUseCases": "Training and evaluating vision-language models for safety in multi-turn conversation; "
    "measuring over-refusal; studying judges. Not for producing harmful content.",
    "dataLimitations": "Machine-written English of the named models; labels of one judge whose agreement with "
    "people was not measured; dialogues without visible risk were rejected.",
    "dataBiases": "The seeds' categories and the models' styles are over-represented; judges are weakest on "
    "privacy, self-harm and cyber topics.",
    "personalSensitiveInformation": "No personal data was sought; images were not searched for faces. Sexual "
    "content with minors is excluded by rule.",
    "dataSocialImpact": "Meant to make assistants safer. The users' messages show how a risk is led up to and "
    "could be misused, so access is gated and unsafe replies are withheld.",
    "dataReleaseMaintenancePlan": "Versions are MAJOR.MINOR.PATCH under tags that never move; CHANGELOG.md and "
    "manifest.json say what changed.",
}
