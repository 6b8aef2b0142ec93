"""What looks like a secret is not shown: by a field's name, a value's form, an environment variable that holds it."""

import json
from pathlib import Path

import pytest

from moetrain import config, runs
from moetrain.common.redact import holds_secret, redacted, redacted_text
from moetrain.report import build
from moetrain.report.read import open_run

KEYS = (
    "hf_" + "a1B2" * 8,
    "ghp_" + "a1B2" * 9,
    "sk-" + "a1B2" * 8,
    "AKIA" + "A1B2" * 4,
    "0123456789abcdef" * 2 + "01234567",
    "https://me:word@host/x",
    "see token=abc",
)


def test_nothing_of_the_shipped_configuration_is_one() -> None:
    for overrides in ([], ["model=tiny", "data=debian", "generate.prompt=the key of it"]):
        tree = config.load(overrides).model_dump(mode="json")
        assert redacted(tree) == tree
        assert not holds_secret(tree)


@pytest.mark.parametrize("value", KEYS)
def test_values_that_look_like_one(value: str) -> None:
    tree = {"track": {"notes": f"run of {value}", "tags": ["x", value], "steps": 3, "none": None}}
    hidden = redacted(tree)
    assert holds_secret(tree)
    assert value not in str(hidden)
    assert "***" in hidden["track"]["notes"]
    assert (hidden["track"]["steps"], hidden["track"]["none"], hidden["track"]["tags"][0]) == (3, None, "x")


def test_fields_with_the_name_of_one() -> None:
    tree = {"api_key": "abc", "db_password": "abc", "client": {"secret": "abc", "author": "abc", "tokenizer": "abc"}}
    hidden = {"api_key": "***", "db_password": "***", "client": {"secret": "***", "author": "abc", "tokenizer": "abc"}}
    assert redacted(tree) == hidden


def test_what_an_environment_variable_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TEAM_TOKEN", "open-sesame-1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    assert redacted_text("say open-sesame-1 sometimes") == "say *** sometimes"


def test_a_run_keeps_its_configuration_complete_for_its_user_alone(tmp_path: Path) -> None:
    """And the report shows it without the secret."""
    for name, notes, mode in (("open", "a run", 0o644), ("closed", f"with {KEYS[0]}", 0o600)):
        settings = config.load(["model=tiny", f"run.dir={tmp_path}", f"run.name={name}", f"track.notes='{notes}'"])
        runs.create(settings)
        path = tmp_path / name / "config.yaml"
        assert config.load_resolved(path) == settings
        assert path.stat().st_mode & 0o777 & mode == path.stat().st_mode & 0o777
    page = build.data([open_run(str(tmp_path / name)) for name in ("open", "closed")])
    assert page["runs"][1]["config"]["track.notes"] == "with ***"
    assert KEYS[0] not in json.dumps(page)
