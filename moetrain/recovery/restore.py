"""The newest snapshot that is whole, wherever its files lie, as a checkpoint in shared memory that every rank can load.

Ranks that are laid out as before need the files of their own numbers; others read from all of them. A host fetches what
it needs and does not have from one that has it.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.checkpoint import files, manifest
from moetrain.checkpoint.manifest import ManifestEntry
from moetrain.checkpoint.saving import share_out
from moetrain.common import disk
from moetrain.distributed.comm import barrier, gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.engine.saved_costs import COSTS
from moetrain.recovery import memory
from moetrain.recovery.memory import SnapshotStamp

Where = dict[int, list[tuple[str, str]]]  # rank that wrote a file -> (host, slot) of its copies


class Found(NamedTuple):
    step: int
    layout: dict[str, Any]
    where: Where


def newest(run: str, mesh: Mesh, hosts: Sequence[str], after: int) -> Found | None:
    """Find the newest whole snapshot of more than `after` steps, the same on every rank; None where there is none.

    It reads every byte of it, once.
    """
    place = memory.host_folder(run, hosts[mesh.rank])
    here = {(slot.name, stamp.rank): stamp for slot, stamp in memory.stamps(place)}
    told = gather_texts(
        json.dumps([[slot, asdict(stamp) | {"holding": {}}] for (slot, _), stamp in here.items()]), mesh.saving
    )
    copies = {
        (host, slot, stamp["rank"]): (stamp["step"], stamp["crc32"], stamp["layout"])
        for host, text in zip(hosts, told, strict=True)
        for slot, stamp in json.loads(text)
    }
    while found := _newest(copies, after):
        mine = [
            (slot, rank) for rank, places in found.where.items() for host, slot in places if host == hosts[mesh.rank]
        ]
        local = [rank for rank, host in enumerate(hosts) if host == hosts[mesh.rank]]
        share = sorted(mine)[local.index(mesh.rank) :: len(local)]
        bad = [key for key in share if not memory.is_whole(place / key[0], here[key])]
        told = gather_texts(json.dumps(bad), mesh.saving)
        gone = [(host, slot, rank) for host, text in zip(hosts, told, strict=True) for slot, rank in json.loads(text)]
        if not gone:
            return found
        for key in gone:
            copies.pop(key, None)
    return None


def _newest(copies: Mapping[tuple[str, str, int], tuple[int, str, dict]], after: int) -> Found | None:
    """The newest step of which every rank's file is there."""
    steps: dict[tuple[int, str], Where] = {}
    layouts: dict[str, dict] = {}
    for (host, slot, rank), (step, _, layout) in sorted(copies.items(), key=lambda item: item[0]):
        key = json.dumps(layout, sort_keys=True)
        layouts[key] = layout
        steps.setdefault((step, key), {}).setdefault(rank, []).append((host, slot))
    whole = [
        (step, key) for (step, key), where in steps.items() if len(where) == layouts[key]["ranks"] and step > after
    ]
    if not whole:
        return None
    step, key = max(whole)
    return Found(step, layouts[key], steps[step, key])


def assemble(found: Found, run: str, mesh: Mesh, hosts: Sequence[str], layout: dict, config: dict, costs: Path) -> Path:
    """Make a folder of this rank as `checkpoint.load` reads it, and return it. All ranks call it.

    `costs`: the file of the planner's costs, of the run.
    """
    old = found.layout["ranks"]
    needs = {r: [r] if found.layout == layout else list(range(old)) for r in range(mesh.world)}
    host = hosts[mesh.rank]
    place = memory.host_folder(run, host)
    for file, to, source in _moves(found, needs, hosts):
        if mesh.rank == source:
            slot = place / next(slot for name, slot in found.where[file] if name == host)
            stamp = next(s for p, s in memory.stamps(place) if p == slot and s.rank == file)
            data = memory.mapped(memory.data_file(slot, file), stamp.bytes)
            for work in memory.start_sending_file(data, stamp, to, mesh):
                work.wait()
        if mesh.rank == to:
            stamp = memory.receive_stamp(source, mesh)
            slot = place / memory.FETCHED
            memory.receive_file(memory.reserve(memory.data_file(slot, file), stamp.bytes), source, mesh)
            memory.put_stamp(slot, stamp)
    barrier()
    return _folder(found, place, mesh.rank, needs[mesh.rank], config, costs)


def _moves(found: Found, needs: Mapping[int, list[int]], hosts: Sequence[str]) -> list[tuple[int, int, int]]:
    """(file, rank that receives it, rank that sends it), the same list on all ranks."""
    out = []
    for host in dict.fromkeys(hosts):
        local = [rank for rank, name in enumerate(hosts) if name == host]
        for file in sorted({file for rank in local for file in needs[rank]}):
            there = [name for name, _ in found.where[file]]
            if host not in there:
                to = next(rank for rank in local if file in needs[rank])
                out.append((file, to, next(rank for rank, name in enumerate(hosts) if name in there)))
    return out


def _folder(found: Found, place: Path, rank: int, needed: Sequence[int], config: dict, costs: Path) -> Path:
    by_rank: dict[int, tuple[Path, SnapshotStamp]] = {}
    for slot, stamp in memory.stamps(place):
        if stamp.step == found.step and stamp.layout == found.layout and stamp.rank in needed:
            by_rank.setdefault(stamp.rank, (slot, stamp))
    out = place / f"for_rank_{rank:05d}" / f"step_{found.step}"
    shutil.rmtree(out.parent, ignore_errors=True)
    memory.make(out)
    entries: dict[str, ManifestEntry] = {}
    ordered = [by_rank[file] for file in needed]
    holdings = [stamp.holding for _, stamp in ordered]
    stamps = {}
    for (slot, stamp), pieces in zip(ordered, _tiled(holdings), strict=True):
        source = memory.data_file(slot, stamp.rank)
        (out / source.name).hardlink_to(source)
        stamps[source.name] = (stamp.bytes, stamp.crc32)
        for name in pieces:
            dtype, shape, begin, end = stamp.holding[name]
            before = entries[name].pieces if name in entries else []
            entries[name] = ManifestEntry(
                dtype, tuple(shape), sorted([*before, (source.name, begin, end)], key=lambda p: p[1])
            )
    text = manifest.entries_text(entries).encode()
    stamps[manifest.ENTRIES] = files.write(out / manifest.ENTRIES, text)
    with suppress(OSError, ValueError):  # without them they are measured again
        stamps[COSTS] = files.write(out / COSTS, disk.read(costs))
    stamp = ordered[0][1]
    body = {"step": stamp.step, "samples": stamp.samples, "layout": stamp.layout, "files": stamps, "config": config}
    manifest.write(out, body)
    return out


def _tiled(holdings: Sequence[Mapping[str, tuple]]) -> list[list[str]]:
    """Which entries to read from each file: a range that several of them have, from one."""
    if len(holdings) == 1:
        return [list(holdings[0])]
    return [[piece.name for piece in pieces] for pieces in share_out(holdings)]
