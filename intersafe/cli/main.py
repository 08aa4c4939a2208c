"""The command line: the only room that knows the terminal.

Each command imports its module when it runs, so that `--help` answers at once. Results go to stdout, talk to stderr.
Exit codes: 0 done, 1 `doctor` found something to mend, 2 bad input (one line, nothing written), 3 seeds exhausted or
version taken, 4 service gone or disk full (resumable), 5 a budget is reached (resumable), 130 stopped by Ctrl-C or
SIGTERM (resumable).
"""

import io
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from intersafe.cli.doctor import doctor
from intersafe.cli.generate import estimate, generate, regate
from intersafe.cli.inputs import prompts, seeds
from intersafe.cli.release import diff, package, pull, push
from intersafe.cli.serve import serve
from intersafe.errors import InputError, IntersafeError, StorageError


class _Group(click.Group):
    """Turns the failures of the house into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that knows fewer letters is no reason to stop
        _hear_signals()
        try:
            return super().invoke(ctx)
        except IntersafeError as error:
            click.echo(f"intersafe: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has all it wanted
            ctx.exit(0)
        except OSError as error:
            click.echo(f"intersafe: {error.filename or 'disk'}: {error.strerror}; mend its path or rights", err=True)
            ctx.exit(StorageError.exit_code)
        except KeyboardInterrupt:
            _hear_no_more()
            click.echo("intersafe: stopped; the same command goes on where it was", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _hear_signals() -> None:
    """SIGTERM and SIGHUP end every command as Ctrl-C does, with one line; what is ignored (`nohup`) stays ignored."""
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(name) is signal.SIG_DFL:
                signal.signal(name, signal.default_int_handler)


def _hear_no_more() -> None:
    """What a user presses again while the last line is written is no new wish."""
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="intersafe")
def main() -> None:
    """Manufacture training data that makes vision-language models safer in conversation.

    An attacker, one or several victims and a judge grow multi-turn dialogues with images from seeds. Start with
    `intersafe generate`: it needs no key and no GPU. Then `intersafe show demo`, and `intersafe init DIR` to make it
    yours.
    """


# --- generate, estimate, regate -------------------------------------------------------------------------------------

for command in (generate, estimate, regate):
    main.add_command(command)


# --- show ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--dialogue", "which", metavar="ID|NUMBER", help="Which one: its id, or its place from 1. Default: the first."
)
@click.option("--refusal", metavar="ID|NUMBER", help="Show that refusal sample instead.")
@click.option("--twin", metavar="ID|NUMBER", help="Show that benign twin instead.")
@click.option("--full", is_flag=True, help="Print every message that each role saw in full.")
@click.option("--funnel", "only_funnel", is_flag=True, help="Print the funnel alone.")
def show(run: str, which: str | None, refusal: str | None, twin: str | None, full: bool, only_funnel: bool) -> None:
    """Show a run: its funnel, and one dialogue with what each role saw, or one refusal sample or twin."""
    from intersafe.cli.printing import pick, print_dialogue, print_funnel, print_refusal, print_roles
    from intersafe.run.directory import Run

    if sum(wish not in (None, False) for wish in (which, refusal, twin, only_funnel)) > 1:
        raise InputError("several things at once", at="--dialogue, --refusal, --twin, --funnel", remedy="give one")
    opened = Run(run)
    kind = "refusals" if refusal is not None else "twins" if twin is not None else "dialogues"
    picked = None if only_funnel else pick(opened, which or refusal or twin, kind)
    print_funnel(opened)
    if only_funnel:
        return
    if refusal is not None:
        print_refusal(opened, picked)
        return
    dialogue = picked
    if dialogue is None:
        click.echo("\nno dialogue was kept yet")
        return
    print_dialogue(opened, dialogue)
    if not twin:
        print_roles(opened, dialogue, full)


# --- stats -----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--json", "target", metavar="PATH", help="Write the figures as JSON too; - prints them and nothing else.")
@click.option(
    "--sample",
    type=click.IntRange(2, 500),
    default=200,
    show_default=True,
    help="Dialogues for self-BLEU and the embeddings.",
)
@click.option("--embedder", metavar="SPEC", help="Model for the embedding dispersion, as openai:model@url.")
@click.option("--embedder-key", metavar="ENVVAR", default="", help="Environment variable with its API key.")
@click.option(
    "--price",
    "prices",
    metavar="ROLE=IN,OUT[,CALL]",
    multiple=True,
    help="USD per million prompt and completion tokens, and per call, in place of the recipe's; several times.",
)
def stats(
    run: str, target: str | None, sample: int, embedder: str | None, embedder_key: str, prices: tuple[str, ...]
) -> None:
    """The figures of a run that a paper needs, beside the published ones.

    \b
    intersafe stats demo
    intersafe stats demo --json figures.json --price victim=0.1,0.3 --price judge=0.4,1.6 --price painter=0,0,0.02
    intersafe stats demo --embedder openai:bge-m3@http://localhost:8000/v1

    Nothing is written into the run. What each figure means and does not show is in docs/stats.md.
    """
    import msgspec

    from intersafe.cli.values import file_outside, parse_prices
    from intersafe.models.http.embeddings import open_embedder
    from intersafe.report.cost import with_flags
    from intersafe.report.stats import stats_of
    from intersafe.report.table import sections
    from intersafe.run.directory import Run
    from intersafe.storage.files import write_whole
    from intersafe.wording import plain

    if embedder_key and not embedder:
        raise InputError("a key without a model", at="--embedder-key", remedy="give --embedder too")
    opened = Run(run)
    priced = with_flags(opened.prices(), parse_prices(prices))
    path = file_outside(opened, target) if target not in (None, "-") else None
    model = open_embedder(embedder, embedder_key, lambda text: click.echo(text, err=True)) if embedder else None
    found = stats_of(opened, sample=sample, prices=priced, embedder=model)
    data = msgspec.json.format(msgspec.json.encode(found)) + b"\n"
    if path:
        write_whole(path, data)
    if target == "-":
        click.echo(data.decode(), nl=False)
        return
    for number, section in enumerate(sections(found)):
        click.echo(("\n" if number else "") + click.style(plain(section.title), bold=True))
        for line in section.lines:
            click.echo(f"  {plain(line)}".rstrip())
    if path:
        click.echo(f"wrote {path}", err=True)


# --- of other rooms ---------------------------------------------------------------------------------------------------

for command in (package, push, pull, diff, seeds, prompts, serve, doctor):
    main.add_command(command)


# --- init ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Copy prompts, seeds and recipes to DIRECTORY to start from."""
    from intersafe.storage.bundled import copy_bundled

    copied = copy_bundled(directory, ("prompts", "seeds", "pipelines"))
    click.echo(f"{directory}: {copied} files in prompts/, seeds/ and pipelines/")
    click.echo(f"next: cd {shlex.quote(str(directory))} && intersafe prompts lint && intersafe generate --n 20")
