"""One prompt file: its checks and its rendering.

It is rendered in Jinja's immutable sandbox with strict undefined variables, and reads no other file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from intersafe.errors import InputError
from intersafe.templates.roles import Role
from intersafe.wording import nearest

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False
)
del _ENVIRONMENT.filters["random"]  # the same values must always give the same text
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
"""What Jinja and the methods of the values raise while a file is rendered."""


@dataclass(frozen=True)
class Prompt:
    """One checked prompt file."""

    name: str
    path: Path
    sha256: str
    role: Role
    uses: frozenset[str]
    """The offered variables that the file uses."""
    template: Template

    def render(self, block: str, values: Mapping[str, Any]) -> str:
        """The text of one block; `InputError` if the values do not fit the file (a missing attribute)."""
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


def check_prompt(name: str, path: Path, text: str, sha256: str, role: Role) -> Prompt:
    """The prompt of a file with that text; `InputError` with file and line names the first problem."""
    try:
        tree = _ENVIRONMENT.parse(text)
        template = _ENVIRONMENT.from_string(text)
    except TemplateSyntaxError as error:
        raise InputError(f"{error.message}", at=path, line=error.lineno, remedy="correct the Jinja syntax") from None
    except (SyntaxError, RecursionError, MemoryError):  # limits of Python on the code that Jinja compiles to
        raise InputError("nested too deep", at=path, line=1, remedy="write it in a simpler form") from None
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise InputError("a prompt reads no other file", at=path, line=node.lineno, remedy="write the text here")
    uses = _check_names(path, tree, role)
    _check_blocks(path, tree, role)
    for group in role.needs:
        if not uses & set(group):
            wanted = " or ".join(f"{{{{ {name} }}}}" for name in group)
            raise InputError(
                f"{wanted} is never used",
                at=path,
                line=1,
                remedy="without it the model does not see what it is asked about",
            )
    prompt = Prompt(name, path, sha256, role, uses, template)
    for values in (
        role.sample,
        role.sample | {key: _FIRST_TURN[key] for key in _FIRST_TURN.keys() & role.sample.keys()},
    ):
        for block in role.blocks:
            if not prompt.render(block, values):
                raise InputError(f"block {block!r} is empty", at=path, line=1, remedy="say what the model should do")
    return prompt


_FIRST_TURN = {
    "has_image": False,
    "has_picture": False,
    "n_pictures": 0,
    "refused": False,
    "transcript": "",
    "turn": 1,
    "judge_reason": "",
    "problem": "",
}
"""Values of a second trial rendering: a first turn without image, for which a file may have another branch."""


def _check_names(path: Path, tree: nodes.Template, role: Role) -> frozenset[str]:
    """The offered variables that the file uses; any other name must be set in the file."""
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx in ("store", "param")} | {"loop", "range"}
    if macros := {node.name for node in tree.find_all(nodes.Macro)}:
        own |= macros | {"caller", "varargs", "kwargs"}
    loaded = [node for node in tree.find_all(nodes.Name) if node.ctx == "load" and node.name not in own]
    for node in loaded:
        if node.name not in role.variables:
            known = nearest(node.name, list(role.variables)) if role.variables else ", this prompt has no variables"
            raise InputError(
                f"unknown variable {node.name!r}{known}",
                at=path,
                line=node.lineno,
                remedy="`intersafe prompts list` shows all",
            )
    return frozenset(node.name for node in loaded)


def _check_blocks(path: Path, tree: nodes.Template, role: Role) -> None:
    """Exactly the blocks of the role are there, and nothing outside of them."""
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
    for line in (line for node in tree.body if not isinstance(node, nodes.Block) for line in _text_lines(node)):
        raise InputError("text outside of the blocks is never sent", at=path, line=line, remedy="move it into a block")


def _text_lines(node: nodes.Node) -> Iterator[int]:
    """The lines at which a node outside of the blocks has more than white space."""
    for part in node.nodes if isinstance(node, nodes.Output) else [node]:
        if not isinstance(part, nodes.TemplateData):
            yield part.lineno
        elif text := part.data.lstrip():
            yield part.lineno + part.data[: len(part.data) - len(text)].count("\n")
