"""The commands of releases: `package`, `push`, `pull` and `diff`. Their exit codes are in the help of `intersafe`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from intersafe.cli.options import default_recipe
from intersafe.cli.values import SHARD_SIZE, FiniteRange
from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.release.client import Hub
    from intersafe.release.manifest import Version
    from intersafe.release.push import PushResult


@click.command("package")
@click.argument("run", metavar="RUN")
@click.option("--version", metavar="X.Y.Z", help="Default: 1.0.0, or the next minor version after the newest release.")
@click.option("--parent", type=click.Path(path_type=Path), help="Release to continue. Default: the run's newest.")
@click.option(
    "--test-share",
    type=FiniteRange(0, 0.5),
    help="Share of the seeds in the split `test`. Default: as in the parent release, or 0.05.",
)
@click.option(
    "--max-shard-size",
    "shard_bytes",
    metavar="SIZE",
    type=SHARD_SIZE,
    default="300MB",
    show_default=True,
    help="Largest shard, texts and images together.",
)
@click.option("--include-unsafe", is_flag=True, help="Add the config dialogues_unsafe with unsafe replies in full.")
@click.option("--allow-incomplete", is_flag=True, help="Package a run that is not complete.")
def package_command(run: str, version: str | None, **options: Any) -> None:
    """Make a release of RUN: Parquet shards, card, changelog and manifest, in RUN/release/X.Y.Z.

    \b
    intersafe package demo
    intersafe package demo --version 1.1.0          after the run has grown: only new shards are written

    Replies that the judge did not call safe are withheld. The same run gives the same bytes. docs/release.md lists the
    columns and all rules.
    """
    from intersafe.release.manifest import parse_version
    from intersafe.release.package import PackageOptions, package
    from intersafe.run.directory import Run

    opened = Run(run)
    asked = parse_version(version) if version else None
    made = package(opened, PackageOptions(version=asked, **options))
    if options["include_unsafe"]:
        click.echo("the config dialogues_unsafe has the unsafe replies in full: keep it private and gated", err=True)
    if opened.summary is None:
        click.echo("the run is not complete; its card says so", err=True)
    for config, counts in made.manifest.counts["configs"].items():
        splits = ", ".join(f"{split} {rows:,}" for split, rows in counts["splits"].items())
        click.echo(f"{counts['rows']:>8,} {config}: {splits}")
    shards, size = made.manifest.shards, sum(shard.bytes for shard in made.manifest.shards)
    click.echo(
        f"{len(shards):>8,} shards, {size / 1e6:,.1f} MB, {made.taken_over:,} as they were in the release before"
    )
    click.echo(f"\n{made.path}" + ("" if made.made else "   was there already with the same content"))


_endpoint = click.option(
    "--endpoint", metavar="URL", help="The Hub's address. Default: HF_ENDPOINT, or the public Hub."
)
_no_xet = click.option("--no-xet", is_flag=True, help="Move large files over plain HTTP, without hf_xet.")
_deadline = click.option(
    "--deadline",
    type=FiniteRange(min=0, min_open=True, max=30 * 86_400),
    default=3 * 3600.0,
    show_default=True,
    help="Seconds after which it gives up; a second run resumes.",
)


@click.command("push")
@click.argument("repo", metavar="ORG/NAME")
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--version", "version", metavar="X.Y.Z", help="Which release of the run. Default: its newest.")
@click.option(
    "--bump",
    type=click.Choice(["major", "minor", "patch"]),
    help="Push the newest release, and only if it is that step after the newest tag.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be sent and change nothing.")
@click.option(
    "--verify",
    type=click.Choice(["tree", "rows", "full"]),
    default="rows",
    show_default=True,
    help="Check before tagging: sha256 of each file (tree), row counts too (rows), or download every shard (full).",
)
@click.option("--status", "only_status", is_flag=True, help="List the versions here and on the Hub; push nothing.")
@click.option("--public", is_flag=True, help="Allow a public repository; asks for its name.")
@click.option("--no-gate", is_flag=True, help="Allow a repository without a gate; asks for its name.")
@click.option("--yes-really", metavar="ORG/NAME", help="Answer that question, in scripts.")
@click.option("--allow-scripted", is_flag=True, help="Publish a run with scripted models.")
@click.option("--take-over", is_flag=True, help="Replace data on main that no tag names or that was changed by hand.")
@click.option(
    "--message", metavar="TEXT", default="", help="Commit message. Default: the version and the recipe's name."
)
@_endpoint
@_no_xet
@_deadline
def push_command(
    repo: str,
    run: str | None,
    version: str | None,
    bump: str | None,
    only_status: bool,
    public: bool,
    no_gate: bool,
    yes_really: str | None,
    allow_scripted: bool,
    no_xet: bool,
    **options: Any,
) -> None:
    """Publish a release on the Hugging Face Hub as version vX.Y.Z, whole or not at all.

    \b
    intersafe package demo && intersafe push my-org/my-data demo --version 1.0.0 --dry-run
    intersafe push my-org/my-data demo --bump minor
    intersafe push my-org/my-data demo --status

    RUN is a run or a release folder; default: the run of the recipe here. The repository is created private and gated,
    and nothing is sent to one that is not. A version is never replaced. Nothing is left half published, whatever stops
    it: run the same command again.
    """
    from intersafe.release.client import Hub, check_repo_id
    from intersafe.release.push import push
    from intersafe.release.push_job import PushOptions
    from intersafe.release.staged import open_release
    from intersafe.release.status import releases_in, status

    check_repo_id(repo)
    deadline, endpoint = options.pop("deadline"), options.pop("endpoint")

    def hub() -> Hub:
        return Hub(repo, endpoint=endpoint, xet=not no_xet, deadline=deadline, say=_say)

    found = releases_in(_folder_of(run))
    if only_status:
        there = hub()
        for line in there.within(lambda: status(there, found)):
            click.echo(line)
        return
    if (public or no_gate) and not options["dry_run"]:
        _confirm(repo, "public" if public else "without a gate", yes_really)
    if not found:
        raise InputError("no release there", at=_folder_of(run), remedy="make one with `intersafe package RUN`")
    release = open_release(_pick(found, version), allow_scripted=allow_scripted)
    there = hub()
    if bump:
        _check_bump(there, release.version, bump)
    chosen = PushOptions(public=public, gate=not no_gate, **options)
    _print(repo, there.within(lambda: push(there, release, chosen)))


def _folder_of(run: str | None) -> Path:
    from intersafe.recipe.load import load_recipe
    from intersafe.run.directory import run_path

    return run_path(load_recipe(default_recipe()).name if run is None else run)


def _pick(found: "dict[Version, Path]", version: str | None) -> Path:
    from intersafe.release.manifest import parse_version

    if version is None:
        return found[max(found)]
    wanted = parse_version(version)
    if wanted not in found:
        here = ", ".join(map(str, found))
        raise InputError(
            f"no release {wanted} here, only {here}", at="--version", remedy="make it: `intersafe package`"
        )
    return found[wanted]


def _check_bump(hub: "Hub", version: "Version", part: str) -> None:
    """`InputError` unless the version is that step after the newest tag, or the newest tag itself (a push again)."""
    from intersafe.release.manifest import Version
    from intersafe.release.push_job import versions_of

    newest = max(versions_of(hub.within(lambda: hub.tags() if hub.state() else {})), default=Version(0, 0, 0))
    if version not in (newest, newest.bumped(part)):
        raise InputError(
            f"the newest release here is {version}, a {part} step after {newest} is {newest.bumped(part)}",
            at="--bump",
            remedy=f"intersafe package RUN --version {newest.bumped(part)}",
        )


def _confirm(repo: str, what: str, answer: str | None) -> None:
    if answer is None:
        click.echo(f"{repo} will be, or may stay, {what}. Type its name to continue:", err=True)
        answer = sys.stdin.readline().strip()
    if answer != repo:
        raise InputError(f"that is not {repo}; nothing was sent", remedy="type ORG/NAME, or pass --yes-really ORG/NAME")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print(repo: str, outcome: "PushResult") -> None:
    if outcome.status == "dry run":
        for path in outcome.adds:
            click.echo(f"add    {path}")
        for path in outcome.deletes:
            click.echo(f"delete {path}")
    shards = sum(path.endswith(".parquet") for path in outcome.adds)
    sent = (
        "nothing was sent"
        if not outcome.adds
        else f"{shards} shards of {len(outcome.adds)} files, {outcome.bytes:,} bytes"
    )
    click.echo(f"{outcome.status}: {repo} {outcome.tag} ({sent})")
    if outcome.status != "dry run":
        click.echo(f'load_dataset("{repo}", "dialogues", revision="{outcome.tag}")')


@click.command("pull")
@click.argument("source", metavar="ORG/NAME[@vX.Y.Z]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder. Default: outputs/NAME/release/X.Y.Z.")
@_endpoint
@_no_xet
@_deadline
def pull_command(source: str, out: Path | None, endpoint: str | None, no_xet: bool, deadline: float) -> None:
    """Download a published release and check it against its manifest, whole or not at all.

    \b
    intersafe pull my-org/my-data@v1.2.0
    intersafe pull my-org/my-data --out there          the newest version

    After a stop the same command resumes.
    """
    from intersafe.release.client import Hub
    from intersafe.release.pull import parse_source, pull

    repo, version = parse_source(source)
    hub = Hub(repo, endpoint=endpoint, xet=not no_xet, deadline=deadline, say=_say)
    click.echo(hub.within(lambda: pull(hub, version, out)))


@click.command()
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@_endpoint
@_no_xet
@_deadline
def diff(old: str, new: str, endpoint: str | None, no_xet: bool, deadline: float) -> None:
    """Count the rows added, removed and changed between two releases, by category and label.

    \b
    intersafe diff my-org/my-data@v1.0.0 v1.1.0
    intersafe diff my-org/my-data@v1.1.0 outputs/demo/release/1.2.0

    OLD and NEW are ORG/NAME@vX.Y.Z or release folders; a bare version is one of the repository in OLD. Shards that both
    releases have are not read.
    """
    from intersafe.release.diff import compare_releases, diff_lines, open_sides

    with open_sides(old, new, endpoint=endpoint, xet=not no_xet, deadline=deadline, say=_say) as (before, after):
        for line in diff_lines(compare_releases(before, after)):
            click.echo(line)
