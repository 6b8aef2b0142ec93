"""What `make test-all` keeps: killed, it goes on where it was; changed sources begin again."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFTEST = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tests import grid
grid.digest = lambda: os.environ["SOURCES"]

def pytest_addoption(parser):
    grid.add_options(parser)

def pytest_configure(config):
    config.pluginmanager.register(grid.Grid(config), "grid")
"""
CASES = """
import os, sys
import pytest
from tests.grid import sample

@pytest.mark.parametrize(("letter", "number"), sample([(letter, n) for letter in "ab@" for n in (1, 2)], every=4))
def test_grid(letter, number):
    with open("ran.txt", "a") as out:
        out.write(letter + str(number) + " ")
    if letter == "b" and number == 2 and os.environ.get("KILLED"):
        os.kill(os.getpid(), 9)
    assert letter + str(number) != os.environ.get("FAILS")
"""


def session(folder: Path, *options: str, **env: str) -> tuple[int, list[str]]:
    """(exit code, the cases that ran)."""
    (folder / "ran.txt").write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    lean = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "SOURCES": "one"}
    done = subprocess.run(command, cwd=folder, capture_output=True, env={**inherited, **lean, **env})
    return done.returncode, sorted((folder / "ran.txt").read_text().split())


def test_it_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    (tmp_path / "tests" / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\nmarkers = grid: wide\n")
    everything = ["@1", "@2", "a1", "a2", "b1", "b2"]
    assert session(tmp_path) == (0, ["@1", "a1"])  # every fourth
    assert session(tmp_path, "tests/test_cases.py::test_grid[b-2]") == (0, ["b2"])
    whole = ["--all", "--kept=build/kept.jsonl", "--table=table.md"]
    assert session(tmp_path, *whole, KILLED="1") == (-9, ["a1", "a2", "b1", "b2"])
    assert session(tmp_path, *whole, FAILS="@1") == (1, ["@1", "@2", "b2"])
    assert not (tmp_path / "table.md").exists()
    two = [*whole, "-p", "xdist", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    assert session(tmp_path, *two) == (0, ["@1"])
    table = (tmp_path / "table.md").read_text()
    assert "6 tests passed, none failed" in table
    assert "| `tests/test_cases.py` | 6 |" in table
    assert session(tmp_path, *two) == (0, [])
    assert session(tmp_path, *two, SOURCES="other") == (0, everything)
