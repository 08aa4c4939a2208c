"""The command that finds problems before a run does: `doctor`."""

from typing import TYPE_CHECKING

import click

from intersafe.cli.options import json_option, recipe_option
from intersafe.cli.values import FiniteRange, JsonTarget

if TYPE_CHECKING:
    from intersafe.doctor.findings import Report
    from intersafe.recipe.sections import Recipe

_COLOURS = {"ok": "green", "info": None, "warn": "yellow", "FAIL": "red"}


@click.command()
@recipe_option(positional=True)
@json_option
@click.option(
    "--timeout",
    type=FiniteRange(0.1, 3600),
    default=10.0,
    show_default=True,
    help="Seconds for one answer; an image gets six times as long.",
)
@click.option("--online", is_flag=True, help="Also ask the Hub whether it accepts the token.")
@click.pass_context
def doctor(ctx: click.Context, recipe: "Recipe", target: JsonTarget | None, timeout: float, online: bool) -> None:
    """Check this machine and the servers of a recipe, and say how to fix what is wrong.

    \b
    intersafe doctor --recipe pipelines/intersafe_v.yaml
    intersafe doctor --recipe pipelines/intersafe_v.yaml --json - | jq .ok

    It says what is installed, which servers answer, and what each can do. Each replica gets about a dozen small
    requests. Nothing is written but --json, and no key is shown. The exit code is 1 if something fails. docs/doctor.md
    explains each line.
    """
    from intersafe.doctor.examine import examine

    servers = sum(len(model.spec.urls) for model in recipe.cast.models.values())
    if servers:
        click.echo(f"asking the servers of {recipe.name}, {timeout:g} s for one answer", err=True)
    report = examine(recipe, timeout=timeout, online=online)
    if target:
        target.write(report)
    if not target or target.path:
        _print(report)
    ctx.exit(0 if report.ok else 1)


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
    click.echo(f"{failed or 'nothing'} to fix" + (f", {warned} to check" if warned else ""))
