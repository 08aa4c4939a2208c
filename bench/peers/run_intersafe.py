"""The work with intersafe's own layers: limiter, retries, call key, image store, journal with fsync, resume."""

import asyncio
from pathlib import Path

from asked import read_work

from intersafe.images.store import ImageStore, read_image
from intersafe.models.base import Hooks
from intersafe.models.cast import JobCast, SharedCast
from intersafe.models.http.chat import EndpointModel
from intersafe.recipe.sections import Cast, Limits, Member
from intersafe.records import Job, Message, Seed
from intersafe.run.journal import Journal
from intersafe.storage.bundled import bundled
from intersafe.storage.jsonl import GroupWriter
from intersafe.templates.load import load_prompts


async def main() -> None:
    """Makes all calls, `--at-once` jobs concurrently; replies of an earlier start come from its journal."""
    work = read_work()
    member = Member(model=f"openai:fixed@{work.url}")
    members = Cast(attacker=member, victims=(member,), judge=member)
    images = ImageStore(work.folder / "images")
    model = EndpointModel(member, Limits(concurrency=work.at_once), images, Hooks(print))
    prompts = load_prompts(bundled("prompts"), ["decomposition"])
    seed = Seed("s", "query", "privacy", "bench", "CC0-1.0")
    writer = GroupWriter(work.folder)
    journal = Journal(writer)
    journal.load(work.folder / "journal", {})
    models = dict.fromkeys(members.members, model)
    shared = SharedCast(cast=members, models=models, prompts=prompts, journal=journal)
    numbers = iter(range(work.calls))
    stored: dict[Path, str] = {}

    async def worker() -> None:
        for number in numbers:
            path = work.image(number)
            if path is not None and path not in stored:
                stored[path] = images.put(read_image(path))
            message = Message("user", work.text(number), (stored[path],) if path else ())
            job = Job(number, f"job-{number}", seed, "decomposition", 0, 0, 1, 0, number)
            assert (await JobCast(shared, job).ask("judge", "judge/turn", (message,))).text

    try:
        await asyncio.gather(*(worker() for _ in range(work.at_once)))
    finally:
        await model.aclose()
        await writer.close()


asyncio.run(main())
