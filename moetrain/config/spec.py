"""From a configuration and what a start finds out to the `RunSpec` that a run works with.

No other module of the package changes a configuration: `resolve` fills in what was left open, once, before the model is
built; `name_run` and `fix_places` say where a run lies; `vary` answers what would be if a field had another value.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import Field

from moetrain.common.extensions import make_paths_absolute
from moetrain.config.layout import find_ep, find_r
from moetrain.config.schema import Config, HuggingFace
from moetrain.config.sections.base import Positive

AnyConfig = TypeVar("AnyConfig", bound=Config)
AUTO = "auto"  # of train.dtype: whichever the ranks are faster at
EARLY_DTYPE = "bf16"  # in place of `auto`, before the ranks are known: they will likely be GPUs


class RunSpec(Config):
    """A configuration of which nothing is left open, on the ranks that it runs on.

    `model.vocab_size` is a number, `train.dtype` is fp32 or bf16, and the data's places are absolute. `parallel` stays
    as it was asked for, so that a run may go on with other ranks; `ep`, `r` and `dp_shard` are what it means here. A
    run's `config.yaml` has all but `world`, `ep` and `r`.
    """

    world: Positive = Field(exclude=True, description="Number of ranks.")
    ep: Positive = Field(exclude=True, description="Ranks of an expert group.")
    r: Positive = Field(exclude=True, description="Slices that every expert is cut into.")

    @property
    def dp_shard(self) -> int:
        """Ranks of a replica."""
        return self.world // self.parallel.dp_replicate

    @property
    def micro_batch(self) -> int:
        """Sequences per rank and micro-step; the most, where shares are uneven."""
        return self.train.split_batch(self.world)[0]

    @property
    def micro_steps(self) -> int:
        """Micro-steps of an optimizer step."""
        return self.train.split_batch(self.world)[1]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.train.global_batch * self.train.seq_len


def resolve(config: Config, world: int, vocab_size: int, dtype: str) -> RunSpec:
    """Returns `config` on `world` ranks with all that it leaves open filled in.

    Arguments:
        vocab_size: of the data's tokenizer, for a model that asks for none.
        dtype: fp32 or bf16, what the ranks have agreed on for `train.dtype=auto`.

    Raises `ConfigError` where the configuration does not fit the ranks.
    """
    facts = {
        "model.vocab_size": config.model.vocab_size or vocab_size,
        "train.dtype": dtype if config.train.dtype == AUTO else config.train.dtype,
    }
    settled = vary(fix_places(config), facts)
    ep = find_ep(config, world)
    return RunSpec(**dict(settled), world=world, ep=ep, r=find_r(config, ep))


def resolve_early(config: Config, world: int) -> RunSpec:
    """Returns what `config` will be on `world` ranks before they and the data are there, for estimates.

    The tokenizer is taken to have `data.vocab_size` tokens, and `auto` to become bf16.
    """
    return resolve(config, world, config.data.vocab_size, EARLY_DTYPE)


def name_run(config: Config, name: str) -> Config:
    """Returns `config` for the run of this name."""
    return vary(config, {"run.name": name})


def fix_places(config: Config) -> Config:
    """Returns `config` with absolute paths of the data, the model and what it begins from, so that a run is found
    complete from any folder."""
    places = {f"data.{field}": getattr(config.data, field) for field in ("path", "dir", "tokenizer")}
    places["router.replay"] = config.router.replay
    places["data.chat_template"] = getattr(config.data, "chat_template", None)
    if isinstance(config.model, HuggingFace):
        places["model.path"] = config.model.path
    changes: dict[str, Any] = {field: os.path.abspath(place) for field, place in places.items() if place}
    if sources := getattr(config.data, "sources", None):
        changes["data.sources"] = make_paths_absolute(sources)
    begin = config.init_from
    if begin is not None and os.path.exists(begin):
        config = config.model_copy(update={"init_from": os.path.abspath(begin)})
    return vary(config, changes)


def vary(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """Returns `config` with other values of fields, `{"train.recompute": "full"}`; they are not checked."""
    sections: dict[str, dict[str, Any]] = {}
    for field, value in changes.items():
        section, _, name = field.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = {name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    return config.model_copy(update=changed)
