"""How a mistake in the configuration is put into one line: the field, the value, the rule.

`config` is the class of the whole configuration.
"""

import difflib
import re
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel


class ConfigError(ValueError):
    """Bad input. Its text is the one line that a user sees; the process ends with exit code 2."""


def short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(message: str) -> str:
    message = message.removeprefix("Input should be ").removeprefix("Value error, ")
    message = "must be given" if message == "Field required" else message
    message = re.sub(r"^a valid (\w+)(, .*)?$", r"must be a valid \1", message)
    return message if message.startswith("must") else f"must be {message}"


def fields(section: "type[BaseModel]", prefix: str = "") -> list[str]:
    from pydantic import BaseModel

    names: list[str] = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        for kind in get_args(field.annotation) or (field.annotation,):
            kind = getattr(kind, "__origin__", kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names += [name for name in fields(kind, f"{prefix}{name}.") if name not in names]
    return names


def nearest(field: str, config: "type[BaseModel]") -> str:
    if field in fields(config):
        return f" in this {field.partition('.')[0]} preset"
    close = difflib.get_close_matches(field, fields(config), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def of_composition(error: Exception, config: "type[BaseModel]") -> str:
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: no such field{nearest(found[1], config)}"
    if found := re.search(r"Key '[^']+' (?:is not in struct|not in)[\s\S]*?full_key: (\S+)", text):
        return f"{found[1]}: no such field{nearest(found[1], config)}"
    if found := re.search(
        r"Could not find '(\w+)/([^']+)'[\s\S]*?Available options in '[^']*':\n([\s\S]*?)\nConfig", text
    ):
        return f"{found[1]}={found[2]}: must be one of {', '.join(found[3].split())}"
    if found := re.search(r"Missing mandatory value: [\s\S]*?full_key: (\S+)", text):
        return f"{found[1]}: must be given"
    if found := re.search(r"Error parsing override '([^']*)'\s+missing EQUAL", text):
        return f"{found[1]}: an override reads field=value"
    return " ".join(text.split())
