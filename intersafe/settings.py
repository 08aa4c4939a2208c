"""The sections of a recipe as frozen, typed values, and the model specs in them; `recipe.py` reads and checks them.

What decides the outcome of a run (`outcome`) is digested and held against a run on resume; how fast and where it runs
(`limits`, URLs, key names, `n`) is not.
"""

import difflib
import functools
import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from intersafe.errors import InputError

BACKENDS = ("scripted", "openai")
PAINTERS = ("scripted", "openai", "diffusers")
OPENAI_URL = "https://api.openai.com/v1"

# Upper bounds keep every number finite and exact in JSON, as which a run keeps its recipe.
Natural = Annotated[int, Meta(ge=0, le=10**9)]
Positive = Annotated[int, Meta(ge=1, le=10**9)]
Parallel = Annotated[int, Meta(ge=1, le=65_536)]
Share = Annotated[float, Meta(gt=0, le=1)]
Score = Annotated[int, Meta(ge=0, le=10)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a recipe: unknown keys are errors."""


class Spec(NamedTuple):
    """`backend:model[@url[,url...]]` taken apart."""

    backend: str
    model: str
    urls: tuple[str, ...]


class Model(Section, frozen=True):
    """A model of the cast: what it is and where."""

    model: str
    """`backend:model[@url[,url...]]`; several URLs are replicas of the same model."""
    revision: str = ""
    """Part of the model's identity, for servers that do not tell."""
    key: Annotated[str, Meta(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?\Z")] = ""
    """Name of the environment variable with the API key; never the key."""
    concurrency: Parallel = 256
    """Most calls in flight to this model; the limiter stays below it when the server says 429."""
    extra: dict[str, Any] = {}
    """More fields for the request body, for example `chat_template_kwargs`."""

    @property
    def spec(self) -> Spec:
        """The model spec taken apart."""
        return parse_spec(self.model)

    @property
    def identity(self) -> str:
        """Backend, model and revision: what the model is, not where it runs."""
        spec = self.spec
        return f"{spec.backend}:{spec.model}" + (f"#{self.revision}" if self.revision else "")


class Member(Model, frozen=True):
    """A model that answers in words, and how it is asked."""

    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024
    json_schema: bool = True
    """False for servers that know no `response_format`: the prompt alone asks for JSON."""
    send_images: Literal["data", "file", "uuid"] = "data"
    """As data URIs; as `file://` paths that the server can read; or once as a data URI, then by vLLM's `uuid`."""


class Painter(Model, frozen=True):
    """A text-to-image model: `scripted:name`, `openai:model@url` (the Images API), or `diffusers:path` in process."""

    size: Annotated[str, Meta(pattern=r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}\Z")] = "1024x1024"
    """Width x height in pixels."""
    steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """`num_inference_steps`; null leaves it to the server."""
    guidance: Annotated[float, Meta(ge=0, le=100)] | None = None
    """`true_cfg_scale`, as Qwen-Image names it; null leaves it to the server."""
    negative_prompt: str = ""
    concurrency: Parallel = 2
    """Pictures asked for at once: a server draws few at a time, and what waits there runs into the time-out."""
    timeout: Annotated[float, Meta(gt=0, le=1e9)] = 1800.0
    """Seconds for one picture."""

    @property
    def spec(self) -> Spec:
        """The model spec taken apart."""
        return parse_spec(self.model, PAINTERS)


class Cast(Section, frozen=True):
    """The models of a run."""

    attacker: Member
    victims: Annotated[tuple[Member, ...], Meta(min_length=1)]
    judge: Member
    second_judge: Member | None = None
    """Asked where the judge's answer stays undetermined."""
    responder: Member | None = None
    """Writes the aligned answers and the refusals."""
    painter: Painter | None = None
    """Draws what the attacker describes."""

    @property
    def members(self) -> dict[str, Member]:
        """Every member that answers in words, by its name in the records: attacker, judge, victim:0, victim:1, ..."""
        named = {"attacker": self.attacker, "judge": self.judge}
        if self.second_judge:
            named["second_judge"] = self.second_judge
        if self.responder:
            named["responder"] = self.responder
        return named | {f"victim:{i}": victim for i, victim in enumerate(self.victims)}

    @property
    def models(self) -> dict[str, Model]:
        """The members and the painter."""
        return {**self.members, **({"painter": self.painter} if self.painter else {})}


class Turns(Section, frozen=True):
    """How many turns a dialogue has: `min` + a binomial draw by job, with exactly this mean."""

    min: Annotated[int, Meta(ge=1)] = 2
    mean: float = 4.0
    max: Annotated[int, Meta(le=16)] = 6


class Images(Section, frozen=True):
    """How many images a dialogue has, the seed's included: drawn as `turns` is, never more than it has turns.

    Only where the cast has a painter; without one a dialogue has its seed's image or none.
    """

    min: Annotated[int, Meta(ge=0)] = 1
    mean: float = 1.53
    max: Annotated[int, Meta(le=16)] = 4


class PlanSettings(Section, frozen=True):
    """Decomposition: the paper's threshold delta and its number of tries are not published, so both are named here."""

    threshold: Score = 5
    """The lowest of a step's three scores must reach it."""
    tries: Positive = 3
    """How often a weak step is asked for in all, and how often an answer that cannot be read."""


class ConverseSettings(Section, frozen=True):
    """The talk, turn by turn."""

    tries: Positive = 3
    """How often a message that a rule turns down is asked for in all, and how often an answer that cannot be read."""
    backtracks: Natural = 1
    """How many turns of a dialogue may be taken back after a full refusal; 0 keeps every turn."""


class CleanSettings(Section, frozen=True):
    """Images of one dialogue that look alike: the later one is taken out and its turn asked again without it."""

    distance: Annotated[int, Meta(ge=0, le=64)] = 4
    """Perceptual hashes (64 bits) at most this far apart count as the same picture."""
    judge_distance: Annotated[int, Meta(ge=0, le=64)] | None = None
    """Between `distance` and this the judge looks at both images and decides; null never asks it."""
    repair: bool = True
    """False rejects the dialogue instead of repairing the turn."""


class RespondSettings(Section, frozen=True):
    """Aligned answers: what the responder would say in each turn, held to the judge."""

    tries: Positive = 3
    """How often an answer that the judge turns down is asked for in all."""


class TwinSettings(Section, frozen=True):
    """Benign twins: dialogues with the same images and structure whose intent is harmless."""

    ratio: Share = 0.1
    """Twins for each accepted dialogue."""


class RuleSettings(Section, frozen=True):
    """What a curator may change about the rules."""

    overlap: Share = 0.9
    """Two user messages repeat each other when their word sets share this much (words in both / words in either)."""
    overlap_words: Positive = 6
    """Messages with fewer different words than this repeat each other only when they are equal."""
    script: Literal["latin", "any"] = "latin"
    """The script that the talk is expected in; `any` switches the rule off. A script is not a language."""
    script_share: Share = 0.8
    """The least share of a message's letters that belong to the script."""
    description_words: Annotated[int, Meta(ge=3, le=100)] = 8
    """A user message that shares a run of so many words with what the painter was told gives it away."""
    image_phrases: tuple[str, ...] = (
        "image description:",
        "image prompt:",
        "picture description:",
        "description of the image:",
        "prompt for the image:",
        "[image:",
        "[image description",
        "[image of",
        "<image:",
    )
    """Anywhere in a user message these show that the painter's text leaked. Case, quotes and spacing are ignored."""
    image_openings: tuple[str, ...] = (
        "generate an image of",
        "create an image of",
        "draw an image of",
        "generate a picture of",
        "create a picture of",
    )
    """The same, but only where a user message opens with them."""


class DuplicateSettings(Section, frozen=True):
    """When two dialogues count as the same: MinHash over the user's side of the talk."""

    threshold: Share = 0.6
    """Estimated Jaccard similarity of the two users' sides, from which on a dialogue is a near-duplicate."""
    unit: Literal["word", "char"] = "char"
    """What a shingle is made of; `char` forgives typing errors and suits scripts without spaces."""
    size: Annotated[int, Meta(ge=1, le=32)] = 5
    """Units in a shingle."""
    permutations: Annotated[int, Meta(ge=32, le=1024, multiple_of=32)] = 128
    """Values in a signature: more of them estimate closer (standard error up to 0.5 / sqrt) and cost 4 bytes each."""


class ImageSettings(Section, frozen=True):
    """Similar images within one dialogue."""

    distance: Annotated[int, Meta(ge=0, le=64)] = 4
    """Perceptual hashes (64 bits) at most this far apart count as the same picture."""


class CoverageSettings(Section, frozen=True):
    """Quotas: how far one value of an axis may run ahead of its share of what was accepted.

    `even` gives every value of the run the same share, a mapping names shares (those of one axis sum to 1), null leaves
    the axis alone.
    """

    category: Literal["even"] | dict[str, Share] | None = "even"
    strategy: Literal["even"] | dict[str, Share] | None = None
    victim: Literal["even"] | dict[str, Share] | None = None
    """By model identity, `openai:model`."""
    turns: Literal["even"] | dict[str, Share] | None = None
    """By number of turns."""
    tolerance: Annotated[float, Meta(ge=0, le=1e9)] = 0.10
    """Share of its share that a value may have on top of it."""
    slack: Annotated[float, Meta(ge=1, le=1e9)] = 5.0
    """Dialogues on top of that, so that the first few of a run are not held to a share."""


class Gates(Section, frozen=True):
    """The gates in the order in which they decide; `null` switches one off."""

    rules: RuleSettings | None = RuleSettings()
    images: ImageSettings | None = ImageSettings()
    coverage: CoverageSettings | None = CoverageSettings()
    duplicates: DuplicateSettings | None = DuplicateSettings()


class RefusalGroup(Section, frozen=True):
    """One group of the refusal VQA."""

    n: Positive
    """Samples to keep; exact."""
    about: Annotated[str, Meta(min_length=3)]
    """What questions belong to the group, in a few words: the asker and the judge are told."""
    answers: Literal["analysis", "templates"] = "analysis"
    """An analysis of the harm by the responder, or one of the standardised texts of the prompt folder."""
    categories: tuple[str, ...] = ()
    """The seeds' categories that it takes; none named: all that no other group names."""
    seeds: tuple[str, ...] = ()
    """Seed files of its own; none named: the recipe's."""
    questions: Literal["written", "seed"] = "written"
    """Written by the attacker after the seed, or the seed's query itself, where a seed is a question already."""


class Refusals(Section, frozen=True):
    """Refusal VQA, grown beside the dialogues (AM3Safety: 300 general, 100 health, 100 finance)."""

    groups: dict[str, RefusalGroup]
    samples: Positive = 8
    """Questions for each seed, where they are written."""
    tries: Positive = 3
    """How often a question or an answer that a filter turns down is asked for in all."""
    duplicates: DuplicateSettings | None = DuplicateSettings()
    """Two questions of a group count as the same."""


class Limits(Section, frozen=True):
    """How fast and how patiently; none of it changes the outcome."""

    concurrency: Parallel = 64
    """Dialogues grown at once."""
    timeout: Annotated[float, Meta(gt=0, le=1e9)] = 300.0
    """Seconds for one answer."""
    retries: Positive = 5
    """Tries of one call in all against a passing fault; 429 and 503 do not count."""
    patience: Annotated[float, Meta(ge=0, le=1e9)] = 600.0
    """Seconds that a service may stay away before the run ends, resumable."""


class Recipe(Section, frozen=True):
    """Cast, seeds, stages, gates and limits of a run."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z")]
    cast: Cast
    seeds: Annotated[tuple[str, ...], Meta(min_length=1)]
    prompts: str
    strategies: Annotated[tuple[str, ...], Meta(min_length=1)]
    n: Positive = 100
    seed: Annotated[int, Meta(ge=-(2**53), le=2**53)] = 0
    """Changes every sampling seed and the number of turns by job."""
    samples: Positive = 1
    """Dialogues for each (seed, strategy, victim)."""
    turns: Turns = Turns()
    images: Images = Images()
    plan: PlanSettings = PlanSettings()
    converse: ConverseSettings = ConverseSettings()
    clean: CleanSettings | None = CleanSettings()
    respond: RespondSettings | None = None
    twins: TwinSettings | None = None
    refusals: Refusals | None = None
    gates: Gates = Gates()
    limits: Limits = Limits()

    @property
    def seed_paths(self) -> list[Path]:
        """The seed files."""
        return [Path(path) for path in self.seeds]

    @property
    def outcome(self) -> dict[str, Any]:
        """The part that decides what a run holds, as plain values; seeds and prompts are digested by their content."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("name", "n", "limits", "seeds", "prompts"):
            del plain[name]
        plain["cast"] = {name: _outcome_of(member) for name, member in self.cast.models.items()}
        for group in plain["refusals"]["groups"].values() if self.refusals else ():
            del group["seeds"]
        return plain

    @property
    def digest(self) -> str:
        """sha256 of `outcome`."""
        return digest_of(self.outcome)


def digest_of(outcome: dict[str, Any]) -> str:
    """sha256 over plain values; the order of keys does not count."""
    return hashlib.sha256(msgspec.json.encode(outcome, order="sorted")).hexdigest()


def _outcome_of(member: Model) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(member)
    for name in ("key", "concurrency", "revision", "send_images", "timeout"):
        plain.pop(name, None)
    plain["model"] = member.identity
    return plain


_ADDRESS = re.compile(r"@(?=http|localhost|[^@]*[:/])")
"""An `@` with an address behind it; any other belongs to the model's name."""


@functools.lru_cache
def parse_spec(text: str, backends: tuple[str, ...] = BACKENDS) -> Spec:
    """`backend:model[@url[,url...]]`; `InputError` for an unknown backend, no model, or a URL that is none."""
    backend, colon, rest = text.partition(":")
    if backend not in backends or not colon:
        raise InputError(
            f"model spec {text!r}: unknown backend {backend!r}" + nearest(backend, backends),
            remedy="write backend:model[@url], for example openai:my-model@http://localhost:8000/v1",
        )
    model, *address = _ADDRESS.split(rest, maxsplit=1)
    urls = tuple(url.rstrip("/") for url in address[0].split(",")) if address else ()
    if any("@" in url for url in urls):  # not echoed: it may be a password
        raise InputError(f"model spec of {model!r}: an @ inside a URL", remedy="a secret goes into the `key` variable")
    if not model or "://" in model or not model.isprintable() or " " in model:
        raise InputError(f"model spec {text!r}: {model!r} is no model's name", remedy="write backend:model[@url]")
    if backend != "openai" and urls:
        raise InputError(f"model spec {text!r}: a {backend} model has no URL", remedy="drop what follows the @")
    for url in urls:
        if not _is_base_url(url):
            raise InputError(f"model spec {text!r}: {url!r} is not a URL", remedy="write http(s)://host[:port][/path]")
    return Spec(backend, model, urls or ((OPENAI_URL,) if backend == "openai" else ()))


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return usable and url.isprintable() and not set(url) & set(" ?#")


def nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    """`, did you mean 'x'?`, or what is known where that is a short list."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f", did you mean {close[0]!r}?"
    return f", known: {', '.join(known)}" if len(known) <= 20 else ""
