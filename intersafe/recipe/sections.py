"""The sections of a recipe as frozen, typed values, and the model specs in them; `load.py` reads and checks them.

What decides the outcome of a run (`outcome`) is digested and held against a run on resume; how fast and where it runs
(`limits`, URLs, key names, `n`) is not.
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
    """For a million prompt tokens."""
    completion: Dollars = 0.0
    """For a million completion tokens."""
    call: Dollars = 0.0
    """For one call, a picture say."""

    def of(self, tokens: tuple[int, int], calls: int = 1) -> float:
        """USD for so many calls with that many prompt and completion tokens in all."""
        return (tokens[0] * self.prompt + tokens[1] * self.completion) / 1e6 + calls * self.call


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
    rpm: Positive | None = None
    """Requests a minute that the account may send; null: no such limit."""
    tpm: Positive | None = None
    """Tokens a minute, prompt and completion together; null: no such limit."""
    price: Price | None = None
    """What it costs; a model on your own machines has none, or one of zeros."""
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
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
    batch: bool = False
    """Through the provider's batch endpoint: half the price, and an answer within a day instead of at once."""
    send_images: Literal["data", "file", "uuid"] = "data"
    """As data URIs; as `file://` paths that the server can read; or once as a data URI, then by vLLM's `uuid`."""

    @property
    def in_process(self) -> bool:
        """True where a library of this process answers, and no server."""
        return self.spec.backend in ("vllm", "transformers") and not self.spec.urls


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
    max_tokens: Annotated[int, Meta(ge=1, le=10**15)] | None = None
    """Tokens of the whole run, prompt and completion of all models together, at which it stops; null: no limit."""
    max_cost: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """USD for the whole run at which it stops; every model that is asked over a network needs a `price`."""
    max_time: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """Seconds after which a command stops; the same command goes on for as long again."""


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
    serve: dict[str, Engine] = msgspec.field(default_factory=dict)
    """How models are put up, by their names in the cast: by `intersafe serve`, or in this process."""

    @property
    def most_images(self) -> int:
        """Most images of one request: those of a dialogue, or the two that the judge compares."""
        compared = 2 if self.clean and self.clean.judge_distance is not None else 1
        return max(self.images.max if self.cast.painter else 1, compared)

    def engine(self, name: str) -> Engine:
        """The engine of a model, with what the recipe leaves to it."""
        engine = self.serve.get(name, Engine())
        return engine if engine.images is not None else msgspec.structs.replace(engine, images=self.most_images)

    @property
    def seed_paths(self) -> list[Path]:
        """The seed files."""
        return [Path(path) for path in self.seeds]

    @property
    def outcome(self) -> dict[str, Any]:
        """The part that decides what a run holds, as plain values; seeds and prompts are digested by their content."""
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
    """sha256 over plain values; the order of keys does not count."""
    return hashlib.sha256(msgspec.json.encode(outcome, order="sorted")).hexdigest()


def _outcome_of(member: Model) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(member)
    for name in ("key", "concurrency", "revision", "send_images", "timeout", "rpm", "tpm", "price", "batch"):
        plain.pop(name, None)
    plain["model"] = member.identity
    return plain
