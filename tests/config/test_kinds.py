"""Kinds of routers and planners: each takes its own options, those of other packages included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import ValidationError

from moetrain import config
from moetrain.common.registry import Options, option
from moetrain.config import Balance, ConfigError, Model, RouterSection, explain, kinds
from moetrain.config.core_options import router_options
from moetrain.config.sections.base import Section
from moetrain.moe.options import PLANNERS, ROUTERS, BalanceOptions, RouterOptions, ZeroComputeOptions


@dataclass(frozen=True, kw_only=True)
class WarmOptions(RouterOptions):
    """Of a router that another package has."""

    warmth: float = option(0.5, "Warmth of the choice.", above=0, at_most=1)
    noise: float = option(0.0, "Its own noise.", at_least=0)


@pytest.fixture
def warm() -> Iterator[None]:
    ROUTERS.register("warm", WarmOptions)(object())
    yield
    del ROUTERS["warm"]


def test_a_section_has_the_options_of_its_kind_alone() -> None:
    topk, top_p = config.load([]).router, config.load(["router.name=top_p"]).router
    assert {"noise", "groups", "top_groups"} <= set(type(topk).model_fields)
    assert not hasattr(topk, "top_p")
    assert not hasattr(top_p, "noise")
    assert set(kinds.own_options("planner", "llep")) == {"alpha", "min_rows", "threshold"}


@pytest.mark.parametrize(
    ("section", "options", "names"),
    [
        (RouterSection, RouterOptions, {name: name for name in RouterOptions.names()}),
        (Balance, BalanceOptions, {name: name for name in BalanceOptions.names()}),
        (Model, ZeroComputeOptions, {f"{name}_experts": name for name in ("zero", "copy", "constant")}),
    ],
)
def test_a_section_takes_what_the_core_takes(
    section: type[Section], options: type[Options], names: dict[str, str]
) -> None:
    """Types are written twice, for the type checker; bounds are not."""
    for field, name in names.items():
        hint = get_type_hints(options)[name]
        assert section.model_fields[field].annotation == hint, field
        for value in (-1, 0, 0.5, 1, float("inf"), None, True, "none") if hint != bool | None else ():
            assert _is_valid(section, field, value) == _is_taken(options, name, value), (field, value)


def _is_valid(section: type[Section], field: str, value: Any) -> bool:
    try:
        section.__pydantic_validator__.validate_assignment(section.model_construct(), field, value)
    except ValidationError as error:
        return error.errors()[0]["type"] == "frozen_instance"
    return True


def _is_taken(options: type[Options], name: str, value: Any) -> bool:
    try:
        options(**{name: value})
    except ConfigError:
        return False
    return True


def test_an_option_of_another_kind_is_refused_and_its_default_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(config.load(["router.noise=0.5"])))
    with pytest.raises(ConfigError, match=r"^router\.noise=0\.5: the router top_p has no such option$"):
        config.load_resolved(path, ["router.name=top_p"])
    path.write_text(config.dump(config.load([])))
    assert config.load_resolved(path, ["router.name=top_p", "router.top_p=0.3"]).router.model_dump()["top_p"] == 0.3


def test_a_kind_of_another_package_is_validated_like_ours(warm: None, tmp_path: Path) -> None:
    loaded = config.load(["router.name=warm", "router.warmth=0.7", "router.noise=0.1"])
    assert router_options(loaded.router) == WarmOptions(warmth=0.7, noise=0.1)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(loaded))
    assert config.load_resolved(path) == loaded
    for override, line in {
        "router.warmth=2": "router.warmth=2: must be less than or equal to 1",
        "router.warmth=hot": "router.warmth=hot: must be a valid number",
        "router.groups=2": "router.groups=2: the router warm has no such option",
        "router.wrmth=1": "router.wrmth: no such field; did you mean router.warmth?",
    }.items():
        with pytest.raises(ConfigError) as caught:
            config.load(["router.name=warm", override])
        assert str(caught.value) == line
    with pytest.raises(ConfigError, match=r"^router\.warmth=1: no such field in this router preset$"):
        config.load(["router.warmth=1"])
    (entry,) = explain.explain("router.warmth")
    assert entry == ("router.warmth", "number > 0 and ≤ 1", "", "Warmth of the choice. Only for router.name=warm.")


def test_names_of_kinds_are_those_of_the_registries() -> None:
    for section, registry in (("router", ROUTERS), ("planner", PLANNERS)):
        assert explain.explain(f"{section}.name")[0].type == " | ".join(registry)
