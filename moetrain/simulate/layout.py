"""How a step is spread over ranks, and what it works on."""

import math
from dataclasses import dataclass
from typing import Literal

from moetrain.common.errors import ConfigError
from moetrain.moe.options import Chunks
from moetrain.simulate.shape import Shape


@dataclass(frozen=True)
class Layout:
    """world = pp × tp × cp × dp. A stage's ranks also form expert groups of ep, and expert data = stage / ep.

    The trainer has no tp, cp and pp yet: they come as formulas.
    """

    world: int
    ep: int
    dp_replicate: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    virtual: int = 1  # model chunks of a pipeline stage (interleaved schedule)
    sharding: Literal["fsdp", "zero1"] = "fsdp"  # of parameters too, or of optimizer states alone
    reshard: bool = False  # parameters are gathered again for the backward
    r: int = 1  # slices that every expert is cut into
    chunks: Chunks = 1  # in which rows travel and are computed

    @property
    def stage(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world // self.pp

    @property
    def dp(self) -> int:
        """Data-parallel ranks of the dense part."""
        return self.stage // (self.tp * self.cp)

    @property
    def dense_shards(self) -> int:
        """Ranks that share one copy of the dense parameters of a tensor-parallel slice."""
        return self.dp // self.dp_replicate * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks that share one copy of an expert-parallel rank's experts."""
        return max(1, self.stage // self.ep // self.dp_replicate)

    def own_experts(self, shape: Shape) -> float:
        """Experts of a layer whose home is the fullest rank of an expert group; parts of some, where they are cut."""
        return -(-shape.experts * self.r // self.ep) / self.r

    def check(self, shape: Shape) -> None:
        """Raises `ConfigError` where the numbers do not divide each other."""
        for field, value, whole, text in (
            ("pp", self.pp, self.world, "the number of ranks"),
            ("tp", self.tp * self.cp, self.stage, "with parallel.cp the ranks of a pipeline stage"),
            ("dp_replicate", self.dp_replicate, self.dp, "the data-parallel ranks"),
            ("ep", self.ep, self.stage // math.gcd(self.dp_replicate, self.stage), "the ranks of one replica"),
        ):
            if whole % value:
                raise ConfigError(f"parallel.{field}={value}: must divide {text}, {whole}")
        if self.ep > shape.experts * self.r:
            rule = f"needs at least as many slices of experts, parallel.r={self.r} × {shape.experts}"
            raise ConfigError(f"parallel.ep={self.ep}: {rule}")
        if self.r > 1 and shape.expert_hidden % (8 * self.r):
            hidden = f"the hidden width of an expert, {shape.expert_hidden}"
            raise ConfigError(f"parallel.r={self.r}: must cut {hidden}, into multiples of 8")
        if self.pp * self.virtual > shape.num_layers:
            raise ConfigError(f"parallel.pp={self.pp}: needs at least as many layers as stages, {shape.num_layers}")


@dataclass(frozen=True)
class StepWork:
    """What an optimizer step computes, and in which numbers."""

    seq_len: int
    micro_batch: int  # sequences of a data-parallel rank and micro-step
    global_batch: int
    dtype: str = "bf16"
    recompute: str = "none"
    moment_bytes: int = 8  # AdamW's two, of a parameter
    offload: bool = False  # optimizer states in host memory

    def micro_steps(self, layout: Layout) -> int:
        """Raises `ConfigError` where the batch does not divide."""
        each = layout.dp * self.micro_batch
        if self.global_batch % each or self.global_batch < each:
            rule = f"must be a multiple of {layout.dp} data-parallel ranks × micro_batch={self.micro_batch}"
            raise ConfigError(f"train.global_batch={self.global_batch}: {rule}")
        return self.global_batch // each

    def tokens(self, layout: Layout) -> int:
        """Tokens that a rank holds in a micro-step, where tensor and context parallelism shard the sequence."""
        return max(1, self.seq_len * self.micro_batch // (layout.tp * layout.cp))
