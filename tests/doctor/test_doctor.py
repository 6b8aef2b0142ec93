"""The doctor: findings of this host, bad ones with advice; hosts that meet, reach each other, or do not."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from moetrain import cli, config
from moetrain.bench.namespaces import Hosts
from moetrain.doctor.host import BAD, GOOD, NOTE, Check, examine
from moetrain.doctor.hosts import meet
from moetrain.engine import precision
from tests.system.test_hosts import allowed


def test_it_says_what_this_host_has(data: list[str], tmp_path: Path, capsys: Any) -> None:
    arguments = ["doctor", "model=tiny", *data, f"run.dir={tmp_path}"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (
        "python",
        "torch",
        "cpu",
        "gpu",
        "dtype",
        "packages",
        "runs",
        "data",
        "memory",
        "loopback",
        "clock",
        "files",
    ):
        assert any(line.split()[1] == name for line in lines if not line.startswith(" ")), name
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(f.keys() == {"name", "state", "text", "advice"} for f in found)
    assert all(f["advice"] for f in found if f["state"] != GOOD)


def test_a_folder_that_cannot_be_written_is_bad(data: list[str], capsys: Any) -> None:
    assert cli.main(["doctor", "model=tiny", *data, "run.dir=/proc/nothing", "--json"]) == 1
    (bad,) = [f for f in json.loads(capsys.readouterr().out) if f["state"] == BAD]
    assert bad["name"] == "runs"
    assert "set run.dir to a folder" in bad["advice"]


def test_it_says_what_auto_takes_and_that_bf16_is_slow(monkeypatch: pytest.MonkeyPatch, data: list[str]) -> None:
    why = "auto takes fp32: bf16 products take 100 times as long as fp32 ones here"
    slow = "bf16 is slower than fp32 here: train.dtype=auto"
    monkeypatch.setattr(precision, "speed_of_bf16", lambda _: 0.01)
    for asked, state, advice in (("auto", GOOD, ""), ("fp32", GOOD, ""), ("bf16", NOTE, slow)):
        found = {f.name: f for f in examine(config.load(["model=tiny", f"train.dtype={asked}", *data]))}
        assert found["dtype"] == Check("dtype", state, f"train.dtype={asked}; {why}", advice)


def test_a_disk_that_is_too_small_is_bad(data: list[str]) -> None:
    huge = ["model=olmoe_1b7b", "model.num_experts=65536", "parallel.ep=1"]
    found = {f.name: f for f in examine(config.load([*huge, *data]))}
    assert found["runs"].state == BAD
    assert "checkpoint.keep=1" in found["runs"].advice


def met(port: int, nodes: int, patience: float) -> list[list[Check]]:
    """What two hosts find, that are threads here."""
    found: list[list[Check]] = [[], []]
    threads = [
        threading.Thread(target=lambda out=out: out.extend(meet(f"127.0.0.1:{port}", nodes, patience))) for out in found
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_hosts_that_meet_reach_each_other(port: int) -> None:
    for found in met(port, 2, 20):
        assert [f.state for f in found] == [GOOD, GOOD], found
        assert "its clock is +0.00 s" in found[1].text


def test_a_host_that_does_not_come_is_missed(port: int) -> None:
    for found in met(port, 3, 1):
        assert found[0].state == BAD
        assert found[0].text.startswith("2 of 3 hosts arrived within 1 s")


def test_over_a_real_link_and_over_a_cut_one(tmp_path: Path) -> None:
    if not allowed():
        return
    with Hosts() as hosts:
        command = [sys.executable, "-m", "moetrain", "doctor", "model=tiny", "--json", "--nodes", "2"]
        command += ["--meet", f"{hosts.addresses[0]}:29400", f"run.dir={tmp_path}", f"data.dir={tmp_path}"]

        def ask(patience: str) -> list[list[dict[str, str]]]:
            outputs = [tmp_path / f"{host}.json" for host in range(2)]
            asked = []
            for host, path in enumerate(outputs):
                with path.open("w") as out:
                    asked.append(hosts.start(host, [*command, "--patience", patience], dict(os.environ), out))
            codes = [process.wait(60) for process in asked]
            found = [json.loads(path.read_text().splitlines()[-1]) for path in outputs]
            assert codes == [1 if any(f["state"] == BAD for f in one) else 0 for one in found]
            return [[f for f in one if f["name"].startswith(("rendezvous", "host "))] for one in found]

        for one in ask("30"):
            assert [f["state"] for f in one] == [GOOD, GOOD], one
        hosts.cut(1)
        for one in ask("2"):
            assert [f["state"] for f in one] == [BAD], one


def test_a_wrong_address_is_one_line(capsys: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moetrain", "doctor", "--meet", "nowhere", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: --meet=nowhere: must be HOST:PORT\n"
