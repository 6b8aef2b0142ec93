"""What tells a whole checkpoint from any other folder: `manifest.json`, and `entries.json` where each entry lies.

The manifest has the stamp of every other file, and its own. Nothing else may lie in the folder.
"""

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.checkpoint import files
from moetrain.checkpoint.files import Stamp
from moetrain.config import ConfigError

FORMAT = 2
MANIFEST, ENTRIES = "manifest.json", "entries.json"


class Entry(NamedTuple):
    """Where the elements of an entry lie."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    pieces: Sequence[tuple[str, int, int]]  # (file, first element, last element + 1), counted row by row

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def step_of(path: Path) -> int:
    """The step that a folder `step_N` is of."""
    return int(path.name.removeprefix("step_"))


def folders(run: Path) -> list[Path]:
    """The folders `step_N` of a run, newest first, whole or not."""
    found = [p for p in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run in which nothing is missing; the bytes of its tensors are not read."""
    return next((path for path in folders(run) if problem(path) is None), None)


def write(folder: Path, body: Mapping[str, Any]) -> None:
    """`body["files"]` has the stamp of every file in the folder. Raises `OSError`."""
    text = json.dumps({**body, "format": FORMAT, "crc32": _crc({**body, "format": FORMAT})}, indent=1)
    files.write(folder / MANIFEST, f"{text}\n".encode())


def read(folder: Path) -> dict[str, Any]:
    """Raises `ConfigError` where it is not there, damaged or of another format."""
    if said := _manifest_problem(folder):
        raise ConfigError(f"checkpoint={folder}: {said}")
    return json.loads((folder / MANIFEST).read_text())


def progress(path: Path | None) -> tuple[int, int]:
    """(optimizer steps done, global samples seen) of a checkpoint; nothing yet for none."""
    if path is None:
        return 0, 0
    manifest = read(path)
    return int(manifest["step"]), int(manifest["samples"])


def entries_text(entries: Mapping[str, Entry]) -> str:
    """`entries.json`, a line an entry."""
    lines = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_entries(folder: Path) -> dict[str, Entry]:
    """Of a folder without a `problem`."""
    tree = json.loads((folder / ENTRIES).read_text())
    return {name: Entry(dtype, tuple(shape), pieces) for name, (dtype, shape, pieces) in tree.items()}


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as it can be seen without reading its tensors; None for nothing."""
    if said := _manifest_problem(folder):
        return said
    stamps: dict[str, list] = json.loads((folder / MANIFEST).read_text())["files"]
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
    """A line for each of these files that is not, byte by byte, the one that was saved."""
    stamps = json.loads((folder / MANIFEST).read_text())["files"]
    out = []
    for name in names:
        try:
            found = files.stamp(folder / name)
        except OSError as error:
            out.append(f"{name} cannot be read: {error.strerror}")
            continue
        if found != Stamp(*stamps[name]):
            out.append(f"{name} is damaged: its CRC-32 is {found.crc32}, that of the saved file was {stamps[name][1]}")
    return out


def share_of(folder: Path, rank: int, world: int) -> list[str]:
    """The files that a rank checks, where all ranks check a checkpoint together."""
    stamps = json.loads((folder / MANIFEST).read_text())["files"]
    return sorted(stamps, key=lambda name: (-stamps[name][0], name))[rank::world]


def _manifest_problem(folder: Path) -> str | None:
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        body = json.loads((folder / MANIFEST).read_text())
        if body["format"] != FORMAT:
            return f"{MANIFEST} has format {body['format']}, this version reads {FORMAT}"
        whole = body.pop("crc32") == _crc(body)
    except (ValueError, KeyError, TypeError):
        whole = False
    return None if whole else f"{MANIFEST} is damaged"


def _crc(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
