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
    r = find_r(c, ep)
    if isinstance(c.engine, DeepSpeed):
        deepspeed.check(c, c.engine, world, ep, r)
    least = t.sequences_of_a_sample
    if p.uneven and t.global_batch < world * least:
        each = f"{world}" if least == 1 else f"{world}, × 2 sequences of a pair"
        raise ConfigError(f"train.global_batch={t.global_batch}: must be at least the number of ranks, {each}")
    if not p.uneven and t.global_batch % (world * (t.micro_batch or least)):
        per = f"{world} ranks" + (f" × micro_batch={t.micro_batch}" if t.micro_batch else "")
        per += " × 2 sequences of a pair" if least == 2 and not t.micro_batch else ""
        raise ConfigError(f"train.global_batch={t.global_batch}: must be a multiple of {per}")
    return ep


def find_r(c: Config, ep: int) -> int:
    """Returns the slices that every expert is cut into for expert groups of `ep`: `parallel.r`, or the fewest of equal
    widths, multiples of 8, that give every rank one.

    Raises `ConfigError` where a rank would have none, or where experts cannot be cut.
    """
    fewest, hidden, asked = min(c.model.experts_of_layers), c.model.expert_hidden, c.parallel.r
    which = "model.num_experts" if len(set(c.model.experts_of_layers)) == 1 else "of one layer"
    is_whole = c.model.source == "hf"
    if asked == "auto" and fewest >= ep:
        return 1
    if asked == "auto":
        if is_whole:
            raise ConfigError(f"parallel.ep={ep}: needs at least as many experts with model=hf, {which}={fewest}")
        r = next((n for n in range(-(-ep // fewest), ep + 1) if hidden % (8 * n) == 0), 0)
        if not r:
            rule = f"has no slices of equal widths, multiples of 8, that give every rank one of {which}={fewest}"
            raise ConfigError(f"parallel.ep={ep}: model.expert_hidden={hidden} {rule}")
    else:
        r = asked
    if fewest * r < ep:
        rule = f"must give each rank of parallel.ep={ep} a slice of the experts, {which}={fewest}"
        raise ConfigError(f"parallel.r={r}: {rule}")
    if r > 1 and is_whole:
        raise ConfigError(f"parallel.r={r}: must be 1 for model=hf, whose experts are never cut")
    if r > 1 and c.train.experts_dtype == "fp8" and hidden % (16 * r):
        rule = f"must cut model.expert_hidden={hidden} into multiples of 16 with train.experts_dtype=fp8"
        raise ConfigError(f"parallel.r={r}: {rule}")
    if r > 1 and hidden % (8 * r):
        raise ConfigError(f"parallel.r={r}: must cut model.expert_hidden={hidden} into multiples of 8")
    if r > 1 and c.lora.rank:
        raise ConfigError(
            f"parallel.r={r}: must be 1 with lora.rank={c.lora.rank}, whose adapters are of whole experts"
        )
    if r > 1 and c.optim.name != "adamw":
        rule = f"must be 1 with optim.name={c.optim.name}, whose update may not be that of each slice by itself"
        raise ConfigError(f"parallel.r={r}: {rule}")
    return r
