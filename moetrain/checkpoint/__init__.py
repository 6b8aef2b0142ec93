"""Checkpoints: safetensors and JSON only, so that loading one can run no code.

`checkpoints/step_N/` holds safetensors files, written by `torch.distributed.checkpoint`, every rank its shards; the
planner's `costs.json`; and `manifest.json`. One entry per parameter in its global shape, experts one by one under
their global number, and the two moments of the optimizer beside each: `model/NAME`, `exp_avg/NAME`,
`exp_avg_sq/NAME`; and `model/NAME` per persistent buffer, which is the same on every rank. The folder appears whole or
not at all.
"""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import moetrain
from moetrain.comm import barrier
from moetrain.config import Balance, Config, ConfigError
from moetrain.mesh import Mesh
from moetrain.moe.experts import Experts
from moetrain.profile import COSTS

FORMAT = 1
FREE = {"skew", "noise", "capacity_factor", "zero_compute_tau", "k_start"}  # router options that may change in a run
MOMENTS = ("exp_avg", "exp_avg_sq")


def _step_of(path: Path) -> int:
    """The step that a folder `step_N` is of."""
    return int(re.sub(r"\D", "", path.name) or 0)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder."""
    found = [p.parent for p in (folder / "checkpoints").glob("step_*/manifest.json")]
    return max(found, key=_step_of, default=None)


def to_resume(config: Config, folder: Path | None) -> Path | None:
    """The checkpoint that `checkpoint.resume` means for a run in `folder`, if any.

    Raises `ConfigError` where it is not there or foreign, or where going on from it would mix two runs in one folder.
    """
    choice = config.checkpoint.resume
    present = newest(folder) if folder is not None else None
    if choice == "auto":
        if present is not None:
            check_fits(config, present, same_run=True)
        return present
    path = None if choice == "none" else Path(choice)
    if path is not None:
        if not (path / "manifest.json").is_file():
            raise ConfigError(f"checkpoint.resume={choice}: must be auto, none or a folder step_N with a manifest.json")
        check_fits(config, path, same_run=False)
        if (step := progress(path)[0]) >= config.train.steps:
            raise ConfigError(f"train.steps={config.train.steps}: must be above the {step} steps of {path}")
    if present is not None and progress(present)[0] > progress(path)[0]:
        later = progress(present)[0]
        raise ConfigError(f"run.name={config.run.name}: has a checkpoint of step {later} already; take another name")
    return path


def check_fits(config: Config, path: Path, same_run: bool) -> None:
    """The checkpoint must be of this model; and of this data where a run goes on.

    Raises `ConfigError` that names the first difference.
    """
    theirs = read_manifest(path)["config"]
    ours = config.model_dump(mode="json")
    sections = {"model": set(ours["model"]) - {"init_std"}, "router": set(ours["router"]) - FREE}
    if same_run:
        sections |= {"train": {"seed", "seq_len"}, "data": {"source", "vocab_size", "max_bytes_per_domain", "held_out"}}
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


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises `ConfigError` where it is damaged or of another format."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ConfigError(f"checkpoint={path}: must have format {FORMAT}, this one has {manifest['format']}")
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"checkpoint={path}: manifest.json must be a manifest; the file is damaged") from None
    return manifest


def progress(path: Path | None) -> tuple[int, int]:
    """(optimizer steps done, global samples seen) of a checkpoint; nothing yet for none."""
    if path is None:
        return 0, 0
    manifest = read_manifest(path)
    return int(manifest["step"]), int(manifest["samples"])


def save(folder: Path, step: int, samples: int, config: Config, mesh: Mesh, model: nn.Module, optimizer: Any) -> Path:
    """Write `folder/checkpoints/step_N`; all ranks call it. Then forget all but the newest `checkpoint.keep`."""
    path = folder / "checkpoints" / f"step_{step}"
    unfinished = path.with_name(f".step_{step}.part")
    if mesh.is_main:
        for left in path.parent.glob(".step_*.part"):
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)
    barrier()
    with _quiet():
        writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        dcp.save(_entries(model, optimizer), storage_writer=writer)
    barrier()
    if mesh.is_main:
        manifest = {
            "format": FORMAT,
            "moetrain": moetrain.__version__,
            "step": step,
            "samples": samples,
            "world": mesh.world,
            "ep": mesh.ep.size,
            "config": config.model_dump(mode="json"),
        }
        shutil.copy(folder / COSTS, unfinished / COSTS)
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        _remove(path)
        os.rename(unfinished, path)
        complete = sorted((p.parent for p in path.parent.glob("step_*/manifest.json")), key=_step_of)
        for old in complete[: -config.checkpoint.keep]:
            _remove(old)
    barrier()
    return path


def _remove(path: Path) -> None:
    """Manifest first, so that what is left of an interrupted removal is not taken for a checkpoint."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def load(path: Path, model: nn.Module, optimizer: Any = None) -> None:
    """Read a checkpoint into the model and, if given, the optimizer."""
    with _quiet():
        dcp.load(_entries(model, optimizer), storage_reader=HuggingFaceStorageReader(str(path)))
    if optimizer is not None:
        for state in optimizer.state.values():
            state["step"].fill_(progress(path)[0])


def _entries(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Name -> tensor that shares its memory with the model's or the optimizer's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without gradient may have left parameters gathered
    known = {p for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        kinds: dict[str, Tensor] = {"model": parameter.detach()}
        if optimizer is not None and parameter.requires_grad:
            if parameter not in known:
                raise RuntimeError(f"{name}: the optimizer does not know this parameter; nothing was saved")
            state = optimizer.state[parameter]
            if not state:  # as AdamW would make it at its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            kinds |= {moment: state[moment] for moment in MOMENTS}
        owner, _, last = name.rpartition(".")
        for kind, tensor in kinds.items():
            if owner in experts:
                out |= {f"{kind}/{owner}.{e}.{last}": part for e, part in _by_expert(experts[owner], tensor)}
            else:
                out[f"{kind}/{name}"] = tensor
    kept = model.state_dict().keys()
    return out | {f"model/{name}": buffer for name, buffer in model.named_buffers() if name in kept}


def _by_expert(experts: Experts, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(global number, its part) of the experts that lie on this rank: FSDP cuts between experts, never through one."""
    own = experts.own_experts()
    if isinstance(tensor, DTensor):
        place, size = tensor.device_mesh.get_local_rank(-1), tensor.device_mesh.size(-1)
        chunk = -(-len(own) // size)
        own, tensor = own[place * chunk : (place + 1) * chunk], tensor.to_local()
    yield from zip(own, tensor, strict=True)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [
        logging.getLogger(n) for n in ("torch.distributed.checkpoint", "torch.distributed.checkpoint.hf_storage")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
