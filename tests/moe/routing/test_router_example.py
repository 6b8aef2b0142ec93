"""The example of docs/add-a-router.md: the document shows the file as it is, and what it says comes true."""

from pathlib import Path
from typing import Any

import pytest

from moetrain import config
from moetrain.config import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.moe.routing import ROUTERS
from tests.moe.routing.example_router import Cosine
from tests.moe.routing.test_routers import against_the_loop, trained

HERE = Path(__file__).parent


def with_cosine(mesh: Mesh, function: Any, overrides: list[str]) -> Any:
    """Call it where the table has the new line."""
    ROUTERS["cosine"] = Cosine
    try:
        return function(mesh, [*overrides, "router.name=cosine"])
    finally:
        del ROUTERS["cosine"]


def test_the_document_shows_the_file() -> None:
    assert (HERE / "example_router.py").read_text() in (HERE.parents[2] / "docs" / "add-a-router.md").read_text()


def test_an_option_that_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "cosine", Cosine)
    with pytest.raises(ConfigError) as caught:
        config.load(["router.name=cosine", "router.groups=4"])
    assert str(caught.value) == "router.groups=4: the router cosine has no such option"
    config.load(["router.name=cosine", "router.noise=0.5"])


def test_it_equals_the_loop_and_trains(pool: Any, tiny: list[str]) -> None:
    assert pool.run(with_cosine, 2, against_the_loop, ["router.noise=0.5"]) == [0.0, 0.0]
    folder = Path(pool.run(with_cosine, 2, trained, [*tiny, "train.steps=3", "run.name=cosine"])[0])
    assert (folder / "summary.json").is_file()
