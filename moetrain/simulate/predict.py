"""A prediction: step time, throughput, memory and traffic of one model, cluster, layout, routing and planner."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moetrain.simulate.layer import PlannerChoice
from moetrain.simulate.memory import MemoryUse, predict_memory
from moetrain.simulate.step import Job, StepTime, predict_step
from moetrain.simulate.traffic import Natural, find_routing


@dataclass(frozen=True)
class Prediction:
    """What is shown of one layout, routing and planner."""

    job: Job
    routing: str
    planner: str
    time: StepTime
    balanced: float  # seconds of the same step with every rank's tokens spread evenly, nothing planned
    memory: MemoryUse

    @property
    def tokens_per_second_per_device(self) -> float:
        work = self.job.work
        return work.global_batch * work.seq_len / self.time.total / self.job.layout.world

    @property
    def mfu(self) -> float:
        """Share of the nominal peak of the dtype that the model's own operations take."""
        flops = self.job.shape.flops_per_token(self.job.work.seq_len)
        return self.tokens_per_second_per_device * flops / self.job.cluster.peak_of(self.job.work.dtype)

    @property
    def percent_of_balanced(self) -> float:
        return 100 * self.balanced / self.time.total

    @property
    def imbalance(self) -> float:
        """Largest over mean device load after planning, mean of the layers."""
        return float(np.mean([layer.rows_here for layer in self.time.layers]))

    @property
    def guests(self) -> float:
        """Copies lent in a layer."""
        return float(np.mean([layer.guests for layer in self.time.layers]))

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.job.cluster)

    def record(self) -> dict[str, Any]:
        """For machines."""
        capacity = self.job.cluster.memory.capacity
        return {
            "model": self.job.shape.name,
            "cluster": self.job.cluster.name,
            **asdict(self.job.layout),
            **asdict(self.job.work),
            "routing": self.routing,
            "planner": self.planner,
            "step_seconds": float(self.time.total),
            "step_seconds_p10": float(self.time.low),
            "step_seconds_p90": float(self.time.high),
            "sampling_error_seconds": float(self.time.error),
            "parts_seconds": {name: float(value) for name, value in self.time.parts.items()},
            "tokens_per_second_per_device": float(self.tokens_per_second_per_device),
            "mfu": float(self.mfu),
            "percent_of_balanced": float(self.percent_of_balanced),
            "imbalance_planned": self.imbalance,
            "guests": self.guests,
            "memory_bytes": self.memory.parts,
            "memory_total_bytes": self.memory.total,
            "memory_capacity_bytes": capacity,
            "fits": self.fits,
            "link_bytes": {name: float(value) for name, value in self.time.link_bytes.items()},
        }


def predict(
    job: Job,
    routing: str = "balanced",
    planner: PlannerChoice | None = None,
    seed: int = 0,
    samples: int = 8,
    natural: Natural | None = None,
) -> Prediction:
    """Raises `ConfigError` for a layout, batch or routing that cannot be."""
    planner = planner or PlannerChoice("home")
    source = find_routing(routing, job.group, natural or Natural())
    time = predict_step(job, source, planner, seed, samples)
    balanced = predict_step(job, "balanced", PlannerChoice("home"), seed, samples).total
    memory = predict_memory(job, time.layers, source.is_drawn)
    return Prediction(job, source.name, planner.name, time, balanced, memory)
