"""The published rows: the columns of a release, and what of each record goes into them.

Not published: the seed's query, the plan, the descriptions of images, the judge's words, and backtracked turns. A reply
that the judge did not call safe is replaced by a marker with its hash, length and labels. Only the optional config
`dialogues_unsafe` holds it in full. In these rows an image is its reference; a shard gets its bytes when it is written.
"""

import hashlib
from typing import Any, NamedTuple

import msgspec

from intersafe.records import Dialogue, ImageOrigin, Message, Provenance, RefusalSample, Turn, Verdict

PublishedRow = dict[str, Any]
"""A row by its column names."""

TRAIN, TEST = "train", "test"
UNSAFE = "dialogues_unsafe"


class Column(NamedTuple):
    """A column; `kind` is string, int32, strings, messages, image or images."""

    name: str
    kind: str
    about: str


_ID = Column("id", "string", "stable name of the row")
_ORIGIN = (
    Column("seed_id", "string", "the seed that the row was grown from; all rows of a seed are in one split"),
    Column("seed_source", "string", "where the seed comes from"),
    Column("source_license", "string", "licence of the seed"),
)
_CATEGORIES = (
    Column("category", "string", "one of 14 safety categories"),
    Column("source_category", "string", "the label that the seed's source gives"),
)
_PROVENANCE = Column("provenance", "string", "JSON: models, prompts by sha256, sampling, recipe, versions, images")
_DIALOGUE = (
    _ID,
    *_CATEGORIES,
    Column("strategy", "string", "how the attacker leads the user's side"),
    Column("n_turns", "int32", "user messages, each with its reply"),
    Column("messages", "messages", "the conversation; each image part stands for the next of `images`"),
    Column("images", "images", "the images of the conversation in order, named <sha256>.<ext>"),
    Column("aligned", "strings", "for every turn the answer that an aligned assistant should give; may be empty"),
    Column("turn_labels", "string", "JSON: for every turn safety, refusal, harmless and helpful (1-5), withheld"),
    Column("first_unsafe_turn", "int32", "number of the first turn judged unsafe, from 1; null if there is none"),
    *_ORIGIN,
    Column("victim", "string", "the model that answered"),
    _PROVENANCE,
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "dialogues": _DIALOGUE,
    "refusal_vqa": (
        _ID,
        Column("group", "string", "general, health or finance"),
        *_CATEGORIES,
        Column("question", "string", "what the user asks"),
        Column("answer", "string", "a refusal that names the harm, or says which professional to ask"),
        Column("image", "image", "the question's image, named <sha256>.<ext>; null if there is none"),
        Column("answered_by", "string", "model or template"),
        *_ORIGIN,
        _PROVENANCE,
    ),
    "twins": (
        *_DIALOGUE,
        Column("twin_of", "string", "id of the dialogue with the same images and structure"),
        Column("goal", "string", "what the user wants, harmless"),
    ),
    UNSAFE: _DIALOGUE,
}
"""The columns of each config; the configs are in the order of the card."""


def dialogue_row(dialogue: Dialogue, *, full: bool = False) -> PublishedRow:
    """The row of a dialogue; with `full` it holds the unsafe replies in full."""
    seed = dialogue.seed
    return {
        "id": dialogue.id,
        "category": seed.category,
        "source_category": seed.source_category,
        "strategy": dialogue.strategy,
        "n_turns": len(dialogue.turns),
        "messages": [message for turn in dialogue.turns for message in _messages(turn, full)],
        "images": list(dialogue.images),
        "aligned": [_said(t.aligned.text, t.aligned.verdict, full) for t in dialogue.turns if t.aligned],
        "turn_labels": _json([_labels(number, turn, full) for number, turn in enumerate(dialogue.turns, 1)]),
        "first_unsafe_turn": dialogue.first_unsafe_turn,
        "seed_id": seed.id,
        "seed_source": seed.source,
        "source_license": seed.license,
        "victim": public_identity(dialogue.victim),
        "provenance": _provenance(
            dialogue.provenance,
            [(number, origin) for number, turn in enumerate(dialogue.turns, 1) for origin in turn.origins],
            sample=dialogue.sample,
            plan_retries=dialogue.plan.retries,
            turns_taken_back=len(dialogue.pruned),
            images_taken_out=len(dialogue.removed),
        ),
    }


def twin_row(twin: Dialogue) -> PublishedRow:
    """The row of a benign twin."""
    return dialogue_row(twin) | {"twin_of": twin.twin_of, "goal": twin.goal}


def refusal_row(sample: RefusalSample) -> PublishedRow:
    """The row of a refusal sample."""
    seed = sample.seed
    return {
        "id": sample.id,
        "group": sample.group,
        "category": seed.category,
        "source_category": seed.source_category,
        "question": sample.question,
        "answer": sample.answer,
        "image": next(iter(sample.images), None),
        "answered_by": sample.answered_by,
        "seed_id": seed.id,
        "seed_source": seed.source,
        "source_license": seed.license,
        "provenance": _provenance(sample.provenance, [(1, origin) for origin in sample.origins]),
    }


def references_of(row: PublishedRow) -> list[str]:
    """References of the row's images, in order."""
    images: list[str] = row["images"] if "images" in row else [row["image"]] if row["image"] else []
    return images


def fingerprint(row: PublishedRow) -> bytes:
    """A hash of a row, 16 bytes; its images count by their names, which are their sha256."""
    return hashlib.blake2b(msgspec.json.encode(row, order="sorted"), digest_size=16).digest()


def split_of(seed_id: str, test_share: float) -> str:
    """The split of all rows of a seed, by the hash of its id: the same in every config and version.

    `test_share` is the share of the seeds in the split `test`, 0 to 1.
    """
    number = int.from_bytes(hashlib.sha256(f"split/{seed_id}".encode()).digest()[:8], "big")
    return TEST if number < test_share * 2**64 else TRAIN


def public_identity(identity: str) -> str:
    """A model's identity as it is published: of a model in a local folder, only the folder's name."""
    backend, _, model = identity.partition(":")
    name, mark, revision = model.partition("#")
    if name.startswith(("/", "~", ".")) or "\\" in name:
        name = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return f"{backend}:{name}{mark}{revision}"


def _messages(turn: Turn, full: bool) -> list[PublishedRow]:
    reply = Message("assistant", _said(turn.reply.text, turn.verdict, full))
    return [
        {
            "role": message.role,
            # An image part has a `text` too: Arrow would add one, and trainers expect exactly these keys.
            "content": [{"type": "image", "text": None} for _ in message.images]
            + [{"type": "text", "text": message.text}],
        }
        for message in (turn.user, reply)
    ]


def _said(text: str, verdict: Verdict, full: bool) -> str:
    if full or verdict.safety == "safe":
        return text
    labels = f"refusal {verdict.refusal}, harmless {verdict.harmless}, helpful {verdict.helpful}"
    sha256 = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"[WITHHELD {verdict.safety} reply, sha256={sha256}, {len(text)} characters, labels: {labels}]"


def _labels(number: int, turn: Turn, full: bool) -> PublishedRow:
    row = {"turn": number, **_verdict(turn.verdict), "finish": turn.finish}
    row["withheld"] = not full and turn.verdict.safety != "safe"
    if turn.aligned:
        row["aligned"] = _verdict(turn.aligned.verdict) | {"recovery": turn.aligned.recovery}
    return row


def _verdict(verdict: Verdict) -> PublishedRow:
    scores = {"harmless": verdict.harmless, "helpful": verdict.helpful}
    return {"safety": verdict.safety, "refusal": verdict.refusal, **scores}


def _provenance(made_by: Provenance, origins: list[tuple[int, ImageOrigin]], **more: int) -> str:
    images = [
        {"image": origin.image, "turn": turn, "source": origin.source}
        | ({"model": public_identity(origin.model), "seed": origin.seed} if origin.source == "painted" else {})
        for turn, origin in origins
    ]
    row = msgspec.to_builtins(made_by) | {"images": images, **more}
    row["models"] = {role: public_identity(identity) for role, identity in made_by.models.items()}
    return _json(row)


def _json(value: Any) -> str:
    return msgspec.json.encode(value, order="sorted").decode()
