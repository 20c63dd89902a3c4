"""Imports run one way, through the rooms in this order."""

import ast
from pathlib import Path

ROOMS = """
log tables files text buckets config presets mesh xla_flags distributed sharding tp_plan ops checkpoint model parallel draw
planner generate train audit cli __main__
""".split()
PACKAGE = Path(__file__).parents[1] / "jaxtp"


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a module names when it is imported (what stands inside functions counts too)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("jaxtp.")}
    return found


def test_every_room_imports_only_those_above_it():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
        for name in imported(path)
        if ROOMS.index(name) > ROOMS.index(room(path))
    ]
    assert wrong == []


def test_every_room_has_its_place():
    assert {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == set(ROOMS)
