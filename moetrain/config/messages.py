"""How a mistake in the configuration is put into one line: the field, the value, the rule.

`config` is the class of the whole configuration.
"""

import difflib
import re
from typing import TYPE_CHECKING, get_args

from moetrain.common.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel


FEW = 16  # fields of a section that may be told


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
    """What may have been meant by a field that there is not: nothing where nothing is near."""
    known = fields(config)
    if field in known:
        return f" in this {field.partition('.')[0]} preset"
    leaves = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    section, _, last = field.rpartition(".")
    own = [name.removeprefix(f"{section}.") for name in leaves if section and name.startswith(f"{section}.")]
    if close := difflib.get_close_matches(last, own, n=1, cutoff=0.7):
        return f"; did you mean {section}.{close[0]}?"
    elsewhere = [name for name in leaves if name.rpartition(".")[2] == last]
    if not own and not elsewhere:
        near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in leaves], n=1, cutoff=0.75)
        elsewhere = [name for name in leaves if name.rpartition(".")[2] in near]
    if 0 < len(elsewhere) <= (1 if own else 3):
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; {section} has {', '.join(own)}" if 0 < len(own) <= FEW else ""


def option(word: str, value: str, config: "type[BaseModel]") -> ConfigError:
    """For `--word value`, which is no option of the command line."""
    field = word.lstrip("-").replace("-", "_")
    known = fields(config)
    hint = f"; did you mean {field}?" if field in known else nearest(field, config)
    hint = hint.replace(" or ", f"={value} or ").replace("?", f"={value}?")
    return ConfigError(f"{word}: no such option, a field is set by field=value{hint}")


def of_override(override: str) -> str:
    """For what Hydra cannot read."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an override reads field=value"
    if value.startswith("~/"):
        return f"{override}: nothing expands ~ here, {key}=$HOME{value[1:]} means the same"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    rule = f"a value with = : ~ , brackets, quotes or letters beyond ASCII is quoted twice, \"{key}='{quoted}'\""
    return f"{override}: {rule}"


def of_composition(error: Exception, config: "type[BaseModel]") -> str:
    text, override = str(error), getattr(error, "override", None)
    if override is not None:
        return of_override(str(override))
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
    return " ".join(text.split())
