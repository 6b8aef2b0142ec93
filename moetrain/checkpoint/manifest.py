"""What tells a whole checkpoint from any other folder: `manifest.json`, and `entries.json` where each entry lies.

The manifest has the stamp of every other file, and its own. Nothing else may lie in the folder.

A checkpoint may be somebody else's: both files are read up to a size and checked field by field, and what they name are
plain names of files in the folder.
"""

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, Strict, StringConstraints, ValidationError

from moetrain.checkpoint import files
from moetrain.checkpoint.files import WIDTH, FileStamp
from moetrain.common import disk
from moetrain.common.errors import short
from moetrain.config import ConfigError
from moetrain.config.messages import plain

FORMAT = 2
MANIFEST, ENTRIES = "manifest.json", "entries.json"
STEP = re.compile(r"step_\d+")  # the name of a checkpoint
MOST_BYTES = 1 << 29  # of either of them
MOST_DIMENSIONS = 16


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]  # of a file in the folder
Crc = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
Count = Annotated[int, Strict(), Field(ge=0, lt=1 << 62)]
Section = dict[str, Any]


class _Layout(BaseModel):
    engine: str
    ranks: Annotated[int, Strict(), Field(ge=1, lt=1 << 31)]


class _Config(BaseModel):
    """The sections that are looked into."""

    model: Section
    router: Section
    train: Section
    data: Section
    balance: Section


class _Manifest(BaseModel):
    """What every manifest has; it may have more."""

    step: Count
    samples: Count
    layout: _Layout
    data: dict[str, str] = {}
    files: dict[Name, tuple[Count, Crc]]
    config: _Config


class ManifestEntry(NamedTuple):
    """Where the elements of an entry lie."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    pieces: Sequence[tuple[str, int, int]]  # (file, first element, last element + 1), counted row by row

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def step_of(path: Path) -> int:
    """Return the step that a folder `step_N` is of."""
    return int(path.name.removeprefix("step_"))


def folders(run: Path) -> list[Path]:
    """Return the folders `step_N` of a run, newest first, whole or not."""
    found = [p for p in (run / "checkpoints").glob("step_*") if STEP.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run in which nothing is missing; the bytes of its tensors are not read."""
    return next((path for path in folders(run) if problem(path) is None), None)


def write(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest; `body["files"]` has the stamp of every file in the folder. Raises `OSError`."""
    text = json.dumps({**body, "format": FORMAT, "crc32": _crc({**body, "format": FORMAT})}, indent=1)
    files.write(folder / MANIFEST, f"{text}\n".encode())


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder. Raises `ConfigError` where it is not there, damaged or of another format."""
    try:
        return _body(folder)
    except ValueError as error:
        raise ConfigError(f"checkpoint={folder}: {error}") from None


def progress(path: Path | None) -> tuple[int, int]:
    """Return (optimizer steps done, global samples seen) of a checkpoint; nothing yet for none."""
    if path is None:
        return 0, 0
    manifest = read(path)
    return int(manifest["step"]), int(manifest["samples"])


def entries_text(entries: Mapping[str, ManifestEntry]) -> str:
    """Return the text of `entries.json`, a line an entry."""
    lines = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_entries(folder: Path) -> dict[str, ManifestEntry]:
    """Return the entries of a folder without a `problem`. Raises `ConfigError` where an entry is not what
    `entries_text` writes."""
    stamps = read(folder)["files"]
    try:
        tree = _json(folder / ENTRIES)
        if not isinstance(tree, dict):
            raise ValueError(f"{ENTRIES} is damaged")
        return {name: _entry(name, about, stamps) for name, about in tree.items()}
    except ValueError as error:
        raise ConfigError(f"checkpoint={folder}: {error}") from None


def problem(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint as far as it can be seen without reading its tensors; None for nothing."""
    try:
        stamps: dict[str, list] = _body(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, _) in stamps.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes, but {size:,} were saved"
    for path in sorted(folder.iterdir()):
        if path.name not in stamps and path.name != MANIFEST and not path.name.startswith("."):
            return f"{path.name} is not of this checkpoint"
    return next(iter(damaged(folder, [name for name in stamps if name.endswith(".json")])), None)


def damaged(folder: Path, names: Sequence[str]) -> list[str]:
    """Return a line for each of these files that is not, byte by byte, the one that was saved."""
    stamps = read(folder)["files"]
    out = []
    for name in names:
        try:
            found = files.stamp(folder / name)
        except OSError as error:
            out.append(f"{name} cannot be read: {error.strerror}")
            continue
        if found != FileStamp(*stamps[name]):
            out.append(f"{name} is damaged: its CRC-32 is {found.crc32}, that of the saved file was {stamps[name][1]}")
    return out


def share_of(folder: Path, rank: int, world: int) -> list[str]:
    """Return the files that a rank checks, where all ranks check a checkpoint together."""
    stamps = read(folder)["files"]
    return sorted(stamps, key=lambda name: (-stamps[name][0], name))[rank::world]


def _json(path: Path) -> Any:
    """Raises `ValueError` in words."""
    try:
        return json.loads(disk.read(path, MOST_BYTES))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"{path.name} is damaged") from None


def _body(folder: Path) -> dict[str, Any]:
    """The manifest, checked. Raises `ValueError` in words."""
    body = _json(folder / MANIFEST)
    if isinstance(body, dict) and body.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{MANIFEST} has format {short(body['format'])}, this version reads {FORMAT}")
    if not isinstance(body, dict) or body.pop("crc32", None) != _crc(body):
        raise ValueError(f"{MANIFEST} is damaged")
    try:
        _Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = short(".".join(map(str, first["loc"])))
        raise ValueError(f"{MANIFEST} is damaged: {field}: {plain(first['msg'])}") from None
    return body


def _entry(name: str, about: Any, stamps: Mapping[str, Any]) -> ManifestEntry:
    """Raises `ValueError` in words."""
    damaged = f"{ENTRIES} is damaged: {short(name)}"
    match about:
        case [str(dtype), list(shape), list(pieces)] if dtype in WIDTH:
            numbers = [*shape, *(number for piece in pieces if isinstance(piece, list) for number in piece[1:])]
        case _:
            raise ValueError(f"{damaged} must be [dtype, shape, pieces]")
    if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError(f"{damaged} must have whole numbers as its shape and ranges")
    numel, reached = math.prod(shape), 0
    for piece in pieces:
        match piece:
            case [str(file), begin, end] if reached <= begin < end <= numel:
                reached = end
            case _:
                raise ValueError(
                    f"{damaged} must have ranges [file, begin, end] of its {numel} elements, in their order"
                )
        if file not in stamps or not file.endswith(".safetensors"):
            raise ValueError(f"{damaged} must lie in safetensors files of this checkpoint, not {short(file)}")
    return ManifestEntry(dtype, tuple(shape), [tuple(piece) for piece in pieces])


def _crc(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
