"""A corpus of another package: prepared and trained on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import moetrain
from moetrain.common.extensions import CORPORA
from moetrain.common.registry import Options, option
from moetrain.config import ConfigError
from moetrain.distributed.mesh import Mesh
from tests.conftest import TINY
from tests.training.test_train import losses, run


@dataclass(frozen=True, kw_only=True)
class CountingOptions(Options):
    documents: int = option(60, "Documents of the corpus.", at_least=0)


def read_numbers(data: Any, left_out: Any) -> Iterator[tuple[str, str, str]]:
    for number in range(data.documents):
        yield "numbers", " ".join(map(str, range(number, number + 300))), f"document {number}"


def run_registered(mesh: Mesh, overrides: list[str]) -> str:
    """A run in a process that knows the corpus for its time."""
    moetrain.register_corpus("counting", CountingOptions)(read_numbers)
    try:
        return run(mesh, overrides)
    finally:
        del CORPORA["counting"]


def settings(tmp_path: Path) -> list[str]:
    own = ["data.source=counting", f"data.dir={tmp_path}/corpora", "data.vocab_size=300", "train.steps=2"]
    return [*TINY, *own, f"run.dir={tmp_path}", "run.name=a", "eval.tokens_per_domain=256", "generate.tokens=4"]


def test_a_run_trains_on_a_corpus_of_another_package(pool: Any, tmp_path: Path) -> None:
    folder = pool.run(run_registered, 1, settings(tmp_path))[0]
    assert len(losses(folder)) == 2
    (manifest,) = (tmp_path / "corpora").glob("counting-*/manifest.json")
    splits = json.loads(manifest.read_text())["splits"]
    assert sum(split["documents"] for split in splits.values()) == 60
    assert "documents: 60" in (Path(folder) / "config.yaml").read_text()


def test_a_corpus_without_documents_is_refused(tmp_path: Path) -> None:
    from moetrain import config
    from moetrain.data import prepare

    moetrain.register_corpus("counting", CountingOptions)(read_numbers)
    try:
        made = config.load([*settings(tmp_path), "data.documents=0"])
        with pytest.raises(ConfigError, match=r"^data\.source=counting: must have a document that is not left out$"):
            prepare.ensure(made.data)
    finally:
        del CORPORA["counting"]
