"""Where documents come from: text that every installation has, Debian packages, a folder of the user's own, or a corpus
that another package registers.

A document is (domain, text, name). Order is fixed; copies are taken once and counted.
"""

import hashlib
import importlib.metadata
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moetrain.common.extensions import CORPORA
from moetrain.config import Data
from moetrain.data import debian
from moetrain.data.files import Columns, LeftOut
from moetrain.data.pieces import PIECE_BYTES, FilePiece, list_pieces, read_pieces

MAX_FILE_BYTES = 1_000_000  # one huge file is not a document that teaches much
MIN_CHARACTERS = 200
MOST_PIECES = 4096  # files that are read together


class Document(NamedTuple):
    domain: str
    text: str
    name: str  # the file, or file:line


class Shard(NamedTuple):
    """A part of a source that is read by itself."""

    read: Callable[[LeftOut], Iterator[tuple[str, str, str]]]  # (label of the domain, text, name) of every document
    size: int  # bytes on the disk; 0: not known


def split_source(options: Data, left_out: LeftOut) -> list[Shard]:
    """The parts of the source, in order: a folder by its files, the other sources whole."""
    if options.source != "folder":
        return [Shard(partial(CORPORA[options.source], options), 0)]
    groups: list[list[FilePiece]] = [[]]
    for piece in list_pieces(Path(str(options.path)), left_out):
        full = sum(each.size for each in groups[-1]) + piece.size > PIECE_BYTES or len(groups[-1]) == MOST_PIECES
        if groups[-1] and full:
            groups.append([])
        groups[-1].append(piece)
    columns = Columns(getattr(options, "text_field", "text"), getattr(options, "domain_field", "domain"))
    read = partial(read_pieces, on_bad=options.on_bad, columns=columns)
    return [Shard(partial(read, group), sum(piece.size for piece in group)) for group in groups]


def domain_name(label: str) -> str:
    """A word for metrics and files: letters, digits, `.`, `_` and `-`; other characters become `_`, `all` is `all_`."""
    name = re.sub(r"[^\w.-]+", "_", label.strip())[:80]
    name = name if re.search(r"\w", name) else f"_{name}_"
    return f"{name}_" if name == "all" else name


def hash_text(raw: bytes) -> int:
    """Four bytes of a document's text alone, by which it is held out or not, so that it stays so."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:4], "little")


def cut(document: Document, share: float) -> tuple[Document, Document] | None:
    """(beginning, end) of a document that is a domain by itself; the end is the last `share` of it.

    Cut behind a paragraph, or else a line, a word, or anywhere; None where it is too short for two.
    """
    text = document.text
    if len(text) < MIN_CHARACTERS:
        return None
    wanted = int(len(text) * (1 - share))
    for border in ("\n\n", "\n", " ", ""):
        at = text.find(border, wanted) + len(border)
        if at >= wanted and text[:at].strip() and text[at:].strip() and at - wanted <= (len(text) - wanted) // 2:
            return document._replace(text=text[:at]), document._replace(text=text[at:])
    return None


def read_local(options: Data, left_out: LeftOut) -> Iterator[Document]:
    """Python sources, C++ headers, prose and data files of this Python installation and its packages."""
    limit = options.max_bytes_per_domain or 1 << 62
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = sorted({Path(str(d.locate_file(""))).resolve() for d in importlib.metadata.distributions()})
    found = {name: path for root in (library, *packages) for name, path in _walk(root)}
    by_hash = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())  # a limit takes a fair sample
    yield from _topics(library)
    for domain, suffixes, names in (
        ("prose", {".rst", ".txt", ".md"}, ("METADATA", "LICENSE", "README", "NOTICE")),
        ("data", {".json", ".yaml", ".yml", ".csv"}, ()),
        ("cpp", {".h", ".hpp", ".cuh"}, ()),
        ("python", {".py"}, ()),
    ):
        taken = 0
        for name in by_hash:
            base = name.rpartition("/")[2]
            if Path(base).suffix.lower() in suffixes or base.upper().startswith(names or ("\0",)):
                text = _read(found[name])
                if text is not None and len(text) <= limit // 8 and _is_worded(text):
                    yield Document(domain, text, str(found[name]))
                    if (taken := taken + len(text)) > limit:
                        break


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(name below root, path) of every file, without what other packages installed into a standard library."""
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in ("__pycache__", "site-packages", "dist-packages")]
        for file in names:
            path = Path(folder, file)
            yield path.relative_to(root).as_posix(), path


def _is_worded(text: str) -> bool:
    """Mostly letters, and not packed binary: leaves out tables of numbers and blobs, which teach nothing."""
    dense = re.sub(r"\s+", "", text[:100_000])
    packed = len(zlib.compress(dense.encode())) / max(1, len(dense.encode()))
    return sum(map(str.isalpha, dense)) > len(dense) / 2 and packed < 0.6


def _topics(library: Path) -> Iterator[Document]:
    """The Python language reference, as pydoc carries it."""
    if (library / "pydoc_data" / "topics.py").is_file():
        from pydoc_data.topics import topics

        for name in sorted(topics):
            if len(topics[name]) >= MIN_CHARACTERS:
                yield Document("prose", topics[name], f"pydoc topic {name}")


def _read(path: Path) -> str | None:
    """A file as text; None where it is none, or too small or too large to be a document."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) >= MIN_CHARACTERS and "\0" not in text else None


def read_folder(options: Data, left_out: LeftOut) -> Iterator[tuple[str, str, str]]:
    """Text files, the first folder below `data.path` being the domain; JSONL and Parquet with a text in every row."""
    for shard in split_source(options, left_out):
        yield from shard.read(left_out)


def read_debian(options: Data, left_out: LeftOut) -> Iterator[Document]:
    """Files of Debian packages, in fifteen domains."""
    for domain, text in debian.texts(options):
        if len(text) >= MIN_CHARACTERS:
            yield Document(domain, text, f"a text of {domain}")


def exact(text: str) -> bytes:
    """Equal for texts that differ in their kind of line ends or in outer white space only."""
    return hashlib.sha256(text.replace("\r\n", "\n").replace("\r", "\n").strip().encode()).digest()


def near(text: str) -> bytes:
    """Equal for texts that differ in their first lines, in case or in white space only: their middle thousand signs."""
    signs = re.sub(r"\s+", "", text.lower())
    middle = len(signs) // 2
    return hashlib.sha256(signs[max(0, middle - 500) : middle + 500].encode()).digest()


def none(text: str) -> bytes:
    """Of no use to tell texts apart."""
    return bytes(16)


FINGERPRINTS = {"exact": exact, "near": near, "none": none}
COPIES = {"exact": "copies of others", "near": "near-copies of others (data.dedup=near)"}
