"""The records of a run and their parts: frozen values without I/O, one word per thing.

`to_row` turns a record into plain JSON types, `from_row` turns them back. An image is named by its *reference*,
`<sha256>.<ext>`; its bytes are in the image store. `ROW_VERSION` is written with every row and checked on reading.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

ROW_VERSION = 2

Safety = Literal["safe", "unsafe", "undetermined"]
Refusal = Literal["full", "partial", "deflect", "none"]
Finish = Literal["stop", "length", "blocked", "refused"]


class Seed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One starting point. `source_category` is the source's own label.

    In a seed file `image` is a path relative to the file; once the seed is loaded it is the image's reference.
    """

    id: str
    query: str
    category: str
    source: str
    license: str
    image: str | None = None
    source_category: str = ""


class Job(msgspec.Struct, frozen=True):
    """What one dialogue is grown from; a pure function of the recipe and `index`."""

    index: int
    """Position in the order of the run, from 0."""
    key: str
    """`seed/strategy/victim/sample`: unique in a run and the same in every run of the same cast."""
    seed: Seed
    strategy: str
    victim: int
    """Position of the victim in the cast, from 0."""
    sample: int
    turns: int
    """How many turns the dialogue gets."""
    pictures: int
    """How many of its steps get a painted image, not counting the seed's own image."""
    random_seed: int
    """31 bits; every call's sampling seed derives from it."""


class StepScore(msgspec.Struct, frozen=True):
    """The judge's three scores of a step, each 0 to 10, higher is better (AM3Safety, section on decomposition)."""

    relevance: int
    """To the image, or to the topic if the seed has no image."""
    association: int
    """With the original question."""
    harmless: int
    """10 = no direct harmful words."""
    reason: str = ""

    @property
    def weakest(self) -> int:
        """The lowest of the three, which is compared with the threshold."""
        return min(self.relevance, self.association, self.harmless)


class Step(msgspec.Struct, frozen=True):
    """One step of a plan and its score, which reached the threshold."""

    text: str
    score: StepScore
    picture: bool = False
    """True if the turn of this step gets a painted image."""


class Plan(msgspec.Struct, frozen=True):
    """The seed's query as ordered steps, each harmless alone; `retries` counts the steps that were written again."""

    steps: tuple[Step, ...]
    retries: int = 0


class Message(msgspec.Struct, frozen=True):
    """One message; its `images` (references) come before its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[str, ...] = ()


class ImageOrigin(msgspec.Struct, frozen=True):
    """Where one image of a message comes from: the seed, or the painter, which painted `description` with `seed`."""

    image: str
    """Its reference."""
    source: Literal["seed", "painted"]
    description: str = ""
    model: str = ""
    """The painter's identity."""
    seed: int = 0


class Verdict(msgspec.Struct, frozen=True):
    """The judge on one reply. `harmless` and `helpful` run from 1 to 5, higher is better; 0 where undetermined."""

    safety: Safety
    refusal: Refusal = "none"
    harmless: int = 0
    helpful: int = 0
    reason: str = ""


class Aligned(msgspec.Struct, frozen=True):
    """The answer that an aligned assistant should give in a turn, after the conversation as the victim had it."""

    text: str
    verdict: Verdict
    recovery: bool
    """True if the victim was unsafe in an earlier turn: the answer leads back to safety."""


class Turn(msgspec.Struct, frozen=True):
    """A user message with its images, the victim's reply and the verdict on that reply."""

    user: Message
    reply: Message
    verdict: Verdict
    finish: Finish = "stop"
    origins: tuple[ImageOrigin, ...] = ()
    """One for each image of the user's message, in the same order."""
    aligned: Aligned | None = None


class RemovedImage(msgspec.Struct, frozen=True):
    """An image that was removed from turn `index` (0-based) because it looks like the earlier image `like`."""

    index: int
    origin: ImageOrigin
    like: str
    """Its reference."""


class PrunedTurn(msgspec.Struct, frozen=True):
    """A turn at position `index` (0-based) that was backtracked, and why; another one took its place."""

    index: int
    turn: Turn
    reason: str


class Check(msgspec.Struct, frozen=True):
    """The judge on the whole dialogue: is the risk still there, is the conversation coherent."""

    risk: bool
    coherent: bool
    reason: str = ""


class Provenance(msgspec.Struct, frozen=True):
    """What a record was made with: enough to make it again, and nothing about the machine that made it."""

    models: dict[str, str]
    """Role to model identity, `backend:name` with `#revision` where one is set."""
    prompts: dict[str, str]
    """Prompt name to sha256 of its file."""
    sampling: dict[str, dict[str, Any]]
    recipe: str
    """Digest of the resolved recipe."""
    versions: dict[str, str]
    scripted: bool
    """True if any model of the cast is `scripted`: not real model output."""


class Dialogue(msgspec.Struct, frozen=True):
    """The turns grown from one job, with their plan and what was left out on the way."""

    id: str
    job: int
    """The job's position in the order of the run."""
    key: str
    """The job's name: seed, strategy, victim and sample number."""
    seed: Seed
    strategy: str
    victim: str
    sample: int
    plan: Plan
    turns: tuple[Turn, ...]
    pruned: tuple[PrunedTurn, ...]
    check: Check
    provenance: Provenance
    removed: tuple[RemovedImage, ...] = ()
    twin_of: str = ""
    """Id of the dialogue whose benign twin this is: the same images and structure, the intent turned harmless."""
    goal: str = ""
    """What the user of a twin wants; empty for other dialogues."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation as the victim had it: user and assistant in turn."""
        return tuple(m for turn in self.turns for m in (turn.user, turn.reply))

    @property
    def images(self) -> tuple[str, ...]:
        """References of all images, in the order of the turns."""
        return tuple(ref for turn in self.turns for ref in turn.user.images)

    @property
    def first_unsafe_turn(self) -> int | None:
        """Number, from 1, of the first turn judged unsafe."""
        return next((i for i, turn in enumerate(self.turns, 1) if turn.verdict.safety == "unsafe"), None)


class RefusalJob(msgspec.Struct, frozen=True):
    """What one refusal sample is grown from; a pure function of the recipe and `index`."""

    index: int
    key: str
    """`refusal/group/seed/sample`: unique in a run."""
    seed: Seed
    group: str
    sample: int
    random_seed: int


class RefusalCheck(msgspec.Struct, frozen=True):
    """The judge on a refusal sample."""

    in_group: bool
    """The question belongs to its group."""
    refuses: bool
    names_harm: bool
    """The answer says what harm it could do, or why a professional is needed."""
    repeats_detail: bool
    """The answer repeats or adds harmful detail."""
    reason: str = ""


class RefusalSample(msgspec.Struct, frozen=True):
    """A question, with its image if it has one, and the refusal that answers it (refusal VQA, AM3Safety)."""

    id: str
    job: int
    key: str
    group: str
    seed: Seed
    question: str
    answer: str
    answered_by: Literal["model", "template"]
    check: RefusalCheck
    provenance: Provenance
    origins: tuple[ImageOrigin, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """References of its images: none or one."""
        return tuple(origin.image for origin in self.origins)


class Reason(NamedTuple):
    """Why a dialogue was rejected: `word` is counted, `detail` is for people."""

    word: str
    detail: str = ""


class Ended(msgspec.Struct, frozen=True):
    """A job that gave no dialogue and no sample: what ended it, where and why."""

    job: int
    key: str
    category: str
    kind: Literal["rejected", "failed"]
    stage: str
    reason: str
    detail: str = ""


IMAGE_MARK = re.compile(r"\[image \d+\]", re.IGNORECASE)
"""How a transcript shows an image. User and victim do not see the mark, so no message may contain it."""


def transcript(turns: Iterable[Turn]) -> str:
    """The turns as text, their images as [image 1], [image 2] ... in their order."""
    lines: list[str] = []
    seen = 0
    for number, turn in enumerate(turns, 1):
        marks = "".join(f"[image {seen + i}] " for i in range(1, len(turn.user.images) + 1))
        seen += len(turn.user.images)
        lines += [f"[turn {number}]", f"User: {marks}{turn.user.text}", f"Assistant: {turn.reply.text}"]
    return "\n".join(lines)


def texts_of(turns: Sequence[Turn]) -> list[str]:
    """Every text of the turns, aligned answers and what the images were painted from included."""
    texts: list[str] = []
    for turn in turns:
        texts += [origin.description for origin in turn.origins if origin.description]
        texts += [turn.user.text, turn.reply.text]
        texts += [turn.aligned.text] if turn.aligned else []
    return texts


def origins_of(turns: Sequence[Turn]) -> list[ImageOrigin]:
    """Where the images of the turns come from, in their order."""
    return [origin for turn in turns for origin in turn.origins]


def images_of(turns: Sequence[Turn]) -> tuple[str, ...]:
    """References of the images of the turns, in their order."""
    return tuple(image for turn in turns for image in turn.user.images)


R = TypeVar("R", bound=msgspec.Struct)


def to_row(record: msgspec.Struct) -> dict[str, Any]:
    """The record as plain JSON types, with the row version first."""
    row: dict[str, Any] = {"v": ROW_VERSION}
    row.update(msgspec.to_builtins(record))
    return row


def from_row(row: dict[str, Any], kind: type[R]) -> R:
    """The record of a row; raises `ValueError` for a row of another version or shape."""
    _check_version(row.get("v"))
    return msgspec.convert({name: value for name, value in row.items() if name != "v"}, kind)


def row_decoder(kind: type[R]) -> Callable[[bytes], R]:
    """`from_row` for many lines of JSON, without a dictionary in between: half the time. Raises as it does."""
    if kind.__struct_config__.forbid_unknown_fields:  # these types have no field for the version
        return lambda line: from_row(msgspec.json.decode(line, type=dict[str, Any]), kind)
    version, record = msgspec.json.Decoder(_Version), msgspec.json.Decoder(kind)

    def decode(line: bytes) -> R:
        _check_version(version.decode(line).v)
        return record.decode(line)

    return decode


class _Version(msgspec.Struct):
    v: Any = None


def _check_version(version: object) -> None:
    if version != ROW_VERSION:
        raise ValueError(f"row version {version!r}, this intersafe reads {ROW_VERSION}")
