"""What the simulator expects of a run, printed before its first step and kept beside what is then measured."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moetrain.common import disk, versions
from moetrain.common.errors import ConfigError
from moetrain.config import RunSpec
from moetrain.distributed.mesh import Mesh
from moetrain.moe.planning.cost import Costs
from moetrain.simulate.cluster import Cluster, load_cluster
from moetrain.simulate.memory import predict_memory
from moetrain.simulate.request import job_of_run
from moetrain.simulate.step import predict_step

NAME = "prediction.json"
DEVICES = {"GB300": "gb300_nvl72", "GB200": "gb200_nvl72", "B200": "b200", "H200": "h200", "H100": "h100"}
ASSUMED = "h100"  # where there is no GPU, or one that is not described
DEVICES |= {"A100": "a100", "MI300X": "mi300x"}  # in the name of a GPU -> in configs/cluster; the first that fits


@dataclass(frozen=True)
class RunPrediction:
    """An optimizer step under natural routing."""

    step_seconds: float
    tokens_per_second: float
    memory_bytes: float  # peak of the fullest rank
    capacity_bytes: float  # of a device

    def lines(self) -> list[str]:
        """What a person is told before the first step."""
        gib = self.memory_bytes / 2**30
        said = [
            f"predicted: {1e3 * self.step_seconds:,.0f} ms a step, {self.tokens_per_second:,.0f} tokens/s, "
            f"{gib:.1f} GiB on the fullest rank"
        ]
        if self.memory_bytes > self.capacity_bytes:
            room = f"{self.capacity_bytes / 2**30:.0f} GiB"
            said.append(f"this may not fit into {room}; `moetrain train --dry-run` says what would make it fit")
        return said

    def write(self, folder: Path) -> None:
        disk.write(folder / NAME, json.dumps(asdict(self), indent=1) + "\n")


def predict(config: RunSpec, mesh: Mesh, costs: Costs) -> RunPrediction | None:
    """Predict the run from the costs that were measured here; None for a device or a model that the simulator does not
    know."""
    cluster = _find_cluster(mesh, costs)
    return None if cluster is None else _predict(config, cluster, costs)


def predict_on_gpus(config: RunSpec) -> tuple[str, RunPrediction | None]:
    """The kind of GPU, this host's or else an H100, and what the run would be on as many of them as it has ranks."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    name = next((name for part, name in DEVICES.items() if part in here), ASSUMED)
    return name, _predict(config, load_cluster(name), None)


def _predict(config: RunSpec, cluster: Cluster, costs: Costs | None) -> RunPrediction | None:
    if config.lora.rank:  # the model of a step has the gradients of all weights
        return None
    try:
        request = job_of_run(config, cluster, costs)
        step = predict_step(request.job, request.routing, request.planner)
    except ConfigError:
        return None
    memory = predict_memory(request.job, step.layers, is_drawn=True)
    seconds = float(step.total)
    tokens = config.train.global_batch * config.train.seq_len / seconds
    return RunPrediction(seconds, tokens, memory.on_device, cluster.memory.capacity)


def _find_cluster(mesh: Mesh, costs: Costs) -> Cluster | None:
    if mesh.device.type == "cuda":
        device = torch.cuda.get_device_name(mesh.device)
        name = next((name for part, name in DEVICES.items() if part in device), None)
        figures = {"memory.capacity": str(mesh.device_bytes)}
        return None if name is None else load_cluster(name, figures)
    if len(set(costs.nodes)) > 1:
        return None
    cores = max(1, versions.count_cores() // torch.get_num_threads())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    figures = {"host.cores": str(cores), "memory.capacity": str(pages / mesh.world)}
    return load_cluster("here", figures)
