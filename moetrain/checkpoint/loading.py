"""Loading: every rank reads the ranges it holds, whatever ranks and engine wrote them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.checkpoint import manifest
from moetrain.checkpoint.manifest import ManifestEntry
from moetrain.checkpoint.slices import DTYPE, cut_slice, join_entries, open_folder, read_whole
from moetrain.config import ConfigError
from moetrain.engine.entries import DTYPES, MODEL, MOMENTS, Checkpointable, Entries, expected, list_base, split_name
from moetrain.models.base import LanguageModel


class _EntryPart(NamedTuple):
    """Elements that one file has for one entry here."""

    name: str
    within: slice  # of the piece in the file
    out: Tensor


@torch.no_grad()
def load(path: Path, engine: Checkpointable, optimizer: bool = True) -> None:
    """Fill the engine with a checkpoint; without `optimizer`, its model alone.

    Raises `ConfigError` where an entry is missing, of another shape, or would be rounded. The files are not checked
    here: see `agreeing.first_whole`.
    """
    entries = engine.entries(optimizer)
    _fill(path, entries)
    engine.restored(entries, manifest.progress(path)[0])


@torch.no_grad()
def load_weights(path: Path, engine: Checkpointable) -> None:
    """Fill the model of the engine with the weights of a checkpoint; no step is done. Raises as `load` does."""
    entries = engine.entries(optimizer=False)
    _fill(path, entries)
    engine.restored(entries, 0)


@torch.no_grad()
def load_base(path: Path, model: LanguageModel) -> None:
    """Fill all of `model` but its adapters with the weights of a checkpoint. Raises as `load` does."""
    _fill(path, list_base(model))


def _fill(path: Path, entries: Entries) -> None:
    saved = manifest.read_entries(path)
    recut = {} if saved.keys() >= entries.keys() else _find_recut(path, saved, entries)
    if recut:
        entries = {name: part for name, part in entries.items() if name not in recut}
    _fill_recut(path, saved, recut)
    for file, parts in _parts(path, entries).items():
        with safe_open(path / file, "pt") as tensors:
            for name, within, out in parts:
                out.copy_(tensors.get_tensor(name).view(-1)[within])


def _find_recut(path: Path, saved: dict[str, ManifestEntry], entries: Entries) -> Entries:
    """Return the entries of experts that were cut into other slices, or into none, where they were saved."""
    there = join_entries(path, saved)
    return {name: part for name, part in entries.items() if name not in saved and split_name(name)[0] in there}


def _fill_recut(path: Path, saved: dict[str, ManifestEntry], entries: Entries) -> None:
    """Read each expert whole, one matrix at a time, and fill the entries that are parts of it."""
    open_file, by_expert = open_folder(path), defaultdict(list)
    for name, part in entries.items():
        by_expert[split_name(name)[0]].append((name, part))
    for whole, parts in by_expert.items():
        value = read_whole(saved, whole, open_file)
        for name, (shape, begin, values) in parts:
            one = cut_slice(whole, value, *split_name(name)[1:])
            if tuple(one.shape) != tuple(shape):
                shapes = f"has shape {list(one.shape)}, this configuration needs {list(shape)}"
                raise ConfigError(f"checkpoint={path}: {name} {shapes}")
            _check_rounding(path, name, DTYPES[value.dtype], values)
            values.copy_(one.reshape(-1)[begin : begin + len(values)])


def _check_rounding(path: Path, name: str, saved: str, values: Tensor) -> None:
    if torch.promote_types(DTYPE[saved], values.dtype) != values.dtype:
        here = DTYPES[values.dtype]
        raise ConfigError(f"checkpoint={path}: {name} is {saved} and would be rounded to {here} here")


def mismatches(path: Path, names: Sequence[str]) -> list[str]:
    """Return a line for the first of these files of a checkpoint that has not what `entries.json` says, dtype, length
    and all, or weights that are not finite."""
    try:
        saved = manifest.read_entries(path)
    except ConfigError as error:
        return [str(error).removeprefix(f"checkpoint={path}: ")]
    wanted: dict[str, list[tuple[str, str, int]]] = {name: [] for name in names}
    for name, entry in saved.items():
        for file, begin, end in entry.pieces:
            if file in wanted:
                wanted[file].append((name, entry.dtype, end - begin))
    for file, pieces in wanted.items():
        if not pieces:
            continue
        try:
            with safe_open(path / file, "pt") as tensors:
                for name, dtype, size in pieces:
                    found = tensors.get_tensor(name)
                    if found.dtype != DTYPE[dtype] or found.numel() != size:
                        return [f"{file}: {name} has {found.numel()} × {found.dtype}, {size} × {dtype} were saved"]
                    if name.startswith(f"{MODEL}/") and not found.isfinite().all():
                        return [f"{file}: {name} has values that are not finite"]
        except (SafetensorError, OSError) as error:
            return [f"{file} cannot be read ({error})"]
    return []


def check_entries(path: Path, model: LanguageModel, states: tuple[str, ...] = MOMENTS) -> None:
    """Check that the checkpoint has what the whole, unsharded `model` is made of, the optimizer's `states` included,
    and no more parameters.

    Raises `ConfigError` that names the first difference.
    """
    _check_against(path, expected(model, states), states)


def check_base(path: Path, model: LanguageModel) -> None:
    """Check that the checkpoint has all of the whole, unsharded `model` but its adapters. Raises `ConfigError`."""
    _check_against(path, {name: part.shape for name, part in list_base(model).items()}, ())


def _check_against(path: Path, wanted: Mapping[str, tuple[int, ...]], states: tuple[str, ...]) -> None:
    saved = join_entries(path, manifest.read_entries(path))
    for name, shape in wanted.items():
        _check(path, saved, name, shape)
    parameters = {name.partition("/")[2] for name in saved if name.partition("/")[0] in states}
    for name in sorted(parameters):
        if f"{MODEL}/{name}" not in wanted:
            raise ConfigError(f"checkpoint={path}: has {MODEL}/{name}, which this configuration has no place for")


def _check(path: Path, saved: dict[str, ManifestEntry], name: str, shape: tuple[int, ...]) -> ManifestEntry:
    if name not in saved:
        raise ConfigError(f"checkpoint={path}: has no {name}, which this configuration needs")
    if saved[name].shape != shape:
        raise ConfigError(
            f"checkpoint={path}: {name} has shape {list(saved[name].shape)}, this configuration needs {list(shape)}"
        )
    return saved[name]


def _parts(path: Path, entries: Entries) -> dict[str, list[_EntryPart]]:
    """By file."""
    saved = manifest.read_entries(path)
    out = defaultdict(list)
    for name, (shape, begin, values) in entries.items():
        entry = _check(path, saved, name, shape)
        end, found = begin + len(values), 0
        _check_rounding(path, name, entry.dtype, values)
        for file, first, last in entry.pieces:
            low, high = max(first, begin), min(last, end)
            if low < high:
                out[file].append(_EntryPart(name, slice(low - first, high - first), values[low - begin : high - begin]))
                found += high - low
        if found != len(values):
            raise ConfigError(f"checkpoint={path}: {manifest.ENTRIES} has {found} of {len(values)} elements of {name}")
    return out
