"""Ctrl-C in a real terminal: the live view goes as a whole, and each line that stays is said once."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from moetrain.launch.signals import INTERRUPTED, NOTED

COLUMNS, LINES = 100, 40
STEP = re.compile(r"\r|\n|\x1b\[(\d*)([A-Za-z])|\x1b\[\?25[lh]|[^\r\n\x1b]+")


class Screen:
    """What stands on a terminal: the few sequences that rich's live view and the line discipline use."""

    def __init__(self) -> None:
        self.lines, self._row, self._column = [""], 0, 0

    def feed(self, text: str) -> None:
        for found in STEP.finditer(text):
            number, code = int(found[1] or 1), found[2]
            if found[0] == "\r":
                self._column = 0
            elif found[0] == "\n":
                self._row += 1
                self.lines += [""] * (self._row + 1 - len(self.lines))
            elif code == "A":
                self._row -= number
                assert self._row >= 0, "above what this program has written"
            elif code == "K":
                self.lines[self._row] = ""
            elif code is None and not found[0].startswith("\x1b"):
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + found[0] + line[self._column + len(found[0]) :]
                self._column += len(found[0])
            else:
                assert code in ("m", None), f"unknown: {found[0]!r}"

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


class Terminal:
    """A program at a terminal of its own, which it controls: Ctrl-C is a byte."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, preexec_fn=take_terminal
        )
        os.close(theirs)
        self.screen, self.written = Screen(), ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read_until(self, seen: Callable[[str], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not seen(self.written):
            assert time.monotonic() < until, self.written[-2000:]
            if select.select([self._ours], [], [], 0.2)[0]:
                try:
                    data = os.read(self._ours, 1 << 16)
                except OSError:  # the last program has closed it
                    return
                self.written += self._decode(data)

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_ctrl_c_takes_the_live_view_away(tiny: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moetrain", "train", *tiny, "run.name=x", "train.steps=100000"]
    terminal = Terminal(command, {**os.environ, "TERM": "xterm-256color"})
    try:
        terminal.read_until(lambda text: text.count("hottest") >= 2, 120)
        terminal.press(b"\x03")
        terminal.read_until(lambda text: "interrupted" in text, 60)
        assert terminal.process.wait(30) == INTERRUPTED
        terminal.screen.feed(terminal.written)
    finally:
        terminal.close()
    shown = terminal.screen.text()
    for once in (NOTED, "ended on request: saved after step", "tokens/s · imbalance", "interrupted"):
        assert shown.count(once) == 1, shown
    for of_the_view in ("training ━", "held out", "hottest", "at home, all layers", "to go"):
        assert of_the_view not in shown, shown
    assert terminal.written.rindex("\x1b[?25h") > terminal.written.rindex("\x1b[?25l"), "the cursor is hidden"
