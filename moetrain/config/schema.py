"""The frozen, typed tree of a run's configuration.

`config.load` composes YAML with Hydra and turns the result into it. Nothing changes a configuration after that.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

from moetrain.config.schedules import spread

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["auto", "fp32", "bf16"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, bool | None):
            raise ValueError("must not be true or false")
        return value


class Run(Section):
    name: str | None = None
    dir: str = "runs"


class Train(Section):
    steps: Positive
    seed: NonNegative
    global_batch: Positive
    micro_batch: Positive | None
    seq_len: Annotated[int, Field(ge=2)]
    recompute: Literal["none", "selective", "full"]
    compile: bool
    dtype: Dtype
    log_every: Positive
    threads: Positive | None


class Optim(Section):
    lr: PositiveFloat
    min_lr: NonNegativeFloat
    schedule: Literal["cosine", "wsd"]
    warmup: NonNegative
    decay_fraction: Fraction
    betas: tuple[Fraction, Fraction]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    clip: NonNegativeFloat
    state_dtype: Literal["fp32", "bf16"]


class Parallel(Section):
    nproc: Positive | None
    ep: Positive | None
    dp_shard: Positive | None
    dp_replicate: Positive
    uneven: bool = False


Shape = Literal["uniform", "descending", "ascending", "pyramid_up", "pyramid_down", "wave_up", "wave_down"]


class Router(Section):
    """The fields with a default here belong to some routers only (`Router.takes`)."""

    name: str
    top_k: Positive
    scores: Literal["softmax", "sigmoid"]
    normalise: bool | None
    scaling: PositiveFloat
    skew: Finite
    k_schedule: Shape
    capacity_factor: PositiveFloat | None
    zero_compute_tau: PositiveFloat
    noise: NonNegativeFloat = 0.0
    groups: Positive | None = None
    top_groups: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.4
    k_start: Positive = 1
    token_groups: Positive = 2
    state_dim: Positive = 128

    @property
    def own_options(self) -> dict[str, Any]:
        """Those of single routers that are not as they are by default."""
        fields = type(self).model_fields
        return {k: v for k, v in self.model_dump().items() if not fields[k].is_required() and v != fields[k].default}


class Balance(Section):
    scope: Literal["micro", "data", "global"]
    accumulate: Literal["buffer", "exact", "hold"]
    coefficient: NonNegativeFloat
    micro_fraction: NonNegativeFloat
    sequence_coefficient: NonNegativeFloat
    device_coefficient: NonNegativeFloat
    device_groups: Positive | None
    entropy_coefficient: NonNegativeFloat
    z_coefficient: NonNegativeFloat
    bias: Literal["none", "sign", "proportional"]
    bias_rate: NonNegativeFloat


class Eval(Section):
    every: NonNegative
    tokens_per_domain: Positive


class Generate(Section):
    prompt: str | None
    tokens: Positive
    temperature: NonNegativeFloat
    seed: NonNegative


class Checkpoint(Section):
    every: NonNegative
    keep: Positive
    keep_every: NonNegative
    resume: str


class Recovery(Section):
    timeout: PositiveFloat
    restarts: NonNegative
    skips: Positive
    snapshot_every: NonNegative


class Track(Section):
    wandb: bool
    tensorboard: bool
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    job_type: str | None = None
    notes: str | None = None
    trace_every: NonNegative
    window: Positive
    alert_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None
    profile_from: Positive | None
    profile_steps: Positive

    @field_validator("project", "entity", "group", "job_type")
    @classmethod
    def _is_a_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        """As wandb has it."""
        if value is not None and not 1 <= len(value) <= 128:
            raise ValueError("must have 1 to 128 characters")
        if info.field_name in ("project", "entity") and value is not None and set(value) & set("/\\#?%:"):
            raise ValueError("must have none of / \\ # ? % :")
        return value

    @field_validator("tags")
    @classmethod
    def _are_tags(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(1 <= len(tag) <= 64 for tag in value):
            raise ValueError("must be words of 1 to 64 characters")
        return value


class Model(Section):
    dim: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    num_experts: Positive
    expert_hidden: Positive
    num_shared_experts: NonNegative
    num_dense_layers: NonNegative
    dense_hidden: Positive
    chain: Positive
    zero_experts: NonNegative
    copy_experts: NonNegative
    constant_experts: NonNegative
    expert_schedule: Shape
    min_experts: Positive | None
    vocab_size: Positive | None
    qk_norm: Literal["none", "head", "full"]
    tied_embeddings: bool
    rope_theta: PositiveFloat
    norm_eps: PositiveFloat
    init_std: PositiveFloat

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def num_zero_compute(self) -> int:
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def pass_names(self) -> list[str]:
        """layer_LL of every pass through a MoE layer, in order; with more than one pass a layer, layer_LL_P."""
        layers = range(self.num_dense_layers, self.num_layers)
        if self.chain == 1:
            return [f"layer_{layer:02d}" for layer in layers]
        return [f"layer_{layer:02d}_{turn}" for layer in layers for turn in range(self.chain)]

    @property
    def experts_of_layers(self) -> list[int]:
        """Experts that compute, of every MoE layer."""
        return spread(self.expert_schedule, self.num_moe_layers, self.num_experts, self.min_experts or 1)


class Data(Section):
    source: Literal["local", "debian", "folder"]  # the keys of data.corpus.SOURCES
    path: str | None
    dir: str
    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)]
    tokenizer: str | None
    max_bytes_per_domain: Positive | None
    dedup: Literal["exact", "near"]  # the keys of data.corpus.FINGERPRINTS
    on_bad: Literal["error", "skip"]
    on_change: Literal["error", "keep"] = "error"
    held_out: Fraction
    attend_within_documents: bool
    domain_block: Positive | None


class Planner(Section):
    name: str
    alpha: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    min_rows: NonNegative | None = None
    threshold: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    replicas: Positive | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {k: v for k, v in self.model_dump(exclude={"name"}).items() if v is not None}


class Native(Section):
    name: Literal["native"]
    reshard_after_forward: bool
    offload: Literal["none", "cpu", "disk"]
    offload_dir: str | None
    guest_memory_mib: NonNegative | None
    max_rows: Positive | None


class DeepSpeed(Section):
    name: Literal["deepspeed"]
    zero_stage: Literal[0, 1, 2, 3]
    offload: Literal["none", "cpu", "nvme"]
    extra: dict[str, Any] | None
    guest_memory_mib: NonNegative | None
    max_rows: Positive | None


def _engine_name(engine: Any) -> Any:
    return engine.get("name") if isinstance(engine, dict) else getattr(engine, "name", None)


AnyEngine = Annotated[
    Annotated[Native, Tag("native")] | Annotated[DeepSpeed, Tag("deepspeed")], Discriminator(_engine_name)
]


class Config(Section):
    run: Run
    train: Train
    optim: Optim
    parallel: Parallel
    router: Router
    balance: Balance
    eval: Eval
    generate: Generate
    checkpoint: Checkpoint
    recovery: Recovery
    track: Track
    model: Model
    data: Data
    planner: Planner
    engine: AnyEngine

    @property
    def top_k_of_layers(self) -> list[int]:
        return spread(self.router.k_schedule, self.model.num_moe_layers, self.router.top_k, 1)

    def micro_batch(self, world: int) -> int:
        """Sequences per rank and micro-step; the most, where shares are uneven."""
        return self.train.micro_batch or -(-self.train.global_batch // world)

    def micro_steps(self, world: int) -> int:
        """Micro-steps of an optimizer step."""
        return -(-self.train.global_batch // (self.micro_batch(world) * world))

    def layout(self, world: int) -> Parallel:
        """`parallel` with `ep` and `dp_shard` filled in; raises `ConfigError` where it does not fit `world` ranks."""
        from moetrain.config.rules import check_world

        check_world(self, world)
        shard = world // self.parallel.dp_replicate
        ep = self.parallel.ep or math.gcd(shard, *self.model.experts_of_layers)
        return self.parallel.model_copy(update={"dp_shard": shard, "ep": ep})
