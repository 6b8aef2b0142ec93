"""Two hosts on one machine: a limited link, its bytes counted, the layer run over it in every way."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain import cli
from moetrain.bench.hosts import WAYS
from moetrain.bench.namespaces import Hosts
from moetrain.config import ConfigError
from moetrain.distributed import mesh
from moetrain.engine.precision import DTYPES

BURST, TOKENS = 256_000, 512


def allowed() -> bool:
    try:
        with Hosts():
            return True
    except ConfigError:
        return False


def test_a_layer_over_a_slow_link_is_counted_by_the_wire() -> None:
    """Where namespaces may not be made, the command has to say so."""
    command = [sys.executable, "-m", "moetrain", "bench", "hosts", "--rate", "400mbit", "--per-host", "1", "--json"]
    command += ["--scenario", "80 % into 1", "--tokens", str(TOKENS), "--repeats", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=200)
    if not allowed():
        assert process.returncode == 2
        assert "several hosts on one machine: needs" in err
        return
    assert process.returncode == 0, err
    found: list[dict[str, Any]] = json.loads(next(line for line in out.splitlines() if line.startswith("[")))
    assert [r["way"] for r in found] == [way.name for way in WAYS]
    for record in found:
        row = DTYPES[record["dtype"]].itemsize * record["dim"]  # a token's row crosses four times
        assert record["bytes_between_hosts"] > 4 * row * record["rows_between_hosts"] / record["top_k"]
        one_way = record["bytes_between_hosts"] / 2
        assert record["total_ms"] > 1e3 * (one_way - 2 * BURST) / (400e6 / 8)
    assert not [name for name in os.listdir("/run/netns") if name.startswith(f"moe{process.pid}-")]


def test_hosts_are_apart_until_the_link_is_up() -> None:
    if not allowed():
        return
    with Hosts("100mbit") as hosts:
        where = (hosts.addresses[1], 5000)
        server = [
            sys.executable,
            "-c",
            f"import socket; s = socket.create_server({where}); [s.accept() for _ in (0, 1)]",
        ]
        client = [sys.executable, "-c", f"import socket; socket.create_connection({where}, timeout=1)"]
        named = hosts.start(1, ["sh", "-c", 'test "$(hostname)" = "$0"', hosts.names[1]], {})
        assert named.wait(10) == 0
        hosts.start(1, server, {})
        assert any(hosts.start(0, client, {}).wait(10) == 0 for _ in range(20))
        hosts.cut(1)
        assert hosts.start(0, client, {}).wait(10) != 0


def test_without_the_tools_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["bench", "hosts"]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: several hosts on one machine: needs the command ip (iproute2, util-linux)"
    )


@pytest.mark.parametrize(
    ("seen", "local_rank", "device"), [(0, 3, "cpu"), (8, 3, "cuda:3"), (1, 0, "cuda:0"), (1, 3, "cuda:0")]
)
def test_a_worker_takes_the_gpu_of_its_number_or_the_one_it_sees(monkeypatch, seen, local_rank, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert str(mesh.device_of(local_rank)) == device


def test_more_workers_than_gpus_share_them_in_turn(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [mesh.device_of(rank).index for rank in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ("a", [(1, False)]),
        ("ab", [(1, False)] * 2),
        ("aba", [(2, True), (1, True), (2, True)]),
        ("aaaa", [(4, True)] * 4),
    ],
)
def test_ranks_find_out_who_shares_a_gpu(cards: str, expected: list[tuple[int, bool]]) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(len(cards)) as ranks:
        found = list(ranks.map(lambda card: mesh.find_card_sharing(card, len(cards), store), cards))
    assert found == expected


@pytest.mark.parametrize(
    ("asked", "device", "shared", "backend"),
    [
        ("auto", "cpu", False, "gloo"),
        ("auto", "cuda", False, "nccl"),
        ("auto", "cuda", True, "gloo"),
        ("gloo", "cuda", False, "gloo"),
        ("nccl", "cuda", False, "nccl"),
    ],
)
def test_nccl_carries_collectives_where_it_can(asked: Any, device: str, shared: bool, backend: str) -> None:
    assert mesh.choose_backend(asked, torch.device(device), shared) == backend


@pytest.mark.parametrize(("device", "shared", "reason"), [("cpu", False, "no GPUs"), ("cuda", True, "share a GPU")])
def test_nccl_is_refused_where_it_cannot_be_used(device: str, shared: bool, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^parallel.backend=nccl: must be auto or gloo.*{reason}"):
        mesh.choose_backend("nccl", torch.device(device), shared)
