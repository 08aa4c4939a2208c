"""The layers of the package: a package imports only from layers above it, no import runs in a circle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import intersafe

PACKAGE = Path(intersafe.__file__).parent
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "records", "exclusions", "wording"),
    ("taxonomy", "replies", "storage"),
    ("recipe", "images"),
    ("checks", "seeds", "engines"),
    ("gates", "run", "templates", "serving"),
    ("models",),
    ("stages", "report"),
    ("generation", "release", "view"),
    ("evaluate", "export", "doctor"),
    ("training",),
    ("cli",),
)
"""`docs/architecture.md` shows the same table. `__init__` (the public names) and `__main__` stand outside it."""
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
PLANNED = {"view", "evaluate", "export", "training"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name without `intersafe.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__"):
            found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            base = (node.module or "").removeprefix("intersafe").lstrip(".")
            if (node.module or "").split(".")[0] == "intersafe":
                names |= {full if (full := f"{base}.{a.name}".lstrip(".")) in known else base for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix("intersafe.") for a in node.names if a.name.startswith("intersafe.")}
    return names - {""}


def test_every_package_has_a_layer() -> None:
    assert {name.split(".")[0] for name in modules()} == set(LAYER) - PLANNED


def test_a_package_imports_only_from_layers_above_it() -> None:
    known = set(modules())
    wrong = [
        f"{name} -> {other}"
        for name, tree in modules().items()
        for other in imports(tree, known)
        if other.split(".")[0] != name.split(".")[0] and LAYER[other.split(".")[0]] >= LAYER[name.split(".")[0]]
    ]
    assert not wrong


def test_no_import_runs_in_a_circle() -> None:
    # An import inside a function counts too.
    known = set(modules())
    graph = {name: {other for other in imports(tree, known) if other != name} for name, tree in modules().items()}
    done: set[str] = set()
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    assert set(graph) == done


def test_no_stage_imports_a_later_one() -> None:
    order = ["calls", "conversation", "judging", "painting", "planning", "conversing", "cleaning"]
    order += ["refusing", "responding", "twinning"]
    known = set(modules())
    for name, tree in modules().items():
        if name.startswith("stages."):
            stage = name.removeprefix("stages.")
            later = {f"stages.{other}" for other in order[order.index(stage) + 1 :]}
            assert not {other for other in imports(tree, known) if other in later}


def test_only_the_command_line_writes_to_the_terminal() -> None:
    for name, tree in modules().items():
        used = {n.value.id for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert name.startswith("cli.") or not (used | called) & {"print", "click", "rich", "Console"}, name


def test_no_module_is_crowded() -> None:
    for name, tree in modules().items():
        assert max((getattr(node, "end_lineno", 0) for node in ast.walk(tree)), default=0) <= 450, name


def test_the_root_of_the_package_stays_small() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 12


def test_the_architecture_page_names_every_module_and_no_other() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    there = {name.replace(".", "/") for name in modules() if not (PACKAGE / name.replace(".", "/")).is_dir()}
    named = set(re.findall(r"^\| `([a-z_/0-9]+)` \|", page[page.index("## The modules") :], re.MULTILINE))
    assert named - {"gates/__init__"} == there  # the contract of a gate is the text of its package


def test_the_architecture_page_shows_the_same_layers() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ((?:`[a-z_]+/?` ?)*)\|", page, re.MULTILINE)
    shown = {int(number): set(re.findall(r"`([a-z_]+)/?`", packages)) for number, packages in rows}
    assert shown == {number: set(packages) - PLANNED for number, packages in enumerate(LAYERS)}


def test_importing_the_package_needs_no_model_library() -> None:
    heavy = ["torch", "vllm", "transformers", "openai", "aiohttp", "numpy", "PIL", "jinja2", "yaml", "rich"]
    code = f"import sys, intersafe, intersafe.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
