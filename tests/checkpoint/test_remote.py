"""Checkpoints in a store: uploaded whole or not counted, pruned alike, fetched; a store that fails ends no training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moetrain import checkpoint, cli
from moetrain.checkpoint import manifest, remote
from moetrain.checkpoint.remote import RemoteCheckpoints, Uploader
from moetrain.common.errors import ConfigError
from moetrain.common.store import open_store
from moetrain.distributed.mesh import Mesh
from tests.checkpoint.test_checkpoint import DATA, Toy, flip, settings
from tests.training.test_train import losses, run


class Failing(MemoryFileSystem):
    """Fails at every `every`-th call, and at all from the `dead`-th on."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    every = dead = calls = 0
    lock = threading.Lock()

    def _count(self) -> None:
        cls = type(self)
        with cls.lock:
            cls.calls += 1
            if (cls.every and cls.calls % cls.every == 0) or (cls.dead and cls.calls >= cls.dead):
                raise ConnectionError("503 Slow Down")

    def put_file(self, *args: Any, **options: Any) -> Any:
        self._count()
        return super().put_file(*args, **options)

    def get_file(self, *args: Any, **options: Any) -> Any:
        self._count()
        return super().get_file(*args, **options)

    def info(self, *args: Any, **options: Any) -> Any:
        self._count()
        return super().info(*args, **options)

    def ls(self, *args: Any, **options: Any) -> Any:
        self._count()
        return super().ls(*args, **options)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "AT_ONCE", 1)
    monkeypatch.setattr(Failing, "every", 0)
    monkeypatch.setattr(Failing, "dead", 0)
    monkeypatch.setattr(Failing, "calls", 0)
    Failing.store.clear()
    fsspec.register_implementation("failing", Failing, clobber=True)
    return Failing


def save(mesh: Mesh, folder: str, url: str, steps: list[int], keep: int = 2, first: int = 0) -> list[str]:
    """Saves a toy at these steps, with seed = step; what was not uploaded."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "costs.json").write_text("{}")
    toy = Toy(mesh, 0)
    with checkpoint.Saver(Path(folder), named(folder, url, keep=keep), mesh, toy, DATA, first) as saver:
        for step in steps:
            toy.states.update(Toy(mesh, step).states)
            saver.save(step, 10 * step)
    return saver.news()


def named(folder: str, url: str, **options: Any) -> Any:
    base = settings(remote=url, **options)
    return base.model_copy(update={"run": base.run.model_copy(update={"name": Path(folder).name})})


def start(mesh: Mesh, folder: str, url: str, resume: str = "auto") -> tuple[str, list[str]]:
    """Where a run starts, and what it says; or its complaint."""
    Path(folder).mkdir(exist_ok=True)
    try:
        found = checkpoint.agree_on_start(named(folder, url, resume=resume), Path(folder), mesh)
    except ConfigError as error:
        return "error", [str(error)]
    return str(found.path.relative_to(folder)) if found.path else "", found.notes


def list_whole(url: str) -> list[int]:
    return RemoteCheckpoints(open_store(url, "url")).list_steps()


def test_finished_checkpoints_are_uploaded_pruned_and_fetched_by_all_ranks(pool, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    assert pool.run(save, 2, str(tmp_path / "a"), url, [2, 4, 6])[0] == []
    place = tmp_path / "store" / "a"
    assert sorted(path.name for path in place.iterdir()) == ["step_4", "step_6"]
    for path in place.iterdir():
        assert manifest.problem(path) is None
        assert not manifest.damaged(path, manifest.share_of(path, 0, 1))
    shutil.rmtree(tmp_path / "a")
    for (found, notes), _ in [pool.run(start, 2, str(tmp_path / "a"), url)]:
        assert (found, notes) == ("checkpoints/step_6", [f"step 6 is fetched from {url}/a"])
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step_6"]
    flip(place / "step_6" / "rank_00001.safetensors")
    shutil.rmtree(tmp_path / "a")
    found, notes = pool.run(start, 2, str(tmp_path / "a"), url)[1]
    assert found == "checkpoints/step_4"
    assert notes[0].startswith(f"{url}/a: step_6 cannot be fetched and is skipped: rank_00001.safetensors is damaged")
    (place / "step_4" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "a")
    found, notes = pool.run(start, 2, str(tmp_path / "a"), url)[0]
    assert found == "error"
    assert notes[0].startswith(f"checkpoint.remote={url}/a: rank_00001.safetensors is damaged")
    assert list((tmp_path / "a" / "checkpoints").iterdir()) == []


def test_another_run_starts_from_a_url_and_runs_are_not_mixed(pool, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    pool.run(save, 1, str(tmp_path / "a"), url, [2, 4])
    for resume in (f"{url}/a/step_2", f"{url}/a"):
        step = 2 if "step" in resume else 4
        found, notes = pool.run(start, 1, str(tmp_path / "b"), f"{url}/elsewhere", resume)[0]
        assert (found, notes[0]) == (f"fetched/step_{step}", f"step {step} is fetched from {url}/a")
    found, notes = pool.run(start, 1, str(tmp_path / "b"), url, f"{url}/a/step_3")[0]
    assert (found, notes) == (
        "error",
        [f"checkpoint.resume={url}/a/step_3: must be a step_N with a manifest.json, or a run's URL"],
    )
    shutil.rmtree(tmp_path / "a")
    said = f"checkpoint.remote={url}/a: has a checkpoint of step 4 of a run of this name already; take another run.name"
    assert pool.run(start, 1, str(tmp_path / "a"), url, "none")[0] == ("error", [said])


def check_memory(mesh: Mesh, folder: str) -> list[Any]:
    """Uploads to and fetches from `memory://`, which is of one process."""
    news = save(mesh, folder, "memory://bucket/runs", [1, 2, 3])
    whole = list_whole(f"memory://bucket/runs/{Path(folder).name}")
    shutil.rmtree(folder)
    return [news, whole, start(mesh, folder, "memory://bucket/runs")[0]]


def test_memory_is_a_store_too(pool, tmp_path: Path) -> None:
    assert pool.run(check_memory, 1, str(tmp_path / "a"))[0] == [[], [3, 2], "checkpoints/step_3"]


def make_checkpoint(pool: Any, tmp_path: Path, step: int = 2) -> Path:
    folder = tmp_path / f"of{step}"
    pool.run(save, 1, str(folder), f"file://{tmp_path}/unused", [step])
    return folder / "checkpoints" / f"step_{step}"


def test_a_store_that_fails_at_every_kth_call_has_the_checkpoint_in_the_end(
    pool, tmp_path: Path, failing: type[Failing]
) -> None:
    path = make_checkpoint(pool, tmp_path)
    for every in (7, 8, 11, 13):
        failing.every = every
        there = RemoteCheckpoints(open_store(f"failing://{every}", "url"))
        there.upload(path)
        there.prune(2, keep=1, keep_every=0)
        assert there.list_steps() == [2]
        failing.every = 0
        assert failing.calls >= every


def test_a_store_that_dies_at_any_call_never_shows_half_a_checkpoint(
    pool, tmp_path: Path, failing: type[Failing]
) -> None:
    """At every call of an upload that replaces an older checkpoint of the same step, and of the removal of old ones."""
    old, new = make_checkpoint(pool, tmp_path), make_checkpoint(pool, tmp_path / "other", 2)
    body = json.loads((new / "manifest.json").read_text())
    assert body["files"] == json.loads((old / "manifest.json").read_text())["files"]  # else the test would be weaker
    (new / "manifest.json").write_text(json.dumps(body, indent=3))  # another one of the same step
    store = RemoteCheckpoints(open_store("failing://dying", "url"))
    seen = set()
    for dead in range(1, 200):
        failing.store.clear()
        failing.dead = 0
        store.upload(old)
        failing.calls, failing.dead = 0, dead
        uploader = Uploader(store, settings(keep=1))
        uploader.add(new)
        uploader.wait()
        (news, failing.dead) = (uploader.news(), 0)
        seen.add(bool(news))
        whole = store.list_steps()
        if whole:
            arrived = tmp_path / "arrived"
            shutil.rmtree(arrived, ignore_errors=True)
            arrived.mkdir()
            store.download_manifest(2, arrived)
            for name in manifest.read(arrived)["files"]:
                store.download(2, name, arrived)  # which compares every byte
            assert manifest.problem(arrived) is None
        if not news:
            assert whole == [2]
            break
        assert "step_2 is not uploaded: 503 Slow Down (1 of this start's uploads failed; it is whole in" in news[0]
    assert seen == {True, False}


def start_without_store(mesh: Mesh, folder: str) -> tuple[str, list[str]]:
    """As `start`, with a store that is down."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    pauses, remote.PAUSES = remote.PAUSES, ()
    Failing.dead = 1
    try:
        return start(mesh, folder, "failing://bucket")
    finally:
        remote.PAUSES, Failing.dead = pauses, 0


def test_a_store_that_is_down_stops_a_start_only_where_there_is_nothing_else(pool, tmp_path: Path) -> None:
    path = make_checkpoint(pool, tmp_path)
    found, notes = pool.run(start_without_store, 1, str(path.parents[1]))[0]
    assert found == "checkpoints/step_2"
    said = "checkpoint.remote=failing://bucket: the store cannot be read: 503 Slow Down"
    assert notes == [f"{said}; {path} is what the run goes on from"]
    found, notes = pool.run(start_without_store, 1, str(tmp_path / "new"))[0]
    assert (found, notes) == ("error", [f"{said}; checkpoint.remote=null starts without it"])


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from moetrain.checkpoint import remote
from moetrain.common.store import open_store
put, calls = LocalFileSystem.put_file, []
def put_file(self, *args, **options):
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, *args, **options)
LocalFileSystem.put_file = put_file
remote.AT_ONCE = 1
remote.RemoteCheckpoints(open_store(sys.argv[1], "url")).upload(Path(sys.argv[2]))
"""


def test_a_kill_in_the_middle_of_an_upload_leaves_what_does_not_count(pool, tmp_path: Path) -> None:
    path, url = make_checkpoint(pool, tmp_path), f"file://{tmp_path}/killed"
    for number in (2, 4):
        done = subprocess.run([sys.executable, "-c", KILLED, url, str(path), str(number)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert os.listdir(tmp_path / "killed" / "step_2")
        assert list_whole(url) == []
    RemoteCheckpoints(open_store(url, "url")).upload(path)
    assert list_whole(url) == [2]
    assert manifest.problem(tmp_path / "killed" / "step_2") is None


def test_a_run_continues_on_a_fresh_machine_as_if_it_had_stayed(pool, tiny, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    more = [*tiny, f"checkpoint.remote={url}", "checkpoint.every=2", "track.trace_every=0"]
    there = [option for option in more if not option.startswith("run.dir=")] + [f"run.dir={tmp_path}/there"]
    whole = pool.run(run, 2, [*more, "run.name=whole", "train.steps=5"])[0]
    pool.run(run, 2, [*more, "run.name=moved", "train.steps=5", "checkpoint.keep=9"])
    shutil.rmtree(tmp_path / "store" / "moved" / "step_5")
    folder = pool.run(run, 2, [*there, "run.name=moved", "train.steps=5"])[0]
    assert losses(folder) == losses(whole)[4:]
    assert "step 4 is fetched from" in (Path(folder) / "log.txt").read_text()
    assert list_whole(f"{url}/moved")[0] == 5


BAD = [
    ("checkpoint.remote=bucket/runs", "checkpoint.remote=bucket/runs: must be a URL, such as s3://bucket/runs"),
    ("checkpoint.remote=nosuch://bucket", "checkpoint.remote=nosuch://bucket: Protocol not known: nosuch"),
    (
        "checkpoint.resume=nosuch://bucket/step_2",
        "checkpoint.resume=nosuch://bucket/step_2: Protocol not known: nosuch",
    ),
]


@pytest.mark.parametrize(("override", "line"), BAD)
def test_a_url_that_cannot_be_one_is_one_line(override: str, line: str, tiny, capfd: pytest.CaptureFixture) -> None:
    assert cli.main(["train", *tiny, override]) == 2
    assert capfd.readouterr().err == f"error: {line}\n"
