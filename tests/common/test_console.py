"""The terminal: whatever text holds, it is shown as it is."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from moetrain.common import console
from moetrain.common.console import RunLogger, Terminal, styled
from moetrain.observe import summary

HOSTILE = ["x[/red]y", "ends in \\\\\\", "[bold]", ":smile:", "[link=file:///]", "\\[dim]"]


@pytest.fixture
def out(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed to the terminal."""
    written = io.StringIO()
    monkeypatch.setattr(console, "console", Terminal(file=written, width=200, soft_wrap=True))
    return written


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_never_markup(text: str, out: io.StringIO, tmp_path: Path) -> None:
    table = Table(box=None, show_header=False, padding=0)
    table.add_row(text)
    logger = RunLogger(tmp_path / "log.txt")
    for what in (text, styled((text, "bold"), (text, "green")), table):
        logger.print(what)
    logger.close()
    lines = [text, text + text, text]
    assert [line.rstrip() for line in out.getvalue().splitlines()] == lines
    assert [line.rstrip() for line in (tmp_path / "log.txt").read_text().splitlines()] == lines


def test_control_characters_are_shown_not_sent(out: io.StringIO, tmp_path: Path) -> None:
    logger = RunLogger(None)
    for text in ("\x1b]0;title\x07a\x1b[31mred", "\u202egnirts", "one\r\ntwo\tthree\rfour", "\udce9"):
        logger.print(text)
        logger.print(styled((text, "bold")))
    shown = ["\\x1b]0;title\\x07a\\x1b[31mred", "\\u202egnirts", "one", "two\tthree\\x0dfour", "\\udce9"]
    assert out.getvalue().replace("two     three", "two\tthree").splitlines() == [
        *2 * shown[:1], *2 * shown[1:2], *2 * shown[2:4], *2 * shown[4:],
    ]  # fmt: skip


def test_a_summary_of_hostile_names_and_texts(out: io.StringIO) -> None:
    found = {
        "run": "runs/x[/red]y",
        "steps": 1,
        "tokens": 1,
        "parameters": {"total": 1, "active": 1},
        "loss": {"first": 1.0, "last": 1.0},
        "bits_per_byte": {"[/all]": 1.0},
        "bigram_bits_per_byte": {"[/all]": 1.0},
        "tokens_per_second": 1.0,
        "imbalance": {"home": 1.0, "planned": 1.0},
        "guests": 0,
        "rows_moved": 0,
        "rows_moved_fraction": 0.0,
        "generated": [{"title": "[/t]", "prompt": "p\\\\\\", "text": "\x1b[2J[/green]"}],
    }
    summary.show(found, RunLogger(None))
    for expected in ("runs/x[/red]y", "[/all]", "[/t]", "p\\\\\\\\x1b[2J[/green]"):
        assert expected in out.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_no_character_is_an_error(encoding: str, tmp_path: Path) -> None:
    code = "import sys; from moetrain import __main__, common; from moetrain.cli import config; "
    code += "config.execute = lambda _: common.console.console.print('1.2 → 1.0 ├ 日本') or 0; "
    code += "sys.argv[1:] = ['config']; __main__.run()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"1.2 \\u2192 1.0 \\u251c \\u65e5\\u672c\n"


def test_a_terminal_that_has_gone_away_ends_nothing() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as gone, open(os.devnull, "w") as nowhere:
        terminal = Terminal(file=gone)
        os.close(ours)
        terminal.print("a line of progress")  # before the signal has come
        terminal.print("and the next one")
        os.dup2(nowhere.fileno(), theirs)  # as it happens to the streams of the process
