"""From a checkpoint to a folder that `from_pretrained` loads, streamed tensor by tensor, whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint import files
from moetrain.checkpoint.files import TensorBlock
from moetrain.checkpoint.reading import SavedModel
from moetrain.checkpoint.remote import retry
from moetrain.common import disk
from moetrain.common.store import Store, StoreError
from moetrain.config import Config, ConfigError
from moetrain.engine.entries import DTYPES
from moetrain.hf import presets

PIECE = 1 << 24  # elements at a time
CONFIGS = ("config.json", "adapter_config.json")  # without which nothing loads
STEM, END = "model", ".safetensors"
Progress = Callable[[int], object]  # called with the bytes that have been done


@dataclass(frozen=True)
class Exported:
    """A tensor of the folder that is written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]  # its values in their order, of any dtype

    @property
    def block(self) -> TensorBlock:
        return TensorBlock(
            self.key, DTYPES[self.dtype], self.shape, torch.Size(self.shape).numel() * self.dtype.itemsize
        )


def list_preset(config: Config, saved: SavedModel, dtype: torch.dtype) -> list[Exported]:
    """Return the tensors of one of our own models under the names of transformers."""
    out = []
    for key, entry, half in presets.list_keys(config):
        shape = saved.find(entry).shape
        rows = shape[0] // 2 if half is not None else shape[0]
        begin = rows * (half or 0)
        pieces = partial(_read_in_pieces, saved, entry, begin, begin + rows)
        out.append(Exported(key, dtype, (rows, *shape[1:]), pieces))
    return out


def write_folder(
    out: Path,
    tensors: Sequence[Exported],
    texts: Mapping[str, bytes],
    shard_bytes: int,
    progress: Progress,
    stem: str = STEM,
) -> None:
    """Write `out`, which appears when the last byte is on the disk.

    Arguments:
        out: the folder, which must not be there.
        tensors: what `model.safetensors` holds, or the shards beside an index; `stem`: in place of `model`.
        texts: name and content of the other files.
        shard_bytes: most of a shard, unless a tensor alone has more.
        progress: called with the bytes that have been written.

    Raises `ConfigError` where the folder is there already or cannot be written.
    """
    check_target(out)
    part = out.with_name(f".{out.name}.{secrets.token_hex(8)}.part")
    needed = sum(tensor.block.bytes for tensor in tensors)
    try:
        part.mkdir(parents=True)
        if (free := shutil.disk_usage(part).free) < needed:
            raise ConfigError(f"--out={out}: {needed:,} bytes are needed, {free:,} are free")
        places: dict[str, str] = {}
        shards = _cut_shards(tensors, shard_bytes)
        for number, shard in enumerate(shards, 1):
            name = f"{stem}{END}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}{END}"
            _write_shard(part / name, shard, progress)
            places |= {tensor.key: name for tensor in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": needed}, "weight_map": dict(sorted(places.items()))}
            texts = {**texts, f"{stem}{END}.index.json": f"{json.dumps(index, indent=2)}\n".encode()}
        for name, content in texts.items():
            files.write(part / name, content)
        disk.sync(part)
        part.rename(out)
        disk.sync(out.parent)
    except OSError as error:
        raise ConfigError(f"--out={out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_store(out: Store, write: Callable[[Path], None], near: Path, progress: Progress) -> None:
    """Have `write` make a folder in the folder `near`, upload it to `out` and remove it.

    The configuration, without which nothing loads, is uploaded last. Raises `ConfigError` where the store has files
    there already, or fails.
    """
    aside = near / f".export.{secrets.token_hex(8)}.part"
    try:
        check_store(out)
        write(aside)
        names = sorted((path.name for path in aside.iterdir()), key=lambda name: (name in CONFIGS, name))
        for name in names:
            retry(partial(out.upload, aside / name, name))
            progress((aside / name).stat().st_size)
    except StoreError as error:
        raise ConfigError(f"--out={out.url}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_store(out: Store) -> None:
    """Raise `ConfigError` where a store has files in the folder already; `StoreError` where it fails."""
    if retry(out.list_names):
        raise ConfigError(f"--out={out.url}: is there already; take a name that nothing has")


def check_target(out: Path) -> None:
    """Raise `ConfigError` where a folder to be written is there already."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out={out}: is there already; take a name that nothing has")


def _read_in_pieces(saved: SavedModel, entry: str, begin: int, end: int) -> Iterator[Tensor]:
    shape = saved.find(entry).shape
    step = max(1, PIECE // max(1, torch.Size(shape[1:]).numel()))
    for first in range(begin, end, step):
        yield saved.read(entry, first, min(first + step, end))


def _cut_shards(tensors: Sequence[Exported], most: int) -> list[list[Exported]]:
    out: list[list[Exported]] = [[]]
    size = 0
    for tensor in tensors:
        if out[-1] and size + tensor.block.bytes > most:
            out.append([])
            size = 0
        out[-1].append(tensor)
        size += tensor.block.bytes
    return out


def _write_shard(path: Path, tensors: Sequence[Exported], progress: Progress) -> None:
    with path.open("xb") as out:
        out.write(files.header([tensor.block for tensor in tensors]))
        for tensor in tensors:
            left = tensor.block.bytes
            for piece in tensor.pieces():
                flat = piece.to(tensor.dtype).contiguous().view(-1).view(torch.uint8)
                out.write(flat.numpy().data)
                left -= flat.numel()
                progress(flat.numel())
            if left:
                raise RuntimeError(f"{tensor.key}: {left} bytes of {tensor.block.bytes} were not written")
        out.flush()
        os.fsync(out.fileno())
