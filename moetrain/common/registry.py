"""Kinds by name, this package's and others': routers, planners, optimizers, corpora; options that check themselves.

A kind comes from three places: this package's own table, which imports it when it is first used; `register(NAME)`, a
decorator; and the entry points of installed packages, of the group `moetrain.routers`, `moetrain.planners`,
`moetrain.optimizers` or `moetrain.corpora`:

    [project.entry-points."moetrain.routers"]
    cosine = "my_package.routing:Cosine"

Options of a kind are a frozen dataclass that derives from `Options`; `option` gives a field its default, its bounds and
its description. Loads neither torch nor pydantic.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module, metadata
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from moetrain.common.errors import ConfigError, short

T = TypeVar("T")
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("above", lambda value, bound: value > bound),
    "at_least": ("at least", lambda value, bound: value >= bound),
    "below": ("below", lambda value, bound: value < bound),
    "at_most": ("at most", lambda value, bound: value <= bound),
}


def option(default: Any, description: str, **bounds: float) -> Any:
    """A dataclass field with a default and one line of description.

    `bounds`: `above`, `at_least`, `below`, `at_most`; they hold for values that are not None.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    return dataclasses.field(default=default, metadata={"description": description, **bounds})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all options: types and bounds are checked when they are made. Raises `ConfigError`: one line that
    names the field, the value and the rule."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            rule = _broken_type(value, hints[field.name]) or _broken_bound(value, field.metadata)
            if rule:
                raise ConfigError(f"{field.name}={short(value)}: {rule}")

    @classmethod
    def names(cls) -> list[str]:
        """The names of all fields."""
        return [field.name for field in dataclasses.fields(cls)]


def make_options(kind: type[Options], values: Mapping[str, Any], prefix: str = "", owner: str = "") -> Any:
    """Returns `kind(**values)`; numbers may be given as text.

    Raises `ConfigError` for a field that there is not or a value that breaks a rule; `prefix` ("router.") stands before
    the field in its line, `owner` ("the router topk") is whose options they are.
    """
    hints, made = get_type_hints(kind), {}
    for name, value in values.items():
        if name not in kind.names():
            known = ", ".join(kind.names())
            has = f"; it has {known}" if known else ""
            raise ConfigError(f"{prefix}{name}={short(value)}: {owner or kind.__name__} has no such option{has}")
        made[name] = _number(value, hints[name])
    try:
        return kind(**made)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _number(value: Any, hint: Any) -> Any:
    """`value`, as a number where a number is wanted and text reads as one; YAML takes 1e-3 for text."""
    kinds = _alternatives(hint)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if isinstance(value, str) and str not in kinds:
        for kind in (int, float):
            if kind in kinds:
                try:
                    return kind(value)
                except ValueError:
                    continue
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _broken_type(value: Any, hint: Any) -> str | None:
    """What `value` must be, where it is something else."""
    rules = []
    for kind in _alternatives(hint):
        if kind is Any or (kind is type(None) and value is None):
            return None
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return None
            rules.append("one of " + ", ".join(map(str, get_args(kind))))
        elif kind in (int, float, bool, str):
            wanted = (int, float) if kind is float else kind
            if isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)):
                finite = not isinstance(value, float) or value - value == 0
                return None if finite else "must be finite"
            rules.append({int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind])
        elif isinstance(value, get_origin(kind) or kind):
            return None
        elif kind is not type(None):
            rules.append(f"a {getattr(kind, '__name__', kind)}")
    return f"must be {' or '.join(rules)}"


def _broken_bound(value: Any, bounds: Mapping[str, Any]) -> str | None:
    for name, (word, holds) in BOUNDS.items():
        if name in bounds and value is not None and not holds(value, bounds[name]):
            return f"must be {word} {bounds[name]:g}"
    return None


@dataclasses.dataclass(frozen=True)
class _Kind:
    load: Callable[[], Any]
    options: type[Options] | None  # None: what is loaded has them as `Options`, or none


class Registry(MutableMapping[str, T]):
    """Kinds of one sort by name; a kind is imported when it is looked up."""

    def __init__(self, sort: str, own: Mapping[str, tuple[str, type[Options]]], field: str | None = None) -> None:
        """`sort`: "router", also the plural of the entry points' group and the name in errors. `own`: of every kind of
        this package "module:attribute" and its options. `field`: what chooses a kind; None: "router.name"."""
        self.sort, self.field = sort, field or f"{sort}.name"
        self.plural = "corpora" if sort == "corpus" else f"{sort}s"
        self._kinds = {name: _Kind(_importer(path), options) for name, (path, options) in own.items()}
        self._own = [options for _, options in own.values()]
        self._searched = False

    @property
    def group(self) -> str:
        """The group of entry points in which other packages name theirs."""
        return f"moetrain.{self.plural}"

    def own_options(self) -> dict[str, Any]:
        """Returns the options of this package's kinds, in their order, with their defaults."""
        return {field.name: field.default for options in self._own for field in dataclasses.fields(options)}

    def register(self, name: str, options: type[Options] | None = None) -> Callable[[Any], Any]:
        """Returns a decorator that makes a class or function known as `name`.

        `options`: the dataclass of its options; None: its attribute `Options`, if it has one. Raises `ConfigError`
        where the name stands for another kind already.
        """

        def decorate(kind: Any) -> Any:
            known = self._kinds.get(name)
            if known is not None and not _same(known.load(), kind):
                raise ConfigError(f"{self.field}={name}: there is a {self.sort} of that name already")
            self._kinds[name] = _Kind(lambda: kind, options)
            return kind

        return decorate

    def options(self, name: str) -> type[Options]:
        """The dataclass of a kind's options. Our own kinds are not imported for it.

        Raises `ConfigError` where there is no such kind.
        """
        kind = self._find(name)
        return kind.options or getattr(kind.load(), "Options", None) or Options

    def make_options(self, name: str, values: Mapping[str, Any], prefix: str | None = None) -> Any:
        """Returns the options of the kind `name` with these values. Raises `ConfigError` as `make_options` does."""
        prefix = f"{self.field.partition('.')[0]}." if prefix is None else prefix
        return make_options(self.options(name), values, prefix, f"the {self.sort} {name}")

    def _find(self, name: str) -> _Kind:
        if name not in self._kinds:
            self._search()
        if name not in self._kinds:
            raise ConfigError(f"{self.field}={short(name)}: known {self.plural} are {', '.join(self._kinds)}")
        return self._kinds[name]

    def _search(self) -> None:
        """Take in what the entry points of installed packages name; our own names come first."""
        if self._searched:
            return
        self._searched = True
        for point in metadata.entry_points(group=self.group):
            self._kinds.setdefault(point.name, _Kind(point.load, None))

    def __getitem__(self, name: str) -> T:
        try:
            return self._find(name).load()
        except ConfigError as error:
            raise _UnknownKind(str(error)) from None

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        self._search()
        return iter(list(self._kinds))

    def __len__(self) -> int:
        self._search()
        return len(self._kinds)

    def __setitem__(self, name: str, kind: T) -> None:
        self._kinds[name] = _Kind(lambda: kind, None)

    def __delitem__(self, name: str) -> None:
        del self._kinds[name]


class _UnknownKind(ConfigError, KeyError):
    """A name that no kind has."""

    __str__ = ConfigError.__str__


def _importer(path: str) -> Callable[[], Any]:
    module, _, attribute = path.partition(":")
    return lambda: getattr(import_module(module), attribute)


def _same(one: Any, other: Any) -> bool:
    """Whether both are one thing: a module that is imported again registers the same."""
    name = lambda kind: (getattr(kind, "__module__", None), getattr(kind, "__qualname__", None))  # noqa: E731
    return one is other or (name(one) == name(other) and None not in name(one))
