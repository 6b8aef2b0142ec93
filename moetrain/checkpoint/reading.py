"""The weights in a checkpoint, read entry by entry in one process, whatever ranks wrote it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint import manifest
from moetrain.checkpoint.loading import mismatches
from moetrain.checkpoint.manifest import ManifestEntry
from moetrain.checkpoint.slices import DTYPE, join_entries, open_folder, read_whole
from moetrain.config import ConfigError
from moetrain.engine.entries import MODEL


class SavedModel:
    """The `model/` entries of a checkpoint."""

    def __init__(self, path: Path) -> None:
        """`path`: a folder `step_N`. Raises `ConfigError` where it is incomplete."""
        if said := manifest.problem(path):
            raise ConfigError(f"checkpoint={path}: {said}")
        self.path = path
        prefix = f"{MODEL}/"
        self._saved = {n: e for n, e in manifest.read_entries(path).items() if n.startswith(prefix)}
        self.entries: dict[str, ManifestEntry] = {
            n.removeprefix(prefix): e for n, e in join_entries(path, self._saved).items()
        }
        self._open = open_folder(path)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all its files."""
        return sum(size for size, _ in manifest.read(self.path)["files"].values())

    def check_bytes(self, progress: Callable[[int], object]) -> None:
        """See that every file is, byte by byte, the one that was saved, and its weights finite.

        `progress` is called with the bytes that have been read. Raises `ConfigError`.
        """
        for name, (size, _) in manifest.read(self.path)["files"].items():
            if found := manifest.damaged(self.path, [name]) or mismatches(self.path, [name]):
                raise ConfigError(f"checkpoint={self.path}: {found[0]}")
            progress(size)

    def find(self, name: str) -> ManifestEntry:
        """Return where an entry lies. Raises `ConfigError` where there is none of the name."""
        if name not in self.entries:
            raise ConfigError(f"checkpoint={self.path}: has no {name}, which the model needs")
        return self.entries[name]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Return the rows `begin : end` of an entry, or all, in the dtype that was saved."""
        entry, key = self.find(name), f"{MODEL}/{name}"
        if key not in self._saved:  # an expert that lies in slices
            return read_whole(self._saved, key, self._open)[begin:end]
        rows = entry.shape[0] if entry.shape else 1
        end = rows if end is None else end
        width = entry.numel // max(1, rows)
        first, last = begin * width, end * width
        out = torch.empty(last - first, dtype=DTYPE[entry.dtype])
        for file, low, high in entry.pieces:
            a, b = max(low, first), min(high, last)
            if a < b:
                out[a - first : b - first] = self._open(file).get_tensor(key).view(-1)[a - low : b - low]
        return out.view(end - begin, *entry.shape[1:]) if entry.shape else out.view(())
