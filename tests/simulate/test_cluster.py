"""Clusters as data: what is shipped loads, any field can be overridden, mistakes are named in one line."""

from pathlib import Path

import pytest
import yaml

from moetrain.common.errors import ConfigError
from moetrain.simulate.cluster import known_clusters, load_cluster, split_name

FOLDER = Path(__file__).parents[2] / "configs" / "cluster"


@pytest.mark.parametrize("name", known_clusters())
def test_every_shipped_figure_has_its_source_beside_it(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.peak["bf16"] > cluster.peak["fp32"]
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        value = line.partition("#")[0].partition(":")[2].strip()
        if value and not line.startswith(("device:", "#")):
            assert len(line.partition("#")[2]) > 5, line


def test_the_published_systems_are_there() -> None:
    assert {"a100", "h100", "h200", "b200", "gb200_nvl72", "mi300x", "here"} <= set(known_clusters())


def test_a_name_carries_the_number_of_devices() -> None:
    assert split_name("h100x64") == ("h100", 64)
    assert split_name("gb200_nvl72x16384") == ("gb200_nvl72", 16384)
    assert split_name("mi300xx8") == ("mi300x", 8)
    assert split_name("mi300x") == ("mi300x", None)
    with pytest.raises(ConfigError, match="cluster=h100x0: must be NAMExDEVICES"):
        split_name("h100x0")
    with pytest.raises(ConfigError, match="or one of a100, b200"):
        split_name("h1000")


def test_any_field_can_be_overridden() -> None:
    cluster = load_cluster("h100", {"network.bandwidth": "25e9", "network.multipath": "hashed", "domain": "4"})
    assert (cluster.network.bandwidth, cluster.network.multipath, cluster.domain) == (25e9, "hashed", 4)
    for field, value, message in (
        ("network.bandwith", "1", "cluster.network.bandwith: no such field"),
        ("net.bandwidth", "1", "cluster.net.bandwidth: no such field"),
        ("network.bandwidth", "-1", "cluster.network.bandwidth=-1: must be greater than 0"),
        ("network.multipath", "ecmp", "cluster.network.multipath=ecmp: must be 'spray', 'chosen' or 'hashed'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_cluster("h100", {field: value})


def test_a_cluster_of_ones_own_is_a_file(tmp_path: Path) -> None:
    tree = yaml.safe_load((FOLDER / "h200.yaml").read_text())
    own = tmp_path / "ours.yaml"
    own.write_text(yaml.safe_dump({**tree, "domain": 16}))
    assert load_cluster(str(own)).domain == 16
    with pytest.raises(ConfigError, match="there is no such file"):
        load_cluster(str(tmp_path / "none.yaml"))


def test_products_slow_down_where_segments_are_short() -> None:
    cluster = load_cluster("h100")
    flops = 2.0 * 65536 * 2048 * 768
    whole = cluster.product_seconds(flops, 65536, (2048 * 768) ** 0.5, "bf16")
    many = cluster.product_seconds(flops, 65536, (2048 * 768) ** 0.5, "bf16", segments=512)
    assert whole < many < 4 * whole
    with pytest.raises(ConfigError, match=r"train\.dtype=fp8: a100 has peaks for fp32, bf16 only"):
        load_cluster("a100").peak_of("fp8")


def test_more_ranks_than_cores_take_turns() -> None:
    alone, crowded = (load_cluster("here").on_one_host(ranks) for ranks in (2, 4))
    assert crowded.peak_of("fp32") == alone.peak_of("fp32") / 2
    assert crowded.memory.bandwidth == alone.memory.bandwidth / 2
    assert crowded.host.turn > alone.host.turn == 0
    assert crowded.domain == 4
