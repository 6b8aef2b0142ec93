"""What every field of the configuration means: of `moetrain config --explain`, and docs/config.md is written by it."""

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moetrain.common.errors import ConfigError
from moetrain.config import messages
from moetrain.config.compose import config_dir
from moetrain.config.fields import classes_of, single_fields
from moetrain.config.schema import Config

WORDS: dict[Any, str] = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
CHOSEN_BY = {
    "router": "router.name",
    "optim": "optim.name",
    "data": "data.source",
    "model": "model.source",
}  # other sections: by their group
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}
PAGE = """# Configuration

Every field of a run's configuration; written by `python -m tests.config.test_explain` from the code, not by hand.
`moetrain train SECTION.FIELD=VALUE` sets a field, `moetrain config --explain SECTION.FIELD` explains it, and
`moetrain config` prints the configuration that results. Defaults are those of `moetrain train` without arguments; a
group such as `model=olmoe_1b7b` or `experiment=router_top_p` sets several fields at once.
"""


class Entry(NamedTuple):
    """One field."""

    field: str  # section.name
    type: str
    default: str  # as one writes it on the command line; "" where a field is set by other groups alone
    meaning: str


def explain(name: str | None = None) -> list[Entry]:
    """The field `name`, the fields of the section `name`, or all. Raises `ConfigError` where there is none."""
    entries = list(_entries())
    found = [entry for entry in entries if name in (None, entry.field, entry.field.partition(".")[0])]
    if not found:
        raise ConfigError(f"--explain {name}: no such field{messages.nearest(str(name))}")
    return found


def sections() -> dict[str, list[type[BaseModel]]]:
    """The classes of every section: several where `name` tells kinds apart."""
    return {name: classes_of(name) for name in Config.model_fields if name not in single_fields()}


def page() -> str:
    """docs/config.md."""
    parts = [PAGE, *_tabulate(entry for name in single_fields() for entry in explain(name))]
    for section, classes in sections().items():
        about = "\n\n".join(dict.fromkeys(_first_paragraph(kind) for kind in classes))
        parts += [f"\n## {section}\n\n{about}\n", *_tabulate(explain(section))]
    return "".join(parts)


def _tabulate(entries: Iterable[Entry]) -> Iterator[str]:
    yield "\n| field | type | default | meaning |\n|---|---|---|---|\n"
    for entry in entries:
        cells = (f"`{entry.field}`", entry.type, f"`{entry.default}`" if entry.default else "–", entry.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _entries() -> Iterator[Entry]:
    defaults = shipped_defaults()
    for name in single_fields():
        about = Config.model_fields[name]
        default = _write_value(defaults[name])
        yield Entry(name, _describe_type(about.annotation, about), default, str(about.description))
    for section, classes in sections().items():
        for name in dict.fromkeys(name for kind in classes for name in kind.model_fields):
            kinds = [kind for kind in classes if name in kind.model_fields]
            default = _write_value(defaults[section][name]) if name in defaults[section] else ""
            fields = {_kind_name(section, kind): kind.model_fields[name] for kind in kinds}
            said = {kind: _describe_type(field.annotation, field) for kind, field in fields.items()}
            meanings = {kind: str(field.description) for kind, field in fields.items()}
            chosen = CHOSEN_BY.get(section, section)
            meaning = _join_kinds({f"Under {chosen}={kind}": text for kind, text in meanings.items()}, " ")
            if len(kinds) < len(classes):
                meaning += f" Only for {chosen}={' or '.join(fields)}."
            type_ = " | ".join(said.values()) if name == _choice(section) else _join_kinds(said, "; ")
            yield Entry(f"{section}.{name}", type_, default, meaning)


def _join_kinds(texts: Mapping[str, str], between: str) -> str:
    """The text that all kinds share, or each with its kind before it."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return between.join(f"{kind}: {text}" for kind, text in texts.items())


@cache
def shipped_defaults() -> Mapping[str, Mapping[str, Any]]:
    """What configs/ sets by default: config.yaml, the groups of its defaults list; of others, what these leave open."""
    folder = config_dir()
    out: dict[str, dict[str, Any]] = yaml.safe_load((folder / "config.yaml").read_text())
    chosen: Sequence[Any] = out.pop("defaults")  # type: ignore[assignment]
    names = {group: name for item in chosen if isinstance(item, dict) for group, name in item.items()}
    for group in ("model", "data", "planner", "engine"):
        files = sorted((folder / group).glob("*.yaml"), key=lambda path: path.stem != names[group])
        for path in files:
            text = path.read_text()
            tree = yaml.safe_load(text)
            for field, value in (tree.get(group, {}) if "@package _global_" in text else tree).items():
                out.setdefault(group, {}).setdefault(field, value)
    return out


def _choice(section: str) -> str:
    """The field that chooses the kind of the section."""
    return CHOSEN_BY.get(section, f"{section}.name").rpartition(".")[2]


def _kind_name(section: str, kind: type[BaseModel]) -> str:
    """The value of the choosing field that stands for this kind; nothing where a section has one kind."""
    choice = kind.model_fields.get(_choice(section))
    return " or ".join(map(str, get_args(choice.annotation))) if choice else ""


def _first_paragraph(kind: type[BaseModel]) -> str:
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _describe_type(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type in words: `integer > 0 or null`, `softmax | sigmoid`."""
    bounds = _describe_bounds(field.metadata if field else [])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = arguments[1]
        return _describe_type(arguments[0], extra if isinstance(extra, FieldInfo) else None) + bounds
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe_type(part) + bounds * (part in (int, float)) for part in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is ...:
            return f"list of {_describe_type(arguments[0])}"
        return f"list of {len(arguments)}: each {_describe_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    return WORDS[annotation] + bounds


def _describe_bounds(metadata: Sequence[Any]) -> str:
    found = [text.format(getattr(m, name)) for m in metadata for name, text in BOUNDS.items() if hasattr(m, name)]
    return " " + " and ".join(found) if found else ""


def _write_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_write_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
