"""Text files of a folder: which are read, how they are unpacked and decoded, and what is left out, with the reason."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from moetrain.config import ConfigError

TEXT_SUFFIXES = {
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".srt", ".log"),
    *(".html", ".htm", ".xhtml", ".xml", ".svg", ".css"),
    *(".json", ".yaml", ".yml", ".toml", ".csv", ".tsv", ".ini", ".cfg", ".ipynb"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala"),
    *(".js", ".mjs", ".jsx", ".ts", ".tsx", ".sh", ".rb", ".pl", ".php", ".lua", ".r", ".jl", ".hs", ".ml", ".swift"),
    *(".cs", ".f90", ".lisp", ".el", ".clj", ".ex", ".erl", ".sql", ".lean", ".v", ".asm", ".s", ".proto", ".cmake"),
    *(".fasta", ".fa", ".po", ".pod"),
}
ROW_SUFFIXES = {".jsonl", ".ndjson"}
PARQUET = ".parquet"
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
for _module in ("compression.zstd", "zstandard", "pyzstd"):
    try:
        OPENERS[".zst"] = importlib.import_module(_module).open
        break
    except (ImportError, AttributeError):
        continue
MOST_BYTES = 1 << 30  # of a document: beyond it a file of a few MB that unpacks to all memory
SKIP_ADVICE = "data.on_bad=skip leaves it out"


class Columns(NamedTuple):
    """The names of what is read of the rows of JSONL and Parquet."""

    text: str
    domain: str


@dataclass
class LeftOut:
    """How many files or documents are not in the corpus, by reason, with an example of each."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, reason: str, example: object) -> None:
        """Count one more. Of a function, what it returns is the example: it is called for the first one."""
        if reason not in self.found:
            self.found[reason] = {"count": 0, "example": str(example() if callable(example) else example)}
        self.found[reason]["count"] += 1

    def merge(self, others: "LeftOut") -> None:
        """Count what was counted elsewhere."""
        for reason, entry in others.found.items():
            own = self.found.setdefault(reason, {**entry, "count": 0})
            own["count"] += entry["count"]

    def lines(self) -> Iterator[str]:
        """One for every reason."""
        yield from (f"left out: {n['count']:,} × {reason}, e.g. {n['example']}" for reason, n in self.found.items())


class BadText(Exception):
    """A file, or a line of it, that is not what it should be: `where`, `rule`."""

    def __init__(self, where: str, rule: str) -> None:
        super().__init__(f"{where}: {rule}")
        self.where, self.rule = where, rule


def refuse_or_skip(error: BadText, on_bad: str, left_out: LeftOut) -> None:
    """Count what is bad, or raise the `ConfigError` that names file, line and rule."""
    if on_bad == "error":
        raise ConfigError(f"data.path={error.where}: {error.rule}; {SKIP_ADVICE}") from None
    left_out.add(error.rule.partition(" (")[0], error.where)


def text_files(path: Path, left_out: LeftOut) -> Iterator[Path]:
    """The files to read below `path`, in order; the others are counted. A file that is named itself is always read."""
    if path.is_file():
        yield path
        return
    for folder, below, names in os.walk(path, onerror=lambda error: left_out.add("cannot be read", error.filename)):
        for name in [*below]:
            whole = Path(folder, name)
            reason = "hidden" if name.startswith(".") else "link to a folder" if whole.is_symlink() else None
            if reason is not None:
                below.remove(name)
                left_out.add(reason, f"{whole}/")
        below.sort()
        for name in sorted(names):
            whole = Path(folder, name)
            if (reason := _reason(whole)) is None:
                yield whole
            else:
                left_out.add(reason, whole)


def _reason(file: Path) -> str | None:
    """Why a file is not read; None: it is."""
    if file.name.startswith("."):
        return "hidden"
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return "not a regular file"
    except OSError:
        return "link to nothing"
    suffix, packing = kind_of(file)
    if packing == ".zst" and packing not in OPENERS:
        return "packed with zstd, which needs `pip install zstandard`"
    if suffix == PARQUET and find_spec("pyarrow") is None:
        return "Parquet, which needs `pip install 'moetrain[parquet]'`"
    known = not suffix or suffix == PARQUET or suffix in TEXT_SUFFIXES | ROW_SUFFIXES
    return None if known else f"the suffix {suffix[:20]} is none of text"


def kind_of(file: Path) -> tuple[str, str]:
    """(suffix of what is inside, suffix of its packing or nothing), in lower case."""
    suffix, packing = file.suffix.lower(), ""
    if suffix in OPENERS or suffix == ".zst":
        suffix, packing = Path(file.stem).suffix.lower(), suffix
    return suffix, packing


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes. Raises `BadText` for what happens while they are read."""
    try:
        packing = kind_of(file)[1]
        with OPENERS.get(packing, open)(file, "rb") as stream:
            yield io.BufferedReader(stream) if packing == ".zst" else stream  # zstandard's has no lines
    except BadText:
        raise
    except OSError as error:
        raise BadText(str(file), f"cannot be read ({error.strerror or error})") from None
    except (EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise BadText(str(file), f"cannot be unpacked ({error})") from None
    except Exception as error:  # those of a zstd module
        if kind_of(file)[1] != ".zst":
            raise
        raise BadText(str(file), f"cannot be unpacked ({error})") from None


def read_text(file: Path) -> str:
    """A whole file. Raises `BadText`."""
    with _opened(file) as stream:
        raw = stream.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise BadText(str(file), "must be at most 1 GiB of text; JSONL takes any number of documents")
    if b"\0" in raw[:8192]:
        raise BadText(str(file), "must be UTF-8 text, not binary data or UTF-16")
    return decode(raw, str(file), 1)


def decode(raw: bytes, file: str, first_line: int) -> str:
    """UTF-8 with or without a mark. Raises `BadText` with file and line."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise BadText(f"{file}:{line}", f"must be UTF-8 text (here the byte 0x{raw[error.start]:02x})") from None


def rows(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file of lines, the empty ones left out. Raises `BadText`."""
    with _opened(file) as stream:
        number = 0
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise BadText(f"{file}:{number}", "must be at most 1 GiB of text")
            if line.strip():
                yield number, line


def row(line: bytes, where: str, number: int, columns: Columns) -> tuple[str, str | None]:
    """(text, domain if it has one) of a line of JSONL. Raises `BadText`."""
    place = f"{where}:{number}"
    text = decode(line, where, number)
    try:
        found = json.loads(text)
        text, label = found[columns.text], found.get(columns.domain)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadText(place, f'must be JSON with a "{columns.text}" field') from None
    return check_row(text, label, place, columns)


def check_row(text: Any, label: Any, place: str, columns: Columns) -> tuple[str, str | None]:
    """The text and the domain of a row, if they are such. Raises `BadText`."""
    if not isinstance(text, str):
        raise BadText(place, f'"{columns.text}" must be a string')
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise BadText(place, f'"{columns.domain}" must be a string')
    if half := re.search("[\ud800-\udfff]", text):
        raise BadText(
            place, f'"{columns.text}" must be Unicode, not half a surrogate pair (here \\u{ord(half[0]):04x})'
        )
    return text, None if label in (None, "") else str(label)
