"""The sections of a recipe as frozen, typed values; `load.py` reads them and `checks.py` checks them.

The digest covers what decides the outcome of a run (`outcome`), and a run resumes only under the same digest. How fast
and where a run runs (`limits`, URLs, names of API keys, `n`) is not part of it.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from intersafe.recipe.base import Dollars, Natural, Parallel, Positive, Score, Section, Share
from intersafe.recipe.engine import Engine
from intersafe.recipe.gates import DuplicateSettings, Gates
from intersafe.recipe.specs import PAINTERS, Spec, parse_spec


class Price(Section, frozen=True):
    """What a model costs, in USD."""

    prompt: Dollars = 0.0
    """Per million prompt tokens."""
    completion: Dollars = 0.0
    """Per million completion tokens."""
    call: Dollars = 0.0
    """Per call, for example per image."""

    def of(self, tokens: tuple[int, int], calls: int = 1) -> float:
        """USD for `calls` calls with these prompt and completion tokens in total."""
        return (tokens[0] * self.prompt + tokens[1] * self.completion) / 1e6 + calls * self.call


class Model(Section, frozen=True):
    """A model of the cast: what it is and where it runs."""

    model: str
    """`backend:model[@url[,url...]]`; several URLs are replicas of the same model."""
    revision: str = ""
    """Revision of the model, part of its identity; servers do not report it."""
    key: Annotated[str, Meta(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?\Z")] = ""
    """Name of the environment variable with the API key; never the key itself."""
    concurrency: Parallel = 256
    """Most calls in flight to this model; the limiter goes below it when the server answers 429."""
    rpm: Positive | None = None
    """Requests per minute that the account allows; null: no limit."""
    tpm: Positive | None = None
    """Tokens per minute, prompt and completion together; null: no limit."""
    price: Price | None = None
    """What it costs; null or zeros for a model on your own machines."""
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further fields of the request body, for example `chat_template_kwargs`."""

    @property
    def spec(self) -> Spec:
        """The parts of the model spec."""
        return parse_spec(self.model)

    @property
    def identity(self) -> str:
        """Backend, model and revision: what the model is, not where it runs."""
        spec = self.spec
        return f"{spec.backend}:{spec.model}" + (f"#{self.revision}" if self.revision else "")


class Member(Model, frozen=True):
    """A model that answers with text, and its sampling."""

    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024
    json_schema: bool = True
    """False for servers without `response_format`: only the prompt asks for JSON."""
    batch: bool = False
    """Uses the provider's batch endpoint: half the price, but an answer can take a day."""
    send_images: Literal["data", "file", "uuid"] = "data"
    """As data URIs, as `file://` paths that the server can read, or first as a data URI and then by vLLM's `uuid`."""

    @property
    def in_process(self) -> bool:
        """True if a library in this process answers, not a server."""
        return self.spec.backend in ("vllm", "transformers") and not self.spec.urls


class Painter(Model, frozen=True):
    """A text-to-image model: `scripted:name`, `openai:model@url` (the Images API), or `diffusers:path` in process."""

    size: Annotated[str, Meta(pattern=r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}\Z")] = "1024x1024"
    """Width x height in pixels."""
    steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """`num_inference_steps`; null: the server's default."""
    guidance: Annotated[float, Meta(ge=0, le=100)] | None = None
    """`true_cfg_scale` in Qwen-Image's terms; null: the server's default."""
    negative_prompt: str = ""
    concurrency: Parallel = 2
    """Requests in flight: a server paints few images at a time, and the others run into the timeout."""
    timeout: Annotated[float, Meta(gt=0, le=1e9)] = 1800.0
    """Seconds for one image."""

    @property
    def spec(self) -> Spec:
        """The parts of the model spec."""
        return parse_spec(self.model, PAINTERS)


class Cast(Section, frozen=True):
    """The models of a run."""

    attacker: Member
    victims: Annotated[tuple[Member, ...], Meta(min_length=1)]
    judge: Member
    second_judge: Member | None = None
    """Asked if the judge's answer stays undetermined."""
    responder: Member | None = None
    """Writes the aligned answers and the refusals."""
    painter: Painter | None = None
    """Paints what the attacker describes."""

    @property
    def members(self) -> dict[str, Member]:
        """Every member that answers with text, by its name in the records: attacker, judge, victim:0, victim:1, ..."""
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
    """Number of turns of a dialogue: `min` plus a binomial draw by job, with exactly this mean."""

    min: Annotated[int, Meta(ge=1)] = 2
    mean: float = 4.0
    max: Annotated[int, Meta(le=16)] = 6


class Images(Section, frozen=True):
    """Number of images of a dialogue, the seed's included: drawn like `turns`, at most one per turn.

    Only if the cast has a painter; without one a dialogue has its seed's image or none.
    """

    min: Annotated[int, Meta(ge=0)] = 1
    mean: float = 1.53
    max: Annotated[int, Meta(le=16)] = 4


class PlanSettings(Section, frozen=True):
    """Decomposition of a query into steps. The paper does not publish its threshold delta and its number of tries."""

    threshold: Score = 5
    """The lowest of the three scores of a step must reach this."""
    tries: Positive = 3
    """Most attempts at a step that scores too low, and at an answer that cannot be parsed."""


class ConverseSettings(Section, frozen=True):
    """The conversation, turn by turn."""

    tries: Positive = 3
    """Most attempts at a message that a rule rejects, and at an answer that cannot be parsed."""
    backtracks: Natural = 1
    """Most turns of a dialogue that are backtracked after a full refusal; 0 keeps every turn."""


class CleanSettings(Section, frozen=True):
    """Similar images of one dialogue: the later one is removed and its turn asked again without it."""

    distance: Annotated[int, Meta(ge=0, le=64)] = 4
    """Perceptual hashes (64 bits) at most this far apart count as the same image."""
    judge_distance: Annotated[int, Meta(ge=0, le=64)] | None = None
    """Between `distance` and this the judge compares the two images; null: never."""
    repair: bool = True
    """False rejects the dialogue instead."""


class RespondSettings(Section, frozen=True):
    """Aligned answers: what the responder would say in each turn, checked by the judge."""

    tries: Positive = 3
    """Most attempts at an answer that the judge rejects."""


class TwinSettings(Section, frozen=True):
    """Benign twins: dialogues with the same images and structure, but a harmless intent."""

    ratio: Share = 0.1
    """Twins for each accepted dialogue."""


class RefusalGroup(Section, frozen=True):
    """One group of the refusal VQA."""

    n: Positive
    """Samples to accept; exact."""
    about: Annotated[str, Meta(min_length=3)]
    """The questions that belong to the group, in a few words for the attacker and the judge."""
    answers: Literal["analysis", "templates"] = "analysis"
    """An analysis of the harm by the responder, or a standardised text of the prompt folder."""
    categories: tuple[str, ...] = ()
    """Categories of its seeds; empty: all that no other group names."""
    seeds: tuple[str, ...] = ()
    """Seed files of its own; empty: those of the recipe."""
    questions: Literal["written", "seed"] = "written"
    """Written by the attacker from the seed, or the query of the seed if seeds are questions already."""


class Refusals(Section, frozen=True):
    """Refusal VQA, generated in the same run (AM3Safety: 300 general, 100 health, 100 finance)."""

    groups: dict[str, RefusalGroup]
    samples: Positive = 8
    """Questions per seed, if the attacker writes them."""
    tries: Positive = 3
    """Most attempts at a question or an answer that a filter rejects."""
    duplicates: DuplicateSettings | None = DuplicateSettings()
    """When two questions of a group count as duplicates."""


class Limits(Section, frozen=True):
    """Speed, patience and budgets; none of them changes the outcome."""

    concurrency: Parallel = 64
    """Dialogues in progress at once."""
    timeout: Annotated[float, Meta(gt=0, le=1e9)] = 300.0
    """Seconds for one answer."""
    retries: Positive = 5
    """Most tries of one call after transient errors; 429 and 503 do not count."""
    patience: Annotated[float, Meta(ge=0, le=1e9)] = 600.0
    """Seconds to wait for a service that does not answer before the run ends, resumable."""
    max_tokens: Annotated[int, Meta(ge=1, le=10**15)] | None = None
    """The run stops at this many tokens, prompt and completion of all models together; null: no limit."""
    max_cost: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """The run stops at this cost in USD; every model that is called over a network needs a `price`."""
    max_time: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """A command stops after this many seconds; the same command resumes for as long again."""


class Recipe(Section, frozen=True):
    """The cast, seeds, stages, gates and limits of a run."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z")]
    cast: Cast
    seeds: Annotated[tuple[str, ...], Meta(min_length=1)]
    prompts: str
    strategies: Annotated[tuple[str, ...], Meta(min_length=1)]
    n: Positive = 100
    seed: Annotated[int, Meta(ge=-(2**53), le=2**53)] = 0
    """Changes every sampling seed and the number of turns of each job."""
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
    serve: dict[str, Engine] = msgspec.field(default_factory=dict)
    """How models are deployed, by their names in the cast: by `intersafe serve`, or in this process."""

    @property
    def most_images(self) -> int:
        """Most images in one request: those of a dialogue, or the two that the judge compares."""
        compared = 2 if self.clean and self.clean.judge_distance is not None else 1
        return max(self.images.max if self.cast.painter else 1, compared)

    def engine(self, name: str) -> Engine:
        """The engine settings of a model, with `images` filled in."""
        engine = self.serve.get(name, Engine())
        return engine if engine.images is not None else msgspec.structs.replace(engine, images=self.most_images)

    @property
    def seed_paths(self) -> list[Path]:
        """The seed files."""
        return [Path(path) for path in self.seeds]

    @property
    def outcome(self) -> dict[str, Any]:
        """What decides the content of a run, as plain values; seeds and prompts have digests of their own."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("name", "n", "limits", "seeds", "prompts", "serve"):
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
    """sha256 of plain values; the order of keys does not matter."""
    return hashlib.sha256(msgspec.json.encode(outcome, order="sorted")).hexdigest()


def _outcome_of(member: Model) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(member)
    for name in ("key", "concurrency", "revision", "send_images", "timeout", "rpm", "tpm", "price", "batch"):
        plain.pop(name, None)
    plain["model"] = member.identity
    return plain
