"""What the commands print about a run: its funnel, an estimate, one dialogue, and what each role saw.

Text of seeds and models goes through `plain`, so that it cannot control the terminal.
"""

import re
from typing import Any

import click

from intersafe.engines.metrics import describe_metrics
from intersafe.errors import InputError
from intersafe.generation.estimate import Estimate
from intersafe.generation.replay import calls_of
from intersafe.generation.strata import Amount
from intersafe.images.store import ImageStore
from intersafe.recipe.sections import Price
from intersafe.records import Dialogue, ImageOrigin, RefusalSample, Turn
from intersafe.run.directory import Run
from intersafe.run.funnel import Funnel, Summary
from intersafe.run.journal import RoleTally
from intersafe.run.kinds import RECORDS
from intersafe.wording import clock, counted, dollars, plain


def pick(run: Run, which: str | None, kind: str = "dialogues") -> Any:
    """The accepted outcome of a kind by id or number from 1; the first if none is named, None if there is none."""
    number = int(which) if which is not None and re.fullmatch(r"[0-9]{1,9}", which) else None
    for position, outcome in enumerate(run.accepted(kind), 1):
        if which is None or position == number or outcome.id == which:
            return outcome
    if which is None:
        return None
    noun = RECORDS[kind].noun
    have = sum(1 for _ in run.accepted(kind))
    remedy = f"give an id or a number from 1 to {have}" if have else f"it has no {noun} at all"
    raise InputError(f"no {noun} {which!r} in this run", at=run.path, remedy=remedy)


def print_funnel(run: Run) -> None:
    """Prints where the jobs of a run ended, what was accepted, and calls, tokens and cost by role."""
    funnel, manifest, summary = run.funnel(), run.manifest, run.summary
    models = {member["model"] for member in manifest.recipe["cast"].values()}
    scripted = any(model.startswith("scripted:") for model in models)
    click.echo(f"run {run.path}   recipe {manifest.name} {manifest.digest[:12]}" + ("   SCRIPTED" if scripted else ""))
    click.echo(
        f"{funnel.jobs:>8,} {'job' if funnel.jobs == 1 else 'jobs'} decided"
        + (f"   ({len(manifest.excluded)} seeds excluded)" if manifest.excluded else "")
    )
    _print_lost(funnel)
    click.echo(f"{funnel.accepted:>8,} accepted" + _shortfall(summary))
    for cell in summary.short if summary else ():
        click.echo(f"         below its quota: {cell}")
    _print_other_kinds(run)
    if funnel.accepted:
        _print_accepted(funnel)
    if roles := run.roles():
        _print_usage(roles, summary.prices if summary else run.prices())
    for name, figures in sorted(summary.engines.items()) if summary else ():
        click.echo(f"         engine {plain(name)}: {describe_metrics(figures)}")
    for role, incidents in run.incidents().items():
        click.echo(f"         {role:<12} {incidents.words}")


def _shortfall(summary: Summary | None) -> str:
    """What the number of accepted dialogues lacks."""
    if summary is None:
        return "   (not complete)"
    return "" if summary.complete else f" of {summary.n:,}   (not complete: the jobs gave no more)"


def _print_accepted(funnel: Funnel) -> None:
    """Prints what the accepted dialogues are like."""
    counts = funnel.categories.values()
    click.echo(f"         turns {funnel.mean_turns:.2f} a dialogue {dict(sorted(funnel.turns.items()))}")
    click.echo(f"         images {funnel.images / funnel.accepted:.2f} a dialogue, {funnel.painted:,} of them painted")
    turns = sum(funnel.turns[n] * n for n in funnel.turns)
    shares = ", ".join(f"{word} {count / turns:.0%}" for word, count in sorted(funnel.verdicts.items()))
    click.echo(f"         unsafe in {funnel.unsafe:,} dialogues; turns {shares}")
    click.echo(f"         categories {len(counts)}, {min(counts):,} to {max(counts):,} each")


def _print_usage(roles: dict[str, RoleTally], prices: dict[str, Price]) -> None:
    """Prints calls and tokens by role, and their cost where there is a price."""
    for role, tally in sorted(roles.items()):
        tokens = f"{tally.prompt_tokens:,} + {tally.completion_tokens:,} tokens"
        cost = f"  {dollars(tally.cost)} USD" if role in prices else ""
        click.echo(f"         {role:<12} {tally.calls:>9,} calls  {tokens}{cost}")
    if any(role in prices for role in roles):
        free = [role for role in sorted(roles) if role not in prices]
        missing = f"; {', '.join(free)} no price" if free else ""
        click.echo(f"         cost {dollars(sum(tally.cost for tally in roles.values()))} USD{missing}")


def print_estimate(found: Estimate) -> None:
    """Prints what a run will take by role and in total, how precise that is, and what it leaves out."""
    beside = [f"{s.wanted:,} {kind}" for kind, s in found.sampled.items() if kind != "dialogues"]
    click.echo(f"estimate for {', '.join([counted(found.n, 'dialogue'), *beside])}")
    prices = {role for role in found.roles if role not in found.unpriced}
    click.echo(f"\n{'role':<14}{'calls':>14}{'prompt tokens':>18}{'completion':>16}{'USD':>14}{'hours':>10}")
    for role, tally in sorted(found.roles.items()):
        cost = dollars(tally.cost) if role in prices else "-"
        tokens = f"{tally.prompt_tokens:>18,.0f}{tally.completion_tokens:>16,.0f}"
        click.echo(f"{role:<14}{tally.calls:>14,.0f}{tokens}{cost:>14}{tally.seconds / 3600:>10,.2f}")
    click.echo(f"\n{'calls':<10}{_with_error(found.calls, '{:,.0f}')}")
    click.echo(f"{'tokens':<10}{_with_error(found.tokens, '{:,.0f}')}")
    if prices:
        missing = f"; {', '.join(found.unpriced)} no price" if found.unpriced else ""
        click.echo(f"{'cost':<10}{_with_error(found.cost, '{:,.2f}')} USD{missing}")
    else:
        click.echo(f"{'cost':<10}no price is known: pass --price ROLE=IN,OUT[,CALL], or set `price` in the recipe")
    for number, (what, seconds) in enumerate(sorted(found.times.items(), key=lambda item: -item[1])[:3]):
        click.echo(f"{'' if number else 'time':<10}{clock(seconds)}  {what}")
    for kind, sampled in found.sampled.items():
        click.echo(
            f"{kind}: {sampled.accepted} of {sampled.tried} samples accepted, so about {counted(sampled.jobs, 'job')}"
        )
    _print_caveats(found)


def _with_error(amount: Amount, form: str) -> str:
    if amount.error is None:
        return f"{form.format(amount.total)} (one sample has no spread: raise --samples)"
    share = amount.error / amount.total if amount.total else 0.0
    return f"{form.format(amount.total)} ± {share:.0%}"


def _print_caveats(found: Estimate) -> None:
    """Prints the limits that the run will reach, and what an estimate cannot know."""
    cast, limits = found.recipe.cast, found.recipe.limits
    if found.sampled["dialogues"].jobs > found.most_jobs:
        click.echo(f"the recipe has {found.most_jobs:,} dialogue jobs: raise `samples`, or add seeds or strategies")
    for flag, limit, whole in (
        ("--max-tokens", limits.max_tokens, found.tokens.total),
        ("--max-cost", limits.max_cost, found.cost.total),
        ("--max-time", limits.max_time, found.seconds),
    ):
        if limit is not None and whole > limit:
            click.echo(f"{flag} will be reached at about {limit / whole:.0%} of it")
    if unmet := [role for role in cast.models if role not in found.roles]:
        click.echo(
            f"in no sample: {', '.join(unmet)}; a victim is estimated like another one, other roles are left out"
        )
    if batch := [role for role, member in cast.members.items() if member.batch]:
        click.echo(f"not in the time: {', '.join(batch)}; a batch takes up to a day")
    click.echo(
        "± is one standard error over the samples. It leaves out calls that fail or are refused, jobs that quotas\n"
        "reject after they were generated, duplicates in a large run, and servers that answer more slowly under load."
    )
    click.echo(
        f"the samples are paid for: `generate --reuse {found.run}` takes their replies, a second estimate is free"
    )


def _print_lost(funnel: Funnel, indent: str = "") -> None:
    for place, count in sorted(funnel.ended.items(), key=lambda item: (item[0].split()[:2], -item[1])):
        click.echo(f"{indent}{-count:>8,} {place}")


def _print_other_kinds(run: Run) -> None:
    """Prints the kinds besides dialogues: refusal samples by group, twins."""
    for kind in list(RECORDS)[1:]:
        funnel = run.funnel(kind)
        if funnel.jobs:
            wanted = (run.manifest.recipe.get(kind) or {}).get("groups", {})
            groups = [f"{name} {funnel.groups.get(name, 0)} of {wanted[name]['n']}" for name in sorted(wanted)]
            click.echo(f"{funnel.accepted:>8,} {kind}" + (f": {', '.join(groups)}" if groups else ""))
            _print_lost(funnel, "    ")


def print_dialogue(run: Run, dialogue: Dialogue) -> None:
    """Prints one dialogue turn by turn, with its plan and its verdicts."""
    seed = dialogue.seed
    click.echo(f"\n{click.style(f'dialogue {dialogue.id}', bold=True)}   job {dialogue.job}   {seed.category}")
    click.echo(f"seed {seed.id} ({plain(f'{seed.source}, {seed.license}')}): {plain(seed.query)}")
    click.echo(f"strategy {dialogue.strategy}   victim {dialogue.victim}")
    if dialogue.twin_of:
        click.echo(f"benign twin of {dialogue.twin_of}: {plain(dialogue.goal)}")
    for index, turn in enumerate(dialogue.turns):
        click.echo(f"\n[turn {index + 1}] step: {plain(dialogue.plan.steps[index].text)}")
        _print_turn(run, turn)
        for pruned in (p for p in dialogue.pruned if p.index == index):
            exchange = f"{plain(pruned.turn.user.text)} -> {plain(pruned.turn.reply.text)}"
            click.echo(f"  backtracked ({pruned.reason}): {exchange}")
        for removed in (r for r in dialogue.removed if r.index == index):
            click.echo(f"  removed    {removed.origin.image}, which looks like {removed.like}")


def _print_turn(run: Run, turn: Turn) -> None:
    for origin in turn.origins:
        _print_image(run, origin)
    click.echo(f"  user       {plain(turn.user.text)}")
    click.echo(f"  assistant  {plain(turn.reply.text)}")
    verdict = turn.verdict
    marks = f"refusal {verdict.refusal}, harmless {verdict.harmless}, helpful {verdict.helpful}"
    click.echo(f"  verdict    {click.style(verdict.safety, bold=True)}, {marks}: {plain(verdict.reason)}")
    if turn.aligned:
        kind = "recovery" if turn.aligned.recovery else "aligned"
        click.echo(f"  {kind:<9}  {plain(turn.aligned.text)}")


def _print_image(run: Run, origin: ImageOrigin) -> None:
    path = ImageStore(run.path / "images").path(origin.image)
    click.echo(f"  image      {path}" + ("" if path.exists() else "   (missing)"))
    if origin.source == "painted":
        click.echo(f"             painted by {origin.model}, seed {origin.seed}: {plain(origin.description)}")


def print_refusal(run: Run, sample: RefusalSample | None) -> None:
    """Prints one refusal sample."""
    if sample is None:
        click.echo("\nno refusal sample was accepted yet")
        return
    click.echo(f"\n{click.style(f'refusal {sample.id}', bold=True)}   {sample.group}   {sample.seed.category}")
    click.echo(f"seed {sample.seed.id} ({plain(f'{sample.seed.source}, {sample.seed.license}')})")
    for origin in sample.origins:
        _print_image(run, origin)
    click.echo(f"  question   {plain(sample.question)}")
    click.echo(f"  answer     {plain(sample.answer)}   ({sample.answered_by})")
    click.echo(f"  check      {plain(sample.check.reason)}")


def print_roles(run: Run, dialogue: Dialogue, full: bool) -> None:
    """Prints every message that each role saw, replayed from the journal."""
    click.echo(click.style("\nwhat each role saw", bold=True) + ("" if full else "   (--full for all of it)"))
    for call, reply in calls_of(run, dialogue.job):
        click.echo(
            f"\n{call.ordinal:>3} {click.style(call.role, bold=True)}" + (f"   {call.prompt}.md" if call.prompt else "")
        )
        for message in call.messages:
            images = "".join(f"[{reference[:12]}] " for reference in message.images)
            click.echo(f"      {message.role:<9} {images}{_shortened(message.text, full)}")
        click.echo(f"      {'-> ' + reply.finish:<9} {_shortened(reply.text, full)}")


def _shortened(text: str, full: bool) -> str:
    if full:
        return plain(text).replace("\n", "\n                ")
    line = " ".join(plain(text).split())
    return line if len(line) <= 150 else f"{line[:70]} ... {line[-75:]}"
