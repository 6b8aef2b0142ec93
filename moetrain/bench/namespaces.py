"""Several hosts on one machine: network namespaces with names of their own, joined by a link of limited rate.

Linux, and root (or CAP_NET_ADMIN and CAP_SYS_ADMIN): `ip` makes the namespaces and their veth pair, `tc` limits the
rate in both directions. A process in one of them sees its own interface, loopback and host name, nothing else.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from moetrain.config import ConfigError

INTERFACE = "moe0"
BURST = "256kb"  # what may leave at once; a segment that the kernel hands down whole has 64 KiB
PORT = 29400  # a namespace has all ports to itself


class Hosts:
    """Two hosts, `names[0]` and `names[1]`, and the link between them. Everything is taken down on the way out."""

    def __init__(self, rate: str | None = None) -> None:
        """Name the hosts; `rate` of the link as `tc` writes it: 1gbit, 200mbit; None: not limited."""
        self.rate = rate
        self.names = [f"moe{os.getpid()}-{n}" for n in range(2)]
        self.addresses = ["10.213.0.1", "10.213.0.2"]
        self._workers: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        """Make them. Raises `ConfigError` where this machine or user cannot."""
        for command in ("ip", "tc", "unshare"):
            if shutil.which(command) is None:
                raise ConfigError(f"several hosts on one machine: needs the command {command} (iproute2, util-linux)")
        try:
            for name in self.names:
                _call("ip", "netns", "add", name)
            first, second = self.names
            _call(*f"ip link add {INTERFACE} netns {first} type veth peer name {INTERFACE} netns {second}".split())
            for name, address in zip(self.names, self.addresses, strict=True):
                _call(*f"ip -n {name} addr add {address}/30 dev {INTERFACE}".split())
                for interface in (INTERFACE, "lo"):
                    _call(*f"ip -n {name} link set {interface} up".split())
            self.limit(self.rate)
        except ConfigError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def limit(self, rate: str | None) -> None:
        """Change the link's rate, in both directions."""
        for name in self.names:
            where = ["tc", "-n", name, "qdisc"]
            subprocess.run([*where, "del", "dev", INTERFACE, "root"], capture_output=True)
            if rate is not None:
                _call(*where, *f"add dev {INTERFACE} root tbf rate {rate} burst {BURST} latency 200ms".split())

    def cut(self, host: int) -> None:
        """Take the link down at one host: the two no longer reach each other."""
        _call(*f"ip -n {self.names[host]} link set {INTERFACE} down".split())

    def start(
        self, host: int, arguments: Sequence[str], env: Mapping[str, str], out: IO[str] | None = None
    ) -> subprocess.Popen:
        """Start a command on a host, with `GLOO_SOCKET_IFNAME` of its interface; it is killed on the way out.

        `out`: the file of its output and errors; None: those of this process.
        """
        name = self.names[host]
        inside = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE, **env}
        worker = subprocess.Popen([*inside, *arguments], env=env, stdout=out, stderr=out)
        self._workers.append(worker)
        return worker

    def start_ranks(
        self, arguments: Sequence[str], per_host: int, out: IO[str] | None = None
    ) -> list[subprocess.Popen]:
        """Run `python -m moetrain ARGUMENTS` as every rank, `per_host` on each host, neighbours on the same one."""
        common = {
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(PORT),
            "WORLD_SIZE": str(2 * per_host),
            "LOCAL_WORLD_SIZE": str(per_host),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # there is no name service to ask
        }
        return [
            self.start(
                rank // per_host,
                [sys.executable, "-m", "moetrain", *arguments],
                {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % per_host)},
                out,
            )
            for rank in range(2 * per_host)
        ]


def count_sent_bytes() -> int:
    """Return the bytes that have left this host through its link since it came up, all headers included."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _call(*command: str) -> None:
    """Run a command. Raises `ConfigError` with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise ConfigError(f"several hosts on one machine: needs root ({' '.join(command)}: {reason})")
