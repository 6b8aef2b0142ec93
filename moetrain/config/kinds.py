"""Sections that have kinds: `router`, `planner` and `optim`, told apart by `name`, and `data`, by `source`. One class
per kind, made of its options.

A kind is one of the registries in `moetrain.moe.options` and `moetrain.common.extensions`, whether it is ours or
another package's: its options become the fields of its section, with their types, bounds, defaults and descriptions. A
section takes the options of its kind only. The files may hold those of our other kinds too, at their defaults:
config.yaml lists all of them.
"""

import dataclasses
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import Field, create_model

from moetrain.common.errors import ConfigError, short
from moetrain.common.extensions import CORPORA, OPTIMIZERS, ChatOptions, FolderOptions, TokensOptions
from moetrain.common.registry import Options, Registry
from moetrain.config.sections.base import Section, find_bounds
from moetrain.config.sections.router import PLANNER_OPTIONS, ROUTER_OPTIONS, Planner, RouterSection
from moetrain.config.sections.running import Data
from moetrain.config.sections.training import Optim
from moetrain.moe.options import PLANNERS, ROUTERS


class Sort(NamedTuple):
    """A section whose kinds are registered."""

    base: type[Section]
    registry: Registry[Any]
    known: dict[str, Any]  # options of our kinds, with their defaults in files
    optional: bool = False  # whether null stands for the kind's own default
    choice: str = "name"  # the field that chooses the kind


def _list_options(*options: type[Options]) -> dict[str, tuple[Any, str]]:
    fields = (field for kind in options for field in dataclasses.fields(kind))
    return {field.name: (field.default, str(field.metadata["description"])) for field in fields}


SORTS: dict[str, Sort] = {
    "router": Sort(RouterSection, ROUTERS, ROUTER_OPTIONS),
    "planner": Sort(Planner, PLANNERS, PLANNER_OPTIONS, optional=True),
    "optim": Sort(Optim, OPTIMIZERS, {}),
    "data": Sort(Data, CORPORA, _list_options(FolderOptions, TokensOptions, ChatOptions), choice="source"),
}


def find_section(section: str, name: str) -> type[Section]:
    """The class of the section for the kind `name`. Raises `ConfigError` where there is no such kind."""
    options: Any = SORTS[section].registry.options(name)
    return _make_section(section, name, options)


def find_sections(section: str) -> Iterator[type[Section]]:
    """The classes of all kinds."""
    return (find_section(section, name) for name in SORTS[section].registry)


def own_options(section: str, name: str) -> list[str]:
    """The options of the kind `name` besides those of every kind."""
    base = SORTS[section].base
    return [field for field in find_section(section, name).model_fields if field not in base.model_fields]


def split_options(section: str, values: dict[str, Any]) -> tuple[type[Section], dict[str, Any]]:
    """The class for the kind that `values` name, and the values that are for it.

    Raises `ConfigError` for an unknown kind, and for an option of another one that is not at its default.
    """
    sort, known = SORTS[section], SORTS[section].known
    name = values.get(sort.choice, sort.base.model_fields[sort.choice].default)
    if not isinstance(name, str):
        return sort.base, values
    kind = find_section(section, name)
    for option, value in values.items():
        if option in known and option not in kind.model_fields and value != known[option]:
            raise ConfigError(f"{section}.{option}={short(value)}: the {section} {name} has no such option")
    return kind, {option: v for option, v in values.items() if option in kind.model_fields or option not in known}


@cache
def _make_section(section: str, name: str, options: Any) -> type[Section]:
    sort, hints = SORTS[section], get_type_hints(options)
    choice = sort.base.model_fields[sort.choice]
    about = Field(default=choice.default, description=choice.description)
    fields: dict[str, Any] = {sort.choice: (Literal[name], about)}
    for field in dataclasses.fields(options):
        if field.name in sort.base.model_fields:
            continue
        type_ = _bounded_type(hints[field.name], field.metadata, sort.optional)
        meaning = str(field.metadata.get("description", ""))
        fields[field.name] = (type_, Field(default=None if sort.optional else field.default, description=meaning))
    made = create_model(
        f"{name.title().replace('_', '')}{sort.base.__name__.removesuffix('Section')}Section",
        __base__=sort.base,
        __module__=__name__,
        **fields,
    )
    made.__doc__ = sort.base.__doc__
    return made


def _bounded_type(hint: Any, metadata: Mapping[str, Any], optional: bool) -> Any:
    """The type of an option with its bounds, as pydantic has them."""
    parts = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    made = [Annotated[part, Field(**find_bounds(part, metadata))] if part in (int, float) else part for part in parts]
    return Union[tuple(made + ([None] if optional else []))]  # noqa: UP007
