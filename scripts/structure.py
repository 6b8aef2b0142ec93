"""The structure of the package in numbers: layers, import cycles, imports against the layers, long functions.

  python scripts/structure.py                          # this checkout
  python scripts/structure.py --commit 50e3f9b         # any commit of this repository, without checking it out
  python scripts/structure.py --root FOLDER --json     # any other checkout, for machines
  python scripts/structure.py --violations             # each import that goes against the layers, and each cycle

Every import counts, wherever it stands: at the top of a file, inside a function, or under TYPE_CHECKING. Only the
front door `moetrain/__init__.py` is left out: it offers names of all layers, and nothing inside the package imports
them from it.
tests/system/test_architecture.py holds the package to the rules with these functions.
"""

import argparse
import ast
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A package imports those above it in this list, never one below.
LAYERS = (
    "common",
    "launch",
    "distributed",
    "moe",
    "config",
    "simulate",
    "runs",
    "models",
    "hf",
    "engine",
    "checkpoint",
    "data",
    "observe",
    "recovery",
    "evals",
    "training",
    "verify",
    "report",
    "bench",
    "doctor",
    "cli",
    "__main__",
)

Graph = dict[str, set[str]]


def find_modules(root: Path) -> dict[str, Path]:
    """The modules of the package under `root` by dotted name; a package has the name of its folder."""
    modules = {}
    for path in sorted((root / "moetrain").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(module: str, path: Path) -> Iterator[str]:
    """Dotted names that a file imports; of `from a import b` both `a` and `a.b`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def read_graph(root: Path) -> Graph:
    """Which module imports which other modules of the package; without the front door."""
    modules = find_modules(root)
    graph: Graph = {}
    for module, path in modules.items():
        names = set(read_imports(module, path)) & modules.keys()
        # `from a import b` loads a/__init__.py too; where b is a module of its own, that is all it wants of a
        wanted = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
        wanted |= {name for name in names if uses_own_name(name, modules, path)}
        graph[module] = wanted - {module, "moetrain"}
    graph.pop("moetrain")
    return graph


def uses_own_name(package: str, modules: dict[str, Path], path: Path) -> bool:
    """Whether a file imports from a package something that is no module of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            return any(f"{package}.{alias.name}" not in modules for alias in node.names)
    return False


def name_unit(module: str) -> str:
    """The package or module directly under moetrain that a module belongs to."""
    return module.split(".")[1]


def find_components(graph: Graph) -> list[list[str]]:
    """Strongly connected components, those that are imported first (Tarjan, 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            begin = stack.index(node)
            components.append(sorted(stack[begin:]))
            del stack[begin:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return components


def find_cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules each of which reaches all others of its group."""
    return [component for component in find_components(graph) if len(component) > 1]


def merge_units(graph: Graph) -> Graph:
    """Which packages and modules directly under moetrain import which others."""
    units: Graph = {}
    for module, others in graph.items():
        units.setdefault(name_unit(module), set()).update({name_unit(other) for other in others} - {name_unit(module)})
    return units


def count_layers(units: Graph) -> int:
    """The longest chain of imports between units, those in a circle counted as one."""
    height: dict[str, int] = {}
    for component in find_components(units):
        below = {other for unit in component for other in units[unit]} - set(component)
        for unit in component:
            height[unit] = 1 + max((height[other] for other in below), default=0)
    return max(height.values())


def find_violations(graph: Graph) -> list[str]:
    """Imports of a package by one that stands above it in LAYERS, as "importer -> imported"."""
    place = {unit: number for number, unit in enumerate(LAYERS)}
    return sorted(
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if place[name_unit(other)] > place[name_unit(module)]
    )


def find_longest_function(root: Path) -> tuple[int, str]:
    """Lines and name of the longest function, its decorators left out."""
    return max(
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(root)}:{node.name}")
        for path in find_modules(root).values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )


def measure(root: Path) -> dict[str, str | int]:
    """The figures of one checkout."""
    graph = read_graph(root)
    units = merge_units(graph)
    cycles = find_cycles(graph)
    lines = {path: len(path.read_text().splitlines()) for path in find_modules(root).values()}
    longest, name = find_longest_function(root)
    return {
        "packages and modules at the top": len(units),
        "imports between them": sum(map(len, units.values())),
        "of them in a circle": sum(map(len, find_cycles(units))),
        "layers": count_layers(units),
        "imports between files": sum(map(len, graph.values())),
        "import cycles": len(cycles),
        "files in import cycles": sum(map(len, cycles)),
        "imports against the layers": len(find_violations(graph)) if units.keys() <= set(LAYERS) else "no such layers",
        "longest function, lines": longest,
        "longest function": name,
        "files": len(lines),
        "lines": sum(lines.values()),
        "files below 60 lines": sum(number < 60 for number in lines.values()),
        "files above 300 lines": sum(number > 300 for number in lines.values()),
    }


def extract(commit: str, folder: Path) -> Path:
    """The package at a commit of this repository, written into a folder."""
    archive = subprocess.run(["git", "archive", commit, "moetrain"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout; this one if left out")
    parser.add_argument("--commit", help="a commit of this repository instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--violations", action="store_true", help="name them, and every cycle")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = extract(options.commit, Path(folder)) if options.commit else options.root
        if options.violations:
            graph = read_graph(root)
            print(*find_violations(graph), *(" <-> ".join(cycle) for cycle in find_cycles(graph)), sep="\n")
            return
        figures = measure(root)
    if options.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    for name, value in figures.items():
        print(f"{name:34} {value}")


if __name__ == "__main__":
    main()
