"""What `moetrain simulate` is asked: fields of the configuration, and those that only the simulator has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain import config
from moetrain.common.errors import ConfigError
from moetrain.config import Config, Native, RunSpec
from moetrain.moe.planning import find_slices
from moetrain.moe.planning.cost import Costs
from moetrain.simulate.cluster import Cluster, load_cluster, split_name
from moetrain.simulate.here import crowd_costs, measured_cluster, read_costs
from moetrain.simulate.layer import PlannerChoice
from moetrain.simulate.layout import Layout, StepWork
from moetrain.simulate.shape import Shape, from_config, from_hf
from moetrain.simulate.stack import find_stack
from moetrain.simulate.step import Job
from moetrain.simulate.traffic import AGREEMENT, CONCENTRATION, Natural

OWN = ("cluster", "routing", "stack", "model.path", "routing.concentration", "routing.agreement")
PARALLEL = {"tp": 1, "cp": 1, "pp": 1, "virtual": 1}
SEQ_LEN, MICRO_BATCH = 4096, 1  # where not told: a preset's defaults are those of a job on a laptop


@dataclass(frozen=True)
class Request:
    """A job, the routing and the planner to predict it under."""

    job: Job
    routing: str
    natural: Natural
    planner: PlannerChoice
    is_auto: bool = False  # the layout is to be chosen


def read(overrides: Sequence[str], extra_dir: str | None = None) -> Request:
    """From the command line's `field=value`. Raises `ConfigError`."""
    own, rest = _split(overrides)
    name, devices = split_name(own.get("cluster", "h100"))
    figures = {key.removeprefix("cluster."): value for key, value in own.items() if key.startswith("cluster.")}
    figures.pop("costs", None)
    cluster = load_cluster(name, figures)
    is_hf = own.pop("model", None) == "hf"
    if is_hf != ("model.path" in own):
        raise ConfigError("model.path: goes with model=hf, and model=hf with model.path=FOLDER")
    settings = config.load(rest, extra_dir)
    shape = from_hf(own["model.path"]) if is_hf else from_config(settings)
    if not is_hf:
        shape = _named(shape, next((o.partition("=")[2] for o in rest if o.startswith("model=")), "small"))
    world = devices or settings.parallel.nproc or cluster.devices_per_node
    layout = _layout(own, settings, shape, cluster, world)
    given = {override.partition("=")[0] for override in rest}
    natural = Natural(
        _number(own, "routing.concentration", CONCENTRATION), _number(own, "routing.agreement", AGREEMENT)
    )
    work = _work(own, settings, given, layout)
    measured = read_costs(Path(costs)) if (costs := own.get("cluster.costs")) else None
    cluster, measured = _settle(cluster, measured, shape.cut(layout.r), world, work.dtype)
    job = Job(cluster, shape, layout, work, find_stack(own.get("stack", "moetrain")), measured)
    layout.check(shape)
    job.work.micro_steps(layout)
    cluster.peak_of(job.work.dtype)
    planner = PlannerChoice(settings.planner.name, settings.planner.options)
    choice = own.get("parallel.layout", "fixed")
    if choice not in ("auto", "fixed"):
        raise ConfigError(f"parallel.layout={choice}: must be auto or fixed")
    return Request(job, own.get("routing", "natural"), natural, planner, choice == "auto")


def job_of_run(config: RunSpec, cluster: Cluster, costs: Costs | None) -> Request:
    """What a run that is about to start asks for, with the costs that were measured; None: with the cluster's figures.

    Raises `ConfigError` for a model or a batch that the simulator does not know.
    """
    shape = from_config(config)
    if not isinstance(config.engine, Native):
        raise ConfigError(f"engine={config.engine.name}: must be native for `moetrain simulate`")
    layout = Layout(
        world=config.world,
        ep=config.ep,
        dp_replicate=config.parallel.dp_replicate,
        sharding="fsdp",
        reshard=config.engine.reshard_after_forward,
        r=config.r,
        chunks=config.parallel.chunks,
    )
    work = StepWork(
        seq_len=config.train.seq_len,
        micro_batch=config.micro_batch,
        global_batch=config.train.global_batch,
        dtype=config.train.dtype,
        recompute=config.train.recompute,
        moment_bytes=8 if config.optim.state_dtype == "fp32" else 4,
        offload=config.engine.offload != "none",
    )
    settled, measured = _settle(cluster, costs, shape.cut(config.r), config.world, work.dtype)
    planner = PlannerChoice(config.planner.name, config.planner.options)
    return Request(Job(settled, shape, layout, work, find_stack("moetrain"), measured), "natural", Natural(), planner)


def _settle(
    cluster: Cluster, measured: Costs | None, shape: Shape, world: int, dtype: str
) -> tuple[Cluster, Costs | None]:
    """The cluster with what was measured on it, and with all ranks on its host where it has but one."""
    if measured is not None:
        cluster = measured_cluster(cluster, measured, shape, dtype)
    if (cores := cluster.host.cores) is not None:
        cluster = cluster.on_one_host(world)
        measured = crowd_costs(measured, max(1.0, world / cores)) if measured else None
    return cluster, measured


def choose_planner(name: str, extra_dir: str | None = None) -> PlannerChoice:
    """A planner with the options of its preset; llep with those of its paper. Raises `ConfigError`."""
    if name == "llep":  # the preset has limits for small jobs on CPUs
        return PlannerChoice(name)
    PlannerChoice(name)
    return PlannerChoice(name, config.load([f"planner={name}"], extra_dir).planner.options)


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({field: value} that only the simulator has, all others)."""
    own: dict[str, str] = {}
    rest = []
    for override in overrides:
        field, _, value = override.partition("=")
        section, _, last = field.partition(".")
        is_own = (
            field in OWN
            or field.startswith("cluster.")
            or (section == "parallel" and last in (*PARALLEL, "sharding", "layout"))
        )
        if is_own or override in ("model=hf", "train.dtype=fp8"):
            own[field] = value
        else:
            rest.append(override)
    return own, rest


def _named(shape: Shape, name: str) -> Shape:
    return Shape(**{**shape.__dict__, "name": name})


def _layout(own: dict[str, str], settings: Config, shape: Shape, cluster: Cluster, world: int) -> Layout:
    axes = {name: _whole(own, f"parallel.{name}", default) for name, default in PARALLEL.items()}
    sharding: Any = own.get("parallel.sharding", "fsdp")
    if sharding not in ("fsdp", "zero1"):
        raise ConfigError(f"parallel.sharding={sharding}: must be fsdp or zero1")
    if settings.parallel.dp_shard is not None:
        raise ConfigError("parallel.dp_shard: follows from the other axes here")
    if world % axes["pp"]:
        raise ConfigError(f"parallel.pp={axes['pp']}: must divide the number of ranks, {world}")
    ep = settings.parallel.ep
    if ep is None:  # the largest group inside an NVLink domain
        replica = world // axes["pp"] // settings.parallel.dp_replicate
        most = min(replica, shape.experts, cluster.domain)
        ep = max(n for n in range(1, max(most, 1) + 1) if replica % n == 0 and shape.experts % n == 0)
    asked = settings.parallel.r
    r = (find_slices(shape.experts, shape.expert_hidden, ep) or 1) if asked == "auto" else asked
    reshard = isinstance(settings.engine, Native) and settings.engine.reshard_after_forward
    return Layout(
        world=world,
        ep=ep,
        dp_replicate=settings.parallel.dp_replicate,
        sharding=sharding,
        reshard=reshard,
        r=r,
        chunks=settings.parallel.chunks,
        **axes,
    )


def _work(own: dict[str, str], settings: Config, given: set[str], layout: Layout) -> StepWork:
    t = settings.train
    micro_batch = t.micro_batch or MICRO_BATCH
    global_batch = t.global_batch if "train.global_batch" in given else layout.dp * micro_batch
    if "train.global_batch" in given and t.micro_batch is None:
        micro_batch = max(1, global_batch // layout.dp)
    dtype = own.get("train.dtype", "bf16" if t.dtype == "auto" else t.dtype)
    return StepWork(
        seq_len=t.seq_len if "train.seq_len" in given else SEQ_LEN,
        micro_batch=micro_batch,
        global_batch=global_batch,
        dtype=dtype,
        recompute=t.recompute,
        moment_bytes=8 if settings.optim.state_dtype == "fp32" else 4,
        offload=settings.engine.offload != "none",
    )


def _number(own: dict[str, str], field: str, default: float) -> float:
    try:
        value = float(own.get(field, default))
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{field}={own[field]}: must be a number above 0")
    return value


def _whole(own: dict[str, str], field: str, default: int) -> int:
    text = own.get(field, str(default))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{field}={text}: must be a whole number above 0")
    return int(text)
