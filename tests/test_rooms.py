"""The rooms of lib/: imports go down, none runs in a circle, files and functions are short."""

import ast
from pathlib import Path

import pytest

LIB = Path(__file__).parent.parent / "lib"
FLOORS = [
    {"cli"},
    {"config"},
    {"advice", "machine"},
    {"runs"},
    {"data"},
    {"models"},
    {"train"},
    {"explain"},
    {"report", "serve"},
    {"compare", "predict"},
    {"export"},
]  # fmt: skip  a room may import from those before it, and from itself
FILES = sorted(LIB.rglob("*.py"))


def room(name):
    """The room of a dotted module name below lib."""
    return name.split(".")[1] if name.count(".") else ""


def imported(tree):
    """The modules of lib that a file imports, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".replace(".", "/")
                is_module = (LIB.parent / f"{inner}.py").exists() or (LIB.parent / inner).is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def module_of(file):
    parts = file.relative_to(LIB.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


GRAPH = {module_of(file): sorted(set(imported(ast.parse(file.read_text())))) for file in FILES}


@pytest.mark.parametrize("module", GRAPH)
def test_imports_go_down(module):
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for other in GRAPH[module]:
        mine, theirs = room(module), room(other)
        assert mine == theirs or floor[theirs] < floor[mine], f"{module} imports {other}"


def test_no_import_runs_in_a_circle():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in GRAPH.get(module, ()):
                visit(other, [*path, module])
            done.add(module)

    for module in GRAPH:
        visit(module, [])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LIB)))
def test_files_and_functions_are_read_in_one_sitting(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 350 and max(map(len, lines), default=0) <= 120
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 45, node.name
