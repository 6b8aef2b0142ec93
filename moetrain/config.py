"""The configuration of a run: Hydra composes YAML, pydantic turns it into a frozen, typed tree.

`load(overrides)` is the only way in. Every mistake becomes a `ConfigError`: one line that names the field, the
value and the rule. Below `train.py` nobody sees a `DictConfig`, and nothing changes a config after it was loaded.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator

from moetrain import disk, mistakes
from moetrain.mistakes import ConfigError as ConfigError
from moetrain.model.schedule import spread

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
        from moetrain.checks import check_world

        check_world(self, world)
        shard = world // self.parallel.dp_replicate
        ep = self.parallel.ep or math.gcd(shard, *self.model.experts_of_layers)
        return self.parallel.model_copy(update={"dp_shard": shard, "ep": ep})


def config_dir() -> Path:
    """The shipped YAML: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


@contextmanager
def composing(extra_dir: str | None) -> Iterator[Any]:
    """Hydra at work on the shipped configs; what the user's folder `extra_dir` has by the same name wins.

    The context gives its config loader.
    """
    from hydra import initialize_config_dir  # not for those who read a resolved configuration
    from hydra.core.global_hydra import GlobalHydra

    if extra_dir is not None and not Path(extra_dir).is_dir():
        raise ConfigError(f"--config-dir={extra_dir}: there is no such folder")
    logging.getLogger("hydra").setLevel(logging.ERROR)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        if extra_dir is not None:
            path = loader.get_search_path()
            path.prepend("user", f"file://{Path(extra_dir).resolve()}", anchor="main")
            loader.repository.initialize_sources(path)  # type: ignore[attr-defined]
        yield loader


def load(overrides: Sequence[str] = (), extra_dir: str | None = None) -> Config:
    """Compose the shipped configs, the user's folder `extra_dir` before them, and `overrides`; check; freeze.

    Raises `ConfigError` for everything that a user can get wrong here.
    """
    from hydra import compose
    from hydra.errors import HydraException

    try:
        with composing(extra_dir):
            tree = OmegaConf.to_container(compose("config", list(overrides)), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(mistakes.of_composition(error, Config)) from None
    config = from_tree(tree, [*fields_of(overrides), *_changed(tree, extra_dir)])
    if config.data.path is not None and config.data.on_change != "keep" and not Path(config.data.path).exists():
        raise ConfigError(f"data.path={config.data.path}: there is no such file or folder")
    return config


def _changed(tree: Any, extra_dir: str | None) -> list[str]:
    """The fields that differ from config.yaml, the user's or the shipped one: set by experiments or overrides."""
    own = Path(extra_dir or "", "config.yaml")
    defaults = yaml.safe_load((own if extra_dir and own.is_file() else config_dir() / "config.yaml").read_text())
    defaults.pop("defaults", None)
    return [field for field in _leaves(defaults) if _at(tree, field) != _at(defaults, field)]


def fields_of(overrides: Sequence[str]) -> Iterator[str]:
    """The fields and groups that Hydra's overrides set."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        if value.startswith("{"):  # a whole section at once
            with suppress(yaml.YAMLError):
                yield from _leaves({key: yaml.safe_load(value.replace(":", ": "))})
                continue
        yield key


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all that is in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _at(tree: Any, field: str) -> Any:
    for part in field.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def load_resolved(path: Path, overrides: Sequence[str] = ()) -> Config:
    """A run's `config.yaml`, with `field=value` overrides on top."""
    if not path.is_file():
        raise ConfigError(f"run={path.parent}: there is no run here (no {path.name})")
    if disk.read_yaml(path) is None:
        raise ConfigError(f"run={path.parent}: {path.name} is damaged")
    try:
        tree = OmegaConf.load(path)
        OmegaConf.set_struct(tree, True)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ConfigError(f"{override}: an override reads field=value")
            if OmegaConf.is_config(OmegaConf.select(tree, key)):
                raise ConfigError(f"{override}: a run's groups are fixed; override a single field, {key}.FIELD=VALUE")
            parsed = value if _takes_text(key) and value != "null" else yaml.safe_load(value)
            OmegaConf.update(tree, key, parsed, merge=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(mistakes.of_composition(error, Config)) from None
    return from_tree(OmegaConf.to_container(tree), [*fields_of(overrides)])


def from_tree(tree: Any, given: Sequence[str] = ()) -> Config:
    """Validate a plain tree of dicts: fields, what holds between them, and that all those `given` have an effect."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        if place[0] == "engine":
            del place[1:2]  # which of the engines
        field = ".".join(place)
        if first["type"] == "union_tag_invalid":
            raise ConfigError(
                f"{field}.name={first['ctx']['tag']}: must be one of {first['ctx']['expected_tags']}"
            ) from None
        rule = mistakes.plain(first["msg"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"{field}={mistakes.short(first['input'])}: no such field{mistakes.nearest(field, Config)}"
            ) from None
        raise ConfigError(f"{field}={mistakes.short(first['input'])}: {rule}") from None
    from moetrain import unused
    from moetrain.checks import check

    check(config)
    unused.check(config, given)
    return config


def dump(config: Config) -> str:
    """The resolved config as YAML, as it is kept in the run's folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _takes_text(field: str) -> bool:
    """Whether `field` holds text, so that what a user writes is meant literally."""
    section: Any = Config
    *path, last = field.split(".")
    for part in path:
        section = getattr(section, "model_fields", {}).get(part)
        section = section.annotation if section else None
    found = getattr(section, "model_fields", {}).get(last)
    return found is not None and found.annotation in (str, str | None)
