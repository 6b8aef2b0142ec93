"""Where documents come from: text that every installation has, Debian packages, or a folder of the user's own.

A document is (domain, text). Order is fixed, near-copies (licences, generated files) are taken once.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moetrain.config import ConfigError, Data
from moetrain.data import debian

TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".text",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".json",
    ".yaml",
    ".yml",
    ".csv",
}
MAX_FILE_BYTES = 1_000_000  # one huge file is not a document that teaches much
MIN_CHARACTERS = 200


class Document(NamedTuple):
    domain: str
    text: str


def documents(options: Data) -> Iterator[Document]:
    """All documents of the corpus, without near-copies, at most `max_bytes_per_domain` of each domain."""
    found = SOURCES[options.source](options)
    taken: dict[str, int] = {}
    seen: set[bytes] = set()
    for document in found:
        size = len(document.text.encode())
        limit = options.max_bytes_per_domain
        if limit is not None and taken.get(document.domain, 0) + size > limit:
            continue
        if (print_ := _fingerprint(document.text)) in seen:
            continue
        seen.add(print_)
        taken[document.domain] = taken.get(document.domain, 0) + size
        yield document


def held_out(document: Document, share: float) -> bool:
    """Whether a document is kept from training: by its text alone, so that it stays so."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:4], "little") < share * 2**32


def _local(options: Data) -> Iterator[Document]:
    """Python sources, C++ headers, prose and data files of this Python installation and its packages."""
    limit = options.max_bytes_per_domain or 1 << 62
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = sorted({Path(str(d.locate_file(""))).resolve() for d in importlib.metadata.distributions()})
    files = {name: path for root in (library, *packages) for name, path in _walk(root)}
    by_hash = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())  # a limit takes a fair sample
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
                text = _read(files[name])
                if text is not None and len(text) <= limit // 8 and _is_worded(text):
                    yield Document(domain, text)
                    if (taken := taken + len(text)) > limit:
                        break


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(name below root, path) of every file, without what other packages installed into a standard library."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in ("__pycache__", "site-packages", "dist-packages")]
        for file in files:
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
                yield Document("prose", topics[name])


def _read(path: Path) -> str | None:
    """A file as text; None where it is none, or too small or too large to be a document."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) >= MIN_CHARACTERS and "\0" not in text else None


def _folder(options: Data) -> Iterator[Document]:
    """Text files, the first folder below `data.path` being the domain; and JSONL with `text` and perhaps `domain`."""
    path = Path(str(options.path))
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    count = 0
    for file in files:
        parts = file.relative_to(path).parts
        domain = parts[0] if len(parts) > 1 else "text"
        if file.suffix == ".jsonl":
            for document in _jsonl(file, domain):
                count += 1
                yield document
        elif file.suffix.lower() in TEXT_SUFFIXES or not file.suffix:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ConfigError(f"data.path={file}: must be UTF-8 text") from None
            if text.strip():
                count += 1
                yield Document(domain, text)
    if not count:
        raise ConfigError(f'data.path={path}: must hold text files or JSONL with a "text" field')


def _debian(options: Data) -> Iterator[Document]:
    """Files of Debian packages, in fifteen domains."""
    return (Document(domain, text) for domain, text in debian.texts(options) if len(text) >= MIN_CHARACTERS)


def _jsonl(file: Path, domain: str) -> Iterator[Document]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, label = row["text"], row.get("domain") or domain
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ConfigError(f'data.path={file}:{number}: must be JSON with a "text" field') from None
            if not isinstance(text, str):
                raise ConfigError(f'data.path={file}:{number}: "text" must be a string')
            if text.strip():
                yield Document(str(label), text)


def _fingerprint(text: str) -> bytes:
    """Equal for texts that differ in their first lines or in white space only: the middle thousand letters."""
    letters = re.sub(r"\W+", "", text.lower())
    middle = len(letters) // 2
    return hashlib.sha256(letters[max(0, middle - 500) : middle + 500].encode()).digest()


SOURCES = {"local": _local, "debian": _debian, "folder": _folder}
