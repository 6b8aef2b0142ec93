"""Which fields a configuration can have, of whatever kinds its sections are."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from moetrain.config import kinds
from moetrain.config.schema import Config


def classes_of(section: str) -> list[type[BaseModel]]:
    """The classes of a section: several where `name` tells kinds apart; none where there is no such section."""
    if section in kinds.SORTS:
        return list(kinds.find_sections(section))
    field = Config.model_fields.get(section)
    return [] if field is None else list(_classes(field.annotation))


def all_fields() -> list[str]:
    """Every field as `section.name`, section by section, after those that are in none."""
    found = (
        f"{section}.{name}"
        for section in Config.model_fields
        for kind in classes_of(section)
        for name in kind.model_fields
    )
    return list(dict.fromkeys([*single_fields(), *found]))


def single_fields() -> list[str]:
    """Those that are in no section, such as `init_from`."""
    return [name for name in Config.model_fields if not classes_of(name)]


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _classes(part)
