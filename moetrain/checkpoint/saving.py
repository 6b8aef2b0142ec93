"""Saving: a step waits for a copy to host memory, a thread writes it with collectives of its own.

Every rank writes one file, straight from its copy. The folder takes its name when all is on the disk. Where a disk is
full, the ranks agree that nothing was saved; what was saved before stays.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moetrain
from moetrain.checkpoint import files, manifest
from moetrain.checkpoint.fetching import FETCHED
from moetrain.checkpoint.files import WIDTH, TensorBlock
from moetrain.checkpoint.manifest import ManifestEntry
from moetrain.checkpoint.remote import Uploader, open_remote
from moetrain.common import disk
from moetrain.config import Config, find_r
from moetrain.distributed.comm import gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.engine.entries import DTYPES, Checkpointable, Entries
from moetrain.engine.saved_costs import COSTS

PATIENCE_SECONDS = 10.0  # for a save under way, when the run ends with an error


class EntryPiece(NamedTuple):
    """A range of an entry's elements, as one rank writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the whole entry
    begin: int
    end: int

    def block(self) -> TensorBlock:
        """Return the block of a file: whole rows keep their shape, other ranges are flat."""
        row = int(torch.Size(self.shape[1:]).numel())
        size = self.end - self.begin
        rows = bool(self.shape) and self.begin % row == 0 and size % row == 0
        shape = (size // row, *self.shape[1:]) if rows else () if not self.shape else (size,)
        return TensorBlock(self.name, self.dtype, shape, size * WIDTH[self.dtype])


Holding = Mapping[str, tuple[str, Sequence[int], int, int]]  # name -> dtype, shape, begin, end: what a rank has


def holding_of(held: Entries) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    return {n: (DTYPES[h.values.dtype], h.shape, h.begin, h.begin + len(h.values)) for n, h in held.items()}


def share_out(holdings: Sequence[Holding]) -> list[list[EntryPiece]]:
    """Return what each rank writes: every range once, by the rank that has least to write among those that hold it.

    Raises `RuntimeError` where ranks differ about an entry or their ranges do not tile it.
    """
    about: dict[str, tuple[str, tuple[int, ...]]] = {}
    holders: dict[tuple[str, int, int], list[int]] = {}
    for rank, holding in enumerate(holdings):
        for name, (dtype, shape, begin, end) in holding.items():
            if about.setdefault(name, (dtype, tuple(shape))) != (dtype, tuple(shape)):
                raise RuntimeError(f"{name}: {dtype} {shape} on rank {rank}, {about[name]} on another")
            if begin < end:
                holders.setdefault((name, begin, end), []).append(rank)
    reached = dict.fromkeys(about, 0)
    for name, begin, end in sorted(holders):
        if begin != reached[name]:
            raise RuntimeError(f"{name}: the ranks' ranges overlap or leave a gap at element {reached[name]}")
        reached[name] = end
    for name, (_, shape) in about.items():
        if reached[name] != torch.Size(shape).numel():
            raise RuntimeError(f"{name}: the ranks hold {reached[name]} elements of {shape}")
    out: list[list[EntryPiece]] = [[] for _ in holdings]
    load = [0] * len(holdings)
    for (name, begin, end), ranks in sorted(holders.items(), key=lambda item: (len(item[1]), item[0])):
        rank = min(ranks, key=lambda r: (load[r], r))
        piece = EntryPiece(name, *about[name], begin, end)
        out[rank].append(piece)
        load[rank] += piece.block().bytes
    return [sorted(pieces, key=lambda p: (-WIDTH[p.dtype], p.name)) for pieces in out]  # each aligned to its width


class Unsaved(Exception):
    """On one rank at least, something kept a checkpoint from being saved."""


class Behind:
    """Work in a thread of its own, one piece at a time, behind the training loop."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None  # what the work leaves here, `wait` raises

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self._thread = threading.Thread(target=work, args=args, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last piece is done. Raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure


class Saver(Behind):
    """Saves the states of `engine` into a run's folder; `data`: the corpus's fingerprint; `first`: steps done when the
    run starts here.

    All ranks make one, and call `save` and `wait` at the same steps. Its context ends when the last save has.
    """

    def __init__(
        self, folder: Path, config: Config, mesh: Mesh, engine: Checkpointable, data: Mapping[str, str], first: int = 0
    ) -> None:
        self._folder, self._config, self._mesh, self._engine = folder, config, mesh, engine
        self._data, self._source = dict(data), _source()
        super().__init__()
        texts = gather_texts(json.dumps(holding_of(engine.entries())), mesh.saving)
        holdings = [json.loads(text) for text in texts]
        self._shares = share_out(holdings)
        self._pieces = self._shares[mesh.rank]
        self.saved = first  # steps done in the newest whole checkpoint, as far as this rank knows
        self._buffer: Tensor | None = None
        self._news: list[str] = []
        self._uploader: Uploader | None = None
        if mesh.is_main:
            shutil.rmtree(folder / FETCHED, ignore_errors=True)  # every rank has loaded its states
            self._costs = (folder / COSTS).read_bytes()  # whatever becomes of the file while the run goes
            for path in manifest.folders(folder):
                if manifest.step_of(path) > first:  # damaged, or this run would not start before it
                    path.rename(_free(path.with_name(f"{path.name}.damaged")))
            if (remote := open_remote(config)) is not None:
                self._uploader = Uploader(remote, config)
                if (newest := folder / "checkpoints" / f"step_{first}").is_dir():
                    self._uploader.add(newest)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or issubclass(kind, FloatingPointError):  # which every rank raises: all can finish
            self.finish()
        elif self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    def save(self, step: int, samples: int) -> float:
        """Begin to write `checkpoints/step_N`, after the last one. Returns the seconds for which the caller waited."""
        began = time.perf_counter()
        self.wait()
        copied = self._copy(self._engine.entries())
        self._start(self._work, step, samples, copied)
        return time.perf_counter() - began

    def news(self) -> list[str]:
        """Return what was not saved or uploaded since the last call, and why; of uploads rank 0 alone knows."""
        out, self._news = self._news, []
        return [*out, *(self._uploader.news() if self._uploader is not None else [])]

    def finish(self) -> None:
        """Wait until the last checkpoint is written, and uploaded or given up. All ranks call it."""
        self.wait()
        if self._config.checkpoint.remote is not None:
            if self._uploader is not None:
                self._uploader.wait()
            gather_texts("", self._mesh.saving)

    def _copy(self, held: Entries) -> torch.cuda.Event | None:
        """Into the buffer, whose layout is the file's. The event says when a GPU is through with it."""
        gpu = self._mesh.device.type == "cuda"
        blocks = [piece.block() for piece in self._pieces]
        if self._buffer is None:
            self._buffer = torch.empty(sum(b.bytes for b in blocks), dtype=torch.uint8, pin_memory=gpu)
        for block, place in zip(blocks, self._buffer.split([b.bytes for b in blocks]), strict=True):
            values = held[block.name].values
            place.view(values.dtype).copy_(values, non_blocking=True)
        if not gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _work(self, step: int, samples: int, copied: torch.cuda.Event | None) -> None:
        path = self._folder / "checkpoints" / f"step_{step}"
        part = path.with_name(f".{path.name}.part")
        try:
            self._together(lambda: self._prepare(part) if self._mesh.is_main else None)
            if copied is not None:
                copied.synchronize()
            stamps = dict(self._together(lambda: self._write_own(part)))
            self._together(lambda: self._finish(part, path, step, samples, stamps) if self._mesh.is_main else None)
            self.saved = step
            if self._uploader is not None:
                self._uploader.add(path)
        except Unsaved as why:
            if self._mesh.is_main:
                shutil.rmtree(part, ignore_errors=True)
            self._news.append(f"checkpoint of step {step} was not saved: {why}. Earlier checkpoints are kept.")
        except BaseException as error:
            self._failure = error

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gave on every rank. Raises `Unsaved` on all of them where it failed on one."""
        gave, failed = None, ""
        try:
            gave = work()
        except OSError as error:
            failed = f"{error.strerror or error} (rank {self._mesh.rank})"
        except Exception as error:
            self._failure, failed = error, f"{error!r} (rank {self._mesh.rank})"
        said = [json.loads(text) for text in gather_texts(json.dumps([failed, gave]), self._mesh.saving)]
        if found := [failed for failed, _ in said if failed]:
            raise Unsaved(found[0])
        return [gave for _, gave in said]

    def _prepare(self, part: Path) -> None:
        """An empty folder, on a disk with room. What stopped saves left behind goes."""
        for left in part.parent.glob(".step_*"):
            _remove(left)
        part.mkdir(parents=True)
        needed = sum(piece.block().bytes for pieces in self._shares for piece in pieces)
        free = shutil.disk_usage(part).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed, {free:,} are free")

    def _write_own(self, part: Path) -> tuple[str, files.FileStamp]:
        assert self._buffer is not None
        name = _file_of(self._mesh.rank)
        header = files.header([piece.block() for piece in self._pieces])
        return name, files.write(part / name, header, self._buffer.numpy().data)

    def _finish(self, part: Path, path: Path, step: int, samples: int, stamps: dict[str, files.FileStamp]) -> None:
        for name, (size, _) in stamps.items():
            if not (part / name).is_file() or (part / name).stat().st_size != size:
                raise OSError(
                    errno.ENOENT, f"rank 0 does not see {name}: run.dir must be a folder that all hosts share"
                )
        entries = manifest.entries_text(self._entries())
        stamps[manifest.ENTRIES] = files.write(part / manifest.ENTRIES, entries.encode())
        stamps[COSTS] = files.write(part / COSTS, self._costs)
        body = {
            "step": step,
            "samples": samples,
            "code": {"moetrain": moetrain.__version__, "source": self._source, "torch": torch.__version__},
            "layout": layout_of(self._config, self._mesh),
            "data": self._data,
            "files": stamps,
            "config": self._config.model_dump(mode="json"),
        }
        manifest.write(part, body)
        disk.sync(part)
        part.rename(path)
        with suppress(OSError):  # it is there, whatever becomes of the old ones
            disk.sync(path.parent)
            for old in self._too_old():
                gone = old.with_name(f".{old.name}.gone")
                old.rename(gone)
                _remove(gone)

    def _entries(self) -> dict[str, ManifestEntry]:
        out: dict[str, ManifestEntry] = {}
        found = ((piece, rank) for rank, pieces in enumerate(self._shares) for piece in pieces)
        for piece, rank in sorted(found):
            pieces = [*(out[piece.name].pieces if piece.name in out else []), (_file_of(rank), piece.begin, piece.end)]
            out[piece.name] = ManifestEntry(piece.dtype, piece.shape, pieces)
        return out

    def _too_old(self) -> list[Path]:
        keep = self._config.checkpoint
        return [
            path
            for path in manifest.folders(self._folder)[keep.keep :]
            if (not keep.keep_every or manifest.step_of(path) % keep.keep_every)
            and not (self._uploader is not None and self._uploader.needs(path))
        ]


def layout_of(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return how states are cut: equal ones are held alike, rank by rank."""
    return {
        "engine": config.engine.name,
        "ranks": mesh.world,
        "ep": mesh.ep.size,
        "r": find_r(config, mesh.ep.size),
        "dp_shard": mesh.world // mesh.dp_replicate,
        "dp_replicate": mesh.dp_replicate,
    }


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _free(path: Path) -> Path:
    """This name, or the next that nobody has."""
    names = (path.with_name(f"{path.name}{n or ''}") for n in range(1000))
    return next(p for p in names if not p.exists())


def _remove(folder: Path) -> None:
    """A folder with all that is in it; of a link, the link alone. Raises `OSError`."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _source() -> str:
    """Of the code that runs: a digest of the package's source."""
    package = Path(moetrain.__file__).parent
    sources = sorted(package.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
