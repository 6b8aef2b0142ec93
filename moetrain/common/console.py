"""The terminal: what a person reads goes to standard output and, during a run, to the run's `log.txt` as well.

Errors go to standard error. `console.quiet` leaves standard output to machines (`--json`). Text may come from data and
from models: it is shown as it is, never read as markup, and no control character of it reaches the terminal.
"""

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

# Control characters but tab and new line, those that turn the direction of text, halves of surrogate pairs.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """With escapes in place of characters that a terminal would obey or could not show."""
    code = lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}"  # noqa: E731
    return _HIDDEN.sub(code, text.replace("\r\n", "\n"))


def styled(*parts: tuple[str, str]) -> Text:
    """(text, style), one after the other; style "" for none."""
    return Text.assemble(*((visible(text), style) for text, style in parts))


def forget_terminal() -> None:
    """Where it is gone, what is written to it would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if os.isatty(stream) or not _takes_output(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)


def _takes_output(stream: int) -> bool:
    try:
        os.write(stream, b"")
    except OSError:
        return False
    return True


class Terminal(Console):
    """Strings are shown as they are; a style stands beside them (`style=`, `styled`)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def _check_buffer(self) -> None:
        """Write. A terminal that has gone away, before its signal has come, ends nothing."""
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            forget_terminal()


console = Terminal(soft_wrap=True, width=None if Console().is_terminal else 110)
errors = Terminal(soft_wrap=True, stderr=True)


class RunLogger:
    """Prints to the terminal and to the run's `log.txt`; on `silent` ranks it does neither."""

    def __init__(self, log: Path | None, silent: bool = False) -> None:
        from moetrain.common import disk  # which loads yaml: not for `moetrain --help`

        self._file = disk.append(log) if log is not None and not silent else None
        self._copies = [Terminal(file=self._file, width=120)] if self._file else []
        self.silent = silent

    def print(self, *what: Any, style: str | None = None) -> None:
        if not self.silent:
            console.print(*what, style=style)
            for copy in self._copies:
                with suppress(OSError):  # a full disk: the terminal has the line
                    copy.print(*what, style=style)

    def print_lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.print(line)

    def close(self) -> None:
        if self._file:
            self._file.close()
