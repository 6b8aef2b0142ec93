"""Snapshots in memory: the states of every rank, every so many steps, on its own host and on a peer host.

A step waits while its states are copied into one of two files of shared memory, in turn. A thread stamps the copy and
sends it to the peer. A file is written over only when all ranks have stamped the newer one: one whole snapshot is
always there, whichever worker or host is lost.
"""

import errno
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint import files
from moetrain.checkpoint.files import TensorBlock
from moetrain.checkpoint.saving import Behind, holding_of
from moetrain.common import disk
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine.entries import DTYPES, Checkpointable, Entries
from moetrain.recovery import memory
from moetrain.recovery.memory import SLOTS, SnapshotStamp


def keepers(hosts: Sequence[str]) -> list[int | None]:
    """Return which rank of the next host keeps a copy for the rank on each of these hosts; None where there is one."""
    names = list(dict.fromkeys(hosts))
    ranks = {name: [rank for rank, host in enumerate(hosts) if host == name] for name in names}
    if len(names) == 1:
        return [None] * len(hosts)
    out: list[int | None] = []
    for rank, host in enumerate(hosts):
        others = ranks[names[(names.index(host) + 1) % len(names)]]
        out.append(others[ranks[host].index(rank) % len(others)])
    return out


class Snapshots(Behind):
    """Takes them. All ranks make one and call `take` at the same steps, when `busy` is false on all of them."""

    def __init__(
        self, run: str, mesh: Mesh, engine: Checkpointable, layout: dict[str, Any], hosts: Sequence[str]
    ) -> None:
        """`run`: its identity; `hosts`: of every rank; `layout`: as in a checkpoint's manifest."""
        super().__init__()
        self._mesh, self._engine, self._layout, self._hosts = mesh, engine, layout, hosts
        self._place = memory.host_folder(run, hosts[mesh.rank])
        keeper = keepers(hosts)
        self._to = keeper[mesh.rank]
        self._from = [rank for rank, to in enumerate(keeper) if to == mesh.rank]
        there = [(stamp.step, slot.name) for slot, stamp in memory.stamps(self._place) if slot.name in SLOTS]
        newest = max(there, default=(0, SLOTS[1]))
        self._turn = (self._newest_of_all(2 * newest[0] + SLOTS.index(newest[1])) + 1) % 2
        self._clear_assembled()
        self._held: dict[tuple[str, int], Tensor] = {}  # (slot, rank) -> its file's memory
        self._too_small = False
        self._unstamped = self._said_so = False

    @property
    def busy(self) -> bool:
        """Tell whether the last one is still being stamped and sent."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def unstamped(self) -> bool:
        """Tell whether a stamp of the last one could not be written here: it does not count. Known when `busy` is
        false."""
        return self._unstamped

    def take(self, step: int, samples: int, again: bool = False) -> str | None:
        """Copy the states now, and do the rest in a thread.

        Returns what to say where there is no memory for it, and takes none.

        `again`: the last one is `unstamped` on some rank. Its file is written over, so that the one before it stays.
        """
        self.wait()
        if self._too_small:
            return None
        said = None
        if again:
            self._turn ^= 1
            if not self._said_so:
                said = f"an in-memory checkpoint was not kept: {memory.ROOT} of some host is full or cannot be written"
        self._said_so, self._unstamped = again, False
        slot, rank = self._place / SLOTS[self._turn], self._mesh.rank
        held = self._engine.entries()
        blocks = _blocks(held)
        header = files.header(blocks)
        size = len(header) + sum(block.bytes for block in blocks)
        if (SLOTS[self._turn], rank) not in self._held and (short := self._reserve(SLOTS[self._turn], size)):
            self._too_small = True
            return short
        self._turn ^= 1
        mapped = self._held[slot.name, rank]
        for owner in (rank, *self._from):
            memory.stamp_file(slot, owner).unlink(missing_ok=True)
        mapped[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for block, place in zip(blocks, mapped[len(header) :].split([b.bytes for b in blocks]), strict=True):
            values = held[block.name].values
            place.view(values.dtype).copy_(values, non_blocking=True)
        if self._mesh.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        stamp = SnapshotStamp(rank, step, samples, self._layout, size, "", holding_of(held))
        self._start(self._work, slot.name, stamp)
        return said

    def forget(self) -> None:
        """Remove the snapshots of a run that is complete, when the threads of all ranks are through with them."""
        self.wait()
        self._held.clear()
        all_reduce_sum(torch.zeros(1, device=self._mesh.device))
        if self._is_first_here:
            memory.remove(self._place)

    def _work(self, slot: str, stamp: SnapshotStamp) -> None:
        try:
            mapped = self._held[slot, stamp.rank]
            stamp = replace(stamp, crc32=f"{zlib.crc32(mapped.numpy().data):08x}")
            self._put_stamp(slot, stamp)
            under_way = [] if self._to is None else memory.start_sending_file(mapped, stamp, self._to, self._mesh)
            for source in self._from:
                theirs = memory.receive_stamp(source, self._mesh)
                memory.receive_file(self._held[slot, source], source, self._mesh)
                self._put_stamp(slot, theirs)
            for work in under_way:
                work.wait()
        except BaseException as error:
            self._failure = error

    def _put_stamp(self, slot: str, stamp: SnapshotStamp) -> None:
        """Have the file count; without room for the stamp, it does not."""
        try:
            memory.put_stamp(self._place / slot, stamp)
        except OSError:
            self._unstamped = True

    def _newest_of_all(self, mine: int) -> int:
        """2 · step + slot of the newest file that any rank sees."""
        seen = torch.zeros(self._mesh.world, dtype=torch.int64, device=self._mesh.device)
        seen[self._mesh.rank] = mine
        return int(all_reduce_sum(seen).max())

    def _reserve(self, slot: str, size: int) -> str | None:
        """Memory for this slot's files on this host. All ranks call it; where one has none, all say so."""
        sizes, failed = torch.zeros(2, self._mesh.world, dtype=torch.int64, device=self._mesh.device)
        sizes[self._mesh.rank] = size
        all_reduce_sum(sizes)
        self._clear_others(slot)
        for rank in (self._mesh.rank, *self._from):
            try:
                self._held[slot, rank] = memory.reserve(memory.data_file(self._place / slot, rank), int(sizes[rank]))
            except OSError as error:
                failed[self._mesh.rank] = error.errno or errno.EIO
        if (code := int(all_reduce_sum(failed).max())) == 0:
            return None
        for key in [key for key in self._held if key[0] == slot]:
            memory.data_file(self._place / slot, key[1]).unlink(missing_ok=True)
            del self._held[key]
        if not memory.ROOT.is_dir():
            return f"no in-memory checkpoints: there is no {memory.ROOT}"
        if code not in (errno.ENOSPC, errno.ENOMEM):
            said = memory.distrust_reason(self._place / slot) or f"{memory.root()} on some host: {os.strerror(code)}"
            return f"no in-memory checkpoints: {said}"
        here = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._mesh.rank]]
        most = 2 * len(here) * size * (1 if self._to is None else 2)
        return f"no in-memory checkpoints: {memory.ROOT} is too small, a host needs about {most / 2**20:,.0f} MiB there"

    def _clear_assembled(self) -> None:
        """What this start was loaded from, `restore.assemble`: all ranks have by now."""
        if memory.distrust_reason(self._place):
            return
        for path in self._place.glob(f"for_rank_{self._mesh.rank:05d}"):
            shutil.rmtree(path, ignore_errors=True)
        if self._is_first_here:
            shutil.rmtree(self._place / memory.FETCHED, ignore_errors=True)

    @property
    def _is_first_here(self) -> bool:
        """Of the ranks on its host."""
        return self._mesh.rank == self._hosts.index(self._hosts[self._mesh.rank])

    def _clear_others(self, slot: str) -> None:
        """Files of ranks that an earlier start had here, and unfinished ones; one rank a host does it."""
        if not self._is_first_here or memory.distrust_reason(self._place / slot):
            return
        here = {rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._mesh.rank]}
        keep = here | {rank for rank, to in enumerate(keepers(self._hosts)) if to in here}
        known = {f"rank_{rank:05d}" for rank in keep}
        disk.remove_parts(self._place / slot)
        for path in (self._place / slot).glob("rank_*"):
            if path.name.partition(".")[0] not in known:
                path.unlink(missing_ok=True)


def _blocks(held: Entries) -> list[TensorBlock]:
    """In the order of a file: wide elements first, each aligned to its width."""
    order = sorted(held, key=lambda name: (-held[name].values.element_size(), name))
    return [
        TensorBlock(name, DTYPES[values.dtype], (len(values),), values.nbytes)
        for name, values in ((name, held[name].values) for name in order)
    ]
