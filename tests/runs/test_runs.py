"""Runs' folders: one job at a time in each, names of their own."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moetrain import cli, config, runs
from moetrain.common import disk
from moetrain.config import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.runs import lock
from moetrain.training import tasks
from moetrain.training.loop import train

HOLDING = """
import sys, time
from moetrain.launch import local
from moetrain import cli

def launch(*given):
    print("launched", flush=True)
    time.sleep(60)

local.launch = launch
cli.main(sys.argv[1:])
"""


@pytest.fixture
def refused(tmp_path: Path) -> object:
    """A function: the line with which a second job is refused; empty where it gets the lock."""

    def ask() -> str:
        try:
            with lock.hold(tmp_path):
                return ""
        except ConfigError as error:
            return str(error)

    return ask


def test_a_second_job_of_the_same_name_is_refused(
    tmp_path: Path, data: list[str], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first launcher lives; after it is killed the name is free."""
    arguments = ["train", "model=tiny", *data, f"run.dir={tmp_path}", "run.name=x"]
    first = subprocess.Popen([sys.executable, "-c", HOLDING, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "launched\n"
        monkeypatch.setattr("moetrain.launch.local.launch", lambda *given: 0)
        capfd.readouterr()
        assert cli.main([*arguments, "optim.lr=1e-3"]) == 2
        who = f"process {first.pid} on {socket.gethostname()}"
        assert capfd.readouterr().err == (
            f"error: run.name=x: is being trained by {who}; take another name, or end that job first\n"
        )
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert cli.main(arguments) == 0
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert (tmp_path / "x" / lock.LOCK).read_text() == ""


def test_the_first_worker_of_torchrun_holds_the_lock(
    tmp_path: Path, data: list[str], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with lock.hold(tmp_path / "x"):
        code = cli.main(["train", "model=tiny", *data, f"run.dir={tmp_path}", "run.name=x"])
    assert code == 2
    assert "error: run.name=x: is being trained by process" in capfd.readouterr().err


def test_where_the_file_system_has_no_locks_its_record_tells(
    tmp_path: Path, refused: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*given: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.3)
    here = socket.gethostname()
    record = lambda **fields: (tmp_path / lock.LOCK).write_text(json.dumps(fields))  # noqa: E731
    record(host=here, pid=os.getpid(), job="")
    assert f"process {os.getpid()} on {here}" in refused()  # type: ignore[operator]
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record(host=here, pid=gone.pid, job="")
    assert refused() == ""  # type: ignore[operator]

    beats = runs.heartbeats(tmp_path)
    beats.mkdir(parents=True)
    (beats / "rank_00000").write_text("0")
    record(host="elsewhere", pid=1, job="")
    assert refused() == ""  # type: ignore[operator] # its heart stands still
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(0.02):
            count += 1
            (beats / "rank_00000").write_text(str(count))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        record(host="elsewhere", pid=1, job="7")
        assert "process 1 on elsewhere" in refused()  # type: ignore[operator]
        monkeypatch.setenv("SLURM_JOB_ID", "7")  # the same job again, with its first rank on another host
        assert refused() == ""  # type: ignore[operator]
    finally:
        over.set()
        heart.join()


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_another_number_of_workers_than_torchrun_started_is_refused(
    pool, tiny, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    name = "run.name=x"
    if verb == "eval":
        (folder,) = pool.run(trained, 1, [*tiny, name, "train.steps=1"])
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    arguments = ["eval", folder] if verb == "eval" else ["train", *tiny, name]
    assert cli.main([*arguments, "parallel.nproc=4"]) == 2
    rule = "must be 2, as many ranks as the launcher started, or left out"
    assert capfd.readouterr().err == f"error: parallel.nproc=4: {rule}\n"


def trained(mesh: Mesh, overrides: list[str]) -> str:
    return str(train(config.load(overrides), mesh))


def test_an_unnamed_run_of_torchrun_is_locked(pool, tiny) -> None:
    (said,) = pool.run(refused_at_its_end, 1, [*tiny, "train.steps=1"])
    assert f"is being trained by process {said.partition(': ')[0]} on {socket.gethostname()}" in said


def refused_at_its_end(mesh: Mesh, overrides: list[str]) -> str:
    """The id of this process, and what a second job is told that wants the same name."""
    said: list[str] = []

    def ask(folder: Path) -> None:
        try:
            with lock.hold(folder):
                said.append("it got the lock")
        except ConfigError as error:
            said.append(str(error))

    tasks.train_run(config.load(overrides), mesh, False, [ask])
    return f"{os.getpid()}: {said[0]}"


def test_what_a_kill_left_unfinished_goes_at_the_next_start(tmp_path: Path) -> None:
    settings = config.load([f"run.dir={tmp_path}", "run.name=x"])
    runs.create(settings)
    folder = tmp_path / "x"
    (folder / "load_trace").mkdir()
    left = [folder / ".report.html.0123456789abcdef.part", folder / "load_trace" / ".part_0.npz.0123456789abcdef.part"]
    theirs = [folder / ".mine.part", folder / "notes.part"]
    for path in (*left, *theirs):
        path.touch()
    with disk.replacing(folder / "run.png") as out:
        out.write(b"written now, by another process")
        runs.create(settings)
    assert (folder / "run.png").is_file()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in theirs)


def test_unnamed_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    settings = config.load([f"run.dir={tmp_path}"])
    names = [runs.make_name(settings) for _ in range(5)]
    assert len(set(names)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, names))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "x" * 300, "a\tb"])
def test_names_that_are_no_folder_below_run_dir_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^run\.name=.*: must ") as caught:
        config.load([f"run.name='{name}'"])
    assert len(str(caught.value).splitlines()) == 1


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    """Whoever starts a worker: `python -m` puts the current folder first."""
    for name in ("queue", "tokenizers", "socket", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file')\n")
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", "config", "model=tiny"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
