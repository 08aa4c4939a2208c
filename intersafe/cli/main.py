"""The command line: the commands, and how a failure becomes one line and an exit code.

Each command imports its modules when it runs, so that `--help` answers at once. Results go to stdout, messages to
stderr. The exit codes are in `EXIT_CODES`, which `intersafe --help` shows.
"""

import io
import os
import signal
import sys
import threading
from typing import Any

import click

from intersafe.cli.doctor import doctor
from intersafe.cli.generate import estimate, generate, regate_command
from intersafe.cli.inputs import init, prompts, seeds
from intersafe.cli.release import diff, package_command, pull_command, push_command
from intersafe.cli.serve import serve
from intersafe.cli.show import show
from intersafe.cli.stats import stats
from intersafe.errors import IntersafeError, StorageError

EXIT_CODES = """\b
Exit codes:
  0    done
  1    doctor found something to fix
  2    wrong input: one line says what and how to correct it; nothing was written
  3    the jobs do not yield --n dialogues; package, push: the version exists with other content
  4    a model's service is gone or the disk is full; push: someone else changed the repository
  5    a limit on tokens, cost or time is reached; push, pull: the repository or the token refuses
  6    push, pull: the network gave up
  130  stopped by Ctrl-C or SIGTERM
After 4 to 6 and 130 the same command resumes, once what the line names is corrected. After 3 the line says what to
change.
"""


class _Group(click.Group):
    """Turns the failures of intersafe into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
        _stop_on_signals()
        try:
            return super().invoke(ctx)
        except IntersafeError as error:
            click.echo(f"intersafe: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
            ctx.exit(0)
        except OSError as error:
            what = f"{error.filename or 'disk'}: {error.strerror}"
            click.echo(f"intersafe: {what}; check the path and its permissions", err=True)
            ctx.exit(StorageError.exit_code)
        except KeyboardInterrupt:
            _ignore_signals()
            click.echo("intersafe: stopped; the same command resumes", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _stop_on_signals() -> None:
    """Makes SIGTERM and SIGHUP stop a command as Ctrl-C does; a signal that is ignored (`nohup`) stays ignored."""
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(name) is signal.SIG_DFL:
                signal.signal(name, signal.default_int_handler)


def _ignore_signals() -> None:
    """Ignores further signals while the last line is printed."""
    if threading.current_thread() is threading.main_thread():
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EXIT_CODES,
)
@click.version_option(package_name="intersafe")
def main() -> None:
    """Generate training data that makes vision-language models safer in conversation.

    An attacker, one or more victims and a judge turn seeds into multi-turn dialogues with images. Start here, without
    an API key or a GPU:

    \b
    intersafe generate                 a demo run with scripted models, in outputs/demo
    intersafe show demo                its funnel and a dialogue
    intersafe init mine                your own copy of the prompts, seeds and recipes
    """


for command in (generate, estimate, regate_command, show, stats, package_command, push_command, pull_command, diff):
    main.add_command(command)
for command in (init, seeds, prompts, serve, doctor):
    main.add_command(command)
