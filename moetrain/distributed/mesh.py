"""The ranks and their groups: the only place where process groups are made.

World = dp_replicate × dp_shard; `ep` borrows the ranks of dp_shard, neighbours first: shard = expert_data × ep.
Every rank reads its own share of the data; a rank is in one data group and one expert group.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moetrain.common.errors import ConfigError
from moetrain.distributed.comm import ALONE, Alone, Group, everyone, use_shared_memory
from moetrain.launch.worker import STORE_SOCKET

SLOWEST_SAVE = timedelta(hours=1)  # between the first rank that has written its part of a checkpoint and the last


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks among which one set of experts is shared."""

    rank: int
    size: int
    rows: Group  # counts, dispatch and combine
    lend: Group  # the same ranks, a communicator of its own: weights travel while rows do

    @classmethod
    def alone(cls) -> "ExpertGroup":
        """The group of one process that holds all experts; there need be no process group at all."""
        return cls(0, 1, ALONE, ALONE)

    @classmethod
    def from_group(cls, group: dist.ProcessGroup | DeviceMesh | None) -> "ExpertGroup":
        """The group of an existing process group, or of a device mesh with one axis; None: this process alone. Never
        makes the default group.

        All ranks of the group call it: it makes the second communicator, for lending, with
        `torch.distributed.new_group`. Raises `ConfigError` where a device mesh has several axes, or this process is
        not in the group.
        """
        given = join_group(group)
        if isinstance(given, Alone) or given.size() == 1:
            return cls.alone()
        ranks = dist.get_process_group_ranks(given)
        lend = dist.new_group(ranks, use_local_synchronization=True)
        is_shared = given is dist.group.WORLD  # in which DDP and FSDP communicate at times of their own
        rows = dist.new_group(ranks, use_local_synchronization=True) if is_shared else given
        return cls(given.rank(), given.size(), rows, lend)


def join_group(group: dist.ProcessGroup | DeviceMesh | None) -> Group:
    """Returns the process group of a device mesh with one axis, or a process group as it is; None: this process alone.

    Raises `ConfigError` where a device mesh has several axes, or this process is not in the group.
    """
    if group is None:
        return ALONE
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ConfigError(f"group: must be one axis of the device mesh, mesh[NAME]; it has {group.ndim} axes")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup) or group.rank() < 0:
        raise ConfigError("group: this process is not in it; every rank passes the group that it belongs to")
    return group


@dataclass(frozen=True)
class Mesh:
    rank: int
    world: int
    device: torch.device
    device_bytes: int  # memory of the smallest GPU of all ranks; 0: CPUs
    ep: ExpertGroup
    dense: DeviceMesh  # dense parameters: (dp_shard) or (dp_replicate, dp_shard)
    expert_data: DeviceMesh  # a rank's expert shard: (expert_data) or (dp_replicate, expert_data)
    dp_replicate: int
    saving: dist.ProcessGroup  # all ranks, over the hosts' network: for the thread that writes checkpoints
    peers: dist.ProcessGroup  # the same: for the thread that sends in-memory checkpoints to another host

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def everyone(self) -> Group:
        """All ranks of the world."""
        return everyone()


@contextmanager
def start(
    *,
    rank: int,
    world: int,
    local_rank: int = 0,
    ep: int | None = None,
    dp_replicate: int = 1,
    init_method: str = "env://",
    timeout: float = 600.0,
) -> Iterator[Mesh]:
    """Join `world` ranks: NCCL where there are GPUs, else gloo.

    `ep` ranks share one set of experts (None: all ranks of a replica), `dp_replicate` replicas hold all parameters;
    `timeout`: seconds that a collective may take. Raises `ConfigError` where this host has too few GPUs.

    The groups are destroyed at the end of the context, but not where it raises: peers may be inside a collective then,
    NCCL would wait for them, and the error would never be shown. The process has to end after that.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == world:  # one host: what its name resolves to does not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    device = device_of(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience, store = timedelta(seconds=timeout), None
    if init_method == "env://" and STORE_SOCKET in os.environ:
        store = _store_at_launchers_socket(rank, world, patience)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=None if store else init_method,
        rank=rank,
        world_size=world,
        store=store,
        timeout=patience,
        device_id=device if device.type == "cuda" else None,
    )
    mesh = _build_axes(rank, world, ep, dp_replicate, device)
    with use_shared_memory([mesh.ep.rows, mesh.ep.lend] if device.type == "cpu" else [], timeout):
        yield mesh
        dist.barrier()  # a rank that leaves early can make a slower one abort
    dist.destroy_process_group()


def device_of(local_rank: int) -> torch.device:
    """Return a worker's device: the GPU of its number on this host.

    Where only one GPU can be seen, its launcher has chosen it (Slurm's --gpus-per-task). Raises `ConfigError` where
    there are several, but too few.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1 and local_rank >= count:
        raise ConfigError(f"LOCAL_RANK={local_rank}: must be below the number of GPUs that this process sees, {count}")
    return torch.device("cuda", local_rank % count) if count else torch.device("cpu")


def _store_at_launchers_socket(rank: int, world: int, patience: timedelta) -> dist.Store:
    """Connect to the store that rank 0 keeps. Nobody else can have taken its port: our launcher opened the socket."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = int(os.environ[STORE_SOCKET]) if rank == 0 else None
    return dist.TCPStore(host, port, world, rank == 0, patience, wait_for_workers=False, master_listen_fd=listening)


@contextmanager
def pretend(*, rank: int, world: int, ep: int | None = None, dp_replicate: int = 1) -> Iterator[Mesh]:
    """Give the mesh of one rank of a world that does not exist: to build what is never run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield _build_axes(rank, world, ep, dp_replicate, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _build_axes(rank: int, world: int, ep: int | None, replicate: int, device: torch.device) -> Mesh:
    shard = world // replicate
    ep = ep or shard
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grid = init_device_mesh(
            device.type,
            (replicate, shard // ep, ep),
            mesh_dim_names=("dp_replicate", "expert_data", "ep"),
        )
        dense = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    lend = None
    for ranks in grid.mesh.reshape(-1, ep).tolist():
        group = dist.new_group(ranks)
        lend = group if rank in ranks else lend
    assert lend is not None
    saving, peers = (
        dist.new_group(timeout=SLOWEST_SAVE, backend="gloo" if device.type == "cuda" else None) for _ in range(2)
    )
    expert = ExpertGroup(rank % ep, ep, grid.get_group("ep"), lend)
    return Mesh(
        rank=rank,
        world=world,
        device=device,
        device_bytes=_min_over_ranks(memory_of(device), device),
        ep=expert,
        dense=dense if replicate > 1 else dense["dp_shard"],
        expert_data=grid["dp_replicate", "expert_data"] if replicate > 1 else grid["expert_data"],
        dp_replicate=replicate,
        saving=saving,
        peers=peers,
    )


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory; 0 for a CPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(device).total_memory


def _min_over_ranks(number: int, device: torch.device) -> int:
    """Return the least of all ranks' numbers."""
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
