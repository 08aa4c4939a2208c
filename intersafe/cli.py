"""The command line: the only room that knows the terminal.

Each command imports its module when it runs, so that `--help` answers at once. Results go to stdout, talk to stderr.
Exit codes: 0 done, 2 bad input (one line, nothing written), 3 seeds exhausted, 4 service gone or disk full (resumable),
130 stopped by Ctrl-C or SIGTERM (resumable).
"""

import io
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from intersafe.errors import InputError, IntersafeError, StorageError

if TYPE_CHECKING:
    from intersafe.records import Dialogue
    from intersafe.runs import Run
    from intersafe.settings import Recipe

HERE = Path("pipelines/demo.yaml")


class _Group(click.Group):
    """Turns the failures of the house into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that knows fewer letters is no reason to stop
        try:
            return super().invoke(ctx)
        except IntersafeError as error:
            click.echo(f"intersafe: {error}", err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            raise
        except OSError as error:
            click.echo(f"intersafe: {error.filename or 'disk'}: {error.strerror}; mend its path or rights", err=True)
            ctx.exit(StorageError.exit_code)
        except KeyboardInterrupt:
            click.echo("intersafe: stopped; the same command goes on where it was", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="intersafe")
def main() -> None:
    """Manufacture training data that makes vision-language models safer in conversation.

    An attacker, one or several victims and a judge grow multi-turn dialogues with images from seeds. Start with
    `intersafe generate`: it needs no key and no GPU. Then `intersafe show demo`, and `intersafe init DIR` to make it
    yours.
    """


# --- generate --------------------------------------------------------------------------------------------------------

_pipeline = click.option(
    "--pipeline",
    type=click.Path(path_type=Path),
    help="Recipe file. Default: pipelines/demo.yaml here, or else the one that ships with intersafe.",
)


@main.command()
@_pipeline
@click.option("--n", type=click.IntRange(1, 10**9), help="Dialogues to keep; exact. Default: the recipe's n.")
@click.option(
    "--run", metavar="NAME|PATH", help="Where it goes; a bare name lives in outputs/. Default: recipe's name."
)
@click.option("--attacker", metavar="SPEC", help="Model that plays the user, as backend:model[@url].")
@click.option(
    "--victim", "victims", metavar="SPEC", multiple=True, help="Model that answers; may be given several times."
)
@click.option("--judge", metavar="SPEC", help="Model that scores steps, turns and dialogues.")
@click.option("--seeds", type=click.Path(path_type=Path), multiple=True, help="Seed file; may be given several times.")
@click.option(
    "--concurrency", type=click.IntRange(min=1), help="Dialogues grown at once; changes no byte of the result."
)
@click.option("--seed", type=int, help="Seed of all sampling.")
@click.option("--patience", type=click.FloatRange(min=0), help="Seconds that a model's service may stay away.")
@click.option("--reuse", metavar="RUN", help="Take every unchanged model reply from this older run.")
def generate(
    pipeline: Path | None,
    n: int | None,
    run: str | None,
    victims: tuple[str, ...],
    seeds: tuple[Path, ...],
    reuse: str | None,
    **changes: Any,
) -> None:
    """Grow dialogues until N passed every gate, or go on with a run that was stopped.

    \b
    intersafe generate --n 11270                                     the scripted cast, minutes on a laptop
    intersafe generate --pipeline pipelines/intersafe_v.yaml         the published method, on your servers
    intersafe generate --run mine --victim openai:vlm@http://host:8000/v1     one model replaced

    A model SPEC is backend:model[@url[,url]]; backends: scripted, openai (any OpenAI-compatible URL). Keys come from
    the environment variable that the recipe names. Ctrl-C stops cleanly; the same command goes on.
    """
    from intersafe.recipe import override

    recipe = override(
        _recipe(pipeline),
        victims=victims,
        seeds=tuple(str(path.resolve()) for path in seeds),
        **changes,
    )
    from intersafe.display import display_for
    from intersafe.generate import generate_dialogues

    made = generate_dialogues(recipe, run=run, n=n, reuse=reuse, display=display_for(sys.stderr))
    _print_funnel(made)
    click.echo(f"\n{made.path / 'dialogues.jsonl'}")


def _recipe(pipeline: Path | None) -> "Recipe":
    from intersafe.files import bundled
    from intersafe.recipe import load_recipe

    if pipeline is None:
        pipeline = HERE if HERE.exists() else bundled("pipelines/demo.yaml")
    return load_recipe(pipeline)


# --- show ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--dialogue", "which", metavar="ID|NUMBER", help="Which one: its id, or its place from 1. Default: the first."
)
@click.option("--full", is_flag=True, help="Print every message that each role saw in full.")
@click.option("--funnel", "only_funnel", is_flag=True, help="Print the funnel alone.")
def show(run: str, which: str | None, full: bool, only_funnel: bool) -> None:
    """Show a run: its funnel, and one dialogue with what each role saw."""
    from intersafe.runs import Run

    opened = Run(run)
    _print_funnel(opened)
    if only_funnel:
        return
    dialogue = _pick(opened, which)
    if dialogue is None:
        click.echo("\nno dialogue was kept yet")
        return
    _print_dialogue(opened, dialogue)
    _print_roles(opened, dialogue, full)


def _pick(run: "Run", which: str | None) -> "Dialogue | None":
    number = int(which) if which is not None and which.isdecimal() and len(which) < 10 else None
    for place, dialogue in enumerate(run.dialogues(), 1):
        if which is None or place == number or dialogue.id == which:
            return dialogue
    if which is None:
        return None
    raise InputError(f"no dialogue {which!r} in this run", at=run.path, remedy="give an id or a number from 1")


def _print_funnel(run: "Run") -> None:
    funnel, manifest = run.funnel(), run.manifest
    models = {member["model"] for member in manifest.recipe["cast"].values()}
    scripted = any(model.startswith("scripted:") for model in models)
    click.echo(f"run {run.path}   recipe {manifest.name} {manifest.digest[:12]}" + ("   SCRIPTED" if scripted else ""))
    click.echo(
        f"{funnel.jobs:>8,} jobs decided"
        + (f"   ({len(manifest.excluded)} seeds excluded)" if manifest.excluded else "")
    )
    for place, count in sorted(funnel.ended.items(), key=lambda item: (item[0].split()[:2], -item[1])):
        click.echo(f"{-count:>8,} {place}")
    click.echo(f"{funnel.accepted:>8,} accepted" + ("" if run.summary else "   (not complete)"))
    if not funnel.accepted:
        return
    counts = funnel.categories.values()
    verdicts = sorted(funnel.verdicts.items())
    click.echo(f"         turns {funnel.mean_turns:.2f} a dialogue {dict(sorted(funnel.turns.items()))}")
    click.echo(f"         images {funnel.images / funnel.accepted:.2f} a dialogue")
    share = {word: f"{count / sum(funnel.turns[n] * n for n in funnel.turns):.0%}" for word, count in verdicts}
    click.echo(
        f"         unsafe in {funnel.unsafe:,} dialogues; turns {', '.join(f'{w} {s}' for w, s in share.items())}"
    )
    click.echo(f"         categories {len(counts)}, {min(counts):,} to {max(counts):,} each")
    for role, tally in sorted(run.roles().items()):
        tokens = f"{tally.prompt_tokens:,} + {tally.completion_tokens:,} tokens"
        click.echo(f"         {role:<12} {tally.calls:>9,} calls  {tokens}")


def _print_dialogue(run: "Run", dialogue: "Dialogue") -> None:
    click.echo(f"\n{click.style(f'dialogue {dialogue.id}', bold=True)}   job {dialogue.job}   {dialogue.seed.category}")
    seed = dialogue.seed
    click.echo(f"seed {seed.id} ({_plain(f'{seed.source}, {seed.license}')}): {_plain(seed.query)}")
    click.echo(f"strategy {dialogue.strategy}   victim {dialogue.victim}")
    for number, turn in enumerate(dialogue.turns, 1):
        click.echo(f"\n[turn {number}] step: {_plain(dialogue.plan.steps[number - 1].text)}")
        for reference in turn.user.images:
            click.echo(f"  image      {run.path / 'images' / reference[:2] / reference}")
        click.echo(f"  user       {_plain(turn.user.text)}")
        click.echo(f"  assistant  {_plain(turn.reply.text)}")
        verdict = turn.verdict
        marks = f"refusal {verdict.refusal}, harmless {verdict.harmless}, helpful {verdict.helpful}"
        click.echo(f"  verdict    {click.style(verdict.safety, bold=True)}, {marks}: {_plain(verdict.reason)}")
        for pruned in (p for p in dialogue.pruned if p.index == number - 1):
            click.echo(
                f"  taken back ({pruned.reason}): {_plain(pruned.turn.user.text)} -> {_plain(pruned.turn.reply.text)}"
            )


def _print_roles(run: "Run", dialogue: "Dialogue", full: bool) -> None:
    from intersafe.rehearsal import calls_of

    click.echo(click.style("\nwhat each role saw", bold=True) + ("" if full else "   (--full for all of it)"))
    for call, reply in calls_of(run, dialogue.job):
        click.echo(f"\n{call.ordinal:>3} {click.style(call.role, bold=True)}   {call.prompt}.md")
        for message in call.messages:
            images = "".join(f"[{reference[:12]}] " for reference in message.images)
            click.echo(f"      {message.role:<9} {images}{_shortened(message.text, full)}")
        click.echo(f"      {'-> ' + reply.finish:<9} {_shortened(reply.text, full)}")


def _shortened(text: str, full: bool) -> str:
    if full:
        return _plain(text).replace("\n", "\n                ")
    line = " ".join(_plain(text).split())
    return line if len(line) <= 150 else f"{line[:70]} ... {line[-75:]}"


def _plain(text: str) -> str:
    """Model text without the control characters with which it could drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


# --- seeds -----------------------------------------------------------------------------------------------------------


@main.group()
def seeds() -> None:
    """Check and import seed files."""


@seeds.command("check")
@click.argument("path", type=click.Path(path_type=Path))
def seeds_check(path: Path) -> None:
    """Validate a seed file and its images; count what is excluded."""
    from intersafe.runs import count
    from intersafe.stages.seeding import load_seeds

    found = load_seeds([path])
    with_image = sum(seed.image is not None for seed in found.seeds)
    click.echo(f"{path}: {len(found.seeds)} seeds, {with_image} with an image, {len(found.excluded)} excluded")
    for title, values in (
        ("category", (seed.category for seed in found.seeds)),
        ("source", (_plain(f"{seed.source} ({seed.license})") for seed in found.seeds)),
    ):
        for name, number in count(values).items():
            click.echo(f"{number:>8} {title} {name}")
    for excluded in found.excluded:
        click.echo(f"excluded by rule: {excluded}")


@seeds.group("import")
def seeds_import() -> None:
    """Turn a public benchmark that you have into a seed file."""


@seeds_import.command("figstep")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("seeds/figstep"), show_default=True)
def import_figstep(path: Path, out: Path) -> None:
    """FigStep (SafeBench or SafeBench-Tiny): the CSV and the images beside it."""
    from intersafe.stages.seeding import import_figstep as figstep

    done = figstep(path, out)
    images = f"{done.with_images} with an image" + (f", {done.missing_images} missing" if done.missing_images else "")
    click.echo(f"{out / 'seeds.jsonl'}: {done.written} seeds, {images}, {done.excluded} excluded by rule")


# --- prompts ---------------------------------------------------------------------------------------------------------


@main.group()
def prompts() -> None:
    """List, lint and render the prompt files."""


@prompts.command("list")
@_pipeline
def prompts_list(pipeline: Path | None) -> None:
    """Every prompt file: its role, hash and the variables that it is offered (* = it uses them)."""
    from intersafe.templates import load_prompts

    found = load_prompts(Path(_recipe(pipeline).prompts))
    for name, prompt in found.prompts.items():
        blocks = ", ".join(prompt.role.blocks)
        click.echo(f"{click.style(name, bold=True)}   {prompt.sha256[:12]}   blocks: {blocks}")
        if name.startswith("attacker/"):
            click.echo(f"    {prompt.render('summary', {})}")
        for variable, meaning in prompt.role.variables.items():
            click.echo(f"    {'*' if variable in prompt.uses else ' '} {variable:<17} {meaning}")
    for family in found.rubrics:
        name = f"judge/rubrics/{family}"
        click.echo(f"{click.style(name, bold=True)}   {found.hashes[name + '.md'][:12]}   plain text")


@prompts.command("lint")
@_pipeline
def prompts_lint(pipeline: Path | None) -> None:
    """Check every prompt file; one line for each problem with file, line and remedy."""
    from intersafe.templates import lint_prompts, load_prompts

    root = Path(_recipe(pipeline).prompts)
    problems = list(lint_prompts(root))
    for problem in problems:
        click.echo(str(problem), err=True)
    if problems:
        raise InputError(f"{len(problems)} problem" + ("s" if len(problems) > 1 else ""), at=root)
    click.echo(f"{root}: {len(load_prompts(root).hashes)} files, all well")


@prompts.command("render")
@click.argument("name", metavar="NAME")
@_pipeline
@click.option("--seed", "seed_id", metavar="ID", required=True, help="Id of a seed of the recipe.")
@click.option(
    "--turn", type=click.IntRange(min=1), default=1, show_default=True, help="Which turn, or step of the plan."
)
def prompts_render(name: str, pipeline: Path | None, seed_id: str, turn: int) -> None:
    """Print the messages that would be sent for NAME (judge/turn, attacker/role_play, ...) and one seed.

    The talk before TURN is grown by the scripted cast; everything else is as in a real run of the recipe.
    """
    from intersafe.rehearsal import rehearse

    call = rehearse(_recipe(pipeline), name.removesuffix(".md"), seed_id, turn)
    for message in call.messages:
        click.echo(click.style(f"--- {message.role}", bold=True))
        for reference in message.images:
            click.echo(f"[image {reference}]")
        click.echo(_plain(message.text))
    if call.schema:
        import msgspec

        click.echo(click.style("--- response_format", bold=True))
        click.echo(msgspec.json.format(msgspec.json.encode(call.schema.schema)).decode())


# --- init ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Copy prompts, seeds and recipes to DIRECTORY to start from."""
    from intersafe.files import copy_bundled

    copied = copy_bundled(directory, ("prompts", "seeds", "pipelines"))
    click.echo(f"{directory}: {copied} files in prompts/, seeds/ and pipelines/")
    click.echo(f"next: cd {shlex.quote(str(directory))} && intersafe prompts lint && intersafe generate --n 20")
