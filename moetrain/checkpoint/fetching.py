"""Fetching a checkpoint from a store, before the ranks agree on what they go on from: each rank fetches its share.

`checkpoint.resume=URL` fetches that one. Where `checkpoint.remote` has a newer one of this run than its folder, as on a
machine that is new to the run, that one is fetched into the folder.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from moetrain.checkpoint import manifest
from moetrain.checkpoint.remote import RemoteCheckpoints, open_remote
from moetrain.checkpoint.resume import continues_own
from moetrain.common import disk
from moetrain.common.console import console
from moetrain.common.errors import ConfigError
from moetrain.common.store import StoreError, is_url, open_store
from moetrain.config import Config
from moetrain.distributed.comm import barrier, broadcast_text, gather_texts
from moetrain.distributed.mesh import Mesh

FETCHED = "fetched"  # in the run's folder: another run's checkpoint, until its states are loaded


class _Wanted(NamedTuple):
    """What rank 0 decided."""

    steps: list[int]  # of the candidates, newest first
    notes: list[str]


def fetch_start(config: Config, folder: Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """Fetch what the run in `folder` goes on from, if it lies in a store. All ranks call it.

    Returns the local folder of a checkpoint of `checkpoint.resume=URL`, which is None for all else, and notes. Raises
    `ConfigError` on all ranks where the store fails and there is nothing else to go on from, and where it has
    checkpoints of another run of this name.
    """
    if config.checkpoint.remote is None and not is_url(config.checkpoint.resume):
        return None, []
    found, error = None, ""
    if mesh.is_main:
        try:
            found = _choose(config, folder)
        except ConfigError as wrong:
            error = str(wrong)
    error, steps, notes = json.loads(broadcast_text(json.dumps([error, *(found or ([], []))]), mesh.device))
    if error:
        raise ConfigError(error)
    if not steps:
        return None, notes
    remote, place, field = _source(config, folder)
    for step in steps:
        said = _fetch(remote, step, place, mesh)
        if not said:
            notes.append(f"step {step} is fetched from {remote.url}")
            return place / f"step_{step}" if field == "checkpoint.resume" else None, notes
        notes.append(f"{remote.url}: step_{step} cannot be fetched and is skipped: {said}")
    if field == "checkpoint.remote" and manifest.newest(folder) is not None:
        return None, notes
    raise ConfigError(f"{field}={remote.url}: {said}")


def _source(config: Config, folder: Path) -> tuple[RemoteCheckpoints, Path, str]:
    """(where checkpoints are fetched from, where to, the field that says so)."""
    choice = config.checkpoint.resume
    if is_url(choice) and not _goes_on(config, folder):
        store, field = open_store(choice.rstrip("/"), "checkpoint.resume"), "checkpoint.resume"
        above, _, last = choice.rstrip("/").rpartition("/")
        if manifest.STEP.fullmatch(last):
            store = open_store(above, field)
        return RemoteCheckpoints(store), folder / FETCHED, field
    remote = open_remote(config)
    assert remote is not None
    return remote, folder / "checkpoints", "checkpoint.remote"


def _goes_on(config: Config, folder: Path) -> bool:
    """Whether the run goes on with what is its own."""
    own = continues_own(config, folder)
    return own and (config.checkpoint.resume == "auto" or manifest.newest(folder) is not None)


def _choose(config: Config, folder: Path) -> _Wanted:
    """On rank 0: the checkpoints to try. Raises `ConfigError`."""
    choice, local = config.checkpoint.resume, manifest.newest(folder)
    reached = 0 if local is None else manifest.step_of(local)
    try:
        if not _goes_on(config, folder):
            _check_new(config)
            if not is_url(choice):
                return _Wanted([], [])
            last = choice.rstrip("/").rpartition("/")[2]
            steps = _source(config, folder)[0].list_steps()
            steps = [step for step in steps if not manifest.STEP.fullmatch(last) or last == f"step_{step}"]
            if not steps:
                raise ConfigError(f"checkpoint.resume={choice}: must be a step_N with a manifest.json, or a run's URL")
            return _Wanted(steps, [])
        remote = open_remote(config)
        return _Wanted([step for step in remote.list_steps() if step > reached] if remote else [], [])
    except StoreError as error:
        field = f"checkpoint.resume={choice}" if is_url(choice) else f"checkpoint.remote={config.checkpoint.remote}"
        if local is None:
            rule = f"the store cannot be read: {error}; checkpoint.remote=null starts without it"
            raise ConfigError(f"{field}: {rule}") from None
        return _Wanted([], [f"{field}: the store cannot be read: {error}; {local} is what the run goes on from"])


def _check_new(config: Config) -> None:
    """A run that begins must not mix its checkpoints with those of another one."""
    remote = open_remote(config)
    if remote is not None and (steps := remote.list_steps()):
        rule = f"has a checkpoint of step {steps[0]} of a run of this name already; take another run.name"
        raise ConfigError(f"checkpoint.remote={remote.url}: {rule}")


def _fetch(remote: RemoteCheckpoints, step: int, place: Path, mesh: Mesh) -> str:
    """Fetch one checkpoint into `place`, whole or not at all; the error of the first rank that has one."""
    part = place / f".step_{step}.part"
    if mesh.is_main:
        shutil.rmtree(part, ignore_errors=True)
    said = ""
    try:
        if mesh.is_main:
            part.mkdir(parents=True)
            remote.download_manifest(step, part)
            size = sum(bytes_ for bytes_, _ in manifest.read(part)["files"].values())
            console.print(f"fetching step {step}, {size / 2**30:.2f} GiB, from {remote.url}", style="dim")
    except (StoreError, ConfigError, OSError) as error:
        said = str(error)
    said = broadcast_text(said, mesh.device)
    if not said:
        said = next(filter(None, gather_texts(_fetch_share(remote, step, part, mesh), mesh.saving)), "")
    if mesh.is_main:
        if said:
            shutil.rmtree(part, ignore_errors=True)
        else:
            disk.sync(part)
            _give_name(part, place / f"step_{step}")
    barrier()
    return said


def _fetch_share(remote: RemoteCheckpoints, step: int, part: Path, mesh: Mesh) -> str:
    """Fetch this rank's share of the files; what went wrong."""
    try:
        for name in manifest.share_of(part, mesh.rank, mesh.world):
            remote.download(step, name, part)
            disk.sync_file(part / name)
    except (StoreError, ConfigError, OSError) as error:
        return str(error)
    return ""


def _give_name(part: Path, path: Path) -> None:
    """Name a folder; what has the name, another run's or damaged, is removed."""
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)
    disk.sync(path.parent)
