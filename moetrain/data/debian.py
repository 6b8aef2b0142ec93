"""Fifteen domains of text out of Debian packages, read as files: nothing is installed, no root is needed.

The packages are fetched once with `apt-get download` into `data.dir/debian-packages`; or they lie in `data.path`.
"""

import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from moetrain.common.console import console
from moetrain.config import ConfigError, Data

WHOLE = 32_000  # characters: a longer file is cut
PART = 8_000  # characters at least of each part
INSTEAD = "data=local and data=folder need no packages, data.path=FOLDER takes .deb files"


class DebianSource(NamedTuple):
    package: str
    files: str  # regular expression of whole paths
    border: str = "\n\n"  # where a long file may be cut
    encoding: str = "utf-8"


def manual(language: str, *packages: str) -> tuple[DebianSource, ...]:
    return tuple(DebianSource(package, rf"usr/share/man/{language}man\d/.*\.gz") for package in packages)


def fortunes(package: str, folder: str = "") -> DebianSource:
    return DebianSource(package, rf"usr/share/games/fortunes/{folder}[^/]*(?<!\.dat)(?<!\.u8)", "\n%\n")


DOMAINS = {
    "english": (fortunes("fortunes"), DebianSource("anarchism", r"usr/share/doc/anarchism/markdown/.*\.md(\.gz)?")),
    "rust": (DebianSource("rust-src", r"usr/src/rustc-[^/]+/(compiler|library/(core|alloc|std)|src/tools)/.*\.rs"),),
    "lisp": (DebianSource("sbcl-source", r"usr/share/sbcl-source/.*\.lisp"),),
    "manuals": (
        *manual("", "manpages", "manpages-dev"),
        DebianSource("perl-doc", r"usr/share/perl/[^/]+/pod/.*\.pod"),
    ),
    "dictionary": (DebianSource("dict-gcide", r"usr/share/dictd/gcide\.dict\.dz"),),
    "german_english": (DebianSource("trans-de-en", r"usr/share/trans/de-en", "\n"),),
    "maths": (DebianSource("metamath-databases", r"usr/share/metamath/databases/.*\.mm"),),
    "json": (DebianSource("iso-codes", r"usr/share/iso-codes/json/iso_.*\.json", "\n    },\n"),),
    "german": (fortunes("fortunes-de", "de/"), *manual("de/", "manpages-de", "manpages-de-dev")),
    "french": manual("fr/", "manpages-fr", "manpages-fr-dev"),
    "spanish": (fortunes("fortunes-es", "es/"), *manual("es/", "manpages-es", "manpages-es-dev")),
    "russian": (fortunes("fortunes-ru", "ru/"), *manual("ru/", "manpages-ru", "manpages-ru-dev")),
    "japanese": manual("ja/", "manpages-ja", "manpages-ja-dev"),
    "chinese": (fortunes("fortunes-zh"), *manual("zh_(CN|TW)/", "manpages-zh")),
    "japanese_dictionary": (DebianSource("edict", r"usr/share/edict/edict", "\n", "euc_jp"),),
}
PACKAGES = [source.package for sources in DOMAINS.values() for source in sources]


def texts(options: Data) -> Iterator[tuple[str, str]]:
    """(domain, text) of every document, each domain in an order that makes its beginning a fair sample of it."""
    files = packages(options)
    for domain, sources in DOMAINS.items():
        found = [
            part
            for source in sources
            for name, content in _files(files[source.package], source.files)
            for part in _cut(_text(name, content, source.encoding), source.border)
        ]
        for text in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()):
            yield domain, text


def versions(options: Data) -> dict[str, str]:
    """What was read, for the manifest."""
    return {name: unquote(path.name.split("_")[1]) for name, path in packages(options).items()}


def packages(options: Data) -> dict[str, Path]:
    """The .deb file of every package, fetched now if it is not there. Raises `ConfigError`."""
    folder = Path(options.path or Path(options.dir, "debian-packages"))
    if missing := [name for name in PACKAGES if not [*folder.glob(f"{name}_*.deb")]]:
        if options.path is not None:
            raise ConfigError(f"data.path={folder}: must hold the packages {', '.join(missing)} as .deb files")
        _download(missing, folder)
    return {name: max(folder.glob(f"{name}_*.deb"), key=os.path.getmtime) for name in PACKAGES}


def _download(names: list[str], folder: Path) -> None:
    """A package takes its place in `folder` once it is whole."""
    if shutil.which("apt-get") is None:
        raise ConfigError(f"data.source=debian: needs apt-get, which this host does not have; {INSTEAD}")
    console.print(f"fetching {len(names)} Debian packages into {folder}, once (about 100 MB)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as here:
        command = ["apt-get", "download", "-q", *names]
        done = subprocess.run(command, cwd=here, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
        for whole in Path(here).glob("*.deb"):
            whole.rename(folder / whole.name)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        why = lines[0].removeprefix("E:").strip() if lines else f"exit code {done.returncode}"
        raise ConfigError(f"data.source=debian: apt-get download failed ({why}); {INSTEAD}")


def _files(package: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the package's files whose whole path matches. Raises `ConfigError`."""
    try:
        with tarfile.open(fileobj=io.BytesIO(_archive(package)), mode="r:*") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and re.fullmatch(pattern, name) and (file := archive.extractfile(member)):
                    yield name, file.read()
    except ConfigError:
        raise
    except (ValueError, EOFError, lzma.LZMAError, tarfile.TarError, subprocess.CalledProcessError):
        raise ConfigError(f"data.path={package}: must be a whole Debian package") from None


def _archive(package: Path) -> bytes:
    """The tar archive inside a .deb file, which is an `ar` archive: members after headers of 60 bytes, at even places.

    Ubuntu compresses with zstd, which Python's tarfile cannot read; dpkg-deb, at hand there, can.
    """
    raw = package.read_bytes()
    at = len(b"!<arch>\n")
    while at + 60 <= len(raw):
        name, size = raw[at : at + 16].decode("ascii", "replace").strip(" /"), int(raw[at + 48 : at + 58])
        if name == "data.tar.zst":
            if shutil.which("dpkg-deb") is None:
                raise ConfigError(f"data.path={package}: needs dpkg-deb (for zstd), which this host does not have")
            return subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
        if name.startswith("data.tar"):
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"{package} has no data.tar")


def _text(name: str, content: bytes, encoding: str) -> str:
    text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode(encoding, "ignore")
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours
    return _without_roff(text) if "/man/" in name else text


SIGNS = {"aq": "'", "oq": "‘", "cq": "’", "dq": '"', "lq": "“", "rq": "”", "em": "—", "en": "–", "bu": "•", "co": "©"}
SIGNS |= {"rs": "\\", "ti": "~", "ha": "^", "la": "<", "ra": ">"}


def _without_roff(page: str) -> str:
    """A manual page's words, without the commands that set it."""
    page = re.sub(r'^[.\'] *(\\"|(de|ds|nr|if|ie|el|tr|TH|IX)\b).*\n', "", page, flags=re.M)  # comments, settings
    page = re.sub(r"^[.'] *[A-Za-z.]{1,3}\b *", "", page, flags=re.M)  # names of macros
    page = re.sub(r"\\f(\[\w*\]|\(..|.)|\\s[-+]?\d+|\\[&/,|^%:]", "", page)  # fonts, sizes, spacing
    page = re.sub(r"\\\*?(?:\((..)|\[([^]]*)\])", lambda m: SIGNS.get(m[1] or m[2], ""), page)
    page = page.replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\")
    return re.sub(r"\n{3,}", "\n\n", page)


def _cut(text: str, border: str) -> Iterator[str]:
    """The text, or if it is long its parts, cut at `border`."""
    if len(text) <= WHOLE:
        yield text
        return
    part: list[str] = []
    for piece in text.split(border):
        part.append(piece)
        if sum(map(len, part)) >= PART:
            yield border.join(part)
            part = []
    yield border.join(part)
