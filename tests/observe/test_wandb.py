"""wandb and TensorBoard: trouble there never ends a run; one id a run; what the user's variables say holds."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moetrain import config
from moetrain.observe import recorder
from moetrain.observe.collect.alerts import Alert
from moetrain.observe.sinks.tracker import Tracker
from tests.observe.test_record import ROW

CLOSED = "http://127.0.0.1:9"
KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings or logins but those that a test makes; wandb reads them anew."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_MODE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    wandb.teardown()
    yield
    wandb.teardown()


def track(folder: Path, *overrides: str, rows: int = 2) -> list[Path]:
    """Rows and an alert to the sinks of a run, as a run does. Returns what wandb wrote."""
    folder.mkdir(exist_ok=True)
    with Tracker(recorder.sinks(config.load(["model=tiny", "run.name=one", *overrides]), folder, 0)) as tracker:
        for step in range(1, rows + 1):
            tracker.log(step, ROW)
        tracker.alert(rows, Alert("imbalance", "uneven"))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == rows
    return sorted((folder / "wandb").glob("*run-*"))


def said_of(name: str, out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(f"{name}: ")]


def runs_begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every run that wandb begins from here on."""
    import wandb

    begun: list[Any] = []
    init = wandb.init

    def begin(**options: Any) -> Any:
        begun.append(init(**options))
        return begun[-1]

    monkeypatch.setattr(wandb, "init", begin)
    return begun


def test_a_server_out_of_reach_is_a_line_and_the_run_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for name, value in {"API_KEY": KEY, "BASE_URL": CLOSED, "INIT_TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    written = track(tmp_path / "one")
    (line,) = said_of("wandb", capfd.readouterr().out)
    assert "connection refused" in line
    assert "offline for now, `wandb sync" in line
    assert any(path.name.startswith("offline-run-") and list(path.glob("*.wandb")) for path in written)


def test_who_is_logged_in_is_asked_for_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment, or `wandb login`'s in netrc; an empty key is none."""
    import wandb

    from moetrain.observe.sinks.wandb import _mode

    def mode(**variables: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(f"WANDB_{name}", value)
            wandb.teardown()
            return _mode()

    assert mode() == "offline"  # WANDB_MODE of the tests
    monkeypatch.delenv("WANDB_MODE")
    assert mode() == mode(API_KEY="") == mode(MODE="online") == "offline"
    assert mode(API_KEY=KEY) == "online"
    assert mode(API_KEY=KEY, MODE="offline") == "offline"
    assert mode(API_KEY=KEY, MODE="disabled") == "disabled"
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert mode(BASE_URL=CLOSED) == "online"
    assert mode() == "offline"  # logged in elsewhere


def test_an_empty_key_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "")
    (offline,) = track(tmp_path / "one")
    assert offline.name.startswith("offline-run-")
    assert said_of("wandb", capfd.readouterr().out) == []


def test_a_name_that_wandb_refuses_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    assert track(tmp_path / "one") == []
    (line,) = said_of("wandb", capfd.readouterr().out)
    assert line.startswith("wandb: Invalid project name 'a/b'")
    assert line.endswith("nothing more goes there, metrics.jsonl has everything")


def test_a_run_that_goes_on_is_one_run(tmp_path: Path) -> None:
    first, second = (track(tmp_path / "one") for _ in range(2))
    ids = {path.name.split("-")[3] for path in second}
    assert (len(first), len(second)) == (1, 2)
    assert ids == {(tmp_path / "one" / "wandb_id").read_text().strip()}
    (tmp_path / "one" / "wandb_id").write_bytes(b"\xff torn/")
    track(tmp_path / "one")
    assert (tmp_path / "one" / "wandb_id").read_text().strip() not in ids


def test_wandbs_variables_hold_unless_an_option_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"PROJECT": "theirs", "ENTITY": "team", "RUN_GROUP": "g", "TAGS": "a,b", "JOB_TYPE": "j", "NOTES": "n"}
    theirs |= {"NAME": "named", "RUN_ID": "id7", "DIR": str(tmp_path)}
    for name, value in theirs.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    begun = runs_begun(monkeypatch)
    track(tmp_path / "one")
    run = begun[-1]
    found = (run.project, run.entity, run.group, run.tags, run.job_type, run.notes, run.name, run.id)
    assert found == ("theirs", "team", "g", ("a", "b"), "j", "n", "named", "id7")
    assert list((tmp_path / "wandb").glob("offline-run-*-id7"))
    track(
        tmp_path / "one", "track.project=p", "track.entity=e", "track.group=h", "track.tags=[c]", "track.job_type=k",
        "track.notes=o",
    )  # fmt: skip
    run = begun[-1]
    assert (run.project, run.entity, run.group, run.tags, run.job_type, run.notes) == ("p", "e", "h", ("c",), "k", "o")


def test_without_variables_a_run_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = runs_begun(monkeypatch)
    track(tmp_path / "one")
    assert (begun[-1].project, begun[-1].name, begun[-1].group) == ("moetrain", "one", "")


KILLED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from tests.observe.test_wandb import ROW, Tracker, config, recorder
sinks = recorder.sinks(config.load(["model=tiny", "run.name=one"]), Path(sys.argv[1]), 0)
with Tracker(sinks) as tracker:
    tracker.log(1, ROW)
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True)
    (core,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "wandb" in line]
    os.kill(core, signal.SIGKILL)
    time.sleep(0.3)
    for step in (2, 3, 4):
        tracker.log(step, ROW)
"""


def test_wandbs_process_killed_is_a_line(tmp_path: Path) -> None:
    """The run goes on to its end, without a traceback there."""
    path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = said_of("wandb", done.stdout)
    reason = r"(Connection lost|.*Connection reset by peer|.*Broken pipe)"  # as the socket was at that moment
    assert re.fullmatch(rf"wandb: {reason}; nothing more goes there, metrics\.jsonl has everything", line)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_tensorboards_trouble_is_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder would be")
    track(tmp_path, "track.wandb=false", "track.tensorboard=true")
    (line,) = said_of("TensorBoard", capfd.readouterr().out)
    assert line.endswith("nothing more goes there, metrics.jsonl has everything")


def test_no_secret_goes_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the configuration nor by the command line that wandb keeps."""
    secrets = {"notes": "hf_" + "a1B2" * 8, "argument": "ghp_" + "c3D4" * 9, "variable": "open-sesame-1"}
    monkeypatch.setenv("MY_TEAM_PASSWORD", secrets["variable"])
    monkeypatch.setattr(sys, "argv", ["moetrain", "train", f"track.notes={secrets['argument']}", "seen=this-one"])
    settings = ["model=tiny", "run.name=one", f"track.notes='{secrets['notes']}'"]
    settings.append(f"generate.prompt={secrets['variable']}")
    with Tracker(recorder.sinks(config.load(settings), tmp_path, 0)) as tracker:
        tracker.log(1, ROW)
        waiting = 600
        while waiting and not list(tmp_path.rglob("wandb-metadata.json")):  # a process of wandb's own writes it
            waiting -= 1
            time.sleep(0.1)
    assert sys.argv[2].endswith(secrets["argument"])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"seen=this-one" in written
    assert [name for name, secret in secrets.items() if secret.encode() in written] == []
