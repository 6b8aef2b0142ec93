"""Every field is explained, has a default in configs/, and stands in docs/config.md."""

import json
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.config import explain, hugging_face
from moetrain.config.overrides import leaves

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "config.md"


def test_the_page_is_what_the_code_says() -> None:
    """`python -m tests.config.test_explain` writes it anew."""
    assert PAGE.read_text() == explain.page()


def test_every_field_is_explained_in_full_sentences() -> None:
    for entry in explain.explain():
        assert entry.meaning[0].isupper() or entry.meaning.startswith(("MiB", "`")), entry
        assert entry.meaning.endswith("."), entry
        assert entry.type, entry


def test_every_field_stands_in_a_shipped_file() -> None:
    shipped = explain.shipped_defaults()
    missing = [
        f"{section}.{name}"
        for section, kinds in explain.sections().items()
        for kind in kinds
        for name in kind.model_fields
        if name not in shipped[section] and name not in hugging_face.SIZES
    ]
    assert not missing


def test_every_shipped_field_is_in_the_schema() -> None:
    known = {entry.field for entry in explain.explain()} - {"model.moe_layers"}  # of a folder alone
    assert set(leaves(explain.shipped_defaults())) == known


def test_the_command_explains_a_field_a_section_or_all(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["config", "--explain", "router.top_k"]) == 0
    assert capsys.readouterr().out.startswith("router.top_k: integer > 0, default 2\n")
    assert cli.main(["config", "--explain", "optim.betas", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["type"], found["default"]) == ("list of 2: each number > 0 and < 1", "[0.9,0.95]")
    assert cli.main(["config", "--explain", "eval"]) == 0
    assert capsys.readouterr().out.count("default") == 2
    assert cli.main(["config", "--explain", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(explain.explain())


def test_a_field_that_there_is_not_is_refused_with_a_hint(capfd: pytest.CaptureFixture) -> None:
    assert cli.main(["config", "--explain", "router.topk"]) == 2
    assert capfd.readouterr().err == "error: --explain router.topk: no such field; did you mean router.top_k?\n"


if __name__ == "__main__":
    PAGE.write_text(explain.page())
