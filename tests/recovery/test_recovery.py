"""Parts of recovery: requests to end, heartbeats, steps that are not finite, ranks that raise, snapshots on two hosts,
fewer ranks."""

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moetrain import checkpoint, config
from moetrain.config.resize import fitting
from moetrain.distributed.mesh import Mesh
from moetrain.engine.native import NativeEngine
from moetrain.launch.exits import GAVE_UP, REQUEUE, Ended
from moetrain.launch.heartbeat import Beat, Heartbeat, describe_stall, furthest_step, read_beats
from moetrain.launch.worker import ERROR_FILE
from moetrain.recovery import memory, restore
from moetrain.recovery.guard import Guard
from moetrain.recovery.snapshots import Snapshots, keepers
from tests.checkpoint.test_checkpoint import Toy, flip
from tests.training.test_train import losses, rows_of, run

# Requests to end


LISTENER = """
import ctypes, time
from moetrain.launch import signals
signals.end_on_request()
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
with signals.note_requests():
    print("ready", flush=True)
    while not signals.end_requested():
        time.sleep(0.01)
    print("asked", flush=True)
    {then}
print("after", flush=True)
time.sleep(60)
"""


@contextmanager
def listener(then: str) -> Iterator[subprocess.Popen]:
    """A process that notes the first request, and then does something."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER.format(then=then)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert said(process) == "ready"
        yield process
        process.kill()


def said(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_request_is_noted_in_the_loop_and_heeded_at_once_outside_of_it() -> None:
    with listener("pass") as process:
        process.send_signal(signal.SIGUSR1)
        assert [said(process), said(process)] == ["asked", "after"]
        process.terminate()
        assert process.wait(5) == REQUEUE


def test_a_terminal_that_is_gone_is_a_request_to_end_but_not_under_nohup() -> None:
    with listener("pass") as process:
        process.send_signal(signal.SIGHUP)
        assert [said(process), said(process)] == ["asked", "after"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to the processes it starts
    try:
        with listener("pass") as process:
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGUSR1)
            assert [said(process), said(process)] == ["asked", "after"]
            process.send_signal(signal.SIGHUP)
            process.terminate()
            assert process.wait(5) == REQUEUE
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_interrupt_ends_a_process_that_waits_in_c() -> None:
    """As in a collective whose peer is gone: Python would run no handler."""
    with listener("lock(mutex)") as process:
        process.send_signal(signal.SIGINT)
        assert said(process) == "asked"
        process.send_signal(signal.SIGINT)  # the terminal's own, and what a launcher passes on: one press
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130


# Heartbeats


def beat(rank: int, marks: int, layer: int | None, phase: str, now: float, host: str = "x") -> Beat:
    return Beat(rank, host, 1, 7, marks, layer, phase, now - 3, now)


def test_a_report_names_the_rank_that_is_silent() -> None:
    silent = beat(1, 3, 1, "dispatch", 60, "y")
    before = [beat(0, 4, 1, "combine", 95), silent, beat(2, 4, 1, "combine", 95)]
    beats = [beat(0, 4, 1, "combine", 100), silent, beat(2, 4, 1, "combine", 100)]
    assert describe_stall(before, beats, 0, 30) == (
        "rank 0: no progress for 30 s; rank 1 on y no longer responds, last seen 40 s ago in step 7, layer 1, "
        "dispatch; ranks 0, 2 wait in step 7, layer 1, combine"
    )


def test_a_clock_that_was_set_back_blames_nobody_else() -> None:
    """The silent rank wrote last before that: its time is the latest of all."""
    silent = beat(1, 3, 1, "dispatch", 5000, "y")
    before, beats = ([beat(0, 4, 1, "combine", now), silent] for now in (95, 100))
    said = describe_stall(before, beats, 0, 30)
    assert "rank 1 on y no longer responds, last seen 0 s ago" in said
    assert said.endswith("rank 0 waits in step 7, layer 1, combine")


def test_a_report_names_the_rank_that_is_behind_or_the_network() -> None:
    behind = [beat(0, 4, 1, "combine", 100), beat(1, 3, 1, "experts", 100)]
    assert "rank 1 on x is behind, last seen 3 s ago in step 7, layer 1, experts; rank 0 waits" in describe_stall(
        [], behind, 0, 9
    )
    level = [beat(0, 4, None, "update", 100), beat(1, 4, None, "update", 100, "y")]
    assert describe_stall([], level, 1, 9) == (
        "rank 1: no progress for 9 s; all ranks respond and wait at the same place: the network between them may be "
        "down; ranks 0, 1 wait in step 7, update"
    )


def test_a_heart_says_where_its_rank_is(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "heartbeat", 0, 1, timeout=300) as heartbeat:
        heartbeat.begin_step(12)
        heartbeat.mark_phase(3, "dispatch")
    (found,) = read_beats(tmp_path / "heartbeat")
    assert (found.pid, found.place(), found.marks) == (os.getpid(), "step 12, layer 3, dispatch", 1)
    assert furthest_step(tmp_path / "heartbeat") == 12
    assert furthest_step(tmp_path / "nothing") == 0


# Steps that are not finite


def run_poisoned(mesh: Mesh, overrides: list[str], bad: list[int]) -> str:
    """A run; in the steps `bad`, counted from one, rank 1 has a gradient that is not finite."""
    whole, done = NativeEngine._backward, []

    def backward(engine: NativeEngine, loss: torch.Tensor, last: bool) -> None:
        step = len(done) + 1 + engine.first
        whole(engine, loss * (math.nan if mesh.rank == 1 and step in bad else 1.0), last)
        done.append(step)

    before = checkpoint.load

    def load(path: Path, engine: NativeEngine, optimizer: bool = True) -> None:
        before(path, engine, optimizer)
        NativeEngine.first = checkpoint.progress(path)[0]

    NativeEngine.first = 0
    NativeEngine._backward, checkpoint.load = backward, load
    try:
        return run(mesh, overrides)
    except Ended as end:
        return f"{end.code}: {end}"
    finally:
        NativeEngine._backward, checkpoint.load = whole, before
        del NativeEngine.first


def test_a_step_that_is_not_finite_is_left_out_and_too_many_go_back_once(pool, tiny) -> None:
    more = [*tiny, "train.steps=9", "planner=llep", "planner.min_rows=1", "recovery.snapshot_every=2"]
    clean = pool.run(run, 2, [*more, "run.name=clean"])[0]
    one = pool.run(run_poisoned, 2, [*more, "run.name=one"], [4])[0]
    assert losses(one)[:4] == losses(clean)[:4]  # the forward was sound
    rows = rows_of(one)
    assert [row["train/skipped_steps"] for row in rows[:9]] == [0] * 3 + [1] * 6
    assert [row["step"] for row in rows if row.get("train/grad_norm", 0) is None] == [4]
    assert losses(one)[4] != losses(clean)[4]
    assert losses(one)[-1] < losses(one)[4]

    many = [*more, "run.name=many", "recovery.skips=2"]
    ends = pool.run(run_poisoned, 2, many, [6, 7])
    said = "step 7: the loss or the gradient norm was not finite 2 times in a row"
    assert ends == [f"1: {said}; when it is started again, the run goes back to its last checkpoint"] * 2
    (again, _) = pool.run(run_poisoned, 2, many, [6, 7])
    assert again.startswith(f"{GAVE_UP}: {said}, again after the run went back")
    folder = pool.run(run_poisoned, 2, many, [])[0]
    assert losses(folder) == losses(clean)
    assert not (Path(folder) / "recovery" / "went_back").exists()


def test_with_nothing_saved_there_is_nothing_to_go_back_to(pool, tiny) -> None:
    bad = ["optim.lr=1e30", "optim.clip=0", "optim.warmup=0", "recovery.skips=2"]
    (said, _) = pool.run(run_poisoned, 2, [*tiny, "run.name=nan", "train.steps=20", *bad], [])
    assert said.startswith(f"{GAVE_UP}: step 3: the loss or the gradient norm was not finite 2 times in a row, and")


def judged(mesh: Mesh, folder: str) -> list[str | None]:
    guard = Guard(Path(folder), mesh, 3, saved=True)
    return [guard.judge(step, norm) for step, norm in enumerate([1.0, math.inf, math.nan, 1.0, math.nan], 1)]


def test_only_steps_in_a_row_count(pool, tmp_path: Path) -> None:
    left = "is skipped: its loss or gradient norm is not finite"
    wanted = [None, f"step 2 {left} (1 in a row)", f"step 3 {left} (2 in a row)", None, f"step 5 {left} (1 in a row)"]
    assert pool.run(judged, 1, str(tmp_path)) == [wanted]


# A rank that raises


RAISES = """
import sys, time
import torch.distributed as dist
dist.destroy_process_group = lambda *_: time.sleep(600)  # as NCCL's, with a peer inside a collective
from moetrain.training import tasks
from moetrain.__main__ import run
tasks.profile_run = lambda *_: 1 / 0
sys.argv = ["moetrain", "profile", "model=tiny"]
run()
"""


def test_a_rank_that_raises_leaves_its_traceback_and_ends(tmp_path: Path) -> None:
    """Whatever it would take to leave its peers in good order."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **place, ERROR_FILE: str(tmp_path / "word.json")}
    done = subprocess.run([sys.executable, "-c", RAISES], timeout=300, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    message = json.loads((tmp_path / "word.json").read_text())["message"]
    assert message["message"] == "ZeroDivisionError: division by zero"
    assert "in <lambda>" in message["extraInfo"]["py_callstack"]


# Snapshots


@pytest.fixture
def identity() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex}"
    yield name
    shutil.rmtree(memory.root() / name, ignore_errors=True)


LAYOUT = {"engine": "toy", "dp_replicate": 1}


def taken(mesh: Mesh, run: str, hosts: list[str], steps: list[int]) -> list[str]:
    """Snapshots of a toy at these steps; the tensors change as soon as `take` returns. What each host holds."""
    toy = Toy(mesh, 0)
    snapshots = Snapshots(run, mesh, toy, {**LAYOUT, "ranks": mesh.world}, hosts)
    for step in steps:
        toy.states.update(Toy(mesh, step).states)
        assert snapshots.take(step, 10 * step) is None
        for part in toy.states.values():
            part.values.fill_(-1)
        snapshots.wait()
        torch.distributed.barrier()
    place = memory.host_folder(run, hosts[mesh.rank])
    return sorted(f"{stamp.rank} of step {stamp.step} in {slot.name}" for slot, stamp in memory.stamps(place))


def check_restored(mesh: Mesh, run: str, hosts: list[str], costs: str, step: int) -> bool:
    """The newest snapshot is that of `step`, and every rank's states are."""
    found = restore.newest(run, mesh, hosts, 0)
    if found is None:
        return step == 0
    assert found.step == step
    settings = config.load(["model=tiny"]).model_dump(mode="json")
    layout = {**LAYOUT, "ranks": mesh.world}
    path = restore.assemble(found, run, mesh, hosts, layout, settings, Path(costs))
    toy = Toy(mesh, -7)
    checkpoint.load(path, toy)
    assert checkpoint.progress(path) == (step, 10 * step)
    assert toy.steps == step
    for name, (_, begin, values) in Toy(mesh, step).states.items():
        assert toy.states[name].begin == begin
        assert torch.equal(toy.states[name].values, values), name
    return True


def test_every_rank_has_a_keeper_on_the_next_host() -> None:
    assert keepers(["x"] * 3) == [None] * 3
    assert keepers(["x", "x", "y", "y"]) == [2, 3, 0, 1]
    assert keepers(["x", "x", "x", "y", "z"]) == [3, 3, 3, 4, 0]


def test_a_lost_host_costs_nothing_but_its_ranks(pool, identity: str, tmp_path: Path) -> None:
    """Two hosts of two ranks: each holds its own files and the other's. Then one is gone, replaced, or left out."""
    hosts, costs = ["x", "x", "y", "y"], tmp_path / "costs.json"
    costs.write_text("{}")
    held = pool.run(taken, 4, identity, hosts, [1, 2, 3])
    assert held == [[f"{r} of step {s} in {slot}" for r in range(4) for s, slot in ((2, "b"), (3, "a"))]] * 4
    shutil.rmtree(memory.host_folder(identity, "y"))
    assert all(pool.run(check_restored, 4, identity, ["new", "new", "x", "x"], str(costs), 3))
    assert all(pool.run(check_restored, 2, identity, ["x", "x"], str(costs), 3))
    shutil.rmtree(memory.host_folder(identity, "new"))
    flip(memory.host_folder(identity, "x") / "a" / "rank_00002.safetensors")
    assert all(pool.run(check_restored, 3, identity, ["x"] * 3, str(costs), 2))
    memory.stamp_file(memory.host_folder(identity, "x") / "b", 0).unlink()
    assert all(pool.run(check_restored, 3, identity, ["x"] * 3, str(costs), 0))


def test_the_newest_snapshot_is_not_written_over_first(pool, identity: str) -> None:
    pool.run(taken, 2, identity, ["x", "x"], [1, 2, 3])
    left = memory.host_folder(identity, "x") / "b" / ".rank_00001.json.0123456789abcdef.part"  # of a killed worker
    left.touch()
    held = pool.run(taken, 1, identity, ["x"], [4])[0]
    assert held == ["0 of step 3 in a", "0 of step 4 in b", "1 of step 3 in a"]
    assert not left.exists()


def taken_without_room(mesh: Mesh, run: str) -> list[tuple[str | None, list[int]]]:
    """What `take` says, and the steps that are whole in memory, while rank 1 cannot write its stamps of 2 to 4."""
    snapshots = Snapshots(run, mesh, Toy(mesh, 0), {**LAYOUT, "ranks": mesh.world}, ["x"] * mesh.world)
    put_stamp, out = memory.put_stamp, []

    def put(slot: Path, stamp: memory.SnapshotStamp) -> None:
        if mesh.rank == 1 and 2 <= stamp.step <= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        put_stamp(slot, stamp)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "put_stamp", put)
        for step in range(1, 7):
            votes = torch.tensor(int(snapshots.unstamped))
            torch.distributed.all_reduce(votes)
            said = snapshots.take(step, 10 * step, again=votes.item() > 0)
            snapshots.wait()
            torch.distributed.barrier()
            there = [stamp.step for _, stamp in memory.stamps(memory.host_folder(run, "x"))]
            out.append((said, sorted(n for n in set(there) if there.count(n) == mesh.world)))
            torch.distributed.barrier()
    return out


def test_shared_memory_that_fills_up_costs_no_whole_snapshot(pool, identity: str) -> None:
    first, second = pool.run(taken_without_room, 2, identity)
    assert first == second
    assert [whole for _, whole in first] == [[1], [1], [1], [1], [1, 5], [5, 6]]
    assert [said is not None for said, _ in first] == [False, False, True, False, False, False]
    assert "was not kept: /dev/shm of some host is full or cannot be written" in str(first[2][0])


def forgotten(mesh: Mesh, run: str) -> bool:
    """A run ends while rank 1 is still stamping its snapshot."""
    put_stamp = memory.put_stamp

    def late(slot: Path, stamp: memory.SnapshotStamp) -> None:
        time.sleep(0.3 * mesh.rank)
        put_stamp(slot, stamp)

    memory.put_stamp = late
    try:
        snapshots = Snapshots(run, mesh, Toy(mesh, 0), {**LAYOUT, "ranks": mesh.world}, ["x"] * mesh.world)
        snapshots.take(1, 10)
        snapshots.forget()
    finally:
        memory.put_stamp = put_stamp
    torch.distributed.barrier()
    return memory.host_folder(run, "x").exists()


def test_a_run_that_ends_waits_for_every_rank_before_its_snapshots_go(pool, identity: str) -> None:
    assert pool.run(forgotten, 2, identity) == [False, False]


# Fewer ranks


def test_uneven_shares_follow_the_same_curve(pool, tiny) -> None:
    """Eight sequences on two ranks, on three, and on three in micro-steps of which some are empty on some ranks."""
    more = [*tiny, "train.steps=6", "router.skew=0.5", "planner=llep", "planner.min_rows=1"]
    whole = losses(pool.run(run, 2, [*more, "run.name=two"])[0])
    for name, ranks, micro in (("three", 3, "null"), ("some", 3, "2"), ("empty", 3, "1")):
        given = [f"run.name={name}", "parallel.uneven=true", f"train.micro_batch={micro}", "balance.accumulate=exact"]
        folder = pool.run(run, ranks, [*more, *given], ep=1)[0]
        assert losses(folder) == pytest.approx(whole, rel=1e-5), name


def test_the_largest_layout_that_fits(tmp_path: Path) -> None:
    def at(world: int, *overrides: str) -> tuple[int | None, int, bool]:
        options = fitting(config.load(["model=tiny", "parallel.ep=4", *overrides]), world, tmp_path).parallel
        return options.ep, options.dp_replicate, options.uneven

    assert at(6) == (4, 1, False)  # a run that begins: nothing is changed, and it will be refused
    for rank in range(8):
        (tmp_path / f"rank_{rank:05d}").touch()
    assert at(8) == (4, 1, False)
    assert at(6) == (3, 1, True)
    assert at(4) == (4, 1, False)
    assert at(6, "parallel.dp_replicate=2") == (3, 2, True)
    assert at(5, "parallel.dp_replicate=2") == (1, 1, True)
    assert at(1) == (1, 1, True)
