"""Which files a corpus was made of, and whether they have changed since: by size and time, and by content where those
differ. Kept in `sources.json` of the prepared corpus."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from moetrain.common import disk
from moetrain.common.extensions import TokenSource, read_sources
from moetrain.config import Data
from moetrain.data import chat_files, debian, files
from moetrain.data.files import LeftOut
from moetrain.data.manifest import digest_file
from moetrain.data.token_files import find_files

NAME = "sources.json"
Listing = dict[str, tuple[int, int]]  # a file's name below `data.path`: its size in bytes, its time in ns


def place(options: Data) -> str:
    """The field that says where the text is, for messages."""
    return "data.sources" if options.path is None else f"data.path={options.path}"


def listing(options: Data) -> Listing | None:
    """The files of a folder, of Debian packages of the user's own or of `data.sources`; None: there are none to watch.

    `data=local`, packages that were fetched once and corpora of other packages stay as they were when they were
    prepared.
    """
    out = {}
    for file in _watched_files(options):
        with suppress(OSError):
            stat = file.stat()
            out[str(file.relative_to(_root(options)))] = (stat.st_size, stat.st_mtime_ns)
    return out or None


def _watched_files(options: Data) -> Iterable[Path]:
    if options.source == "tokens":
        found = read_sources(getattr(options, "sources", None) or {}, TokenSource).values()
        places = [place for source in found for place in (source.path, source.held_out) if place]
        return [file for place in places for file in find_files(Path(place).absolute())]
    if options.source == "chat":
        places = (
            [options.path] if options.path else [source.path for source in chat_files.list_sources(options).values()]
        )
        return [file for place in places for file in chat_files.list_files(Path(place).absolute())]
    if options.path is None:
        return []
    if options.source == "debian":
        return debian.packages(options).values()
    return files.text_files(Path(options.path), LeftOut()) if options.source == "folder" else []


def _root(options: Data) -> Path:
    """What the names of the files are relative to."""
    return Path("/") if options.source in ("tokens", "chat") else Path(str(options.path))


def record(folder: Path, options: Data, seen: Listing | None, digests: Mapping[str, str] | None = None) -> None:
    """Keep what was listed before it was read, with digests: those that are known, or else made now."""
    if seen is not None:
        known = digests or {}
        rows = {name: [size, time, known.get(name) or digest(options, name)] for name, (size, time) in seen.items()}
        disk.write(folder / NAME, json.dumps(rows))


def change(folder: Path, options: Data) -> str | None:
    """How the files differ from those that the corpus in `folder` was made of, in words; None where they do not."""
    try:
        known = {name: (int(size), int(time), str(sha)) for name, (size, time, sha) in _read(folder).items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"{folder / NAME} cannot be read"
    if options.source not in ("tokens", "chat") and (options.path is None or not Path(options.path).exists()):
        return f"{options.path} is gone"
    now = listing(options) or {}
    new, gone = sorted(now.keys() - known.keys()), sorted(known.keys() - now.keys())
    touched = [name for name in now.keys() & known.keys() if now[name] != known[name][:2]]
    changed = [n for n in touched if now[n][0] != known[n][0] or digest(options, n) != known[n][2]]
    if not new and not gone and not changed:
        if touched:
            _write(folder, {name: [*now[name], known[name][2]] for name in known})
        return None
    parts = {"new": new, "changed": sorted(changed), "gone": gone}
    said = [f"{len(names)} {what} ({names[0]}{', ...' if names[1:] else ''})" for what, names in parts.items() if names]
    return f"its files are not those it was made of: {', '.join(said)}"


def digest(options: Data, name: str) -> str:
    """SHA-256 of a file; empty where it cannot be read."""
    root = _root(options)
    with suppress(OSError):
        return digest_file(root if name == "." else root / name)
    return ""


def _read(folder: Path) -> dict[str, list]:
    return json.loads(disk.read(folder / NAME, 1 << 32))


def _write(folder: Path, rows: dict[str, list]) -> None:
    """New times of files that are the same; where the folder is read-only they are compared by content every time."""
    with suppress(OSError):
        disk.write(folder / NAME, json.dumps(rows))
