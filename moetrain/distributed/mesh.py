"""The ranks and their groups: the only place where process groups are made.

World = dp_replicate × dp_shard; `ep` borrows the ranks of dp_shard, neighbours first: shard = expert_data × ep.
Every rank reads its own share of the data; a rank is in one data group and one expert group.
"""

import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moetrain.common.errors import ConfigError
from moetrain.distributed.comm import (
    ALONE,
    Alone,
    Group,
    GroupTransport,
    everyone,
    find_transport,
    gather_texts,
    use_transports,
)
from moetrain.distributed.exchange import AskedExchange, ExchangeMaker, RowExchange
from moetrain.distributed.transport import Transport
from moetrain.launch.worker import STORE_SOCKET

Backend = Literal["nccl", "gloo"]
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
    device_bytes: int  # a rank's share of the memory of its GPU, the smallest of all ranks; 0: CPUs
    ep: ExpertGroup
    dense: DeviceMesh  # dense parameters: (dp_shard) or (dp_replicate, dp_shard)
    expert_data: DeviceMesh  # a rank's expert shard: (expert_data) or (dp_replicate, expert_data)
    dp_replicate: int
    saving: dist.ProcessGroup  # all ranks, over the hosts' network: for the thread that writes checkpoints
    peers: dist.ProcessGroup  # the same: for the thread that sends in-memory checkpoints to another host
    backend: Backend  # of the collectives of tensors on `device`
    exchange: RowExchange  # how the rows of `ep` travel
    notes: tuple[str, ...] = ()  # what was asked for and cannot be had between these ranks

    @property
    def is_staged(self) -> bool:
        """Whether collectives copy GPU tensors to pinned host memory and back: right, but slow."""
        return self.device.type == "cuda" and self.backend == "gloo"

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
    exchange: AskedExchange = "flat",
    flow_splits: int = 1,
    nodes: Sequence[int] | None = None,
    init_method: str = "env://",
    timeout: float = 600.0,
    backend: Literal["auto", "nccl", "gloo"] = "auto",
) -> Iterator[Mesh]:
    """Join `world` ranks.

    Arguments:
        rank, world, local_rank: of this process; the last on its host.
        ep: ranks that share one set of experts; None: all ranks of a replica.
        dp_replicate: replicas that hold all parameters.
        exchange: how the rows of an expert group travel. "two_level" where that is possible, else flat and a line in
            `Mesh.notes`; "auto" begins flat, and `Mesh.exchange` can be told to use the other way.
        flow_splits: connections, or communicators, that a transfer of rows between hosts uses at the same time.
        nodes: [world] the node of each rank; None: ranks of one host name are on one node.
        timeout: seconds that a collective may take.
        backend: what carries collectives; "auto": NCCL between GPUs, gloo between CPUs and where ranks share a GPU,
            which NCCL refuses. gloo copies GPU tensors to pinned host memory and back.

    Raises `ConfigError`, before there is a process group, where NCCL is asked for and cannot be used.

    The groups are destroyed at the end of the context, but not where it raises: peers may be inside a collective then,
    NCCL would wait for them, and the error would never be shown. The process has to end after that.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == world:  # one host: what its name resolves to does not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    device = device_of(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = timedelta(seconds=timeout)
    store = _open_store(init_method, rank, world, patience, device)
    sharing = CardSharing(1, False)
    if device.type == "cuda" and store is not None:
        sharing = find_card_sharing(str(torch.cuda.get_device_properties(device).uuid), world, store)
    chosen = choose_backend(backend, device, sharing.is_any_shared)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen == "nccl" else "gloo",
        init_method=None if store else init_method,
        rank=rank,
        world_size=world,
        store=store,
        timeout=patience,
        device_id=device if chosen == "nccl" else None,
    )
    mesh = _build_axes(rank, world, ep, dp_replicate, device, chosen, sharing.num_ranks)
    mesh = _connect_rows(mesh, nodes or _find_nodes(mesh.saving), exchange, flow_splits, patience)
    transports: dict[Group, Transport] = {mesh.ep.rows: mesh.exchange}
    if not isinstance(mesh.ep.lend, Alone) and mesh.exchange.is_on_one_node and device.type == "cpu":
        transports[mesh.ep.lend] = find_transport(mesh.ep.lend, timeout)
    with use_transports(transports):
        yield mesh
        dist.barrier()  # a rank that leaves early can make a slower one abort
    dist.destroy_process_group()


def device_of(local_rank: int) -> torch.device:
    """Return a worker's device: the GPU of its number on this host.

    Where only one GPU can be seen, its launcher has chosen it (Slurm's --gpus-per-task), or ranks share it. Where there
    are several, but fewer than ranks, they share them in turn.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", local_rank % count) if count else torch.device("cpu")


class CardSharing(NamedTuple):
    """How ranks share GPUs."""

    num_ranks: int  # on this rank's GPU
    is_any_shared: bool  # whether any two ranks of the world are on one GPU


def find_card_sharing(card: str, world: int, store: dist.Store) -> CardSharing:
    """Return how the ranks share GPUs; all ranks call it. `card`: a name of this rank's GPU that no other GPU has."""
    cards = dist.PrefixStore("cards", store)
    if cards.add(card, 1) > 1:
        cards.add("shared", 1)
    if cards.add("arrived", 1) == world:
        cards.set("complete", "")
    cards.wait(["complete"])
    return CardSharing(cards.add(card, 0), cards.add("shared", 0) > 0)


def choose_backend(asked: Literal["auto", "nccl", "gloo"], device: torch.device, is_any_shared: bool) -> Backend:
    """Return what carries the collectives of tensors on `device`; `is_any_shared`: whether ranks share a GPU.

    Raises `ConfigError` where NCCL is asked for and cannot be used.
    """
    if asked == "nccl" and device.type != "cuda":
        raise ConfigError("parallel.backend=nccl: must be auto or gloo, for there are no GPUs")
    if asked == "nccl" and is_any_shared:
        raise ConfigError("parallel.backend=nccl: must be auto or gloo where ranks share a GPU, which NCCL refuses")
    if asked != "auto":
        return asked
    return "nccl" if device.type == "cuda" and not is_any_shared else "gloo"


def _open_store(
    init_method: str, rank: int, world: int, patience: timedelta, device: torch.device
) -> dist.Store | None:
    """Return the store through which ranks meet; None: `init_process_group` makes it of `init_method`."""
    if init_method == "env://" and STORE_SOCKET in os.environ:
        return _store_at_launchers_socket(rank, world, patience)
    if device.type != "cuda" or world == 1:
        return None
    store: dist.Store = next(dist.rendezvous(init_method, rank, world, timeout=patience))[0]
    store.set_timeout(patience)
    return store


def _store_at_launchers_socket(rank: int, world: int, patience: timedelta) -> dist.Store:
    """Connect to the store that rank 0 keeps. Nobody else can have taken its port: our launcher opened the socket."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = int(os.environ[STORE_SOCKET]) if rank == 0 else None
    return dist.TCPStore(host, port, world, rank == 0, patience, wait_for_workers=False, master_listen_fd=listening)


def _find_nodes(everyone: dist.ProcessGroup) -> list[int]:
    """Return the node of each rank, numbered from 0: ranks of one host name share it."""
    names = gather_texts(socket.gethostname(), everyone)
    order = list(dict.fromkeys(names))
    return [order.index(name) for name in names]


def _connect_rows(
    mesh: Mesh, nodes: Sequence[int], asked: AskedExchange, flow_splits: int, patience: timedelta
) -> Mesh:
    """Return the mesh with the ways that rows can travel between ranks on these `nodes` [world]; all ranks call it."""
    first = mesh.rank - mesh.ep.rank

    def make_group(ranks: Sequence[int]) -> dist.ProcessGroup:
        many = [first + r for r in ranks]
        group: dist.ProcessGroup = dist.new_group(many, timeout=patience, use_local_synchronization=True)
        return group

    assert not isinstance(mesh.ep.rows, Alone)
    of_groups = [tuple(nodes[begin : begin + mesh.ep.size]) for begin in range(0, mesh.world, mesh.ep.size)]
    maker = ExchangeMaker(mesh.ep.rows, flow_splits, mesh.device.type == "cpu", make_group, patience.total_seconds())
    exchange, notes = maker.connect(of_groups, of_groups[first // mesh.ep.size], asked)
    return replace(mesh, exchange=exchange, notes=notes)


@contextmanager
def pretend(*, rank: int, world: int, ep: int | None = None, dp_replicate: int = 1) -> Iterator[Mesh]:
    """Give the mesh of one rank of a world that does not exist: to build what is never run."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield _build_axes(rank, world, ep, dp_replicate, torch.device("cpu"), "gloo", 1)
    finally:
        dist.destroy_process_group()


def _build_axes(
    rank: int, world: int, ep: int | None, replicate: int, device: torch.device, backend: Backend, num_on_card: int
) -> Mesh:
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
    rows = grid.get_group("ep")
    expert = ExpertGroup(rank % ep, ep, rows, lend)
    return Mesh(
        rank=rank,
        world=world,
        device=device,
        device_bytes=_min_over_ranks(memory_of(device) // num_on_card, device),
        ep=expert,
        dense=dense if replicate > 1 else dense["dp_shard"],
        expert_data=grid["dp_replicate", "expert_data"] if replicate > 1 else grid["expert_data"],
        dp_replicate=replicate,
        saving=saving,
        peers=peers,
        backend=backend,
        exchange=RowExchange(rank % ep, [0] * ep, "flat", {"flat": GroupTransport(rows)}),
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
