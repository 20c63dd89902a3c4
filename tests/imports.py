"""Which module of the package imports which, read from the sources: at the top, inside functions, for types alone."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxtp"
ROOMS = """
log checks compilation_cache tables files text buckets config presets mesh xla_flags distributed sharding weights tp_plan ops
checkpoint model parallel draw planner engine generate train audit load serve cli __main__
""".split()

Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """The file of each module; "jaxtp.ops" is its __init__.py."""
    found = {path: path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in found.items()}


def graph(package: Path = PACKAGE) -> Graph:
    """What each module imports of the package. `from a import b` is of the module a.b where there is one, else of a."""
    known = modules(package)

    def names(path: Path) -> set[str]:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                found |= {each if (each := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        return found & known.keys()

    return {name: names(path) for name, path in known.items()}


def circle(found: Graph) -> list[str]:
    """Modules that import each other in a ring, if there are any."""
    try:
        graphlib.TopologicalSorter(found).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def room(module: str) -> str:
    """jaxtp.ops.rope is of the room ops."""
    return module.split(".")[1] if "." in module else "__init__"
