"""Prompt files: find, check, render, hash.

A prompt is one Jinja file, `prompts/<role>/<name>.md`, with a block for each part of what is sent. A curator edits it
without reading code: the variables that a role offers are declared here, and an unknown one, a missing block or a
syntax error is found at the start of a run, with file and line. Rubrics (`prompts/judge/rubrics/<family>.md`) are
plain text, put into the judge's prompt as `rubric`. Files are rendered in Jinja's immutable sandbox with strict
undefined variables; no file reads another.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jinja2 import StrictUndefined, Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from intersafe.errors import InputError
from intersafe.recipe.sections import Recipe, Refusals
from intersafe.storage.files import read_small
from intersafe.taxonomy import Family
from intersafe.templates.refusals import TEMPLATES, read_templates
from intersafe.templates.roles import PROMPTS, STRATEGY, Role
from intersafe.wording import nearest

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
)
del _ENVIRONMENT.filters["random"]  # the same values give the same text, always
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    MemoryError,
)
"""What Jinja and the values' own methods raise on what a file asks of them."""

_FAMILIES: tuple[str, ...] = get_args(Family)


@dataclass(frozen=True)
class Prompt:
    """One checked prompt file."""

    name: str
    path: Path
    sha256: str
    role: Role
    uses: frozenset[str]
    """The variables that the file names."""
    template: Template

    def render(self, block: str, values: Mapping[str, Any]) -> str:
        """The text of one block; `InputError` if the values do not fit the file (an attribute that is not there)."""
        try:
            context = self.template.new_context(dict(values))
            return "".join(self.template.blocks[block](context)).strip()
        except _RENDER_ERRORS as error:
            raise InputError(
                f"block {block!r} does not render: {' '.join(str(error).split()) or type(error).__name__}",
                at=self.path,
                line=self._line_of(error),
                remedy="`intersafe prompts list` shows what is offered",
            ) from None

    def _line_of(self, error: BaseException) -> int | None:
        """The line of the file at which rendering stopped."""
        line, trace = None, error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == "<template>":
                line = self.template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return line


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
    """The prompt files, by name, that a run of the recipe can ask with; the strategies and rubrics come on top."""
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


_TEMPLATES = TEMPLATES.rpartition(".")[0]


def load_prompts(
    root: Path, strategies: Sequence[str] | None = None, needed: frozenset[str] | None = None, *, alone: bool = False
) -> Prompts:
    """Every prompt file below `root`, checked; only the named strategies, or all of them.

    What is not `needed` may be absent; with `alone` it is not looked at. Raises the first problem as `InputError`;
    `lint_prompts` yields them all.
    """
    prompts: dict[str, Prompt] = {}
    rubrics: dict[str, str] = {}
    refusals: dict[str, tuple[str, ...]] = {}
    hashes: dict[str, str] = {}
    wanted = _Wanted(strategies, needed, alone)
    problems = list(_problems(root, wanted, prompts, rubrics, refusals, hashes))
    if problems:
        raise problems[0]
    return Prompts(root, prompts, rubrics, refusals, dict(sorted(hashes.items())))


def lint_prompts(root: Path, needed: frozenset[str] | None = None) -> Iterator[InputError]:
    """Every problem of every prompt file below `root`, strategies that no recipe names included."""
    yield from _problems(root, _Wanted(None, needed, alone=False), {}, {}, {}, {})


def check_refusals(refusals: Refusals, prompts: Prompts) -> None:
    """`InputError` where a group is answered by standardised refusals and the prompt folder has none for it."""
    for name, group in refusals.groups.items():
        if group.answers == "templates" and name not in prompts.refusals:
            raise InputError(
                f"no refusals for group {name!r}" + nearest(name, list(prompts.refusals)),
                at=prompts.root / TEMPLATES,
                remedy="add a list of that name, or set `answers: analysis` in the recipe",
            )


class _Wanted(NamedTuple):
    strategies: Sequence[str] | None
    needed: frozenset[str] | None
    alone: bool

    def skips(self, name: str, path: Path) -> bool:
        """True for a file that is not needed, and absent or not to be looked at."""
        return self.needed is not None and name not in self.needed and (self.alone or not path.exists())


def _problems(
    root: Path,
    wanted_files: _Wanted,
    prompts: dict[str, Prompt],
    rubrics: dict[str, str],
    refusals: dict[str, tuple[str, ...]],
    hashes: dict[str, str],
) -> Iterator[InputError]:
    """Loads into the four dicts and yields what is wrong."""
    if not root.is_dir():
        yield InputError("no prompts folder there", at=root, remedy="`intersafe init DIR` makes one to start from")
        return
    files = [path for path in sorted(root.rglob("*.md")) if _is_prompt(path.relative_to(root))]
    found = [path.stem for path in files if path.parent == root / "attacker"]
    wanted = found if wanted_files.strategies is None else list(wanted_files.strategies)
    if not wanted:
        yield InputError("no strategy file", at=root / "attacker", remedy="a strategy is one file, attacker/<name>.md")
    for strategy in wanted:
        if strategy not in found:
            yield InputError(
                f"no strategy {strategy!r}" + nearest(strategy, found), at=root / "attacker", remedy="name a file there"
            )
    roles = PROMPTS | {f"attacker/{name}": STRATEGY for name in wanted if name in found}
    for name, role in roles.items():
        path = root / f"{name}.md"
        if name in PROMPTS and wanted_files.skips(name, path):
            continue
        try:
            text, hashes[f"{name}.md"] = _read(path)
            prompts[name] = _check(name, path, text, hashes[f"{name}.md"], role)
        except InputError as error:
            yield error
    for family in _FAMILIES:
        path = root / "judge" / "rubrics" / f"{family}.md"
        try:
            text, hashes[f"judge/rubrics/{family}.md"] = _read(path)
            rubrics[family] = text.strip()
        except InputError as error:
            yield error
    if not wanted_files.skips(_TEMPLATES, root / TEMPLATES):
        try:
            _, hashes[TEMPLATES] = _read(root / TEMPLATES)
            refusals.update(read_templates(root / TEMPLATES))
        except InputError as error:
            yield error
    known = {root / f"{name}.md" for name in PROMPTS} | {root / "judge" / "rubrics" / f"{f}.md" for f in _FAMILIES}
    for path in files:
        if path not in known and path.parent != root / "attacker":
            names = sorted(p.relative_to(root).as_posix() for p in known)
            yield InputError(
                "nothing uses this file" + nearest(path.relative_to(root).as_posix(), names),
                at=path,
                remedy="rename or move it",
            )


def _is_prompt(path: Path) -> bool:
    """Not a note for people, nor the hidden copy that an editor or a notebook leaves beside a file."""
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
        raise InputError(f"cannot be read ({error.strerror})", at=path, remedy="mend its rights") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError("not UTF-8 text", at=path, line=line, remedy="save the file as UTF-8") from None
    if not text.strip():
        remedy = "copy it from a fresh folder, `intersafe init NEW` makes one"
        raise InputError("the file is empty", at=path, remedy=remedy)
    return text, hashlib.sha256(data).hexdigest()


def _check(name: str, path: Path, text: str, sha256: str, role: Role) -> Prompt:
    """The prompt, or `InputError` with file and line."""
    try:
        tree = _ENVIRONMENT.parse(text)
        template = _ENVIRONMENT.from_string(text)
    except TemplateSyntaxError as error:
        raise InputError(f"{error.message}", at=path, line=error.lineno, remedy="mend the Jinja syntax") from None
    except (SyntaxError, RecursionError, MemoryError):  # Python's own limits on the code that Jinja makes of it
        raise InputError("nested too deep", at=path, line=1, remedy="write it plainer") from None
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise InputError("a prompt reads no other file", at=path, line=node.lineno, remedy="write the text here")
    uses = _check_names(path, tree, role)
    _check_blocks(path, tree, role)
    for group in role.needs:
        if not uses & set(group):
            wanted = " or ".join(f"{{{{ {name} }}}}" for name in group)
            raise InputError(f"{wanted} is never used", at=path, line=1, remedy="without it the model misses the point")
    prompt = Prompt(name, path, sha256, role, uses, template)
    for values in (role.sample, role.sample | {key: _FIRST[key] for key in _FIRST.keys() & role.sample.keys()}):
        for block in role.blocks:
            if not prompt.render(block, values):
                raise InputError(f"block {block!r} is empty", at=path, line=1, remedy="say what the model shall do")
    return prompt


_FIRST = {
    "has_image": False,
    "has_picture": False,
    "n_pictures": 0,
    "refused": False,
    "transcript": "",
    "turn": 1,
    "judge_reason": "",
    "problem": "",
}
"""The other sample: the first turn of a talk without image, where a file may take another branch."""


def _check_names(path: Path, tree: nodes.Template, role: Role) -> frozenset[str]:
    """The variables that the file names; each is offered, or the file's own."""
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx in ("store", "param")} | {"loop", "range"}
    if macros := {node.name for node in tree.find_all(nodes.Macro)}:
        own |= macros | {"caller", "varargs", "kwargs"}
    loaded = [node for node in tree.find_all(nodes.Name) if node.ctx == "load" and node.name not in own]
    for node in loaded:
        if node.name not in role.variables:
            known = nearest(node.name, list(role.variables)) if role.variables else ", this prompt is offered none"
            raise InputError(
                f"unknown variable {node.name!r}{known}",
                at=path,
                line=node.lineno,
                remedy="`intersafe prompts list` shows all",
            )
    return frozenset(node.name for node in loaded)


def _check_blocks(path: Path, tree: nodes.Template, role: Role) -> None:
    """The blocks of the role, no others, and nothing outside of them."""
    blocks = {node.name: node.lineno for node in tree.find_all(nodes.Block)}
    for block in role.blocks:
        if block not in blocks:
            raise InputError(
                f"block {block!r} is missing", at=path, line=1, remedy=f"add {{% block {block} %}}...{{% endblock %}}"
            )
    for block, line in blocks.items():
        if block not in role.blocks:
            raise InputError(
                f"unknown block {block!r}" + nearest(block, list(role.blocks)),
                at=path,
                line=line,
                remedy="only these blocks are sent",
            )
    for line in (line for node in tree.body if not isinstance(node, nodes.Block) for line in _lines_said(node)):
        raise InputError("text outside of the blocks is never sent", at=path, line=line, remedy="move it into a block")


def _lines_said(node: nodes.Node) -> Iterator[int]:
    """The lines at which a node has more than white space."""
    for part in node.nodes if isinstance(node, nodes.Output) else [node]:
        if not isinstance(part, nodes.TemplateData):
            yield part.lineno
        elif text := part.data.lstrip():
            yield part.lineno + part.data[: len(part.data) - len(text)].count("\n")
