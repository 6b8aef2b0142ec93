"""The weights in a folder of Hugging Face: which tensors its safetensors files hold, and any rows of them.

Everything that can be known without reading weights is checked when a folder is opened: the index, the files it names,
their headers, where each tensor lies. Mistakes are `ConfigError`s of one line that name the file or the key.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.common import disk
from moetrain.common.errors import ConfigError, short
from moetrain.config.architecture import CONFIG, read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TABLE = "weights.json"  # of what a run keeps of a folder: which tensors it holds
MOST_INDEX_BYTES = 1 << 28
OPEN_FILES = 8  # at a time
DTYPES = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Rows = slice | Sequence[int] | None  # of the first dimension; None: all


class Lazy(Protocol):
    """A tensor that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """What `read` returns."""
        ...

    def read(self, rows: Rows = None) -> Tensor:
        """Return these rows, or all, in memory of their own; only their bytes are read.

        Raises `ConfigError` where the file cannot be read.
        """
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in one of the files, as it lies there."""

    folder: "Folder" = field(repr=False)
    key: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: Rows = None) -> Tensor:
        """Return these rows, or all, in memory of their own; see `Lazy`."""
        if not self.shape:
            return self.folder.read(self, None)
        runs = list(find_runs(rows, self.shape[0]))
        out = torch.empty(sum(end - begin for begin, end in runs), *self.shape[1:], dtype=self.dtype)
        done = 0
        for begin, end in runs:
            out[done : done + end - begin] = self.folder.read(self, slice(begin, end))
            done += end - begin
        return out


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written, and lies nowhere yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, rows: Rows = None) -> Tensor:
        """Raise `ValueError`."""
        raise ValueError("a tensor that is to be written has no values")


class Folder:
    """A folder that has been opened by `open_folder`."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """`config`: what its config.json holds."""
        self.path, self.config = path, config
        self.tensors: dict[str, Stored] = {}  # by key, in the order of the files
        self._files: dict[str, Any] = {}

    def read(self, stored: Stored, rows: slice | None) -> Tensor:
        """Return rows of a tensor as a view of the file. Raises `ConfigError` where it cannot be read."""
        try:
            part = self._open(stored.file).get_slice(stored.key)
            found: Tensor = part[...] if rows is None else part[rows]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model.path={self.path}: {stored.file}: {stored.key} cannot be read ({error})") from None
        return found

    def bad(self, rule: str) -> ConfigError:
        """Return the error of a mistake in this folder."""
        return ConfigError(f"model.path={self.path}: {rule}")

    def _open(self, file: str) -> Any:
        """The file, open; a few stay so."""
        if file not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files)))
            self._files[file] = _open_file(self, file)
        return self._files[file]


def open_folder(path: str | Path) -> Folder:
    """Open a folder with `config.json` and `model.safetensors` or its index and shards; no weight is read.

    Raises `ConfigError` for whatever cannot be right: a file that is missing, cut or of a damaged header, a key that
    does not lie where the index says, or in no file of the index, or in two.
    """
    folder = Folder(Path(path), read_config(path))
    index = folder.path / INDEX
    if index.is_file():
        _read_shards(folder, _read_index(folder, index))
    elif (folder.path / SINGLE).is_file():
        folder.tensors = {stored.key: stored for stored in _read_header(folder, SINGLE)}
    else:
        others = sorted(p.name for p in folder.path.glob("*.bin"))
        advice = f"; {others[0]} is a pickle, which may run code and is not read" if others else ""
        raise folder.bad(f"has neither {SINGLE} nor {INDEX}{advice}")
    return folder


def has_weights(path: str | Path) -> bool:
    """Whether a folder has safetensors that `open_folder` would open."""
    return any((Path(path) / name).is_file() for name in (INDEX, SINGLE))


def keep_table(path: str | Path, kept: Path) -> None:
    """Write which tensors the folder at `path` holds, without their values, into the folder `kept`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {key: [names[stored.dtype], stored.shape] for key, stored in open_folder(path).tensors.items()}
    disk.write(kept / TABLE, json.dumps(tensors))


def open_kept(kept: Path) -> Folder | None:
    """Return what `keep_table` wrote, as a folder whose tensors cannot be read; None where there is nothing of it."""
    found = disk.read_json(kept / TABLE)
    if not isinstance(found, dict):
        return None
    folder = Folder(kept, read_config(kept))
    for key, (dtype, shape) in found.items():
        folder.tensors[key] = Stored(folder, key, TABLE, tuple(shape), DTYPES[dtype])
    return folder


def read_config(path: str | Path) -> dict[str, Any]:
    """Return what `config.json` in a folder holds. Raises `ConfigError`."""
    if not (Path(path) / CONFIG).is_file():
        raise ConfigError(f"model.path={path}: has no {CONFIG}")
    return read_json(path)


def find_runs(rows: Rows, size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the runs of neighbouring rows, of `size` rows in all."""
    if rows is None:
        rows = slice(None)
    if isinstance(rows, slice):
        begin, end, _ = rows.indices(size)
        yield begin, max(begin, end)
        return
    begin = end = rows[0] if rows else 0
    for row in rows:
        if row != end:
            yield begin, end
            begin = row
        end = row + 1
    yield begin, end


def _read_index(folder: Folder, index: Path) -> dict[str, str]:
    """Key -> file. Raises `ConfigError`."""
    try:
        found = json.loads(disk.read(index, MOST_INDEX_BYTES))
        places = found["weight_map"]
        sound = all(isinstance(file, str) for file in places.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise folder.bad(f"{INDEX} is damaged") from None
    if not sound or not places:
        raise folder.bad(f"{INDEX} must map keys to files in weight_map")
    for key, file in places.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise folder.bad(f"{INDEX}: {short(key)} must lie in a safetensors file of the folder, not {short(file)}")
    return places


def _read_shards(folder: Folder, places: Mapping[str, str]) -> None:
    """Take what all files of the index hold. Raises `ConfigError` where files and index differ."""
    for file in dict.fromkeys(places.values()):
        for stored in _read_header(folder, file):
            if stored.key not in places:
                raise folder.bad(f"{file} has {stored.key}, which {INDEX} does not name")
            if places[stored.key] != file:
                raise folder.bad(f"{file} has {stored.key}, which lies in {places[stored.key]} by {INDEX}")
            folder.tensors[stored.key] = stored
    for key, file in places.items():
        if key not in folder.tensors:
            raise folder.bad(f"{INDEX} says that {short(key)} is in {file}, which has it not")


def _read_header(folder: Folder, file: str) -> list[Stored]:
    """The tensors in a file. Raises `ConfigError`."""
    tensors = _open_file(folder, file)
    out = []
    for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
        part = tensors.get_slice(key)
        dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
        if dtype not in DTYPES:
            raise folder.bad(f"{file}: {key} is {dtype}; must be one of {', '.join(DTYPES)}")
        if math.prod(shape) >= 1 << 48:
            raise folder.bad(f"{file}: {key} has shape {list(shape)}")
        out.append(Stored(folder, key, file, shape, DTYPES[dtype]))
    return out


def _open_file(folder: Folder, file: str) -> Any:
    """Raises `ConfigError`; safetensors itself checks that header and length fit, and that no tensors overlap."""
    if not (folder.path / file).is_file():
        raise folder.bad(f"{file} is missing")
    try:
        return safe_open(folder.path / file, "pt")
    except (SafetensorError, OSError) as error:
        raise folder.bad(f"{file} is damaged or cut ({error})") from None
