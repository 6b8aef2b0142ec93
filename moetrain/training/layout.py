"""`parallel.layout=auto`: the fastest layout that the simulator says fits, chosen before there are workers."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moetrain.common import cache, disk, versions
from moetrain.common.errors import ConfigError
from moetrain.config import Config, Native, find_ep, resolve_early, vary
from moetrain.config.rules import check
from moetrain.moe.planning.cost import Costs
from moetrain.simulate.cluster import BYTES, Cluster, load_cluster
from moetrain.simulate.here import read_costs
from moetrain.simulate.layout import Layout, StepWork
from moetrain.simulate.request import Request, job_of_run
from moetrain.simulate.shape import from_config
from moetrain.simulate.sweep import Candidate, sweep
from moetrain.training.prediction import DEVICES

OPEN: dict[str, Any] = {  # what is chosen, unless it is given; and what it is where nobody gives it
    "parallel.ep": None,
    "parallel.dp_replicate": 1,
    "train.micro_batch": None,
    "train.recompute": "none",
    "engine.reshard_after_forward": False,
}


class ChosenLayout(NamedTuple):
    """A layout, and why it is this one."""

    fields: dict[str, Any]  # of the configuration, all of `OPEN`
    reason: str  # one line; empty where it is the layout of an earlier start

    def overrides(self) -> list[str]:
        """Return the fields as the command line has them."""
        return [f"{name}={_write_value(value)}" for name, value in self.fields.items()]


def choose_layout(config: Config, given: Collection[str], world: int) -> ChosenLayout:
    """Choose what `config` leaves open for `world` ranks.

    Arguments:
        given: fields of the command line, which stay as they are; so do fields that a preset has set.

    A run that goes on keeps the layout of its earlier start.

    Raises `ConfigError` where no layout fits, or the simulator does not know the model or the engine.
    """
    fixed = {name for name, value in OPEN.items() if name in given or _get(config, name) != value}
    if fixed == OPEN.keys():
        return ChosenLayout({name: _get(config, name) for name in OPEN}, "")
    if (kept := _read_earlier(config, world)) is not None:
        return ChosenLayout({name: _get(config, name) if name in fixed else kept[name] for name in OPEN}, "")
    cluster = find_cluster(config, world)
    request = _ask(config, world, cluster)
    best, num_fitting, left_out = _find_best(config, request, world, fixed)
    if best is None:
        why = max(left_out, key=lambda reason: left_out[reason], default="the batch divides by none")
        raise ConfigError(f"parallel.layout=auto: no layout of {world} ranks fits on {cluster.name}: {why}")
    layout, work = best.prediction.job.layout, best.prediction.job.work
    fields = _fields_of(layout, work, request)
    found = {name: _get(config, name) if name in fixed else value for name, value in fields.items()}
    numbers = ", ".join(f"{name.partition('.')[2]} {_write_value(value)}" for name, value in found.items())
    step = f"{1e3 * best.prediction.time.total:,.0f} ms a step"
    return ChosenLayout(
        found,
        f"layout: {numbers}: {step} predicted on {cluster.name}, the fastest of {num_fitting} that fit; "
        f"most of the rest: {best.reason}",
    )


def find_cluster(config: Config, world: int) -> Cluster:
    """Return the cluster that a layout is chosen for: `parallel.cluster`, or what this host looks like."""
    if config.parallel.cluster is not None:
        return load_cluster(config.parallel.cluster)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        name = next((name for part, name in DEVICES.items() if part in device.name), None)
        if name is None:
            raise ConfigError(f"parallel.cluster=null: must name one like {device.name} for parallel.layout=auto")
        return load_cluster(name, {"memory.capacity": str(device.total_memory)})
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if here < world:
        raise ConfigError("parallel.cluster=null: must name one for parallel.layout=auto on several hosts without GPUs")
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // world)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = max(1, versions.count_cores() // threads)
    return load_cluster("here", {"host.cores": str(cores), "memory.capacity": str(pages / world)})


def _ask(config: Config, world: int, cluster: Cluster) -> Request:
    """Return what the simulator is asked, with the costs that this host has of such a layer, if any."""
    if not isinstance(config.engine, Native):
        raise ConfigError(f"engine={config.engine.name}: must be native for parallel.layout=auto")
    spec = resolve_early(config, world)
    is_here = cluster.host.cores is not None and config.parallel.cluster is None
    for dtype in ("bf16", "fp32") if config.train.dtype == "auto" else (spec.train.dtype,):
        costs = _find_profile(world, from_config(spec).expert_params * BYTES[dtype]) if is_here else None
        if costs is not None:
            return job_of_run(vary(spec, {"train.dtype": dtype}), cluster, costs)
    return job_of_run(spec, cluster, None)


def _find_profile(world: int, weight_bytes: int) -> Costs | None:
    """Return the newest costs that this machine keeps of so many ranks and of experts of that size."""
    kept = cache.folder("profiles")
    paths = sorted(kept.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True) if kept else []
    for path in paths:
        tree = disk.read_json(path)
        if isinstance(tree, dict) and str(tree.get("ranks", "")).startswith(f"{world} on cpu"):
            costs = read_costs(path)
            if costs.weight_bytes == weight_bytes:
                return costs
    return None


def _find_best(
    config: Config, request: Request, world: int, fixed: Collection[str]
) -> tuple[Candidate | None, int, dict[str, int]]:
    """Return the fastest layout that fits, how many fit, and how many do not, by reason.

    As many micro-steps as asked for, unless nothing fits then: they change what `balance.accumulate=buffer` sees.
    """
    base = _fields_of(request.job.layout, request.job.work, request)

    def allows(layout: Layout, work: StepWork, same_batch: bool) -> bool:
        fields = _fields_of(layout, work, request)
        kept = {*fixed, "train.micro_batch"} if same_batch else fixed
        if any(fields[name] != base[name] for name in kept) or config.parallel.r not in ("auto", layout.r):
            return False
        tried = vary(config, fields)
        try:
            check(tried)
            find_ep(tried, world)
        except ConfigError:
            return False
        return True

    left_out: dict[str, int] = {}
    for same_batch in (True, False):
        found, left_out, num_fitting = sweep(
            request.job,
            request.routing,
            request.planner,
            0,
            allows=lambda a, b: allows(a, b, same_batch),  # noqa: B023
        )
        if found:
            return found[0], num_fitting, left_out
    return None, 0, left_out


def _fields_of(layout: Layout, work: StepWork, request: Request) -> dict[str, Any]:
    """Return the fields of the configuration that make this layout."""
    is_whole = work.micro_batch * layout.world == work.global_batch
    return {
        "parallel.ep": layout.ep,
        "parallel.dp_replicate": layout.dp_replicate,
        "train.micro_batch": None if is_whole else work.micro_batch,
        "train.recompute": work.recompute,
        "engine.reshard_after_forward": layout.reshard,
    }


def _read_earlier(config: Config, world: int) -> dict[str, Any] | None:
    """Return the fields that an earlier start of the run has chosen; None where there is none, or `world` ranks cannot
    have them."""
    if config.run.name is None or config.checkpoint.resume == "none":
        return None
    tree = disk.read_yaml(Path(config.run.dir, config.run.name, "config.yaml"))
    if not isinstance(tree, dict) or tree.get("parallel", {}).get("layout") != "auto":
        return None
    kept = {name: tree[name.partition(".")[0]][name.partition(".")[2]] for name in OPEN}
    group = (kept["parallel.ep"] or 1) * (kept["parallel.dp_replicate"] or 1)
    return kept if world % group == 0 and config.train.global_batch % world == 0 else None


def _write_value(value: Any) -> str:
    """Return a value as YAML has it."""
    return "null" if value is None else str(value).lower()


def _get(config: Config, field: str) -> Any:
    section, _, name = field.partition(".")
    return getattr(getattr(config, section), name, None)
