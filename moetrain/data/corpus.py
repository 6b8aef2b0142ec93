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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moetrain.common.extensions import CORPORA
from moetrain.config import ConfigError, Data
from moetrain.data import debian, files
from moetrain.data.files import BadText, LeftOut

MAX_FILE_BYTES = 1_000_000  # one huge file is not a document that teaches much
MIN_CHARACTERS = 200


class Document(NamedTuple):
    domain: str
    text: str
    name: str  # the file, or file:line


def documents(options: Data, left_out: LeftOut) -> Iterator[Document]:
    """All documents of the corpus, at most `max_bytes_per_domain` of each domain; what is not taken is counted."""
    same_text = FINGERPRINTS[options.dedup]
    taken: dict[str, int] = {}
    seen: dict[bytes, str] = {}
    labels: dict[str, str] = {}
    for label, text, name in CORPORA[options.source](options, left_out):
        document = Document(domain_name(label), text, name)
        if labels.setdefault(document.domain, label) != label:
            both = f"{labels[document.domain]!r} and {label!r} would both be named {document.domain}"
            raise ConfigError(f"data.path={options.path}: two domains, {both}; give one another name")
        size = len(document.text.encode())
        limit = options.max_bytes_per_domain
        if limit is not None and taken.get(document.domain, 0) + size > limit:
            left_out.add("beyond data.max_bytes_per_domain", document.name)
            continue
        if (print_ := same_text(document.text)) in seen:
            left_out.add(COPIES[options.dedup], f"{document.name}, as {seen[print_]}")
            continue
        seen[print_] = document.name
        taken[document.domain] = taken.get(document.domain, 0) + size
        yield document


def domain_name(label: str) -> str:
    """A word for metrics and files: letters, digits, `.`, `_` and `-`; other characters become `_`, `all` is `all_`."""
    name = re.sub(r"[^\w.-]+", "_", label.strip())[:80]
    name = name if re.search(r"\w", name) else f"_{name}_"
    return f"{name}_" if name == "all" else name


def held_out(document: Document, share: float) -> bool:
    """Whether a document is kept from training: by its text alone, so that it stays so."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:4], "little") < share * 2**32


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


def read_folder(options: Data, left_out: LeftOut) -> Iterator[Document]:
    """Text files, the first folder below `data.path` being the domain; and JSONL with `text` and perhaps `domain`."""
    path = Path(str(options.path))
    count = 0
    for file in files.text_files(path, left_out):
        parts = file.relative_to(path).parts
        domain = parts[0] if len(parts) > 1 else "text"
        read = _rows if files.kind_of(file)[0] in files.ROW_SUFFIXES else _whole
        try:
            for document in read(file, domain, options.on_bad, left_out):
                if document.text.strip():
                    count += 1
                    yield document
                else:
                    left_out.add("empty", document.name)
        except BadText as error:
            files.refuse_or_skip(error, options.on_bad, left_out)
    if not count:
        said = "".join(f"; {line}" for line in left_out.lines())
        raise ConfigError(f'data.path={path}: must hold text files or JSONL with a "text" field{said}')


def _whole(file: Path, domain: str, on_bad: str, left_out: LeftOut) -> Iterator[Document]:
    yield Document(domain, files.read_text(file), str(file))


def _rows(file: Path, domain: str, on_bad: str, left_out: LeftOut) -> Iterator[Document]:
    for number, line in files.rows(file):
        try:
            text, label = files.row(line, str(file), number)
        except BadText as error:
            files.refuse_or_skip(error, on_bad, left_out)
        else:
            yield Document(label or domain, text, f"{file}:{number}")


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


FINGERPRINTS = {"exact": exact, "near": near}
COPIES = {"exact": "copies of others", "near": "near-copies of others (data.dedup=near)"}
