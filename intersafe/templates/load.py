"""The prompt folder: find its files, check and hash them.

A prompt is one Jinja file, `prompts/<role>/<name>.md`, with a block for each part of what is sent. A curator edits it
without reading code. `templates/roles.py` declares the variables of each role. An unknown variable, a missing block or
a syntax error is found at the start of a run, with file and line. Rubrics (`prompts/judge/rubrics/<family>.md`) are
plain text, which the judge's prompt gets as `rubric`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from intersafe.errors import InputError
from intersafe.recipe.sections import Recipe, Refusals
from intersafe.storage.files import read_small
from intersafe.taxonomy import Family
from intersafe.templates.prompt import Prompt, check_prompt
from intersafe.templates.refusals import TEMPLATES, read_templates
from intersafe.templates.roles import PROMPTS, STRATEGY
from intersafe.wording import nearest

_TEMPLATES = TEMPLATES.rpartition(".")[0]
_FAMILIES: tuple[str, ...] = get_args(Family)


@dataclass(frozen=True)
class Prompts:
    """The prompt files of a run: prompts by name, rubrics by family, and the sha256 of every file."""

    root: Path
    prompts: Mapping[str, Prompt]
    rubrics: Mapping[str, str]
    refusals: Mapping[str, tuple[str, ...]]
    """Standardised refusals by group: `refusal/templates.yaml`."""
    hashes: Mapping[str, str]

    def __getitem__(self, name: str) -> Prompt:
        return self.prompts[name]

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies."""
        return tuple(name.removeprefix("attacker/") for name in self.prompts if name.startswith("attacker/"))


def needed_by(recipe: Recipe) -> frozenset[str]:
    """The prompt files, by name, that a run of the recipe can use, besides strategies and rubrics."""
    unused: set[str] = set()
    if recipe.cast.painter is None:
        unused |= {"painter/describe"}
    if recipe.clean is None or recipe.clean.judge_distance is None:
        unused |= {"judge/images"}
    if recipe.respond is None:
        unused |= {"responder/aligned", "judge/aligned"}
    if recipe.twins is None:
        unused |= {"planner/twin"}
    groups = recipe.refusals.groups.values() if recipe.refusals else ()
    if not groups:
        unused |= {"refusal/question", "judge/refusal"}
    if not any(group.answers == "analysis" for group in groups):
        unused |= {"refusal/answer"}
    if not any(group.answers == "templates" for group in groups):
        unused |= {_TEMPLATES}
    return frozenset({*PROMPTS, _TEMPLATES} - unused)


def load_prompts(
    root: Path, strategies: Sequence[str] | None = None, needed: frozenset[str] | None = None, *, alone: bool = False
) -> Prompts:
    """Every prompt file below `root`, checked; only the named strategies, or all of them.

    What is not `needed` may be missing; with `alone` it is not read at all. Raises the first problem as `InputError`;
    `lint_prompts` yields them all.
    """
    folder = _Folder(root, strategies, needed, alone=alone)
    for problem in folder.problems():
        raise problem
    return Prompts(root, folder.prompts, folder.rubrics, folder.refusals, dict(sorted(folder.hashes.items())))


def lint_prompts(root: Path, needed: frozenset[str] | None = None) -> Iterator[InputError]:
    """Every problem of every prompt file below `root`, strategies that no recipe names included."""
    yield from _Folder(root, None, needed, alone=False).problems()


def check_refusals(refusals: Refusals, prompts: Prompts) -> None:
    """`InputError` if a group is answered by standardised refusals and the prompt folder has none for it."""
    for name, group in refusals.groups.items():
        if group.answers == "templates" and name not in prompts.refusals:
            raise InputError(
                f"no refusals for group {name!r}" + nearest(name, list(prompts.refusals)),
                at=prompts.root / TEMPLATES,
                remedy="add a list of that name, or set `answers: analysis` in the recipe",
            )


class _Folder:
    """Reads a prompt folder; `problems` yields what is wrong and fills the dicts with what is right."""

    def __init__(
        self, root: Path, strategies: Sequence[str] | None, needed: frozenset[str] | None, *, alone: bool
    ) -> None:
        self._root, self._strategies, self._needed, self._alone = root, strategies, needed, alone
        self.prompts: dict[str, Prompt] = {}
        self.rubrics: dict[str, str] = {}
        self.refusals: dict[str, tuple[str, ...]] = {}
        self.hashes: dict[str, str] = {}

    def problems(self) -> Iterator[InputError]:
        """Reads every file once; yields what is wrong with each."""
        root = self._root
        if not root.is_dir():
            remedy = "`intersafe init DIR` makes one to start from"
            yield InputError("no prompts folder there", at=root, remedy=remedy)
            return
        files = [path for path in sorted(root.rglob("*.md")) if _is_prompt(path.relative_to(root))]
        found = [path.stem for path in files if path.parent == root / "attacker"]
        wanted = found if self._strategies is None else list(self._strategies)
        yield from self._missing_strategies(wanted, found)
        yield from self._read_prompts([name for name in wanted if name in found])
        yield from self._read_rubrics()
        yield from self._read_refusals()
        yield from self._unused(files)

    def _missing_strategies(self, wanted: list[str], found: list[str]) -> Iterator[InputError]:
        at = self._root / "attacker"
        if not wanted:
            yield InputError("no strategy file", at=at, remedy="a strategy is one file, attacker/<name>.md")
        for strategy in wanted:
            if strategy not in found:
                what = f"no strategy {strategy!r}" + nearest(strategy, found)
                yield InputError(what, at=at, remedy="name a file there")

    def _read_prompts(self, strategies: list[str]) -> Iterator[InputError]:
        for name, role in (PROMPTS | {f"attacker/{name}": STRATEGY for name in strategies}).items():
            path = self._root / f"{name}.md"
            if name in PROMPTS and self._skips(name, path):
                continue
            try:
                text, sha256 = self._read(f"{name}.md")
                self.prompts[name] = check_prompt(name, path, text, sha256, role)
            except InputError as error:
                yield error

    def _read_rubrics(self) -> Iterator[InputError]:
        for family in _FAMILIES:
            try:
                text, _ = self._read(f"judge/rubrics/{family}.md")
                self.rubrics[family] = text.strip()
            except InputError as error:
                yield error

    def _read_refusals(self) -> Iterator[InputError]:
        path = self._root / TEMPLATES
        if self._skips(_TEMPLATES, path):
            return
        try:
            self._read(TEMPLATES)
            self.refusals = read_templates(path)
        except InputError as error:
            yield error

    def _unused(self, files: list[Path]) -> Iterator[InputError]:
        known = sorted([f"{name}.md" for name in PROMPTS] + [f"judge/rubrics/{family}.md" for family in _FAMILIES])
        for path in files:
            name = path.relative_to(self._root).as_posix()
            if name not in known and path.parent != self._root / "attacker":
                what = "nothing uses this file" + nearest(name, known)
                yield InputError(what, at=path, remedy="rename or move it")

    def _read(self, name: str) -> tuple[str, str]:
        """Text and sha256 of a file, which is hashed even if its text turns out to be wrong."""
        text, self.hashes[name] = _read(self._root / name)
        return text, self.hashes[name]

    def _skips(self, name: str, path: Path) -> bool:
        """True for a file that is not needed, and missing or not to be read."""
        return self._needed is not None and name not in self._needed and (self._alone or not path.exists())


def _is_prompt(path: Path) -> bool:
    """False for a README and for hidden files, such as the copies of an editor or a notebook."""
    return path.name != "README.md" and not any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> tuple[str, str]:
    """Text without a byte order mark, and the sha256 of all bytes."""
    try:
        data = read_small(path)
        text = data.decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        remedy = "copy it from a fresh folder, `intersafe init NEW` makes one"
        raise InputError("prompt file is missing", at=path, remedy=remedy) from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", at=path, remedy="correct its permissions") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError("not UTF-8 text", at=path, line=line, remedy="save the file as UTF-8") from None
    if not text.strip():
        remedy = "copy it from a fresh folder, `intersafe init NEW` makes one"
        raise InputError("the file is empty", at=path, remedy=remedy)
    return text, hashlib.sha256(data).hexdigest()
