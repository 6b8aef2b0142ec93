"""What all ranks go on from: `resume` on the first of them, every byte checked by all, before weights load."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moetrain.checkpoint import manifest
from moetrain.checkpoint.fetching import fetch_start
from moetrain.checkpoint.loading import check_base, check_entries, mismatches
from moetrain.checkpoint.manifest import newest
from moetrain.checkpoint.resume import check_data, check_fits, continues_own, find_initial, find_to_resume
from moetrain.common.extensions import OPTIMIZERS, state_names
from moetrain.config import Config, ConfigError, RunSpec
from moetrain.distributed.comm import broadcast_text, gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.models.base import LanguageModel


class StartingPoint(NamedTuple):
    path: Path | None  # None: from nothing
    notes: list[str]  # what was passed over, and why
    is_own: bool = False  # whether it is of the same run, which goes on


def agree_on_start(config: Config, folder: Path, mesh: Mesh) -> StartingPoint:
    """Return what the run in `folder` goes on from, the same on every rank; all ranks call it and read their share of
    bytes.

    Raises `ConfigError` on all ranks where `find_to_resume` does, and where no checkpoint of the run is whole although
    there are some.
    """
    fetched, said = fetch_start(config, folder, mesh)
    _first_rank_checks(mesh, lambda: find_to_resume(config, folder, fetched))
    choice = config.checkpoint.resume if fetched is None else str(fetched)
    again = continues_own(config, folder) and (choice == "auto" or newest(folder) is not None)
    choice = broadcast_text("auto" if again else choice, mesh.device)
    candidates = manifest.folders(folder) if choice == "auto" else [] if choice == "none" else [Path(choice)]
    path, passed = first_whole(candidates, mesh)
    if path is None and passed:
        worst, why = passed[0]
        if choice != "auto":
            raise ConfigError(f"checkpoint.resume={choice}: {why}")
        rule = f"none of its checkpoints is complete ({worst.name}: {why}); another run.name starts a new run"
        raise ConfigError(f"run.name={config.run.name}: {rule}")
    notes = [*said, *(f"{bad} is incomplete or damaged and is skipped: {why}" for bad, why in passed)]
    return StartingPoint(path, notes, is_own=choice == "auto")


def check_start(
    start: StartingPoint, config: RunSpec, mesh: Mesh, model: LanguageModel, data: Mapping[str, str]
) -> StartingPoint:
    """Return `start` with a note where the layout or the micro-batches are others and the loss depends on them.

    All ranks call it. `model`: whole, on the meta device; `data`: the corpus's fingerprint. Raises `ConfigError` on all
    ranks where the checkpoint is of another model, or the data has another meaning.
    """
    if start.path is None:
        return start
    _first_rank_checks(mesh, partial(_check_all, config, start.path, start.is_own, model, data))
    return start._replace(notes=[*start.notes, *of_the_layout(config, start.path, mesh)])


def agree_on_weights(config: Config, start: StartingPoint, mesh: Mesh, makes_reference: bool = False) -> Path | None:
    """Return the checkpoint whose weights a new run begins with, or whose weights a run's adapters adapt.

    None where there is none, or a run goes on that has no adapters and whose reference is there (`makes_reference`).

    All ranks call it and read their share of bytes. Raises `ConfigError` on all ranks where it is not whole.
    """
    if start.path is not None:
        if not config.lora.rank and not makes_reference:
            return None
        kept = manifest.read(start.path)["config"].get("init_from")  # that of the run's beginning, whatever is newer
        config = config.model_copy(update={"init_from": kept})
    if config.init_from is None:
        return None
    _first_rank_checks(mesh, lambda: find_initial(config))
    found = find_initial(config) if mesh.is_main else None
    path, passed = first_whole([found] if found is not None else [], mesh)
    if path is None:
        raise ConfigError(f"init_from={config.init_from}: {passed[0][1]}")
    return path


def check_weights(path: Path, mesh: Mesh, model: LanguageModel, data: Mapping[str, str]) -> None:
    """Raise `ConfigError` on all ranks where the weights are of another model, or tokens had another meaning.

    All ranks call it. `model`: whole, on the meta device; `data`: the corpus's fingerprint.
    """

    def check() -> None:
        check_data(path, data, same_run=False)
        (check_entries(path, model, ()) if model.adapted is None else check_base(path, model))

    _first_rank_checks(mesh, check)


def first_whole(candidates: Sequence[Path], mesh: Mesh) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the first of rank 0's candidates in which every byte is as it was saved, and what is wrong with those
    before it.

    All ranks call it and read a share of the files each.
    """
    passed: list[tuple[Path, str]] = []
    texts = "\n".join(str(path) for path in candidates) if mesh.is_main else ""
    for path in map(Path, broadcast_text(texts, mesh.device).splitlines()):
        said = broadcast_text((manifest.problem(path) or "") if mesh.is_main else "", mesh.device)
        if not said:
            mine = manifest.share_of(path, mesh.rank, mesh.world)
            found = manifest.damaged(path, mine) or mismatches(path, mine)
            said = next(filter(None, gather_texts("\n".join(found), mesh.saving)), "")
        if not said:
            return path, passed
        passed.append((path, said.splitlines()[0]))
    return None, passed


def _first_rank_checks(mesh: Mesh, check: Callable[[], object]) -> None:
    """Rank 0 checks; where it finds a mistake, all ranks raise it."""
    found = ""
    if mesh.is_main:
        try:
            check()
        except ConfigError as error:
            found = str(error)
    if found := broadcast_text(found, mesh.device):
        raise ConfigError(found)


def _check_all(config: Config, path: Path, same_run: bool, model: LanguageModel, data: Mapping[str, str]) -> None:
    check_fits(config, path, same_run)
    check_data(path, data, same_run)
    check_entries(path, model, state_names(OPTIMIZERS.options(config.optim.name)))


def of_the_layout(config: RunSpec, path: Path, mesh: Mesh) -> list[str]:
    """Return a note where the layout or the micro-batches are others and the loss depends on them."""
    found = manifest.read(path)
    theirs, was, now = found["config"], found["layout"], config.balance
    groups = was.get("ep") != mesh.ep.size and now.device_groups is None and now.device_coefficient > 0
    shares = (was["ranks"], theirs["train"].get("micro_batch"), theirs["train"].get("global_batch")) != (
        mesh.world,
        config.train.micro_batch,
        config.train.global_batch,
    )
    fields = {
        "balance.device_groups": groups,
        "router.capacity_factor": shares and config.router.capacity_factor is not None,
        "balance.scope": shares and now.scope != "global",
        "balance.micro_fraction": shares and now.micro_fraction > 0,
        "balance.accumulate": shares and now.accumulate == "buffer" and config.micro_steps > 1,
    }
    if not any(fields.values()):
        return []
    names = ", ".join(name for name, depends in fields.items() if depends)
    return [
        f"{path} was trained with another layout or other micro-batches, on which {names} depend: the loss may jump"
    ]
