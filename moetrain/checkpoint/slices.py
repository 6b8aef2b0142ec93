"""Experts that were cut into slices where a checkpoint was written, or are where it is read: any number into any other.

A slice is an entry of its own, `NAME[i/r]`; nothing else in a checkpoint depends on r.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moetrain.checkpoint.manifest import ENTRIES, ManifestEntry
from moetrain.common.errors import short
from moetrain.config import ConfigError
from moetrain.engine.entries import DTYPES, name_slice, split_name
from moetrain.moe.slices import cut_matrices, join_matrices

DTYPE = {name: dtype for dtype, name in DTYPES.items()}
OpenFile = Callable[[str], Any]  # of a checkpoint: the tensors in the file of that name


def join_entries(path: Path, saved: Mapping[str, ManifestEntry]) -> dict[str, ManifestEntry]:
    """Return the entries of whole experts that a checkpoint has; those that lie in slices name no pieces.

    Raises `ConfigError` where a slice is missing.
    """
    out: dict[str, ManifestEntry] = {}
    slices: dict[str, dict[int, ManifestEntry]] = {}
    numbers: dict[str, int] = {}
    for name, entry in saved.items():
        whole, place, number = split_name(name)
        if number == 1:
            out[name] = entry
        else:
            slices.setdefault(whole, {})[place] = entry
            numbers[whole] = max(number, numbers.get(whole, 0))
    for name, parts in slices.items():
        number, one = numbers[name], next(iter(parts.values()))
        if name in out or sorted(parts) != [*range(number)] or any(part[:2] != one[:2] for part in parts.values()):
            raise ConfigError(f"checkpoint={path}: {ENTRIES} is damaged: {short(name)} must have {number} equal slices")
        matrix = torch.empty(number, *one.shape, device="meta")
        out[name] = ManifestEntry(one.dtype, tuple(_join(name, matrix).shape), ())
    return out


def read_whole(saved: Mapping[str, ManifestEntry], name: str, open_file: OpenFile) -> Tensor:
    """Return the entry `name` of a whole expert, which `join_entries` has found, from wherever it lies."""
    if name in saved:
        return _read(saved[name], name, open_file)
    number = next(n for n in range(2, len(saved) + 2) if name_slice(name, 0, n) in saved)
    names = [name_slice(name, place, number) for place in range(number)]
    return _join(name, torch.stack([_read(saved[one], one, open_file) for one in names]))


def cut_slice(name: str, whole: Tensor, place: int, slices: int) -> Tensor:
    """Return a slice of the matrix that is the entry `name` of a whole expert."""
    return cut_matrices(name.rpartition(".")[2], whole[None], slices)[place] if slices > 1 else whole


def open_folder(path: Path) -> OpenFile:
    """Return what opens the files of a checkpoint, each once."""
    files: dict[str, Any] = {}

    def open_file(name: str) -> Any:
        if name not in files:
            files[name] = safe_open(path / name, "pt")
        return files[name]

    return open_file


def _join(name: str, parts: Tensor) -> Tensor:
    whole: Tensor = join_matrices(name.rpartition(".")[2], parts, len(parts))[0]
    return whole


def _read(entry: ManifestEntry, name: str, open_file: OpenFile) -> Tensor:
    out = torch.empty(entry.numel, dtype=DTYPE[entry.dtype])
    for file, begin, end in entry.pieces:
        out[begin:end] = open_file(file).get_tensor(name).view(-1)
    return out.view(entry.shape)
