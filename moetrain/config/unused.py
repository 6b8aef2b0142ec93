"""Options that a user set and that cannot have an effect: they are refused, never ignored.

A default never is: only what is set, on the command line or in a file of the user's own, is looked at.
"""

from collections.abc import Iterable, Iterator, Sequence

from moetrain.common.errors import ConfigError, short
from moetrain.common.extensions import OPTIMIZERS
from moetrain.config.kinds import SORTS, own_options
from moetrain.config.overrides import fields_of
from moetrain.config.schema import Config, Dpo, HuggingFace, Model, Native, Optim

REPLAY = ("router.replay", "router.replay_missing")
RESTARTS = ("recovery.restarts", "recovery.skips", "recovery.snapshot_every")
OF_A_RUN: tuple[str, ...] = (
    "init_from",
    "run",
    "optim",
    "balance",
    "lora",
    "checkpoint",
    "track",
    "eval.every",
    *RESTARTS,
)
OF_A_RUN = (*OF_A_RUN, "train.steps", "train.log_every", "train.recompute")
SAVES = ("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.remote")
OF_A_SIMULATION: tuple[str, ...] = (
    "init_from",
    "run",
    "train.steps",
    "train.seed",
    "train.log_every",
    "train.threads",
    "train.compile",
    "lora",
)
OF_A_SIMULATION += tuple(f"optim.{name}" for name in Optim.model_fields if name != "state_dtype")
NOT_USED: dict[str, tuple[str, ...]] = {  # by verbs: sections and fields; what is not named may have an effect
    "eval": (*OF_A_RUN, *REPLAY, "generate"),
    "generate": (*OF_A_RUN, *REPLAY, "eval", "dpo"),
    "data": tuple(name for name in Config.model_fields if name != "data"),
    "record": ("optim", "balance", "lora", "checkpoint", "track", "eval", "generate", "dpo", *REPLAY, *RESTARTS),
    "profile": (*OF_A_RUN, *REPLAY, "eval", "generate", "data", "dpo"),
    "simulate": (
        *OF_A_SIMULATION,
        *REPLAY,
        "dpo",
        "eval",
        "generate",
        "data",
        "checkpoint",
        "recovery",
        "track",
        "balance",
    ),
    "bench": (
        "init_from",
        "run",
        "lora",
        "dpo",
        *REPLAY,
        "eval",
        "generate",
        "track",
        "train.log_every",
        *SAVES,
        *RESTARTS,
    ),
}


def check_verb(verb: str, overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for an override of what `moetrain VERB` does not use."""
    for field in fields_of(overrides):
        if any(field == name or field.startswith(f"{name}.") for name in NOT_USED.get(verb, ())):
            raise ConfigError(f"{field}: `moetrain {verb}` does not use it")


def check(c: Config, fields: Iterable[str]) -> None:
    """Raises `ConfigError` for the first of `fields` that cannot have an effect beside the rest of `c`."""
    known = set(fields)
    is_chosen = "train.objective" in known and "balance.coefficient" not in known
    objective = c.train.objective
    if is_chosen and objective != "lm" and c.balance.coefficient:
        said = f"would balance the router with balance.coefficient={c.balance.coefficient:g}"
        advice = f"experiment={objective} leaves it alone, or set the coefficient"
        raise ConfigError(f"train.objective={objective}: {said}; {advice}")
    for field, reason in _without_effect(c):
        if field in known:
            section, _, name = field.partition(".")
            value = getattr(getattr(c, section), name, None)
            value = getattr(c, section).model_dump()[name] if value is None else value
            raise ConfigError(f"{field}={short(value)}: {reason}")


def _without_effect(c: Config) -> Iterator[tuple[str, str]]:
    """(field, why it has no effect) of all fields that have none."""
    m, b = c.model, c.balance
    for section, sort in SORTS.items():
        name = getattr(getattr(c, section), sort.choice)
        own = own_options(section, name)
        for option in (option for option in sort.known if option not in own):
            yield f"{section}.{option}", f"the {section} {name} has no such option"
    if c.train.objective != "dpo":
        for option in Dpo.model_fields:
            yield f"dpo.{option}", f"has an effect only with train.objective=dpo, not {c.train.objective}"
    if c.dpo.loss in ("hinge", "ipo"):
        yield "dpo.label_smoothing", f"has no effect with dpo.loss={c.dpo.loss}"
    if isinstance(m, HuggingFace):
        for option in type(c.router).model_fields:
            if option not in ("freeze", "replay", "replay_missing"):
                yield f"router.{option}", "has no effect with model=hf, whose router is the family's own"
    if c.router.replay is None:
        yield "router.replay_missing", "has an effect only with router.replay=FILE"
    if c.router.name == "top_p":
        yield "router.k_schedule", "has no effect with router.name=top_p, which takes as many experts as a token needs"
    if not m.num_zero_compute:
        yield (
            "router.zero_compute_tau",
            "has an effect only with model.zero_experts, copy_experts or constant_experts above 0",
        )
    if not c.lora.rank:
        for option in type(c.lora).model_fields:
            if option != "rank":
                yield f"lora.{option}", "has an effect only with lora.rank above 0"
    if c.data.source == "local":
        yield (
            "data.path",
            "has an effect only with data=folder; data=local, which is chosen, reads text of this installation",
        )
    if c.data.source in ("local", "debian", "tokens"):
        yield "data.on_bad", f"has an effect only with data=folder, not data={c.data.source}"
    watched = c.data.source in ("tokens", "chat") or (c.data.path is not None and c.data.source in ("folder", "debian"))
    if not watched:
        yield "data.on_change", f"has an effect only with data.path; data={c.data.source} is not checked for changes"
    if c.data.source == "tokens":
        for option in ("path", "vocab_size", "max_bytes_per_domain", "dedup"):
            yield f"data.{option}", "has no effect with data=tokens, whose text is prepared already (data.sources)"
    if c.data.tokenizer is not None:
        yield "data.vocab_size", "has no effect with data.tokenizer, which has a vocabulary of its own"
    if c.optim.name != "adamw":
        for option in {"betas", "eps", "state_dtype"} - set(OPTIMIZERS.options(c.optim.name).names()):
            yield f"optim.{option}", f"the optimizer {c.optim.name} has no such option"
    if c.optim.schedule != "wsd":
        yield "optim.decay_fraction", f"has an effect only with optim.schedule=wsd, not {c.optim.schedule}"
    if not b.coefficient:
        yield "balance.micro_fraction", "has an effect only with balance.coefficient above 0, of which it is a fraction"
    if not b.device_coefficient:
        yield "balance.device_groups", "has an effect only with balance.device_coefficient above 0"
        if not b.coefficient:
            yield "balance.scope", "has an effect only with balance.coefficient or balance.device_coefficient above 0"
    if b.scope != "global" or not (b.coefficient or b.device_coefficient):
        yield "balance.accumulate", "has an effect only with balance.scope=global and a coefficient above 0"
    if b.bias == "none":
        yield "balance.bias_rate", "has an effect only with balance.bias=sign or proportional"
    if not c.generate.temperature:
        yield (
            "generate.seed",
            "has an effect only with generate.temperature above 0; at 0 the most probable token is taken",
        )
    if not c.track.wandb:
        for option in ("project", "entity", "group", "tags", "job_type", "notes"):
            yield f"track.{option}", "has an effect only with track.wandb=true"
    if c.track.profile_from is None:
        yield "track.profile_steps", "has an effect only with track.profile_from=STEP"
    if isinstance(m, Model) and not m.num_dense_layers:
        yield "model.dense_hidden", "has an effect only with model.num_dense_layers above 0"
    if isinstance(m, Model) and m.expert_schedule == "uniform":
        yield "model.min_experts", "has an effect only with a model.expert_schedule other than uniform"
    if isinstance(c.engine, Native) and c.engine.offload != "disk":
        yield "engine.offload_dir", f"has an effect only with engine.offload=disk, not {c.engine.offload}"
    if c.planner.name == "home":
        yield (
            "engine.guest_memory_mib",
            "has an effect only with a planner that lends experts; planner=home moves nothing",
        )
