"""The costs that the planner decides with, kept per machine, group and layer shape, and with each run, so that a repeat
plans alike."""

import dataclasses
import hashlib
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import torch

from moetrain.common import cache, disk
from moetrain.common.console import console
from moetrain.config import ConfigError, RunSpec
from moetrain.distributed.comm import broadcast_text
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.moe import calibrate, compiled
from moetrain.moe.calibrate import Layer
from moetrain.moe.kernels import cpu_gemm
from moetrain.moe.planning.cost import Costs

COSTS = "costs.json"  # in a run's folder and in its checkpoints


def layer_of(config: RunSpec) -> Layer:
    """Returns the layer of experts of a run; of slices, where they are cut."""
    model, r = config.model, config.r
    dtype = precision.get_dtype(config)
    return Layer(model.dim, model.expert_hidden // r, model.num_experts * r, config.router.top_k * r, dtype)


def obtain(mesh: Mesh, layer: Layer, run: Path, saved: Path | None = None) -> Costs:
    """The costs of the checkpoint `saved` or of the run, if they are of as many ranks of this kind; else the machine's
    stored ones; else measured now. They are written to the run's folder, and kept for the machine."""
    own, stored = run / COSTS, _stored(mesh, layer)
    places = [*([saved / COSTS] if saved is not None else []), own, *([stored] if stored is not None else [])]
    kept = (disk.read_json(path) for path in places) if mesh.is_main else ()
    found = next(
        (tree for tree in kept if calibrate.of_tree(tree) and tree["ranks"] == calibrate.describe_ranks(mesh)), None
    )
    text = broadcast_text(json.dumps(found, indent=1) if found else "", mesh.device)
    if not text:
        if mesh.is_main:
            console.print("measuring what computing and sending take here, for the planner", style="dim")
        with mesh.exchange.using("flat"):
            text = calibrate.to_json(calibrate.measure(mesh, layer), mesh)
    text, is_more = _add_two_level(mesh, layer, text)
    if mesh.is_main:
        disk.write(own, text)
        if stored is not None and (is_more or calibrate.of_tree(disk.read_json(stored)) is None):
            _keep(stored, text)
    return dataclasses.replace(calibrate.from_json(text), nodes=mesh.exchange.nodes)


def _add_two_level(mesh: Mesh, layer: Layer, text: str) -> tuple[str, bool]:
    """Return the costs with the link that rows have in two steps, and whether it was measured now: where
    `parallel.exchange=auto` has a choice, and they lack it."""
    costs = calibrate.from_json(text)
    if mesh.exchange.asked != "auto" or not mesh.exchange.is_two_level_possible or costs.two_level is not None:
        return text, False
    with mesh.exchange.using("two_level"):
        link = calibrate.measure_between(mesh, layer, mesh.exchange.nodes)
    return calibrate.to_json(dataclasses.replace(costs, two_level=link), mesh), True


def of_checkpoint(saved: Path) -> Costs:
    """The costs that a checkpoint's run was planned with. Raises `ConfigError` where they are damaged."""
    costs = calibrate.of_tree(disk.read_json(saved / COSTS))
    if costs is None:
        raise ConfigError(f"checkpoint={saved}: {COSTS} is damaged")
    return costs


def _keep(path: Path, text: str) -> None:
    """Where a cache cannot be written, nothing is kept. What a killed process left unfinished beside it goes."""
    with suppress(OSError):
        disk.remove_parts(path.parent)
        disk.write(path, text)


def _stored(mesh: Mesh, layer: Layer) -> Path | None:
    """The machine's file for such a layer; None where nothing can be kept."""
    kept = cache.folder("profiles")
    return None if kept is None else kept / f"{_key(mesh, layer)}.json"


def keep(mesh: Mesh, layer: Layer, costs: Costs) -> Path | None:
    """Keep costs as the machine's, in place of what was there. Returns the file; None where nothing can be kept."""
    path = _stored(mesh, layer)
    if mesh.is_main and path is not None:
        _keep(path, calibrate.to_json(costs, mesh))
    return path


def _key(mesh: Mesh, layer: Layer) -> str:
    if mesh.device.type == "cuda":
        device = torch.cuda.get_device_name(mesh.device)
    else:
        device = f"{socket.gethostname()} {os.cpu_count()} cores {torch.get_num_threads()} threads"
        device += f" {torch.backends.cpu.get_cpu_capability()} {cpu_gemm.able()}"  # a name may move to another machine
    facts = f"{device} {torch.__version__} {compiled.DIGEST} {mesh.exchange.nodes} {mesh.world} {mesh.ep.size} {layer}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
