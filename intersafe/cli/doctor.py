"""The command that says what is wrong before a run does: `doctor`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from intersafe.cli.inputs import recipe_of
from intersafe.errors import InputError

if TYPE_CHECKING:
    from intersafe.doctor.findings import Report

_COLOURS = {"ok": "green", "info": None, "warn": "yellow", "FAIL": "red"}


@click.command()
@click.argument("pipeline", metavar="[RECIPE]", required=False, type=click.Path(path_type=Path))
@click.option("--json", "target", metavar="PATH", help="Write it as JSON too; - prints that and nothing else.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    help="Seconds for one answer; a picture gets six times as long.",
)
@click.option("--online", is_flag=True, help="Ask the Hub too whether it accepts the token.")
@click.pass_context
def doctor(ctx: click.Context, pipeline: Path | None, target: str | None, timeout: float, online: bool) -> None:
    """Say what is installed, which servers of RECIPE answer and what each can do; name the remedy where one cannot.

    \b
    intersafe doctor pipelines/intersafe_v.yaml
    intersafe doctor pipelines/intersafe_v.yaml --json - | jq .ok

    Each replica is asked about a dozen small questions. Nothing is written but --json, and no key is shown. Exit code 1
    if something fails. What each line means is in docs/doctor.md.
    """
    import msgspec

    from intersafe.doctor.examine import examine
    from intersafe.storage.files import write_whole

    path = None if target in (None, "-") else _file(str(target))
    recipe = recipe_of(pipeline)
    servers = sum(len(model.spec.urls) for model in recipe.cast.models.values())
    if servers:
        click.echo(f"asking the servers of {recipe.name}, {timeout:g} s for one answer", err=True)
    report = examine(recipe, timeout=timeout, online=online)
    data = msgspec.json.format(msgspec.json.encode(report)) + b"\n"
    if path:
        write_whole(path, data)
    if target == "-":
        click.echo(data.decode(), nl=False)
    else:
        _print(report)
    if path:
        click.echo(f"wrote {path}", err=True)
    ctx.exit(0 if report.ok else 1)


def _file(name: str) -> Path:
    path = Path(name)
    if not name or path.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"{name!r} is no regular file", at="--json", remedy="name a file, or - for stdout")
    return path.resolve()  # a link is followed, not replaced


def _print(report: "Report") -> None:
    from intersafe.wording import plain

    for group in report.groups:
        click.echo(click.style(plain(group.title), bold=True))
        for finding in group.findings:
            status = click.style(f"{finding.status:<5}", fg=_COLOURS[finding.status])
            click.echo(f"  {status} {finding.what:<12} {plain(finding.says)}".rstrip())
            if finding.remedy:
                click.echo(f"{'':21}fix: {plain(finding.remedy)}")
        click.echo()
    failed = sum(finding.status == "FAIL" for group in report.groups for finding in group.findings)
    warned = sum(finding.status == "warn" for group in report.groups for finding in group.findings)
    click.echo(f"{failed or 'nothing'} to mend" + (f", {warned} to look at" if warned else ""))
