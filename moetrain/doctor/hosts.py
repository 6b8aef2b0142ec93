"""Whether the hosts of a rendezvous reach each other: the same command on each of them, at the same time.

They meet at a store on the host that has the address, say who they are, and each connects to each other one directly.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistError, TCPStore

from moetrain import __version__
from moetrain.config import ConfigError
from moetrain.doctor.host import BAD, GOOD, NOTE, Check

SKEW_SECONDS = 1.0


def meet(where: str, nodes: int, patience: float) -> Iterator[Check]:
    """`where`: HOST:PORT, an address of the first host. Raises `ConfigError` for anything else."""
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--meet={where}: must be HOST:PORT")
    try:
        store, own = _join(host, int(port), patience)
    except (OSError, DistError, RuntimeError) as error:
        advice = "run the same command on the host with that address, and open the port in its firewall"
        yield Check("rendezvous", BAD, f"{where} cannot be reached: {str(error).splitlines()[0][:100]}", advice)
        return
    with socket.create_server((own, 0)) as server:
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        about = {"name": socket.gethostname(), "address": server.getsockname()[:2], "torch": torch.__version__}
        about["moetrain"] = __version__
        mine = store.add("nodes", 1) - 1
        store.set(f"node/{mine}", json.dumps(about))
        found = _others(store, nodes, patience)
        if len(found) < nodes:
            names = ", ".join(other["name"] for other in found)
            advice = f"run the same command on all {nodes} hosts at the same time, and read what it prints there"
            yield Check(
                "rendezvous", BAD, f"{len(found)} of {nodes} hosts arrived within {patience:.0f} s: {names}", advice
            )
        else:
            yield Check("rendezvous", GOOD, f"{nodes} hosts met at {where}")
        for number, other in enumerate(found):
            if number != mine:
                yield _reach(other, about)
        until = time.monotonic() + patience
        with suppress(DistError):  # the host that keeps the store has seen all of them done, and left
            done = store.add("done", 1)
            while done < len(found) and time.monotonic() < until:
                time.sleep(0.05)
                done = store.add("done", 0)


def _join(host: str, port: int, patience: float) -> tuple[TCPStore, str]:
    """(the store, this host's address towards the others)."""
    options: dict[str, Any] = {"timeout": timedelta(seconds=patience), "wait_for_workers": False}
    try:
        listening = socket.create_server((host, port))
    except OSError:
        until = time.monotonic() + patience
        while True:
            try:
                with socket.create_connection((host, port), timeout=patience) as way:
                    own = way.getsockname()[0]
                return TCPStore(host, port, None, False, **options), own
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
    own = listening.getsockname()[0]
    return TCPStore(host, port, None, True, master_listen_fd=listening.detach(), **options), own


def _others(store: TCPStore, nodes: int, patience: float) -> list[dict[str, Any]]:
    until = time.monotonic() + patience
    while store.add("nodes", 0) < nodes and time.monotonic() < until:
        time.sleep(0.05)
    return [json.loads(store.get(f"node/{n}")) for n in range(min(nodes, store.add("nodes", 0)))]


def _answer(server: socket.socket) -> None:
    """Send the time of this host to every connection."""
    while True:
        try:
            way, _ = server.accept()
        except OSError:
            return
        with way:
            way.sendall(repr(time.time()).encode())


def _reach(other: dict[str, Any], own: dict[str, Any]) -> Check:
    name, (address, port) = f"host {other['name']}", other["address"]
    try:
        asked_at, began = time.time(), time.monotonic()
        with socket.create_connection((address, port), timeout=5) as way:
            theirs = float(way.makefile().read())
        took = time.monotonic() - began
    except (OSError, ValueError) as error:
        advice = "open all ports between the hosts in their firewalls"
        return Check(name, BAD, f"{address} does not answer ({error})", advice)
    ahead = round(theirs - asked_at - took / 2, 2) + 0.0  # never -0
    text = f"{address} answers in {1e3 * took:.1f} ms; its clock is {ahead:+.2f} s"
    for package in ("torch", "moetrain"):
        if other[package] != own[package]:
            return Check(
                name,
                BAD,
                f"{text}; it has {package} {other[package]}, this host {own[package]}",
                "install the same version everywhere",
            )
    if abs(ahead) > SKEW_SECONDS:
        return Check(name, NOTE, text, "synchronize the clocks: heartbeats compare them")
    return Check(name, GOOD, text)
