"""The command that shows a run: `show`."""

import click

from intersafe.errors import InputError


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--dialogue", "which", metavar="ID|NUMBER", help="Its id, or its number counted from 1. Default: the first."
)
@click.option("--refusal", metavar="ID|NUMBER", help="Show this refusal sample instead.")
@click.option("--twin", metavar="ID|NUMBER", help="Show this benign twin instead.")
@click.option("--full", is_flag=True, help="Print every message that each role saw in full.")
@click.option("--funnel", "only_funnel", is_flag=True, help="Print only the funnel.")
def show(run: str, which: str | None, refusal: str | None, twin: str | None, full: bool, only_funnel: bool) -> None:
    """Show a run: its funnel, and one dialogue with everything that each role saw.

    \b
    intersafe show demo
    intersafe show demo --dialogue 3 --full
    intersafe show demo --refusal 1
    """
    from intersafe.cli.printing import pick, print_dialogue, print_funnel, print_refusal, print_roles
    from intersafe.run.directory import Run

    if sum(wish not in (None, False) for wish in (which, refusal, twin, only_funnel)) > 1:
        raise InputError("several at once", at="--dialogue, --refusal, --twin, --funnel", remedy="pass one of them")
    opened = Run(run)
    kind = "refusals" if refusal is not None else "twins" if twin is not None else "dialogues"
    picked = None if only_funnel else pick(opened, which or refusal or twin, kind)
    print_funnel(opened)
    if only_funnel:
        return
    if refusal is not None:
        print_refusal(opened, picked)
        return
    if picked is None:
        click.echo("\nno dialogue was accepted yet")
        return
    print_dialogue(opened, picked)
    if not twin:
        print_roles(opened, picked, full)
