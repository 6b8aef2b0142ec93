"""What a training loop does for the day when something fails: a heartbeat, snapshots, an ear for requests to end."""

import json
import socket
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moetrain import checkpoint, runs
from moetrain.checkpoint import StartingPoint, manifest
from moetrain.checkpoint.saving import layout_of
from moetrain.common import disk
from moetrain.common.console import RunLogger
from moetrain.config import Config
from moetrain.distributed.comm import all_reduce_sum, broadcast_text, gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.engine import Engine
from moetrain.engine.saved_costs import COSTS
from moetrain.launch import signals
from moetrain.launch.heartbeat import Heartbeat
from moetrain.models.base import LanguageModel
from moetrain.recovery import memory, restore
from moetrain.recovery.guard import Guard
from moetrain.recovery.snapshots import Snapshots


def find_newer(start: StartingPoint, config: Config, folder: Path, mesh: Mesh) -> StartingPoint:
    """Return `start`, or the run's newest snapshot in memory where that is further. All ranks call it, and agree.

    Raises `ConfigError` where the snapshot is of another model or other data.
    """
    if not checkpoint.continues_own(config, folder):
        return start
    run = _identity(folder, mesh, make=False)
    hosts = _hosts(mesh)
    mine = memory.distrust_reason(memory.host_folder(run, hosts[mesh.rank])) if run else ""
    if said := next(filter(None, gather_texts(mine, mesh.saving)), ""):
        start = start._replace(notes=[*start.notes, f"an in-memory checkpoint is not used: {said}"])
    found = restore.newest(run, mesh, hosts, checkpoint.progress(start.path)[0]) if run else None
    if found is None:
        return start
    begun_with = json.loads(broadcast_text(json.dumps(_begun_with(start, folder)), mesh.device))
    if begun_with is None:
        said = f"an in-memory checkpoint of step {found.step} is skipped: the run's config.yaml is missing or damaged"
        return start._replace(notes=[*start.notes, said])
    path = restore.assemble(found, run, mesh, hosts, layout_of(config, mesh), begun_with, folder / COSTS)
    checkpoint.check_fits(config, path, same_run=True)
    return StartingPoint(
        path, [*start.notes, f"an in-memory checkpoint is newer than the one on the disk: step {found.step}"]
    )


def _begun_with(start: StartingPoint, folder: Path) -> dict[str, Any] | None:
    """The configuration that the run in `folder` has had, in its own words or in those of its checkpoint."""
    if start.path is not None and start.path.resolve().is_relative_to(folder.resolve()):
        return runs.config_of(folder) or manifest.read(start.path)["config"]
    return runs.config_of(folder)


class Watch:
    """Over one training loop, on every rank; its context ends with the loop.

    `begin` and `end` enclose a step; `end` enters one small collective.
    """

    def __init__(self, config: Config, folder: Path, mesh: Mesh, engine: Engine, first: int, logger: RunLogger) -> None:
        """`first`: steps done when the loop begins."""
        options = config.recovery
        self._mesh, self._logger, self._every = mesh, logger, options.snapshot_every
        self._run = _identity(folder, mesh, make=True)
        self.guard = Guard(folder / "recovery", mesh, options.skips, saved=first > 0)
        self._heartbeat = Heartbeat(runs.heartbeats(folder), mesh.rank, mesh.world, options.timeout)
        self._follow_layers(engine.model)
        self._snapshots = Snapshots(self._run, mesh, engine, layout_of(config, mesh), _hosts(mesh))
        self._last = first
        self._stack = ExitStack()

    def __enter__(self) -> "Watch":
        self._stack.enter_context(signals.note_requests())
        self._stack.enter_context(self._heartbeat)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _follow_layers(self, model: LanguageModel) -> None:
        """Have every MoE layer tell the heartbeat in which phase it is."""
        for number, layer in model.find_layers():
            layer.step.observe(partial(self._heartbeat.mark_phase, number))

    def begin(self, step: int) -> None:
        self._heartbeat.begin_step(step)

    def mark(self, phase: str) -> None:
        """Note that a part of the step begins that is not of a layer."""
        self._heartbeat.mark_phase(None, phase)

    def end(self, step: int, samples: int, norm: float) -> bool:
        """Tell whether all ranks have agreed to end here. Raises `Diverged` after too many steps that were not
        finite."""
        self.mark("end of the step")
        if said := self.guard.judge(step, norm):
            self._logger.print(said)
        own = [signals.end_requested(), self._snapshots.busy, self._snapshots.unstamped]
        votes = torch.tensor(own, dtype=torch.int64, device=self._mesh.device)
        asked, busy, unstamped = all_reduce_sum(votes).tolist()
        due = self._every and step - self._last >= self._every
        if due and not busy and not self.guard.in_a_row:
            if said := self._snapshots.take(step, samples, again=unstamped > 0):
                self._logger.print(said)
            self._last, self.guard.saved = step, True
        return asked > 0

    @property
    def skipped(self) -> int:
        """Return how many steps were left out since this process began."""
        return self.guard.skipped

    @property
    def sound(self) -> bool:
        """Tell whether the last step was not left out."""
        return not self.guard.in_a_row

    def saved(self) -> None:
        """Note that there is a checkpoint of this run to go back to."""
        self.guard.saved = True

    def complete(self) -> None:
        """Remove what was kept in memory for the run, which is complete."""
        self._snapshots.forget()


def _identity(folder: Path, mesh: Mesh, make: bool) -> str:
    """Return the identity of the run in `folder`: another run of the same name has another. Empty: it has none yet.

    What the file says becomes the name of a folder that is removed one day: it counts only if it is an identity. A copy
    of the run's folder is another run: it has neither the inode nor the path that were noted.
    """
    path, place, text = folder / "recovery" / "run", folder / "recovery" / "place", ""
    if mesh.is_main:
        with suppress(OSError, ValueError):
            text = disk.read(path).decode()
        text = text if memory.is_identity(text) and not _is_copy(place, folder) else ""
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not text:
                disk.write(path, text := memory.new_identity(folder.name))
            disk.write(place, json.dumps(_where(folder)))
    return broadcast_text(text, mesh.device)


def _where(folder: Path) -> list[Any]:
    """Return what tells a folder from its copy: a folder that is moved keeps its inode, one that is mounted again or
    restored from a backup keeps its path."""
    return [folder.stat().st_ino, str(folder.resolve())]


def _is_copy(place: Path, folder: Path) -> bool:
    """Tell whether the folder is neither where nor what was noted. Nothing noted, as by earlier versions: it is not."""
    noted = disk.read_json(place)
    if not isinstance(noted, list):
        return False
    return not any(old == new for old, new in zip(noted, _where(folder), strict=False))


def _hosts(mesh: Mesh) -> list[str]:
    """The host of every rank."""
    return gather_texts(socket.gethostname(), mesh.saving)
