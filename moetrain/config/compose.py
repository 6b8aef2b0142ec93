"""From YAML and overrides to a checked `Config`. Every mistake becomes a `ConfigError`: one line that names the field,
the value and the rule. Nobody else sees a `DictConfig`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from moetrain.common import disk
from moetrain.common.errors import ConfigError, short
from moetrain.config import hugging_face, kinds, messages, rules, unused
from moetrain.config.fields import all_fields, classes_of, single_fields
from moetrain.config.overrides import fields_of, leaves
from moetrain.config.schema import Config
from moetrain.config.sections.base import Section


def config_dir() -> Path:
    """The shipped YAML: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
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
            composed = compose("config", [_may_add(override) for override in overrides])
            tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(messages.describe_composition(error)) from None
    config = from_tree(tree, [*fields_of(overrides), *_changed(tree, extra_dir)])
    if config.data.path is not None and config.data.on_change != "keep" and not Path(config.data.path).exists():
        raise ConfigError(f"data.path={config.data.path}: there is no such file or folder")
    return config


def _may_add(override: str) -> str:
    """`++override` for what may stand in none of the files: an option of a kind, an entry of one that is a mapping."""
    section, _, name = override.partition("=")[0].partition(".")
    option = name.partition(".")[0]
    of_kind = section in kinds.SORTS and option not in kinds.SORTS[section].base.model_fields
    return f"++{override}" if of_kind and f"{section}.{option}" in all_fields() else override


def _changed(tree: Any, extra_dir: str | None) -> list[str]:
    """The fields that differ from config.yaml, the user's or the shipped one: set by experiments or overrides."""
    own = Path(extra_dir or "", "config.yaml")
    defaults = yaml.safe_load((own if extra_dir and own.is_file() else config_dir() / "config.yaml").read_text())
    defaults.pop("defaults", None)
    return [field for field in leaves(defaults) if _at(tree, field) != _at(defaults, field)]


def _at(tree: Any, field: str) -> Any:
    for part in field.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def load_resolved(path: Path, overrides: Sequence[str] = (), facts: Mapping[str, str] = MappingProxyType({})) -> Config:
    """A run's `config.yaml`, with `field=value` overrides on top, and fields in `facts` that no user gave."""
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
        raise ConfigError(messages.describe_composition(error)) from None
    plain: Any = OmegaConf.to_container(tree)
    for field, fact in facts.items():
        section, _, name = field.partition(".")
        plain[section] = {**(plain.get(section) or {}), name: fact}
    return from_tree(plain, [*fields_of(overrides)])


def from_tree(tree: Any, given: Sequence[str] = ()) -> Config:
    """Validate a plain tree of dicts: fields, what holds between them, and that all those `given` have an effect."""
    tree = hugging_face.complete(tree, given)
    try:
        config = Config.model_validate(tree | _read_kinds(tree))
    except ValidationError as error:
        raise _describe(error) from None
    rules.check(config)
    unused.check(config, given)
    return config


def _read_kinds(tree: dict[str, Any]) -> dict[str, Section]:
    """The sections that have kinds, each validated by the class of its kind."""
    found = {}
    for section in kinds.SORTS:
        if isinstance(values := tree.get(section), dict):
            kind, own = kinds.split_options(section, values)
            try:
                found[section] = kind.model_validate(own)
            except ValidationError as error:
                raise _describe(error, section) from None
    return found


def _describe(error: ValidationError, *section: str) -> ConfigError:
    """The first mistake in one line; `section` is what was validated."""
    first = error.errors()[0]
    place = [*section, *map(str, first["loc"])]
    if place[0] in ("engine", "model"):
        del place[1:2]  # which of its kinds
    field, value = ".".join(place), short(first["input"])
    if first["type"] == "union_tag_invalid":
        return ConfigError(f"{field}.name={first['ctx']['tag']}: must be one of {first['ctx']['expected_tags']}")
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{field}={value}: no such field{messages.nearest(field)}")
    return ConfigError(f"{field}={value}: {messages.plain(first['msg'])}")


def dump(config: Config) -> str:
    """The resolved config as YAML, as it is kept in the run's folder."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _takes_text(field: str) -> bool:
    """Whether `field` holds text, so that what a user writes is meant literally."""
    section, _, name = field.partition(".")
    if field in single_fields():
        return True
    found = [kind.model_fields[name].annotation for kind in classes_of(section) if name in kind.model_fields]
    return bool(found) and all(annotation in (str, str | None) for annotation in found)
