"""Files on the disk that are torn, damaged, somebody else's, or have no room: read as far as they are sound."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moetrain import config, runs
from moetrain.checkpoint import StartingPoint, files
from moetrain.common import disk
from moetrain.common.console import RunLogger
from moetrain.config import ConfigError
from moetrain.data import prepare
from moetrain.distributed.mesh import Mesh
from moetrain.engine import saved_costs
from moetrain.launch import heartbeat
from moetrain.launch.exits import Ended
from moetrain.moe import calibrate
from moetrain.moe.planning.cost import Costs, default_costs
from moetrain.observe import picture, recorder, summary
from moetrain.observe.collect import specialization
from moetrain.observe.sinks.files import JsonLines
from moetrain.observe.sinks.tracker import Tracker
from moetrain.recovery import memory, watch
from moetrain.recovery.guard import Guard
from moetrain.recovery.snapshots import Snapshots
from moetrain.report import build
from moetrain.runs import lock
from tests import made_run
from tests.checkpoint.test_checkpoint import Toy
from tests.engine.test_calibrate import obtain
from tests.observe.test_record import ROW
from tests.training.test_train import run as trained


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files of this process take no more bytes than that."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# One writer


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    disk.write(path, "before")
    with room_for(100), pytest.raises(OSError, match="File too large"):
        disk.write(path, "a" * 1000)
    with pytest.raises(TypeError), disk.replacing(path) as out:
        out.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_disk_that_fails_in_the_middle_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Full or read-only: it is said once, what waits is written later, and the lock is let go."""
    sink = JsonLines(tmp_path, 0)
    with room_for(10):
        for step in (1, 2):
            sink.log(step, {"train/loss": 1.0})
    sink.log(3, {"train/loss": 1.0})
    sink.close()
    said = capsys.readouterr().err.replace("\n", "")
    assert said.count("metrics.jsonl cannot be written (File too large): its lines wait until it can") == 1
    assert [row["step"] for row in disk.rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (tmp_path / "specialisation").touch()  # its folder cannot be made
    specialization.write(tmp_path, 1, ["all"], [])
    cut = os.ftruncate

    def refuse(handle: int, size: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with lock.hold(tmp_path / "x"):
        monkeypatch.setattr(os, "ftruncate", refuse)
    monkeypatch.setattr(os, "ftruncate", cut)
    with lock.hold(tmp_path / "x"):
        pass


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Where a file of a run is expected, and where earlier versions put the unfinished one."""
    run = made_run.write(tmp_path / "run")
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    settings = config.load(["model=tiny", f"run.dir={tmp_path}", "run.name=run"])
    names = ["report.html", "config.yaml", "corpus.json", "metrics.jsonl", "run.png", "load_trace/part_00000.npz"]
    for name in names:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(theirs)
        unfinished = run / name
        unfinished.with_name(f".{unfinished.name}.part").symlink_to(theirs)
    build.write_of(run)
    runs.create(settings)
    runs.keep_corpus(run, {"tokenizer": "a"})
    picture.draw(run)
    JsonLines(run, 3).close()
    assert theirs.read_text() == "precious"
    for name in names[:-1]:
        assert not (run / name).is_symlink(), name


def test_a_disk_without_room_is_one_line(tmp_path: Path) -> None:
    settings = config.load(["model=tiny", f"run.dir={tmp_path}", "run.name=x"])
    with room_for(1000), pytest.raises(ConfigError, match=r"^run.dir=.*: must be a folder that can be written"):
        runs.check_writable(settings)
    assert [*tmp_path.iterdir()] == []


FULL = """
import errno, os, sys
from moetrain.launch import worker
def body():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/config.yaml")
sys.exit(worker.run_worker(body))
"""


def test_a_disk_that_fills_up_later_is_one_line_too(tmp_path: Path) -> None:
    word = tmp_path / "word.json"
    done = subprocess.run(
        [sys.executable, "-c", FULL], env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(word)}, timeout=120
    )
    said = json.loads(word.read_text())["message"]
    assert done.returncode == 1
    assert said["message"] == said["extraInfo"]["py_callstack"]
    assert said["message"] == "No space left on device: runs/x/config.yaml; earlier checkpoints are kept"


# Readers


DAMAGED = [b"", b"\xff\xfe", b"5", b"[", b"[" * 100_000, b"null", b'{"a": 1}', b'"x"']


def test_a_damaged_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    """When a run resumes, is drawn, summed up and reported on."""
    run = made_run.write(tmp_path / "run", steps=20)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    bad = [*DAMAGED, b'{"step": "x"}', b'{"step": 1e99}', b'{"step": -1}', b'{"step": true}', b'{"step": 7, "tra\xff']
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:5], *bad, *lines[5:]]))  # without its last line end
    (run / "alerts.jsonl").write_bytes(b"\n".join(bad))
    JsonLines(run, 10).close()
    assert (run / "metrics.jsonl").read_bytes().splitlines() == [x for x in lines if json.loads(x)["step"] <= 10]
    picture.draw(run)
    build.write_of(run)


def test_a_pipe_is_not_waited_for_and_a_giant_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert disk.read_json(tmp_path / "pipe.json") is None
    with (tmp_path / "giant.json").open("wb") as file:
        file.truncate(1 << 42)
    assert disk.read_json(tmp_path / "giant.json") is None
    assert disk.rows(tmp_path / "pipe.json") == disk.rows(tmp_path / "giant.json") == []


def impossible() -> Iterator[bytes]:
    """Costs with one figure that cannot be."""
    sound = {"ranks": "1 on cpu, ep 1", **json.loads(json.dumps(vars(default_costs()), default=vars))}
    assert calibrate.of_tree(sound) is not None
    for name, value in (
        ("row_forward", 0), ("row_forward", -1.0), ("row_backward", float("nan")), ("overlap", 2.0),
        ("weight_bytes", float("inf")), ("weight_bytes", "x"), ("row_bytes", None), ("nodes", ["x"]), ("nodes", 3),
        ("inside", {"latency": 0.0, "bandwidth": 0.0}), ("between", {"latency": 0.0}), ("inside", 3), ("lends", 0),
        ("kernels", [["sums", 0.0, 1.0]]), ("kernels", [["rm", 1.0, 1.0]]), ("unknown", 1), ("ranks", 4),
    ):  # fmt: skip
        yield json.dumps({**sound, name: value}).encode()
    yield json.dumps({name: value for name, value in sound.items() if name != "overlap"}).encode()


def obtained(mesh: Mesh, cache: str, run: str, saved: str, texts: list[bytes]) -> list[Costs]:
    """With each of these in all places where costs are kept."""
    (kept,) = Path(cache, "moetrain", "profiles").iterdir()
    found = []
    for text in texts:
        for path in (kept, Path(run, "costs.json"), Path(saved, "costs.json")):
            path.write_bytes(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibrate, "measure", lambda *_: default_costs())
            found += obtain(mesh, cache, run, saved)
        assert saved_costs.of_checkpoint(Path(run)) == default_costs()
        assert calibrate.of_tree(disk.read_json(kept)) is not None
    return found


def test_torn_costs_are_measured_again(pool, tmp_path: Path) -> None:
    """Of the run, of its checkpoint and of the machine; what is there afterwards is whole."""
    texts = [*DAMAGED, *impossible()]
    for name in ("run", "saved"):
        (tmp_path / name).mkdir()
    pool.run(obtain, 1, str(tmp_path / "cache"), str(tmp_path / "run"), None)
    places = [str(tmp_path / name) for name in ("cache", "run", "saved")]
    (found,) = pool.run(obtained, 1, *places, texts)
    assert len(found) == 2 * len(texts)
    assert {costs.row_forward for costs in found} == {default_costs().row_forward}


def test_of_a_damaged_checkpoint_costs_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^checkpoint=.*: costs.json is damaged$"):
        saved_costs.of_checkpoint(tmp_path)


def test_small_state_files_that_are_damaged_count_as_missing(pool, tmp_path: Path, data: list[str]) -> None:
    for text in DAMAGED:
        for name in ("summary.json", "corpus.json", "config.yaml"):
            (tmp_path / name).write_bytes(text)
        (tmp_path / "rank_00000").write_bytes(text)
        (tmp_path / "went_back").write_bytes(text.replace(b"5", b'"5"'))
        assert summary.read(tmp_path) is None
        assert runs.corpus_of(tmp_path) is None or text == b'{"a": 1}'
        assert runs.config_of(tmp_path) is None
        assert heartbeat.read_beats(tmp_path) == []
        assert heartbeat.furthest_step(tmp_path) == 0
        assert pool.run(went_back, 1, str(tmp_path)) == [0]
    corpus = prepare.prepared(config.load(data).data)[0]
    manifest = json.loads((corpus / "manifest.json").read_text())
    for name in ("domains", "end_of_text", "vocab_size", "splits", "one_document"):
        copy = tmp_path / f"corpus-{name}"
        copy.mkdir()
        for file in corpus.iterdir():
            (copy / file.name).symlink_to(file)
        assert prepare.problem(copy) is None
        disk.write(copy / "manifest.json", json.dumps({**manifest, name: None}))
        assert prepare.problem(copy) is not None, name


def went_back(mesh: Mesh, folder: str) -> int:
    return Guard(Path(folder), mesh, 3, saved=True)._went_back_from


def newer(mesh: Mesh, identity: str, folder: str, overrides: list[str]) -> tuple[str, list[str]]:
    """What a run whose snapshot is of step 3 goes on from, without a checkpoint and without costs."""
    settings = config.load(overrides)
    Path(folder, "recovery").mkdir(parents=True, exist_ok=True)
    Path(folder, "recovery", "run").write_text(identity)
    layout = watch.layout_of(settings, mesh)
    snapshots = Snapshots(identity, mesh, Toy(mesh, 0), layout, watch._hosts(mesh))
    snapshots.take(3, 30)
    snapshots.wait()
    start = watch.find_newer(StartingPoint(None, []), settings, Path(folder), mesh)
    return start.path.name if start.path else "", start.notes


def test_a_snapshot_without_a_config_is_passed_over(pool, tmp_path: Path, data: list[str]) -> None:
    overrides = ["model=tiny", *data, f"run.dir={tmp_path}", "run.name=x"]
    identity = f"x-{uuid.uuid4().hex[:12]}"
    folder = tmp_path / "x"
    try:
        for text in (None, b"", b"\xff", b"a: [", b"5"):
            folder.mkdir(exist_ok=True)
            if text is not None:
                (folder / "config.yaml").write_bytes(text)
            ((path, notes),) = pool.run(newer, 1, identity, str(folder), overrides)
            assert path == ""
            assert notes == [
                "an in-memory checkpoint of step 3 is skipped: the run's config.yaml is missing or damaged"
            ]
        runs.create(config.load(overrides))
        ((path, notes),) = pool.run(newer, 1, identity, str(folder), overrides)
        assert path == "step_3"
    finally:
        memory.remove(memory.root() / identity)


# What others on the host, or in a copied folder, have put there


def test_an_identity_that_is_a_path_removes_nothing(pool, tiny, tmp_path: Path) -> None:
    """In a run's folder that came from somewhere else: made anew, and what it pointed at stays."""
    victim = tmp_path / "victim" / socket.gethostname()
    victim.mkdir(parents=True)
    (victim / "thesis.tex").touch()
    place = tmp_path / "x" / "recovery" / "run"
    place.parent.mkdir(parents=True)
    place.write_text(str(victim.parent))
    pool.run(trained, 1, [*tiny, "run.name=x", "train.steps=2", "recovery.snapshot_every=1"])
    assert (victim / "thesis.tex").is_file()
    assert memory.is_identity(place.read_text())
    assert not (memory.root() / place.read_text()).exists()


def identity_of(mesh: Mesh, folder: str, make: bool) -> str:
    return watch._identity(Path(folder), mesh, make)


def test_a_copied_run_is_another_run_in_memory(pool, tmp_path: Path) -> None:
    """A moved one is the same."""
    run, copy, moved = (str(tmp_path / name) for name in ("run", "copy", "moved"))
    (own,) = pool.run(identity_of, 1, run, True)
    assert pool.run(identity_of, 2, run, False) == [own, own]
    shutil.copytree(run, copy)
    assert pool.run(identity_of, 1, copy, False) == [""]
    (other,) = pool.run(identity_of, 1, copy, True)
    assert memory.is_identity(other)
    assert other != own
    assert pool.run(identity_of, 1, copy, False) == [other]
    Path(run).rename(moved)
    assert pool.run(identity_of, 1, moved, True) == [own]


def test_logs_stay_in_the_runs_folder(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (run / "log.txt").symlink_to(outside / "precious")
    for name in ("wandb", "tensorboard"):
        (run / name).symlink_to(outside)
    logger = RunLogger(run / "log.txt")
    logger.print("a line")
    logger.close()
    settings = config.load(["model=tiny", "run.name=run", "track.tensorboard=true"])
    with Tracker(recorder.sinks(settings, run, 0)) as tracker:
        tracker.log(1, ROW)
    assert (run / "log.txt").read_text() == "a line\n"
    assert list((run / "wandb").glob("offline-run-*"))
    assert list((run / "tensorboard").glob("events.*"))
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "precious"


def test_a_run_that_begins_anew_is_a_new_run_on_wandb(pool, tiny, tmp_path: Path) -> None:
    """checkpoint.resume=none, over a run that ended before anything was saved; the same again is that run."""
    for name, choice, kept in (("x", "auto", True), ("y", "none", False)):
        more = [*tiny, f"run.name={name}", "train.steps=1"]
        runs.create(config.load(more))
        (tmp_path / name / "wandb_id").write_text("old\n")
        pool.run(trained, 1, [*more, f"checkpoint.resume={choice}"])
        assert (tmp_path / name / "wandb_id").exists() == kept


def test_identities() -> None:
    for name in ("x", "planner=llep,optim.lr=0.1", "é ü", "a" * 255, "..", "-"):
        assert memory.is_identity(memory.new_identity(name)), name
        assert len(memory.new_identity(name)) < 120
    for text in (
        "",
        "/",
        "/tmp/x-0123456789ab",
        "../x-0123456789ab",
        "x",
        "x-0123456789AB",
        "x-0123456789ab\n",
        "é-0123456789ab",
    ):
        assert not memory.is_identity(text), text


def planted(shm: Path, how: str) -> Path:
    """The folder of this user in shared memory as somebody else has prepared it; what must stay as it is."""
    root = shm / f"moetrain-{os.getuid()}"
    theirs = shm / "theirs" / "x-0123456789ab" / socket.gethostname()
    theirs.mkdir(parents=True)
    if how == "link":
        root.symlink_to(shm / "theirs")
    elif how == "link to the run":
        root.mkdir(0o700)
        (root / theirs.parent.name).symlink_to(theirs.parent)
    else:
        (shm / "theirs").rename(root)
        theirs = root / theirs.relative_to(shm / "theirs")
        root.chmod(0o777 if how == "writable" else 0o700)
    (theirs / "a").mkdir(mode=0o700)
    stamp = memory.SnapshotStamp(0, 9, 90, {"ranks": 1}, 3, "", {})
    memory.data_file(theirs / "a", 0).write_bytes(b"abc")
    memory.put_stamp(theirs / "a", stamp)
    return theirs


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("link", "is no folder, or a link to one"),
        ("link to the run", "is no folder, or a link to one"),
        ("writable", "can be written by others"),
        ("of another user", "belongs to another user"),
    ],
)
def test_shared_memory_that_another_user_prepared_is_not_used(
    pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    theirs = planted(tmp_path, how)
    ours = os.getuid()
    (line,) = pool.run(prepared_by_another, 1, str(tmp_path), theirs.parent.name, how == "of another user")
    assert line.startswith(f"no in-memory checkpoints: {tmp_path}/moetrain-"), line
    assert said in line
    assert sorted(path.name for path in theirs.rglob("*")) == ["a", "rank_00000.json", "rank_00000.safetensors"]
    assert os.getuid() == ours


def prepared_by_another(mesh: Mesh, shm: str, identity: str, other: bool) -> str:
    """What a run says that takes a snapshot there; it neither sees what is there nor removes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "ROOT", Path(shm))
        if other:
            owner = os.getuid() + 1
            (Path(shm) / f"moetrain-{owner - 1}").rename(Path(shm) / f"moetrain-{owner}")
            patch.setattr(os, "getuid", lambda: owner)
        place = memory.host_folder(identity, socket.gethostname())
        assert [*memory.stamps(place)] == []
        toy = Toy(mesh, 0)
        snapshots = Snapshots(identity, mesh, toy, {"engine": "toy", "ranks": 1}, [socket.gethostname()])
        line = snapshots.take(1, 10) or ""
        snapshots.forget()
        if other:
            (Path(shm) / f"moetrain-{owner}").rename(Path(shm) / f"moetrain-{owner - 1}")
        return line


def test_shared_memory_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an earlier version left its upper levels open to be read; a stamp or file of another's counts not."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    place = memory.host_folder("x-0123456789ab", "host")
    place.parent.mkdir(parents=True, mode=0o755)
    path = memory.data_file(place / "a", 0)
    memory.reserve(path, 3)
    for level in (memory.root(), place.parent, place, place / "a"):
        assert level.stat().st_mode & 0o777 == 0o700
    memory.put_stamp(place / "a", memory.SnapshotStamp(0, 9, 90, {"ranks": 1}, 3, "", {}))
    assert len([*memory.stamps(place)]) == 1
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert [*memory.stamps(place)] == []


def not_saved(mesh: Mesh, overrides: list[str]) -> tuple[str, int]:
    """How a run ends whose checkpoints find no room, and the step of its newest snapshot."""

    def full(path: Path, *parts: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write", full)
        try:
            trained(mesh, overrides)
            return "", 0
        except Ended as end:
            folder = runs.folder_of(config.load(overrides))
            place = memory.host_folder((folder / "recovery" / "run").read_text(), socket.gethostname())
            newest = max(stamp.step for _, stamp in memory.stamps(place))
            memory.remove(place)
            return str(end), newest


def test_where_the_last_state_is_not_saved_the_snapshot_stays(pool, tiny) -> None:
    overrides = [*tiny, "run.name=x", "train.steps=3", "recovery.snapshot_every=1"]
    ((said, newest),) = pool.run(not_saved, 1, overrides)
    assert said == "the state after step 3 is not saved; the lines above say why"
    assert newest >= 2
