"""How the ranks of a run share its work: what the configuration leaves open, filled in for a number of ranks."""

import math

from moetrain.common.errors import ConfigError
from moetrain.config import deepspeed
from moetrain.config.schema import Config, DeepSpeed


def find_ep(c: Config, world: int) -> int:
    """Returns the ranks of an expert group on `world` ranks: `parallel.ep`, or the most that divide ranks and experts.

    Raises `ConfigError` for the first rule between the configuration and the number of ranks that does not hold.
    """
    p, t = c.parallel, c.train
    if world % p.dp_replicate:
        raise ConfigError(f"parallel.dp_replicate={p.dp_replicate}: must divide the number of ranks, {world}")
    shard = world // p.dp_replicate
    if p.dp_shard is not None and p.dp_shard != shard:
        rule = f"dp_replicate={p.dp_replicate} × dp_shard must be the number of ranks, {world}"
        raise ConfigError(f"parallel.dp_shard={p.dp_shard}: {rule}")
    ep = p.ep or math.gcd(shard, *c.model.experts_of_layers)
    if shard % ep:
        raise ConfigError(f"parallel.ep={ep}: must divide the ranks of one replica, {shard}")
    fewest = min(c.model.experts_of_layers)
    if fewest < ep:
        which = "model.num_experts" if len(set(c.model.experts_of_layers)) == 1 else "of one layer"
        raise ConfigError(f"parallel.ep={ep}: needs at least as many experts, {which}={fewest}")
    if isinstance(c.engine, DeepSpeed):
        deepspeed.check(c, c.engine, world, ep)
    if p.uneven and t.global_batch < world:
        raise ConfigError(f"train.global_batch={t.global_batch}: must be at least the number of ranks, {world}")
    if not p.uneven and t.global_batch % (world * (t.micro_batch or 1)):
        per = f"{world} ranks" + (f" × micro_batch={t.micro_batch}" if t.micro_batch else "")
        raise ConfigError(f"train.global_batch={t.global_batch}: must be a multiple of {per}")
    return ep
