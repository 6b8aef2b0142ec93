"""The layers of the package: what may import what, no cycles between files, what loads without torch, names."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# Imports that go against the layers today, and files that import each other in a circle even without those. These lists
# may only shrink: a line that is no longer true fails the test, as a new violation does.
AGAINST_THE_LAYERS = """
"""
FILES_IN_CYCLES = """
"""


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    """scripts/structure.py, which also prints these figures for any commit."""
    spec = importlib.util.spec_from_file_location("structure", ROOT / "scripts" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """A package of three files with one lazy import against the layers, which closes a cycle."""
    files = {
        "__init__.py": "",
        "common/__init__.py": "",
        "common/disk.py": "def write():\n    from ..data.loader import read\n    return read\n",
        "data/__init__.py": "TABLE = {}\n",
        "data/loader.py": "from moetrain.common import disk\nfrom moetrain.data import TABLE\n",
    }
    for name, text in files.items():
        path = tmp_path / "moetrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_check_sees_lazy_and_relative_imports(structure: ModuleType, package: Path) -> None:
    graph = structure.read_graph(package)
    assert graph["moetrain.data.loader"] == {"moetrain.common.disk", "moetrain.data"}
    assert structure.find_violations(graph) == ["moetrain.common.disk -> moetrain.data.loader"]
    assert structure.find_cycles(graph) == [["moetrain.common.disk", "moetrain.data.loader"]]
    assert structure.count_layers(structure.merge_units(graph)) == 1


def test_every_import_obeys_the_layers(structure: ModuleType) -> None:
    graph = structure.read_graph(ROOT)
    units = {structure.name_unit(module) for module in graph}
    assert units <= set(structure.LAYERS), "a package without a place in LAYERS of scripts/structure.py"
    found = set(structure.find_violations(graph))
    known = set(AGAINST_THE_LAYERS.split("\n")) - {""}
    assert not found - known, "new imports against the layers"
    assert not known - found, "these are mended: take them off the list"


def test_no_files_import_each_other_in_a_circle(structure: ModuleType) -> None:
    graph = structure.read_graph(ROOT)
    for line in AGAINST_THE_LAYERS.split("\n")[1:-1]:
        module, _, other = line.partition(" -> ")
        graph[module].discard(other)
    found = {module for cycle in structure.find_cycles(graph) for module in cycle}
    known = set(FILES_IN_CYCLES.split())
    assert not found - known, "new import cycles"
    assert not known - found, "these are mended: take them off the list"


def test_the_layer_needs_no_configuration(structure: ModuleType) -> None:
    """Nothing in moe imports the packages that configuration is made with."""
    foreign = {
        f"{module} -> {name}"
        for module, path in structure.find_modules(ROOT).items()
        if module.startswith("moetrain.moe")
        for name in structure.read_imports(module, path)
        if name.partition(".")[0] in {"hydra", "omegaconf", "yaml", "pydantic"}
    }
    assert not foreign


@pytest.mark.parametrize("package", ["moetrain", "moetrain.moe.planning", "moetrain.config", "moetrain.cli"])
def test_these_packages_load_no_torch(package: str) -> None:
    ask = f"import {package}, sys; print(*(name for name in ('torch', 'transformers') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"


def test_no_two_classes_have_one_name(structure: ModuleType) -> None:
    places = defaultdict(list)
    for module, path in structure.find_modules(ROOT).items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    assert len(places) > 100, "the classes of the package are not found"
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_the_page_lists_packages_in_the_order_of_the_layers(structure: ModuleType) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| `moetrain/([a-z]+)` \|", text, re.MULTILINE)
    assert listed == [unit for unit in structure.LAYERS if unit != "__main__"]


def test_the_picture_shows_every_package(structure: ModuleType) -> None:
    """Drawn by scripts/draw_architecture.py."""
    words = re.findall(r"[a-z]+", " ".join(re.findall(r"<text[^>]*>([^<]*)<", PICTURE.read_text())))
    assert {unit for unit in structure.LAYERS if unit != "__main__"} <= set(words)
