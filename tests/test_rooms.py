"""Rooms: imports run downwards, folders and files are small, and each room says what is in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From top to bottom; the names of one row may not import each other. `errors` may be imported from anywhere.
ROWS = (
    {"__main__"},
    {"cli"},
    {"commands"},
    {"short_help"},
    {"trainer_cli", "generator", "resources"},
    {"callbacks"},
    {"cost"},
    {"toy_parts", "strategies"},  # old paths
    {"stages"},
    {"evaluation", "runs"},
    {"training"},
    {"model", "video", "hardware"},
    {"encoders", "data"},
    {"errors"},
)
DEPTH = {room: depth for depth, row in enumerate(ROWS) for room in row}
LAZY = {("lightning_semgen/__init__.py", "generator")}  # only `from lightning_semgen import Generator` waits for torch
MAX_FILES, MAX_LINES = 12, 250  # beside __init__.py; of a file
STILL_LONG = set()

PACKAGES = ("lightning_semgen", "encoders", "data")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES} | {ROOT / "benchmarks"})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(*parts: str) -> str:
    """The room of a module by its parts: a package, or what lies in lightning_semgen."""
    return parts[1] if parts[0] == "lightning_semgen" and len(parts) > 1 else parts[0]


def imported(path: Path) -> Iterator[str]:
    """Rooms that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: a relative import"
            modules = [node.module]
            if node.module == "lightning_semgen":
                modules = [f"lightning_semgen.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (room_of(*module.split(".")) for module in modules if module.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path):
    own = room_of(*path.relative_to(ROOT).with_suffix("").parts)
    up = set()
    for room in imported(path):
        if room in (own, "errors") or (name_of(path), room) in LAZY:
            continue
        if own not in DEPTH or DEPTH[room] <= DEPTH[own]:
            up.add(room)
    assert not up


def test_every_room_has_its_place():
    rooms = {room_of(*path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    assert rooms - {"__init__"} == DEPTH.keys()


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_holds_few_files(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_FILES


def test_files_are_short():
    long = {name_of(path) for path in FILES if path.read_text().count("\n") > MAX_LINES}
    assert long == STILL_LONG


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=name_of)
def test_a_room_lists_what_is_in_it(folder):
    told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    files = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
    rooms = [f"{path.parent.name}/" for path in folder.glob("*/__init__.py")]
    assert not [name for name in files + rooms if name not in told]
