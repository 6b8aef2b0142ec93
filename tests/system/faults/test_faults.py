"""Real faults in real runs: no hang, no silent divergence; losses are those of a run without faults."""

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.bench.namespaces import Hosts
from moetrain.launch.exits import REQUEUE
from moetrain.recovery import memory
from tests.checkpoint.test_checkpoint import flip
from tests.conftest import TINY
from tests.system.faults.faults import Job, alive, last_step, steps, wait
from tests.system.test_hosts import allowed
from tests.training.test_train import losses, run

ROOT = Path(__file__).parents[3]
STEPS, EVERY = 60, 5
JOB = [*TINY, f"train.steps={STEPS}", f"recovery.snapshot_every={EVERY}", "recovery.timeout=6", "planner=llep"]
JOB += ["planner.min_rows=1", "train.threads=1", "track.trace_every=0", "parallel.nproc=2", "generate.tokens=2"]
JOB += ["eval.tokens_per_domain=64"]


@pytest.fixture(scope="module")
def job(data: list[str]) -> list[str]:
    return [*JOB, *data]


@pytest.fixture(scope="module")
def sound(pool, job: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run without any fault."""
    folder = tmp_path_factory.mktemp("sound")
    return losses(pool.run(run, 2, [*job, f"run.dir={folder}", "run.name=sound"])[0])


def test_a_run_survives_a_kill_a_hang_and_a_request_to_end(job: list[str], sound: list[float], tmp_path: Path) -> None:
    """One run, four times interrupted; bit for bit the losses of the run that was not."""
    draw = random.Random(7)
    with Job([*job, f"run.dir={tmp_path}", "run.name=struck"]) as struck:
        killed = struck.at(draw.randrange(EVERY + 1, 4 * EVERY)).strike(1, signal.SIGKILL)
        reached = last_step(struck.folder)
        stopped = struck.at(reached + draw.randrange(2, 2 * EVERY), killed).strike(0, signal.SIGSTOP)
        reached = last_step(struck.folder)
        struck.at(reached + draw.randrange(2, 2 * EVERY), stopped).process.terminate()
        assert struck.end() == REQUEUE, struck.said
    said = " ".join(struck.said.split())
    assert "rank 1 failed in step" in said
    assert "the process was killed by signal 9" in said
    assert "rank 0 on " in said
    assert "is stopped, last seen" in said
    assert "ended on request: saved after step" in said
    assert said.count("an in-memory checkpoint is newer than the one on the disk") == 2
    assert not struck.ranks()
    with Job([*job, f"run.dir={tmp_path}", "run.name=struck"]) as again:
        assert again.end() == 0, again.said
    found = steps(struck.folder)
    assert [found[step] for step in range(1, STEPS + 1)] == sound


def test_torchrun_starts_again_and_its_workers_do_not_outlive_it(job, sound, tmp_path: Path) -> None:
    """A worker of torchrun is killed while it saves, then torchrun itself; then a shard is damaged, and another layout
    goes on."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["env", f"PATH={path}", "bash", str(ROOT / "launch" / "local.sh"), "2"]
    overrides = [*job, f"run.dir={tmp_path}", "run.name=elastic", "checkpoint.every=5", "recovery.snapshot_every=0"]
    with Job(overrides, command) as elastic:
        killed = elastic.at(12).saving().strike(0, signal.SIGKILL)
        elastic.at(26, killed)
        workers = elastic.ranks()
        elastic.process.kill()
        until = time.monotonic() + 5
        while time.monotonic() < until and any(map(alive, workers.values())):
            time.sleep(0.05)
        assert len(workers) == 2
        assert not [pid for pid in workers.values() if alive(pid)]
    assert "resumed from" in elastic.said
    newest, *_ = sorted((elastic.folder / "checkpoints").glob("step_*"), key=lambda p: -int(p.name[5:]))
    flip(newest / "rank_00001.safetensors")
    with Job([*overrides, "parallel.ep=1"]) as again:
        assert again.end() == 0, again.said
    assert f"{newest.name} is incomplete or damaged" in " ".join(again.said.split())
    assert list(steps(elastic.folder).values()) == pytest.approx(sound, rel=1e-3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 64 MiB; None where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "moetrain-test", place], capture_output=True)
    yield None if mounted.returncode else place
    subprocess.run(["umount", "--lazy", place], capture_output=True)


def test_a_full_disk_is_said_and_the_run_goes_on(job, sound, small_disk: Path | None) -> None:
    """Everything is written to a disk that fills up and, twelve steps later, has room again."""
    if small_disk is None:
        return
    saving = ["checkpoint.every=4", "recovery.snapshot_every=0"]
    with Job([*job, *saving, f"run.dir={small_disk}", "run.name=full"]) as full:
        full.at(9)
        filler = small_disk / "filler"
        left = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(left - (1 << 20)))  # a checkpoint takes 3 MB
        whole = set((full.folder / "checkpoints").glob("step_*"))
        wait(lambda: "was not saved: No space left on device" in " ".join(full.said.split()))
        assert whole & set((full.folder / "checkpoints").glob("step_*"))
        filler.unlink()
        assert full.end() == 0, full.said
    assert list(steps(full.folder).values()) == sound
    assert (full.folder / "checkpoints" / f"step_{STEPS}").is_dir()


def test_the_second_interrupt_ends_everything_at_once(job: list[str], tmp_path: Path) -> None:
    with Job([*job, f"run.dir={tmp_path}", "run.name=impatient", "recovery.timeout=60"]) as impatient:
        impatient.at(3).strike(1, signal.SIGSTOP)  # so that no step ends any more
        impatient.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert impatient.process.poll() is None
        impatient.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert impatient.end() == 130
        assert time.monotonic() - began < 20  # a third of the time-out
        assert not impatient.ranks()


def test_a_launcher_that_is_killed_leaves_no_process_and_no_file(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # torch's own, one a user
    with Job([*job, f"run.dir={tmp_path}", "run.name=killed"]) as killed:
        workers = killed.at(1).ranks()
        killed.process.kill()
        killed.end()
        wait(lambda: not any(map(alive, workers.values())))
    assert len(workers) == 2
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_terminal_that_goes_away_ends_a_run_which_saves(job: list[str], tmp_path: Path) -> None:
    """As a dropped SSH session does: the run's own terminal is closed at the other end."""
    ours, theirs = pty.openpty()
    login = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    overrides = [*job, f"run.dir={tmp_path}", "run.name=dropped"]
    with Job(overrides, [sys.executable, "-c", login, sys.executable, "-m", "moetrain", "train"], theirs) as dropped:
        os.close(theirs)
        dropped.at(3)
        os.close(ours)
        assert dropped.end() == REQUEUE
        assert not dropped.ranks()
    assert list((dropped.folder / "checkpoints").glob("step_*"))


def test_a_cut_link_is_named_and_one_host_goes_on_alone(job, sound, tmp_path: Path) -> None:
    """Two hosts of one rank each; the second is lost with all its memory, the first has its states."""
    overrides = [*job, f"run.dir={tmp_path}", "run.name=apart"]
    command = [sys.executable, "-m", "moetrain", "train", *overrides]
    folder, log = tmp_path / "apart", tmp_path / "hosts.txt"
    if not allowed():
        return
    with log.open("w") as out, Hosts("1gbit") as hosts:
        ranks = hosts.start_ranks(["train", *overrides], 1, out)
        wait(lambda: (folder / "metrics.jsonl").is_file() and last_step(folder) >= 4 * EVERY + 3)
        hosts.cut(1)
        assert [rank.wait(60) for rank in ranks] == [1, 1], log.read_text()
        said = " ".join(log.read_text().split())
        assert "no progress for" in said
        assert "in step" in said
        run_of = (folder / "recovery" / "run").read_text()
        shutil.rmtree(memory.host_folder(run_of, hosts.names[1]))
        alone = hosts.start(0, command, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", **HERE}, out)
        assert alone.wait(120) == 0, log.read_text()
    assert "an in-memory checkpoint is newer than the one on the disk: step 20" in " ".join(log.read_text().split())
    assert list(steps(folder).values()) == pytest.approx(sound, rel=1e-3)


HERE = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29401"}
