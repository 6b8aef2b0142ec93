"""`make test` and `make test-all`: which tests run, in which order, and what need not run again.

A test marked `grid` is a case of a wide parametrization that `make test` leaves to `make test-all`: see `sample`, and
the mark itself where a single test is meant. Options: `--all` runs them too; `--kept=FILE` writes every test that
passed into FILE, one JSON object a line, and leaves out those that stand there with the same sources, so that a
`make test-all` that was killed goes on where it was; `--table=FILE` writes a Markdown table when all of them passed.

Tests are handed to the two workers file by file, the longest files first (`LONG`), and test by test in files whose
tests start whole programs (`WHOLE_PROGRAMS`): so that both workers end at about the same time.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WHOLE_PROGRAMS = ("test_faults.py", "test_cli.py", "test_experiments.py", "test_package.py")
WHOLE_PROGRAMS += ("test_checkpoint.py", "test_sweep.py", "test_doctor.py", "test_hosts.py", "test_elsewhere.py")
LONG = (*WHOLE_PROGRAMS, "test_layouts.py", "test_routers.py", "test_train.py", "test_deepspeed.py", "test_moe.py")
SOURCES = ("moetrain", "configs", "tests", "scripts", "launch", "docs", ".")
NOT_SOURCES = ROOT / "docs" / "results"


def sample(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of which `make test` takes the first and each `every`-th after it, `make test-all` all."""
    return [case if number % every == 0 else on_grid(case) for number, case in enumerate(cases)]


def on_grid(case: Any) -> Any:
    """A parameter, or a tuple of them, for `make test-all` alone."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.grid)


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole grid: tests marked `grid` too")
    parser.addoption("--kept", metavar="FILE", help="keep what passed in FILE; with the same sources it is left out")
    parser.addoption("--table", metavar="FILE", help="with --all and --kept: write a table of what passed")


class Grid:
    """The plugin. With several workers each of them chooses the tests, and the first process keeps the results."""

    def __init__(self, config: pytest.Config) -> None:
        path = config.getoption("--kept")
        self._kept = Kept(Path(path)) if path and not hasattr(config, "workerinput") else None
        self._done: set[str] = set(getattr(config, "workerinput", {}).get("done", ()))
        if self._kept is not None:
            self._done |= self._kept.passed.keys()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker that replaces one that died leaves out the same tests."""
        node.workerinput["done"] = sorted(self._done)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        named = any("::" in argument for argument in config.args)
        left_out = [item for item in items if item.get_closest_marker("grid")]
        left_out = [] if named or config.getoption("--all") else left_out
        left_out += [item for item in items if item.nodeid in self._done and item not in left_out]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
        items[:] = sorted((item for item in items if item not in left_out), key=_place)
        for item in items:
            if item.path.name not in WHOLE_PROGRAMS or _shares_a_fixture(item):
                item.add_marker(pytest.mark.xdist_group(_name(item)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._kept is not None:
            self._kept.add(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self._kept is None:
            return
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._done:
            session.exitstatus = exitstatus = pytest.ExitCode.OK
        table = session.config.getoption("--table")
        if table and _is_whole(session.config) and exitstatus == pytest.ExitCode.OK:
            Path(table).write_text(self._kept.table())


def _is_whole(config: pytest.Config) -> bool:
    """Whether no test was chosen by hand."""
    chosen = config.getoption("keyword") or config.getoption("markexpr")
    return config.getoption("--all") and not chosen and config.args_source == pytest.Config.ArgsSource.TESTPATHS


def _name(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0].removeprefix("tests/")


def _place(item: pytest.Item) -> int:
    return LONG.index(item.path.name) if item.path.name in LONG else len(LONG)


def _shares_a_fixture(item: pytest.Item) -> bool:
    """With other tests of its file."""
    info = getattr(item, "_fixtureinfo", None)
    made = [each for all_of in info.name2fixturedefs.values() for each in all_of] if info else []
    return any(fixture.scope in ("module", "class") for fixture in made)


class Kept:
    """Tests that passed with these sources, and how long they took, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._sources = path, digest()
        self._began = time.time()
        self.passed: dict[str, float] = {}  # test -> seconds
        self._sessions: dict[float, float] = {}  # began -> last result, of the wall clock
        self._under_way: dict[str, float] = defaultdict(float)
        for row in self._rows():
            self.passed[row["test"]] = row["seconds"]
            self._sessions[row["began"]] = row["now"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.passed:
            path.unlink(missing_ok=True)

    def _rows(self) -> Iterator[dict[str, Any]]:
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the last one, of a session that was killed
                continue
            if row["sources"] == self._sources:
                yield row

    def add(self, report: pytest.TestReport) -> None:
        test = report.nodeid.rpartition("@")[0] if "@" in report.nodeid.rpartition("]")[2] else report.nodeid
        if not report.passed:
            self._under_way[test] = float("-inf")
        self._under_way[test] += report.duration
        if report.when == "teardown" and self._under_way[test] >= 0:
            self.passed[test] = round(self._under_way.pop(test), 2)
            self._sessions[self._began] = time.time()
            row = {"test": test, "seconds": self.passed[test], "began": self._began, "now": self._sessions[self._began]}
            with self._path.open("a") as out:
                out.write(json.dumps({**row, "sources": self._sources}) + "\n")

    def table(self) -> str:
        files: dict[str, list[float]] = defaultdict(list)
        for test, seconds in self.passed.items():
            files[test.partition("::")[0]].append(seconds)
        minutes = sum(now - began for began, now in self._sessions.items()) / 60
        rows = [f"| `{name}` | {len(times)} | {sum(times):.0f} |" for name, times in sorted(files.items())]
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numba", "numpy"))
        lines = [
            "# The whole grid of tests",
            "",
            f"`make test-all`, {datetime.date.today()}: {len(self.passed)} tests passed, none failed, in "
            f"{minutes:.0f} minutes.",
            f"{_machine()}; Python {platform.python_version()}, {versions}.",
            "Seconds are those of the tests, two at a time, on this machine.",
            "",
            "| file | tests | seconds |",
            "|---|---:|---:|",
            *rows,
            f"| all | {len(self.passed)} | {sum(self.passed.values()):.0f} |",
        ]
        return "\n".join(lines) + "\n"


def digest() -> str:
    """Of every file that a test may read, and of the packages that are installed."""
    sums = hashlib.sha256()
    for path in _files(SOURCES):
        sums.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    installed = sorted(f"{each.name} {each.version}" for each in importlib.metadata.distributions())
    sums.update("\n".join([platform.python_version(), *installed]).encode())
    return sums.hexdigest()[:16]


def _files(folders: Sequence[str]) -> Iterator[Path]:
    for folder in folders:
        found = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
        for path in sorted(found):
            if path.is_file() and path.suffix != ".pyc" and NOT_SOURCES not in path.parents:
                yield path


def _machine() -> str:
    """The processor, and which of the instructions that our kernels ask for it has."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    facts = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())}, {os.cpu_count()} cores, {' '.join(flags)}"
