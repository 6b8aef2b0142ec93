"""What `moetrain bench step` measures, from its command line. No torch."""

import argparse
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetrain.common.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.config import Config


@dataclass(frozen=True)
class Options:
    planners: list[str]
    repeats: int
    warmup: int
    by_domain: bool = False
    peers: bool = False

    @classmethod
    def from_arguments(cls, given: argparse.Namespace) -> "Options":
        """Raises `ConfigError`."""
        from moetrain.moe.planning import PLANNERS

        planners = given.planners.split(",")
        for name in planners:
            if name not in PLANNERS:
                raise ConfigError(f"--planners {name}: must be among {', '.join(PLANNERS)}")
        if given.repeats < 1:
            raise ConfigError(f"--repeats {given.repeats}: must be at least 1")
        if given.warmup < 0:
            raise ConfigError(f"--warmup {given.warmup}: must be at least 0")
        return cls(planners, given.repeats, given.warmup, given.by_domain, given.peers)


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
    """Raises `ConfigError` where transformers is missing or has no such model."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("--peers: needs transformers, which is not installed (pip install 'moetrain[dev]')")
    for field, value in PEER_HAS.items():
        section, name = field.split(".")
        if (given := getattr(getattr(settings, section), name)) != value:
            raise ConfigError(f"{field}={given}: must be {value} with --peers")
