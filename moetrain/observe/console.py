"""The terminal: what a person reads goes to standard output and, during a run, to the run's `log.txt` as well.

Errors go to standard error. `console.quiet` leaves standard output to machines (`--json`).
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

_terminal = Console().is_terminal
console = Console(highlight=False, soft_wrap=True, width=None if _terminal else 110)
errors = Console(highlight=False, soft_wrap=True, stderr=True)


BAD_INPUT = 2  # exit code


def say_bad_input(error: Exception) -> int:
    """One line, once, however many workers found the same mistake. Returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        errors.print(f"error: {error}", markup=False)
    else:
        time.sleep(2)  # a launcher ends all workers when the first one exits: leave rank 0 the time to speak
    return BAD_INPUT


class Voice:
    """Speaks on the terminal and into `log.txt`; `silent` ranks do neither."""

    def __init__(self, log: Path | None, silent: bool = False) -> None:
        self._file = log.open("a", encoding="utf-8") if log is not None and not silent else None
        self._copies = [Console(file=self._file, width=120, highlight=False)] if self._file else []
        self.silent = silent

    def say(self, *what: Any) -> None:
        if not self.silent:
            console.print(*what)
            for copy in self._copies:
                with suppress(OSError):  # a full disk: it is said on the terminal
                    copy.print(*what)

    def say_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.say(Text(line))

    def close(self) -> None:
        if self._file:
            self._file.close()
