"""Systems that lack what this one has: each part is taken away, and a run does without it."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from moetrain import config
from moetrain.common import cache
from moetrain.distributed import comm
from moetrain.distributed.mesh import Mesh
from moetrain.distributed.shared_memory import ShmChannel
from moetrain.engine import optim
from moetrain.launch import heartbeat, local
from moetrain.moe.kernels import cpu_gemm
from moetrain.observe.collect import meter
from moetrain.recovery import memory
from moetrain.training.loop import train
from tests.grid import on_grid
from tests.training.test_train import losses

ROOT = Path(__file__).parents[2]


@contextmanager
def without(*names: str) -> Iterator[None]:
    """A system that has none of these: parts of `os`, `/proc`, `/dev/shm`; "linux": one that is macOS."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            if name == "linux":
                patch.setattr(sys, "platform", "darwin")
            elif name == "/proc":
                for owner, door in ((Path, "read_text"), (Path, "stat"), (os, "readlink")):
                    patch.setattr(owner, door, without_proc(getattr(owner, door)))
            elif name == "/dev/shm":
                patch.setattr(memory, "ROOT", Path("/nonexistent/shm"))
            else:
                patch.delattr(os, name)
        yield


def without_proc(usual: Callable[..., Any]) -> Callable[..., Any]:
    def opened(path: Any, *more: Any, **options: Any) -> Any:
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return usual(path, *more, **options)

    return opened


def run(mesh: Mesh, overrides: list[str], lacks: list[str]) -> tuple[str, str, int]:
    """(the run's folder, its log, groups whose rows travel through shared memory) on such a system."""
    groups = list(comm._transports)
    for group in groups:
        comm._transports.pop(group).close()
    with without(*lacks):
        found = {group: comm.find_transport(group, 60.0) for group in groups}
        with comm.use_transports(found):
            folder = train(config.load(overrides), mesh)
    in_memory = [way for way in found.values() if isinstance(way, ShmChannel)]
    return str(folder), (folder / "log.txt").read_text(), len(in_memory)


MACOS = ["linux", "memfd_create", "posix_fallocate", "sched_getaffinity", "/proc", "/dev/shm"]


@pytest.mark.parametrize("lacks", [MACOS, *map(on_grid, (["memfd_create"], ["/proc"], ["/dev/shm"]))], ids=" ".join)
def test_a_run_is_the_same_without_what_linux_has(pool, tiny: list[str], lacks: list[str]) -> None:
    more = [*tiny, "train.steps=3", "recovery.snapshot_every=1", "planner=llep", "planner.min_rows=1"]
    usual, said, groups = pool.run(run, 2, [*more, "run.name=usual"], [])[0]
    assert groups > 0
    assert "no snapshots" not in said
    folder, said, groups = pool.run(run, 2, [*more, "run.name=lacking"], lacks)[0]
    assert losses(folder) == losses(usual)
    assert (groups > 0) == (lacks == ["/dev/shm"])
    assert ("no in-memory checkpoints: there is no /nonexistent/shm" in said) == ("/dev/shm" in lacks)
    assert not Path("/nonexistent").exists()


def test_macos_counts_memory_in_bytes_and_names_its_loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = meter.peak_memory(torch.device("cpu"))
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $GLOO_SOCKET_IFNAME > {tmp_path}/interface\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the handlers here stay
    for platform, interface, unit in (("linux", "lo", 1), ("darwin", "lo0", 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert local.launch(["train"], 1) == 0
        assert (tmp_path / "interface").read_text().strip() == interface
        assert meter.peak_memory(torch.device("cpu")) == pytest.approx(here / unit, rel=0.2)


def test_moments_lie_in_files_without_fallocate(tmp_path: Path) -> None:
    with without("posix_fallocate"):
        held = optim.mapped(tmp_path, torch.Size([5, 1 << 20]), torch.float32)
    assert held.shape == (5, 1 << 20)
    assert not held.any()


def test_a_process_that_is_gone_is_known_without_proc() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with without("/proc"):
        states = [heartbeat._state(beat(pid)) for pid in (os.getpid(), gone.pid)]
    assert states == ["", "is gone"]


def beat(pid: int) -> heartbeat.Beat:
    return heartbeat.Beat(0, "here", pid, 1, 0, None, "data", 0.0, 0.0)


def test_where_nothing_can_be_kept_the_doctor_and_the_planner_work(tmp_path: Path) -> None:
    """A home that cannot be written, and in the folder of temporary files somebody else's where ours would be."""
    theirs = tmp_path / f"moetrain-{os.getuid()}"
    theirs.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}
    env |= {"HOME": "/proc/nothing", "TMPDIR": str(tmp_path), "NUMBA_CACHE_DIR": "/proc/nothing"}
    command = [sys.executable, "-m", "moetrain", "doctor", "model=tiny", f"run.dir={tmp_path}", f"data.dir={tmp_path}"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert not list((tmp_path / "elsewhere").iterdir())


NO_AVX = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
NO_AVX |= {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


def test_kernels_without_avx() -> None:
    """Those of test_moe.py, compiled for the oldest processor of this kind."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "moe" / "test_moe.py")]
    chosen = [*command, "-k", "test_cpu_kernels or test_grouped_products"]
    done = subprocess.run(chosen, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **NO_AVX})
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_a_processor_that_llvm_does_not_know_has_no_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise RuntimeError("failed to get host cpu features.")

    monkeypatch.setattr(cpu_gemm.llvm, "get_host_cpu_features", unknown)
    assert not cpu_gemm.able.__wrapped__()


@pytest.mark.grid  # every kernel is compiled again
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_without_avx(tiny: list[str], tmp_path: Path, dtype: str) -> None:
    more = [*tiny, "train.steps=2", "run.name=old", "parallel.nproc=2", f"train.dtype={dtype}"]
    command = [sys.executable, "-m", "moetrain", "train", *more]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **NO_AVX})
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "old")) == 2


# What is kept between processes


def test_the_first_folder_that_can_be_written_and_is_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, shared = tmp_path / "home", tmp_path / "tmp"
    ours = shared / f"moetrain-{os.getuid()}"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    assert cache.folder("costs") == home / ".cache" / "moetrain" / "costs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder("costs") == tmp_path / "xdg" / "moetrain" / "costs"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert cache.folder("costs") == ours / "costs"
    assert ours.stat().st_mode & 0o777 == 0o700
    ours.chmod(0o777)
    assert cache.folder("costs") is None
    shutil.rmtree(ours)
    ours.symlink_to(home)
    assert cache.folder("costs") is None
    ours.unlink()
    ours.write_text("a file")
    assert cache.folder("costs") is None


@pytest.fixture
def compile_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """Load a module with a compiled function as a new process would, and call it: hits of the cache."""
    source = tmp_path / "doubled.py"
    source.write_text(TWICE)
    monkeypatch.setitem(vars(numba.config), "CACHE_DIR", str(tmp_path / "cache"))

    def load() -> int:
        twice = runpy.run_path(str(source))["twice"]
        assert twice(2.5) == 5.0
        return sum(twice.stats.cache_hits.values())

    return load


TWICE = """
from moetrain.moe.compiled import njit
@njit()
def twice(x):
    return 2 * x
"""


def test_of_several_processes_one_compiles(tmp_path: Path) -> None:
    source = tmp_path / "doubled.py"
    said = "input(); print(twice(2.5), sum(twice.stats.cache_hits.values()))"
    source.write_text(f"{TWICE}\nprint(flush=True); {said}\n")
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, str(source)], env=env, **pipes) for _ in range(3)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert sorted(process.communicate()[0].split()[-1] for process in processes) == ["0", "1", "1"]


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("damage", ["", "half", "other"])
def test_a_damaged_cache_is_compiled_again(
    compile_again: Callable[[], int], tmp_path: Path, kind: str, damage: str
) -> None:
    assert [compile_again(), compile_again()] == [0, 1]
    (path,) = (tmp_path / "cache").rglob(kind)
    whole = path.read_bytes()
    path.write_bytes({"": b"", "half": whole[: len(whole) // 2], "other": bytes(reversed(whole))}[damage])
    assert [compile_again(), compile_again()] == [0, 1]


def test_a_cache_that_can_no_longer_be_written_is_left(compile_again: Callable[[], int], tmp_path: Path) -> None:
    assert compile_again() == 0
    (path,) = (tmp_path / "cache").rglob("*.nbi")
    shutil.rmtree(path.parent)
    path.parent.write_text("no folder any more")
    assert compile_again() == 0
