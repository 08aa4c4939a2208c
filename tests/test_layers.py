"""The floors of the house: no import goes up, no import runs in a circle, no room holds too much."""

import ast
import subprocess
import sys
from pathlib import Path

import intersafe

PACKAGE = Path(intersafe.__file__).parent
FLOORS: dict[str, int] = {
    "errors": 0, "records": 0, "taxonomy": 0,
    "files": 1, "sections": 1, "specs": 1, "gate_settings": 1, "engine_settings": 1, "settings": 1,
    "gauges": 1, "engine_failures": 1, "stderr_log": 1,
    "recipe": 1, "budget": 1, "prompt_roles": 1, "templates": 1, "replies": 1, "images": 1,
    "journal": 1, "messages": 1, "refusal_texts": 1, "outcomes": 1, "owners": 1, "locks": 1, "runs": 1, "jobs": 1,
    "models": 2,
    "stages": 3, "gates": 3,
    "prepare": 4, "conductor": 4, "shortfall": 4, "loops": 4,
    "lines": 4, "worker": 4, "cluster": 4, "farm": 4,
    "watch": 4, "generate": 4, "estimate": 4, "rehearsal": 4, "regate": 4, "report": 4, "release": 4,
    "serving": 4, "supervisor": 4, "server_guard": 4, "cli_serve": 5,
    "doctor": 4, "probes": 4, "probe_line": 4, "cli_doctor": 5,
    "cli": 5, "cli_generate": 5, "cli_inputs": 5, "cli_release": 5, "display": 5, "shown": 5, "__main__": 6,
}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name without `intersafe.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
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


def test_every_room_has_a_floor() -> None:
    assert {name.split(".")[0] for name in modules()} == set(FLOORS)


def test_no_import_goes_up() -> None:
    known = set(modules())
    up = [
        f"{name} -> {other}"
        for name, tree in modules().items()
        for other in imports(tree, known)
        if FLOORS[other.split(".")[0]] > FLOORS[name.split(".")[0]]
    ]
    assert not up


def test_no_stage_imports_a_later_one() -> None:
    order = [
        "seeding", "judging", "painting", "planning", "conversing", "cleaning", "refusing", "responding", "twinning",
    ]  # fmt: skip
    known = set(modules())
    for name, tree in modules().items():
        if name.startswith("stages."):
            stage = name.removeprefix("stages.")
            later = {f"stages.{other}" for other in order[order.index(stage) + 1 :]}
            assert not {other for other in imports(tree, known) if other in later or other.startswith("gates")}


def test_no_circles() -> None:
    # An import inside a function counts too, unless it goes from a package to one of its own modules (a backend).
    known = set(modules())
    graph = {
        name: {other for other in imports(tree, known) if other != name and not other.startswith(f"{name}.")}
        for name, tree in modules().items()
    }
    done: set[str] = set()
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    assert set(graph) == done


def test_only_the_command_line_prints_and_no_room_is_crowded() -> None:
    for name, tree in modules().items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert name == "cli" or not [
            call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"
        ]
        assert max((getattr(node, "end_lineno", 0) for node in ast.walk(tree)), default=0) <= 450, name


def test_importing_the_package_needs_no_model_library() -> None:
    heavy = ["torch", "vllm", "transformers", "openai", "aiohttp", "numpy", "PIL", "jinja2", "yaml", "rich"]
    code = f"import sys, intersafe, intersafe.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
