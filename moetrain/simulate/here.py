"""This machine as a cluster: what `moetrain profile` or a run measured, in place of nominal figures. Loads no torch."""

import math
from dataclasses import replace
from pathlib import Path

from moetrain.common import disk
from moetrain.common.errors import ConfigError
from moetrain.moe.planning.cost import Costs, Link
from moetrain.simulate.cluster import BYTES, Cluster
from moetrain.simulate.shape import Shape

FIGURES = (
    *("row_forward", "row_backward", "segment_forward", "segment_backward", "row_bytes", "weight_bytes"),
    *("gradient_bytes", "overlap", "handling", "lends"),
)

DENSE = 1.8  # rate of dense products over that of experts' rows with their gathers and sums (results/simulate-here.md)


def read_costs(path: Path) -> Costs:
    """The costs of `costs.json`, as a run's folder and the profiles of a machine have them. Raises `ConfigError`."""
    tree = disk.read_json(path)
    try:
        figures = {name: tree[name] for name in FIGURES}
        inside, between = (Link(**tree[name]) for name in ("inside", "between"))
        costs = Costs(**figures, inside=inside, between=between, nodes=tuple(tree["nodes"]))
        if min(costs.row_forward, costs.row_backward, costs.inside.bandwidth, costs.between.bandwidth) <= 0:
            raise ValueError
    except (TypeError, ValueError, LookupError):
        raise ConfigError(f"cluster.costs={path}: must be the costs.json of a run") from None
    return costs


def crowd_costs(costs: Costs, crowd: float) -> Costs:
    """The costs of rows and segments where so many ranks share a core; each was measured with a core to itself."""
    rows = {name: crowd * getattr(costs, name) for name in ("row_forward", "row_backward")}
    segments = {name: crowd * getattr(costs, name) for name in ("segment_forward", "segment_backward")}
    return replace(costs, **rows, **segments)


def measured_cluster(cluster: Cluster, costs: Costs, shape: Shape, dtype: str) -> Cluster:
    """`cluster` with links and the rate of products as measured; raises `ConfigError` where they are of another layer.

    The peak becomes what gives dense products the measured rate of the experts' forward; on a host's cores `DENSE`
    times that.
    """
    if costs.weight_bytes != shape.expert_params * BYTES[dtype]:
        theirs, ours = f"{costs.weight_bytes:,} bytes", f"{shape.expert_params:,} weights in {dtype}"
        raise ConfigError(f"cluster.costs: is of experts of {theirs}, the model's have {ours}")
    width = math.sqrt(shape.dim * shape.expert_hidden)
    dense = DENSE if cluster.host.cores is not None else 1.0
    achieved = dense * 6.0 * shape.dim * shape.expert_hidden / costs.row_forward
    peak = achieved / cluster.gemm.share * (1 + cluster.gemm.half_width / width)
    link = {"share": 1.0, "half_message": 0.0}
    inside = {"bandwidth": costs.inside.bandwidth, "latency": costs.inside.latency}
    between = {"bandwidth": costs.between.bandwidth, "latency": costs.between.latency}
    return cluster.model_copy(
        update={
            "peak": {**cluster.peak, dtype: peak},
            "nvlink": cluster.nvlink.model_copy(update={**link, **inside}),
            "network": cluster.network.model_copy(update={**link, **between, "nics": 1.0}),
        }
    )
