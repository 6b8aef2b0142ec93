"""Going on with fewer ranks than a run has had: the same global batch and data, the layout as near as it can be.

The loss is divided by the global batch, samples are read by their global number and noise depends on it, so that
nothing but the layout changes; shares of the batch may be uneven (ElasWave keeps global batch and gradient scale so).
"""

from pathlib import Path

from moetrain.common.errors import ConfigError
from moetrain.config.layout import find_ep
from moetrain.config.schema import Config
from moetrain.config.spec import vary


def fitting(config: Config, world: int, heartbeats: Path) -> Config:
    """`config` for a run that goes on with `world` ranks; unchanged where it has never had more, or fits as it is.

    The most replicas that divide the ranks, up to `parallel.dp_replicate`; the largest `ep` that is valid, up to
    `parallel.ep`. Raises `ConfigError` where none is.
    """
    if len(list(heartbeats.glob("rank_*"))) <= world or _fits(config, world):
        return config
    options = config.parallel
    most = max(n for n in range(1, options.dp_replicate + 1) if world % n == 0)
    changed = {
        "parallel.nproc": None,
        "parallel.dp_shard": None,
        "parallel.dp_replicate": most,
        "parallel.uneven": True,
    }
    for ep in range(options.ep or 0, 0, -1):
        tried = vary(config, {**changed, "parallel.ep": ep})
        if _fits(tried, world):
            return tried
    out = vary(config, {**changed, "parallel.ep": None})
    find_ep(out, world)
    return out


def _fits(config: Config, world: int) -> bool:
    try:
        find_ep(config, world)
    except ConfigError:
        return False
    return True
