"""What `moetrain bench layer` and `bench step` measure, from their command lines. Loads no torch."""

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from moetrain.bench.cases import PRESETS, QUICK, LayerShape, match_scenarios
from moetrain.common.errors import ConfigError
from moetrain.config.schema import Dtype

if TYPE_CHECKING:
    from moetrain.config import Config

DTYPES = get_args(Dtype)
PLANNERS = ["home", "llep", "makespan"]
KERNELS = ["fastest", "torch", "triton"]  # the first: what the device uses by itself


@dataclass(frozen=True)
class Grid:
    """What `moetrain bench layer` measures: every routing and planner on layers of these shapes."""

    shapes: list[LayerShape]
    patterns: list[str] | None  # of the names of routings; None: all
    planners: list[str]
    repeats: int  # timed passes of each cell
    warmup: int  # balanced passes before any is timed
    seed: int
    kernels: Sequence[str] = tuple(KERNELS[:1])
    workloads: Sequence[str] = ()  # names, and folders of runs; in place of the routings unless `patterns` name some

    @classmethod
    def from_options(cls, options: argparse.Namespace, num_ranks: int) -> "Grid":
        """Return the grid of a command line. Raises `ConfigError` for what cannot be measured on `num_ranks` ranks."""
        from moetrain.moe import planning  # compiled code: not for every command line

        for name in options.planner:
            if name not in planning.PLANNERS:
                raise ConfigError(f"--planner {name}: must be one of {', '.join(planning.PLANNERS)}")
        dim, hidden, experts, top_k = PRESETS.get(options.shape, (512, 1024, None, 2))
        dim, hidden, top_k = options.dim or dim, options.hidden or hidden, options.top_k or top_k
        shapes = [
            LayerShape(options.tokens, dim, hidden, number, top_k, dtype)
            for dtype in options.dtype
            for number in options.experts or ([experts] if experts else [16, 64])
        ]
        for shape in shapes:
            if shape.experts % num_ranks:
                raise ConfigError(f"--experts {shape.experts}: must be a multiple of the {num_ranks} ranks")
            if shape.dim % 8 or shape.hidden % 8:  # rows of a grouped GEMM begin at multiples of 16 bytes
                raise ConfigError(f"--dim {shape.dim} --hidden {shape.hidden}: must be multiples of 8")
        chosen = _list_workloads(options)
        if chosen and options.virtual_ranks:
            raise ConfigError("--workload and --trace: must not be given with --virtual-ranks")
        patterns = options.scenario or ([] if chosen else list(QUICK) if options.quick else None)
        for shape in shapes:
            if patterns != []:
                match_scenarios(patterns, shape.experts)
        repeats = options.repeats or (3 if options.virtual_ranks else 5 if options.quick else 15)
        warmup = options.warmup or (5 if options.virtual_ranks else 40)
        return cls(shapes, patterns, options.planner, repeats, warmup, options.seed, options.kernels, chosen)

    def list_scenarios(self, shape: LayerShape) -> list[str]:
        """Return the routings of one shape, by name, and the workloads."""
        routings = [] if self.patterns == [] else match_scenarios(self.patterns, shape.experts)
        return [*routings, *self.workloads]


def _list_workloads(options: argparse.Namespace) -> list[str]:
    """Return the workloads of a command line, `--workload` and `--trace`. Raises `ConfigError`."""
    if not options.workload and options.trace is None:
        return []
    from moetrain.bench import workloads  # loads torch: not for every command line

    return workloads.list_workloads(options.workload or [], options.trace)


@dataclass(frozen=True)
class StepOptions:
    """What `moetrain bench step` measures."""

    planners: list[str]
    repeats: int  # steps of each variant that are timed
    warmup: int  # training steps before
    by_domain: bool = False  # whether every rank reads another domain of the corpus
    peers: bool = False  # whether transformers' model takes its turns
    workloads: Sequence[str] = ()  # that the routers choose by; none: by their scores

    @classmethod
    def from_arguments(cls, given: argparse.Namespace) -> "StepOptions":
        """Return the options of a command line. Raises `ConfigError` for what cannot be measured."""
        from moetrain.moe.planning import PLANNERS

        planners = given.planners.split(",")
        for name in planners:
            if name not in PLANNERS:
                raise ConfigError(f"--planners {name}: must be among {', '.join(PLANNERS)}")
        if given.repeats < 1:
            raise ConfigError(f"--repeats {given.repeats}: must be at least 1")
        if given.warmup < 0:
            raise ConfigError(f"--warmup {given.warmup}: must be at least 0")
        chosen = _list_workloads(given)
        if chosen and given.peers:
            raise ConfigError("--peers: must not be given with --workload or --trace")
        return cls(planners, given.repeats, given.warmup, given.by_domain, given.peers, chosen)


PEER_HAS = {  # what Qwen3-MoE of transformers can be
    "model.qk_norm": "head",
    "model.num_shared_experts": 0,
    "model.num_zero_compute": 0,
    "model.chain": 1,
    "model.expert_schedule": "uniform",
    "router.name": "topk",
    "router.scores": "softmax",
    "router.scaling": 1.0,
    "router.skew": 0.0,
    "router.noise": 0.0,
    "router.groups": None,
    "router.capacity_factor": None,
    "router.k_schedule": "uniform",
    "data.attend_within_documents": False,
    "train.recompute": "none",
}


def check_peer(settings: "Config") -> None:
    """Raise `ConfigError` where transformers is missing or has no model like ours."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("--peers: needs transformers, which is not installed (pip install 'moetrain[dev]')")
    if settings.model.source != "preset":
        raise ConfigError(f"model={settings.model.source}: must be a preset with --peers")
    for field, value in PEER_HAS.items():
        section, name = field.split(".")
        if (given := getattr(getattr(settings, section), name)) != value:
            raise ConfigError(f"{field}={given}: must be {value} with --peers")
