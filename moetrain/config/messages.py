"""How a mistake in the configuration is put into one line: the field, the value, the rule."""

import difflib
import re

from moetrain.common.errors import ConfigError
from moetrain.config.fields import all_fields

FEW = 16  # fields of a section that a line may list


def plain(message: str) -> str:
    """pydantic's message as a rule that begins with "must"."""
    message = message.removeprefix("Input should be ").removeprefix("Value error, ")
    message = "must be given" if message == "Field required" else message
    message = re.sub(r"^a valid (\w+)(, .*)?$", r"must be a valid \1", message)
    return message if message.startswith("must") else f"must be {message}"


def nearest(field: str) -> str:
    """What may have been meant by a field that does not exist, as the end of a line; "" where nothing is near."""
    leaves = all_fields()
    if field in leaves:
        return f" in this {field.partition('.')[0]} preset"
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


def unknown_option(word: str, value: str) -> ConfigError:
    """For `--word value`, which is no option of the command line."""
    field = word.lstrip("-").replace("-", "_")
    hint = f"; did you mean {field}?" if field in all_fields() else nearest(field)
    hint = hint.replace(" or ", f"={value} or ").replace("?", f"={value}?")
    return ConfigError(f"{word}: no such option; fields are set as field=value{hint}")


def describe_override(override: str) -> str:
    """For what Hydra cannot read."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an override reads field=value"
    if value.startswith("~/"):
        return f"{override}: nothing expands ~ here, {key}=$HOME{value[1:]} means the same"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    rule = f"a value with = : ~ , brackets, quotes or letters beyond ASCII is quoted twice, \"{key}='{quoted}'\""
    return f"{override}: {rule}"


def describe_composition(error: Exception) -> str:
    """What Hydra or OmegaConf found wrong."""
    text, override = str(error), getattr(error, "override", None)
    if override is not None:
        return describe_override(str(override))
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: no such field{nearest(found[1])}"
    if found := re.search(r"Key '[^']+' (?:is not in struct|not in)[\s\S]*?full_key: (\S+)", text):
        return f"{found[1]}: no such field{nearest(found[1])}"
    if found := re.search(
        r"Could not find '(\w+)/([^']+)'[\s\S]*?Available options in '[^']*':\n([\s\S]*?)\nConfig", text
    ):
        return f"{found[1]}={found[2]}: must be one of {', '.join(found[3].split())}"
    if found := re.search(r"Missing mandatory value: [\s\S]*?full_key: (\S+)", text):
        return f"{found[1]}: must be given"
    return " ".join(text.split())
