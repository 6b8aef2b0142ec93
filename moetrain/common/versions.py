"""What this process runs on: cores, and releases of fast-moving packages beside those that the tests ran with."""

import os
import re
from collections.abc import Iterator
from importlib import metadata

TESTED = {"torch": "2.13", "numba": "0.68", "transformers": "5.24", "deepspeed": "0.19"}  # as in constraints.txt


def newer_than_tested() -> list[str]:
    """One line that names each installed package whose release is newer than the tested one; none where none is."""
    found = [
        f"{name} {here} ({TESTED[name]})" for name, here in _installed() if _release(here) > _release(TESTED[name])
    ]
    return [f"newer than what moetrain was tested with: {', '.join(found)}"] if found else []


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _installed() -> Iterator[tuple[str, str]]:
    for name in TESTED:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
