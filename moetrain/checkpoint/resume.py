"""What a run goes on from: the newest checkpoint that is whole, or the one it is told; decided before weights load."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import nn

from moetrain.checkpoint import manifest
from moetrain.checkpoint.loading import check_entries
from moetrain.checkpoint.manifest import newest, progress
from moetrain.comm import broadcast_text, gather_texts
from moetrain.config import Balance, Config, ConfigError
from moetrain.mesh import Mesh

FREE = {"skew", "noise", "capacity_factor", "zero_compute_tau", "k_start"}  # router options that may change in a run


class Start(NamedTuple):
    path: Path | None  # None: from nothing
    notes: list[str]  # what was passed over, and why


def goes_on(config: Config, folder: Path) -> bool:
    """Whether `checkpoint.resume` lets a run in `folder` go on with what is its own.

    `auto` does. A path or `none` says how a run begins: the same command again goes on with it.
    """
    choice, known = config.checkpoint.resume, folder / "config.yaml"
    if choice == "auto" or not known.is_file():
        return choice == "auto"
    return yaml.safe_load(known.read_text()).get("checkpoint", {}).get("resume") == choice


def dtype_of(folder: Path | None, saved: Path | None) -> str:
    """What the run in `folder` computes in, or else the run of the checkpoint `saved`; empty where there is neither."""
    if folder is not None and (known := folder / "config.yaml").is_file():
        return str(yaml.safe_load(known.read_text())["train"]["dtype"])
    return str(manifest.read(saved)["config"]["train"]["dtype"]) if saved is not None else ""


def to_resume(config: Config, folder: Path | None) -> Path | None:
    """The checkpoint that `checkpoint.resume` means for a run in `folder`, if any; the tensors' bytes are not read.

    Raises `ConfigError` where it is not there, damaged or foreign, or where going on from it would mix two runs in one
    folder.
    """
    present = newest(folder) if folder is not None else None
    if config.checkpoint.resume == "auto" or (folder is not None and present is not None and goes_on(config, folder)):
        if present is not None:
            check_fits(config, present, same_run=True)
            _check_steps(config, present, progress(present)[0])
        return present
    path = given(config)
    if path is not None:
        _check_steps(config, path, progress(path)[0] + 1)
    if present is not None and (
        path is None
        or not path.resolve().is_relative_to(present.parent.resolve())
        or progress(present) > progress(path)
    ):
        later = progress(present)[0]
        raise ConfigError(f"run.name={config.run.name}: has a checkpoint of step {later} already; take another name")
    return path


def _check_steps(config: Config, path: Path, fewest: int) -> None:
    """The steps of a checkpoint count. Raises `ConfigError` that says how many would train on."""
    steps, done = config.train.steps, progress(path)[0]
    if steps < fewest:
        rule = f"{path} has {done} steps already, and they count: train.steps={done + steps} trains {steps} more"
        raise ConfigError(f"train.steps={steps}: {rule}")


def given(config: Config) -> Path | None:
    """The folder that `checkpoint.resume` names, if it names one.

    Raises `ConfigError` where it is not there, visibly damaged, or of another model.
    """
    choice = config.checkpoint.resume
    if choice in ("auto", "none"):
        return None
    path = Path(choice)
    if not (path / manifest.MANIFEST).is_file():
        raise ConfigError(f"checkpoint.resume={choice}: must be auto, none or a folder step_N with a manifest.json")
    if said := manifest.problem(path):
        raise ConfigError(f"checkpoint.resume={choice}: {said}")
    check_fits(config, path, same_run=False)
    return path


def agree(config: Config, folder: Path, mesh: Mesh, model: nn.Module, data: Mapping[str, str]) -> Start:
    """What the run in `folder` goes on from, the same on every rank; all ranks call it and read their share of bytes.

    `model`: whole, on the meta device; `data`: the corpus's fingerprint. Raises `ConfigError` on all ranks where
    `to_resume` does, where no checkpoint of the run is whole although there are some, and where the model has other
    entries or the data another meaning.
    """
    _first_rank_checks(mesh, lambda: to_resume(config, folder))
    choice = config.checkpoint.resume
    again = goes_on(config, folder) and (choice == "auto" or newest(folder) is not None)
    choice = broadcast_text("auto" if again else choice, mesh.device)
    candidates = manifest.folders(folder) if choice == "auto" else [] if choice == "none" else [Path(choice)]
    path, passed = first_whole(candidates, mesh)
    if path is None and passed:
        worst, said = passed[0]
        if choice != "auto":
            raise ConfigError(f"checkpoint.resume={choice}: {said}")
        rule = f"none of its checkpoints is whole, {worst.name}: {said}; another name begins anew"
        raise ConfigError(f"run.name={config.run.name}: {rule}")
    if path is not None:
        _first_rank_checks(mesh, partial(_check_all, config, path, choice == "auto", model, data))
    notes = [f"{bad} is not whole and is passed over: {said}" for bad, said in passed]
    return Start(path, notes if path is None else [*notes, *of_the_layout(config, path, mesh)])


def first_whole(candidates: Sequence[Path], mesh: Mesh) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The first of rank 0's candidates in which every byte is as it was saved, and what is wrong with those before it.

    All ranks call it and read a share of the files each.
    """
    passed: list[tuple[Path, str]] = []
    texts = "\n".join(str(path) for path in candidates) if mesh.is_main else ""
    for path in map(Path, broadcast_text(texts, mesh.device).splitlines()):
        said = broadcast_text((manifest.problem(path) or "") if mesh.is_main else "", mesh.device)
        if not said:
            mine = manifest.share_of(path, mesh.rank, mesh.world)
            said = next(filter(None, gather_texts("\n".join(manifest.damaged(path, mine)), mesh.saving)), "")
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


def _check_all(config: Config, path: Path, same_run: bool, model: nn.Module, data: Mapping[str, str]) -> None:
    check_fits(config, path, same_run)
    check_data(path, data, same_run)
    check_entries(path, model)


def check_data(path: Path, data: Mapping[str, str], same_run: bool) -> None:
    """The numbers of tokens must mean what they meant; where a run goes on, its documents must be the same, too.

    Raises `ConfigError`.
    """
    theirs = manifest.read(path)["data"]
    if theirs["tokenizer"] != data["tokenizer"]:
        advice = "data.tokenizer=FILE takes that of the corpus it was trained on"
        raise ConfigError(f"checkpoint={path}: was trained with another tokenizer; {advice}")
    if same_run and theirs["documents"] != data["documents"]:
        raise ConfigError(f"checkpoint={path}: was trained on other documents; another run.name starts a new run")


def of_the_layout(config: Config, path: Path, mesh: Mesh) -> list[str]:
    """A note where the layout or the micro-batches are others and the loss depends on them."""
    found = manifest.read(path)
    theirs, was, now = found["config"], found["layout"], config.balance
    groups = was["ep"] != mesh.ep.size and now.device_groups is None and now.device_coefficient > 0
    shares = (was["ranks"], theirs["train"]["micro_batch"], theirs["train"]["global_batch"]) != (
        mesh.world,
        config.train.micro_batch,
        config.train.global_batch,
    )
    fields = {
        "balance.device_groups": groups,
        "router.capacity_factor": shares and config.router.capacity_factor is not None,
        "balance.scope": shares and now.scope != "global",
        "balance.micro_fraction": shares and now.micro_fraction > 0,
        "balance.accumulate": shares and now.accumulate == "buffer" and config.micro_steps(mesh.world) > 1,
    }
    if not any(fields.values()):
        return []
    names = ", ".join(name for name, depends in fields.items() if depends)
    return [f"{path} was trained in other shares a rank, on which {names} depend: the loss may not go on smoothly"]


def check_fits(config: Config, path: Path, same_run: bool) -> None:
    """The checkpoint must be of this model; and of this data where a run goes on.

    Raises `ConfigError` that names the first difference.
    """
    theirs = manifest.read(path)["config"]
    ours = config.model_dump(mode="json")
    sections = {"model": set(ours["model"]) - {"init_std"}, "router": set(ours["router"]) - FREE}
    if same_run:
        sections |= {
            "train": {"seed", "seq_len"},
            "data": {"source", "vocab_size", "max_bytes_per_domain", "held_out", "domain_block"},
        }
    for section, fields in sections.items():
        for field in ours[section]:
            value, other = ours[section][field], theirs[section].get(field)
            if field in fields and value != other and not (field == "vocab_size" and value is None):
                advice = "; another run.name starts a new run" if same_run else ""
                raise ConfigError(f"{section}.{field}={value}: the checkpoint {path} has {other}{advice}")
    _check_buffers(config.balance, theirs["balance"], path)


def _check_buffers(ours: Balance, theirs: dict[str, Any], path: Path) -> None:
    """What routers keep from step to step must be in the checkpoint, and a bias that is there is part of the model."""
    biased = theirs.get("bias", "none") != "none"
    if (ours.bias != "none") != biased:
        rule = "was trained with one, by which experts are chosen" if biased else "has none"
        raise ConfigError(f"balance.bias={ours.bias}: the checkpoint {path} {rule}")
    if ours.accumulate == "hold" and theirs["accumulate"] != "hold":
        raise ConfigError(f"balance.accumulate=hold: the checkpoint {path} holds no frequencies; take buffer or exact")
