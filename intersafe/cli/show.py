"""The command that shows a run: `show`."""

import click

from intersafe.errors import InputError


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--dialogue", "dialogues", metavar="ID|NUMBER", help="Its id, or its number counted from 1. Default: the first."
)
@click.option("--refusal", "refusals", metavar="ID|NUMBER", help="Show this refusal sample instead.")
@click.option("--twin", "twins", metavar="ID|NUMBER", help="Show this benign twin instead.")
@click.option("--full", is_flag=True, help="Print every message that each role saw in full.")
@click.option("--funnel", "only_funnel", is_flag=True, help="Print only the funnel.")
def show(run: str, full: bool, only_funnel: bool, **wishes: str | None) -> None:
    """Show a run: its funnel, and one dialogue with everything that each role saw.

    \b
    intersafe show demo
    intersafe show demo --dialogue 3 --full
    intersafe show demo --refusal 1
    """
    from intersafe.cli.printing import pick, print_dialogue, print_funnel, print_refusal, print_roles
    from intersafe.records import RefusalSample
    from intersafe.run.directory import Run
    from intersafe.run.kinds import RECORDS

    wished = [kind for kind, wish in wishes.items() if wish is not None]  # the options have the names of the kinds
    if len(wished) + only_funnel > 1:
        raise InputError("several at once", at="--dialogue, --refusal, --twin, --funnel", remedy="pass one of them")
    opened = Run(run)
    kind = next(iter(wished), "dialogues")
    picked = None if only_funnel else pick(opened, wishes[kind] or None, kind)
    print_funnel(opened)
    if only_funnel:
        return
    if picked is None:
        click.echo(f"\nno {RECORDS[kind].noun} was accepted yet")
        return
    if isinstance(picked, RefusalSample):
        print_refusal(opened, picked)
        return
    print_dialogue(opened, picked)
    if kind == "dialogues":
        print_roles(opened, picked, full)
