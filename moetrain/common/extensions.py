"""The kinds of corpora and optimizers, ours and those of other packages. Loads neither torch nor pydantic.

Routers and planners, which the layer alone needs too, are in `moetrain.moe.options`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from moetrain.common.errors import ConfigError
from moetrain.common.registry import Options, Registry, make_options, option


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """The base of the options of an optimizer."""

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")  # its state tensors of a parameter's shape


@dataclass(frozen=True, kw_only=True)
class PreparedInParallel(Options):
    """The base of the options of corpora that several processes or threads prepare."""

    workers: int | None = option(
        None, "Processes or threads that prepare the corpus. null: one for every core.", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class FolderOptions(PreparedInParallel):
    """The options of `data=folder`."""

    text_field: str = option("text", "The field of JSONL or the column of Parquet that holds the text.")
    domain_field: str = option("domain", "The field of JSONL or the column of Parquet that holds the domain, if any.")


@dataclass(frozen=True, kw_only=True)
class ChatSource(Options):
    """One entry of `data.sources` of `data=chat`: conversations."""

    path: str = option("", "Files of conversations; under `data=tokens` what `moetrain data` prepared, or Megatron's.")
    weight: float | None = option(None, "Its share of the samples, relative to the other weights.", above=0)
    epochs: float | None = option(None, "Passes over it beside one of the others; with a weight the most.", above=0)
    domain: str | None = option(None, "The label of its tokens. null: as they are labeled, or the source's name.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ConfigError("path=: must be given")


@dataclass(frozen=True, kw_only=True)
class TokenSource(ChatSource):
    """One entry of `data.sources` of `data=tokens`: text that is tokens already."""

    held_out: str | None = option(None, "Megatron files to evaluate on. null: the last `data.held_out` of its own.")


@dataclass(frozen=True, kw_only=True)
class SourcesOptions(Options):
    """The base of the options of corpora that mix several sources."""

    sources: dict[str, Any] | None = option(  # noqa: RUF009 - a field, as those of other types
        None,
        "What to train on: a mapping of names to {path, weight, epochs, domain}, under `data=tokens` also held_out "
        "(docs/data-at-scale.md); under `data=chat` in place of `data.path`. `data.sources.NAME.FIELD=VALUE` sets one "
        "field.",
    )

    Source: ClassVar[type[ChatSource]] = ChatSource  # of an entry

    def __post_init__(self) -> None:
        super().__post_init__()
        found = read_sources(self.sources or {}, self.Source)
        weighted = [name for name, source in found.items() if source.weight is not None]
        if missing := [name for name in found if name not in weighted] if weighted else []:
            rule = f"must be given, as that of {weighted[0]} is, or for none of the sources"
            raise ConfigError(f"sources.{missing[0]}.weight=null: {rule}")


@dataclass(frozen=True, kw_only=True)
class TokensOptions(SourcesOptions, PreparedInParallel):
    """The options of `data=tokens`."""

    Source = TokenSource


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SourcesOptions):
    """The options of `data=chat`."""

    chat_template: str | None = option(
        None, "PATH of a Jinja file with the chat template. null: that of the tokenizer, or a plain one."
    )
    pack: bool = option(
        True, "Whether a sequence holds several conversations, each seeing itself alone. false: one, and padding."
    )
    too_long: Literal["error", "cut", "skip"] = option(
        "error",
        "What to do with conversations that are longer than `train.seq_len`. error: stop. cut: keep their beginning. "
        "skip: leave them out.",
    )


S = TypeVar("S", bound=ChatSource)


def read_sources(sources: Mapping[str, Any], kind: type[S]) -> dict[str, S]:
    """`data.sources` with types and bounds checked. Raises `ConfigError`, whose line begins with `sources.NAME`."""
    found = {}
    for name, values in sources.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"sources.{name}={values}: must be a mapping such as {{path: PATH}}")
        made: S = make_options(kind, values, f"sources.{name}.", "a source")
        found[name] = made
    return found


def make_paths_absolute(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`data.sources` with their places in full."""
    places = ("path", "held_out")
    return {
        name: {key: os.path.abspath(value) if key in places and value else value for key, value in source.items()}
        for name, source in sources.items()
    }


CORPORA: Registry[Any] = Registry(
    "corpus",
    {
        "local": ("moetrain.data.corpus:read_local", Options),
        "debian": ("moetrain.data.corpus:read_debian", Options),
        "folder": ("moetrain.data.corpus:read_folder", FolderOptions),
        "chat": ("moetrain.data.chat:prepare_chat", ChatOptions),
        "tokens": ("moetrain.data.token_sources:prepare_sources", TokensOptions),
    },
    field="data.source",
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimizer", {"adamw": ("moetrain.engine.optim:AdamW", OptimizerOptions)}, field="optim.name"
)


def state_names(options: type[Options]) -> tuple[str, ...]:
    """The state tensors of a parameter's shape of an optimizer with these options."""
    names: tuple[str, ...] = getattr(options, "state_names", OptimizerOptions.state_names)
    return names


def register_corpus(name: str, options: type[Options] | None = None) -> Any:
    """Returns a decorator that makes a corpus known as `data.source=NAME`: a function (data, left_out) that yields
    (domain, text, name of the document) in a fixed order. `data` is the section `data`, its own options included;
    `left_out.add(reason, name)` counts what it does not take.

    `options`: the dataclass of its options, `data.OPTION`; None: the function's attribute `Options`, if it has one.
    """
    return CORPORA.register(name, options)


def register_optimizer(name: str, options: type[Options] | None = None) -> Any:
    """Returns a decorator that makes an optimizer known as `optim.name=NAME`, under `engine=native`: a class or
    function (groups, **options) -> `torch.optim.Optimizer`. A group has `params`, `lr` and `weight_decay`; its `lr` is
    set before every step.

    `options`: the dataclass of its options, `optim.OPTION`; None: the attribute `Options`, if it has one. Its class
    variable `state_names` names the state tensors of a parameter's shape, which checkpoints hold; they begin as zeros.
    Other state than these and `step` is refused.
    """
    return OPTIMIZERS.register(name, options)
