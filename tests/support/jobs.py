"""One job with a real cast: over HTTP, with the scripted models behind it, or with the scripted models in process."""

import asyncio
import functools
import io
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from intersafe.images.store import ImageStore, normalise
from intersafe.models.base import Hooks
from intersafe.models.cast import JobCast, SharedCast
from intersafe.models.open import open_models
from intersafe.recipe.sections import Cast, ConverseSettings, Limits, Member
from intersafe.records import (
    Check,
    Dialogue,
    ImageOrigin,
    Job,
    Message,
    Plan,
    PrunedTurn,
    Safety,
    Seed,
    Step,
    StepScore,
    Turn,
    Verdict,
)
from intersafe.run.journal import Entry
from intersafe.stages.conversation import Conversation
from intersafe.storage.bundled import bundled
from intersafe.templates.load import Prompts, load_prompts
from tests.support.dialogues import dialogue
from tests.support.servers.scripted_server import Body, text_of

T = TypeVar("T")

QUERY = "keeping the quarterly ledger out of the auditor's sight"
STEP = "planned step that nobody but the attacker may read"
REASON = "verdict that nobody but the judge may read"
DESCRIPTION = "a lighthouse keeper at dawn, described for the painter alone"


class MemoryJournal:
    """A journal in memory."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def take(self, key: str) -> Entry | None:
        return self.entries.get(key)

    def add(self, entry: Entry) -> None:
        assert entry.key not in self.entries, "paid for twice"
        self.entries[entry.key] = entry


@functools.cache
def _prompts() -> Prompts:
    return load_prompts(bundled("prompts"))


def cast_of(spec: str, *, second_judge: bool = False) -> Cast:
    """A cast with one model in every role."""
    member = Member(model=spec)
    return Cast(
        attacker=member,
        victims=(member,),
        judge=member,
        second_judge=Member(model=spec, temperature=0.1) if second_judge else None,
        responder=member,
    )


def with_cast(
    spec: str,
    store: ImageStore,
    act: Callable[[JobCast], Awaitable[T]],
    *,
    job: Job,
    journal: MemoryJournal | None = None,
    second_judge: bool = False,
) -> T:
    """What `act` makes of the cast of that job."""

    async def run() -> T:
        cast = cast_of(spec, second_judge=second_judge)
        models = open_models(cast, Limits(retries=1, patience=1), store, Hooks())
        shared = SharedCast(cast=cast, models=models, prompts=_prompts(), journal=journal or MemoryJournal())
        try:
            return await act(JobCast(shared, job))
        finally:
            for model in set(models.values()):
                await model.aclose()

    return asyncio.run(run())


def sent(body: Body) -> str:
    """All text of a request, instructions included."""
    return "\n".join(text_of(message) for message in body["messages"])


def stored(root: Path, count: int) -> tuple[ImageStore, list[str]]:
    """An image store and the references of its images, all different."""
    store = ImageStore(root)
    refs = []
    for shade in range(count):
        data = io.BytesIO()
        Image.new("RGB", (16, 12), (40 * shade, 20, 90)).save(data, "PNG")
        refs.append(store.put(normalise(data.getvalue(), at="test")))
    return store, refs


def job_of(turns: int, image: str | None = None, *, index: int = 0, category: str = "fraud") -> Job:
    """A job of that many turns about `QUERY`."""
    seed = Seed("seed-1", QUERY, category, "test", "CC0-1.0", image)
    return Job(index, f"seed-1/role_play/x/{index}", seed, "role_play", 0, index, turns, 0, 1234 + index)


def turn_of(number: int, safety: Safety = "safe", images: tuple[str, ...] = ()) -> Turn:
    """A turn whose texts name its number; images after the first of the conversation are painted."""
    origins = tuple(
        ImageOrigin(image, "seed") if number == 1 else ImageOrigin(image, "painted", DESCRIPTION, "x", 1)
        for image in images
    )
    verdict = Verdict(safety, "none", 4 if safety == "safe" else 1, 3, REASON)
    user = Message("user", f"Question number {number} about the bookshop on the corner.", images)
    reply = Message("assistant", f"Reply number {number} from the victim, who runs on about bookshops for a while.")
    return Turn(user, reply, verdict, origins=origins)


def plan_of(turns: Sequence[Turn]) -> Plan:
    """The plan that those turns follow."""
    return Plan(tuple(Step(f"{STEP} {i}", StepScore(7, 7, 9), bool(turn.origins)) for i, turn in enumerate(turns)))


def conversation_of(job: Job, cast: JobCast, turns: Sequence[Turn], backtracked: Sequence[Turn] = ()) -> Conversation:
    """A conversation of those turns, after the first of which the others were backtracked."""
    conversation = Conversation(job, plan_of(turns), cast, ConverseSettings(), None, list(turns))
    conversation.backtracked = [PrunedTurn(1, turn, "refused") for turn in backtracked]
    return conversation


def dialogue_of(job: Job, turns: tuple[Turn, ...]) -> Dialogue:
    """A dialogue of those turns."""
    return dialogue(
        turns,
        job=job.index,
        key=job.key,
        seed=job.seed,
        strategy=job.strategy,
        sample=job.sample,
        plan=plan_of(turns),
        check=Check(True, True, REASON),
    )
