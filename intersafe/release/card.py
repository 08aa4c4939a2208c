"""The card of a release (`README.md`): YAML for the Hub, and what a reader must know before using the data.

It is made from the manifest alone and holds no row of the data. Text that a person writes between the two markers is
kept in every later version.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from intersafe.release.croissant import croissant_of
from intersafe.release.front_matter import DATASETS_URL, ordered_splits, render_front_matter
from intersafe.release.licenses import OTHER, hub_license, license_of
from intersafe.release.manifest import ReleaseManifest
from intersafe.release.rows import COLUMNS, UNSAFE
from intersafe.wording import printable

CARD, CHANGELOG, CROISSANT = "README.md", "CHANGELOG.md", "croissant.json"
ANY_REPO = "ORG/NAME"
"""The repository in a card until the release is pushed to one."""
KEEP, KEEP_END = "<!-- intersafe:keep -->", "<!-- /intersafe:keep -->"
DATASET = "intersafe"
_ABOUT = {
    "dialogues": "multi-turn dialogues with images: a user leads up to a risk step by step, a model answers",
    "refusal_vqa": "single questions, with or without an image, each with the refusal that answers it",
    "twins": "benign twins: the images and structure of a dialogue with a harmless intent, to measure over-refusal",
    UNSAFE: "the dialogues with a withheld reply again, with every unsafe reply in full",
}

_SCRIPTED = "> **Scripted: nothing in this release is real model output.** A script played the models."


def card_files(manifest: ReleaseManifest, repo_id: str, kept: str = "") -> dict[str, bytes]:
    """Card and Croissant of a release for the repository `ORG/NAME`, by file name.

    The same arguments give the same bytes. `kept` is the text between the markers.
    """
    about, license_id, citation = (
        describe_release(manifest),
        license_of(manifest.licenses),
        _citation(manifest, repo_id),
    )
    return {
        CARD: render_card(manifest, repo_id, kept).encode(),
        CROISSANT: croissant_of(manifest, repo_id, about, license_id, citation),
    }


def kept_text(card: str) -> str:
    """The text between the markers of a card; empty if a marker is missing."""
    _, opened, rest = card.partition(KEEP)
    text, closed, _ = rest.rpartition(KEEP_END)
    return text.strip("\n") if opened and closed else ""


def render_card(manifest: ReleaseManifest, repo_id: str, kept: str = "") -> str:
    """The card of a release in the repository `ORG/NAME`, with `kept` between the markers."""
    sections = [
        *([_SCRIPTED] if manifest.scripted else []),
        f"# {_title(repo_id)}",
        describe_release(manifest),
        "> **Content warning.** The users' messages lead up to harmful requests, and images may show risky things.",
        f"{KEEP}\n{kept}\n{KEEP_END}",
        _use(),
        _load(manifest, repo_id),
        _configs(manifest),
        _made(manifest),
        _figures(manifest),
        _funnel(manifest),
        _withheld(manifest),
        _limits(manifest),
        _licences(manifest),
        f"## Citation\n\n```bibtex\n{_citation(manifest, repo_id)}\n```",
        _changes(manifest),
    ]
    return f"---\n{render_front_matter(manifest, repo_id, _title(repo_id))}---\n" + "\n\n".join(sections) + "\n"


def describe_release(manifest: ReleaseManifest) -> str:
    """What the release is, in one sentence."""
    rows = {config: counts["rows"] for config, counts in manifest.counts["configs"].items()}
    parts = [f"{rows['dialogues']:,} multi-turn, multimodal safety dialogues"]
    parts += [f"{rows['refusal_vqa']:,} refusal-VQA samples"] if rows.get("refusal_vqa") else []
    parts += [f"{rows['twins']:,} benign twins"] if rows.get("twins") else []
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"{listed}, made to teach vision-language models to stay safe in conversation."


def changelog(manifest: ReleaseManifest, earlier: str) -> str:
    """The changelog of a release: this version, then the changelog of the earlier release."""
    head = "# Changelog\n"
    return (
        f"{head}\n## {manifest.version}\n\n{_change_lines(manifest)}\n" + earlier.removeprefix(head).rstrip("\n") + "\n"
    )


# --- sections --------------------------------------------------------------------------------------------------------


def _title(repo_id: str) -> str:
    return repo_id.rpartition("/")[2] if repo_id != ANY_REPO else DATASET


def _use() -> str:
    return """\
## Use

For: teaching vision-language models to notice a risk that builds up over several turns and to answer it safely;
measuring that, and over-refusal too; studying how judges and victims behave.

Not for: training a model to produce harmful content; testing or attacking systems without permission of their owners;
judging the safety of a product by these figures alone; legal, medical or financial guidance. `messages` hold what the
victims said, safe or not. Before you use replies as targets, select by `turn_labels`, or train on `aligned`."""


def _load(manifest: ReleaseManifest, repo_id: str) -> str:
    lines = [
        f'load_dataset("{repo_id}", "{config}", revision="v{manifest.version}")'
        for config in manifest.counts["configs"]
    ]
    return "\n".join(["## Load", "", "```python", "from datasets import load_dataset", "", *lines, "```"])


def _configs(manifest: ReleaseManifest) -> str:
    counts = manifest.counts["configs"]
    table = _table(
        ("config", "split", "rows", "seeds", "MB"),
        [
            (config, split, f"{found['splits'][split]:,}", found["seeds"], f"{found['bytes'][split] / 1e6:,.1f}")
            for config, found in counts.items()
            for split in ordered_splits(found["splits"])
        ],
    )
    text = [f"- `{config}`: {_ABOUT[config]}." for config in counts]
    columns = {column.name: column.about for config in counts for column in COLUMNS[config]}
    return "\n".join(
        [
            "## Configs and columns\n",
            *text,
            "",
            table,
            "",
            f"`test` holds the seeds whose hash falls in the lowest {manifest.counts['test_share']:.1%}; no seed is in "
            "two splits of any config.",
            "",
            _table(("column", "holds"), [(f"`{name}`", about) for name, about in columns.items()]),
        ]
    )


def _made(manifest: ReleaseManifest) -> str:
    models = _table(("role", "model"), manifest.models.items())
    prompts = _table(("prompt", "sha256"), [(name, sha256[:16]) for name, sha256 in sorted(manifest.prompts.items())])
    generator = ", ".join(f"{name} {version}" for name, version in sorted(manifest.generator.items()))
    return f"""\
## How it was made

An attacker decomposes a seed's question into steps that are harmless alone and leads a conversation along them; a
victim answers each turn; a judge scores every reply and the whole. Images come from the seed or from a painter. Rules,
quotas and near-duplicate removal decide what is accepted. The method follows InterSafe-V (AM3Safety, arXiv 2601.04736).

Recipe `{_cell(manifest.name)}`, digest `{manifest.recipe[:16]}`; seeds `{manifest.seeds[:16]}`; written by {generator}.

{models}

<details><summary>Prompts, by the hash of their file</summary>

{prompts}

</details>"""


def _figures(manifest: ReleaseManifest) -> str:
    configs, figures = manifest.counts["configs"], manifest.counts["figures"]
    dialogues = configs["dialogues"]
    parts = ["## Figures\n"]
    names = [config for config in configs if config != UNSAFE]
    categories = sorted({name for config in names for name in configs[config]["category"]})
    parts.append(
        _table(
            ("category", *names), [(c, *(configs[name]["category"].get(c, 0) for name in names)) for c in categories]
        )
    )
    for title, key in (("turns", "turns"), ("images", "images"), ("strategy", "strategy"), ("victim", "victim")):
        parts += ["", _table((title, "dialogues"), [(value, f"{count:,}") for value, count in dialogues[key].items()])]
    parts += [
        "",
        _table(("reply judged", "turns"), [(word, f"{count:,}") for word, count in dialogues["safety"].items()]),
    ]
    parts += ["", _table(("refusal", "turns"), [(word, f"{count:,}") for word, count in dialogues["refusals"].items()])]
    if groups := configs.get("refusal_vqa", {}).get("group"):
        parts += ["", _table(("refusal group", "samples"), [(word, f"{count:,}") for word, count in groups.items()])]
    facts = [
        ("turns per dialogue", _mean(dialogues["turns"])),
        ("images per dialogue", _mean(dialogues["images"])),
        ("dialogues with an unsafe turn", _share(figures["asr"])),
        ("aligned answers judged safe", _share(figures["aligned_safe"])),
        ("twins with a turn refused in full (over-refusal)", _share(figures["over_refusal"])),
        ("distinct-1, distinct-2 of the users' words", _pair(figures["distinct"])),
        ("self-BLEU-4 on a sample", _number(figures["self_bleu_4"])),
        ("judge's agreement with people", "not measured"),
    ]
    return "\n".join([*parts, "", _table(("figure", "value"), facts)])


def _funnel(manifest: ReleaseManifest) -> str:
    figures = manifest.counts["figures"]
    rows = [(*ended[:4], f"{ended[4]:,}") for ended in figures["ended"]]
    accepted = f"{_share(figures['yielded'])} of the dialogue jobs were accepted"
    excluded = f"{figures['seeds_excluded']:,} seeds were excluded by rule before any model saw them"
    text = f"## Funnel\n\n{accepted}; {excluded}. The other jobs ended here:\n\n"
    state = {
        "incomplete": "\n\n**The run was not complete when this was packaged.**",
        "jobs_exhausted": "\n\nThe seeds were used up before every quota was met.",
    }.get(figures["state"], "")
    return text + (_table(("job kind", "ended as", "stage", "reason", "jobs"), rows) if rows else "none.") + state


def _withheld(manifest: ReleaseManifest) -> str:
    withheld = sum(counts.get("withheld", 0) for counts in manifest.counts["configs"].values())
    unsafe = (
        f"The config `{UNSAFE}` holds them in full, for those who study or classify unsafe replies."
        if manifest.includes_unsafe
        else "Their texts are not in this repository."
    )
    return f"""\
## What is withheld

{withheld:,} replies that the judge did not call safe are replaced by `[WITHHELD unsafe reply, sha256=..., N
characters, labels: ...]`. {unsafe}

Not published: backtracked turns, the plans, the descriptions of painted images, the judge's words, and the seeds'
questions (except as `question` in refusal VQA, if the recipe asks for that). Sexual content with minors is excluded by
rule, in the seeds and in every generated text. Images are stripped of metadata; they are not searched for faces or
personal data."""


def _limits(manifest: ReleaseManifest) -> str:
    lines = [
        "Labels are one judge model's; its agreement with people was not measured here, and such judges are weakest on "
        "privacy, self-harm and cyber topics.",
        "Dialogues without visible risk were rejected, so the share of unsafe turns is no attack success rate on the "
        "seeds.",
        "All text is machine-written, in English, in the style of the models above; the terms of the models may "
        "restrict their outputs beyond the licences of the seeds.",
        "A user's message may mention what a withheld reply before it said.",
        "Each victim is one checkpoint with one setting; other versions behave differently.",
    ]
    return "## Known limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licences(manifest: ReleaseManifest) -> str:
    rows = []
    for config, counts in manifest.counts["configs"].items():
        for source, licenses in counts["sources"].items():
            rows += [(config, source, name, hub_license(name), f"{count:,}") for name, count in licenses.items()]
    license_id = license_of(manifest.licenses)
    why = (
        "No single licence holds for all rows: each row is under the licence in its `source_license`, and a use of the "
        "whole must comply with all of them."
        if license_id == OTHER
        else f"The whole is under the strictest of the sources' licences, `{license_id}`."
    )
    table = _table(("config", "source of the seeds", "licence", "on the Hub", "rows"), rows)
    return f"## Licences\n\n{why} `source_license` names the licence of each row.\n\n{table}"


def _citation(manifest: ReleaseManifest, repo_id: str) -> str:
    return f"""\
@misc{{{_title(repo_id).replace(" ", "_")}_{manifest.version.replace(".", "_")},
  title = {{{_title(repo_id)} v{manifest.version}}},
  howpublished = {{{DATASETS_URL}{repo_id}}},
  note = {{made with intersafe {manifest.generator["intersafe"]}, recipe {manifest.recipe[:16]}}}
}}"""


def _changes(manifest: ReleaseManifest) -> str:
    return f"## Changes in {manifest.version}\n\n{_change_lines(manifest)}\n\nEarlier versions: `{CHANGELOG}`."


def _change_lines(manifest: ReleaseManifest) -> str:
    if not manifest.parent_version:
        return "\n".join(["- First version.", *_row_lines(manifest)])
    lines = [
        f"- `{config}`: {added:,} rows added, {changed:,} changed, {removed:,} removed since {manifest.parent_version}."
        for config, (added, changed, removed) in manifest.counts["changes"].items()
        if added or changed or removed
    ]
    return "\n".join([*(lines or [f"- The rows are those of {manifest.parent_version}."]), *_row_lines(manifest)])


def _row_lines(manifest: ReleaseManifest) -> list[str]:
    return [f"- `{config}`: {counts['rows']:,} rows." for config, counts in manifest.counts["configs"].items()]


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(str(value)) for value in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _mean(histogram: Mapping[str, int]) -> str:
    return _number(sum(int(value) * count for value, count in histogram.items()) / sum(histogram.values()))


def _share(share: Mapping[str, Any]) -> str:
    return f"{share['count']:,} of {share['total']:,} ({share['share']:.1%})" if share["total"] else "none"


def _pair(distinct: Mapping[str, Any]) -> str:
    return f"{_number(distinct['distinct_1'])}, {_number(distinct['distinct_2'])}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
