"""Clusters as data: `configs/cluster/NAME.yaml`, where every figure has its source beside it.

`load_cluster("h100x64", {"network.bandwidth": "25e9"})` reads one, with any field overridden.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moetrain.common.errors import ConfigError, short
from moetrain.config import config_dir, messages

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Dtype = Literal["fp32", "bf16", "fp8"]
BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp8": 1}


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Gemm(_Figures):
    """Matrix products: rows × K × N run at peak · share / ((1 + half_rows / rows) · (1 + half_width / sqrt(K · N)))."""

    share: Share  # of the peak, for large products
    half_rows: NonNegativeFloat  # rows of a segment that a product spends on reading weights and filling up
    half_width: NonNegativeFloat  # the same for the widths of the weight matrix
    attention: Share  # of the peak, for the products of causal attention, forward and backward together


class DeviceMemory(_Figures):
    capacity: PositiveFloat  # bytes of a device
    bandwidth: PositiveFloat  # bytes a second, nominal
    share: Share  # of it that element-wise kernels reach
    context: NonNegativeFloat  # bytes that driver, libraries and communication buffers take
    fragmentation: Annotated[float, Field(ge=0, lt=1)]  # of the activations, lost between the allocator's blocks


class Links(_Figures):
    """Links of one device. A message of b bytes to each peer moves at bandwidth · share · b / (b + half_message)."""

    bandwidth: PositiveFloat  # bytes a second in each direction, nominal
    share: Share
    latency: NonNegativeFloat  # seconds of a collective
    half_message: NonNegativeFloat  # bytes to one peer at which half of the bandwidth is reached


class Network(Links):
    """Between NVLink domains: `nics` of `bandwidth` a device, leaf switches of `leaf_devices`, spines above them."""

    nics: PositiveFloat  # network interfaces of a device; 0.5: two devices share one
    rails: bool  # whether the i-th device of every node hangs at the i-th leaf
    leaf_devices: Positive  # devices below one leaf switch
    spines: Positive  # above the leaves
    oversubscription: Annotated[float, Field(ge=1)]  # of a leaf: down over up
    multipath: Literal["spray", "chosen", "hashed"]  # how flows get their spine
    flow_splits: Positive = 1  # parts of a flow, each with a path of its own


class Host(_Figures):
    launch: NonNegativeFloat  # seconds that the host takes to launch an operation
    sync: NonNegativeFloat  # seconds that the device idles where the host waits for a result
    runs_ahead: bool = True  # of a device of its own; false where host and device are the same cores
    cores: Positive | None = None  # of the one host that all ranks share; None: every rank has a device of its own
    turn: NonNegativeFloat = 0.0  # seconds that a collective waits for the ranks that have no core just then


class Cluster(_Figures):
    name: str
    device: str
    devices_per_node: Positive
    domain: Positive  # devices that NVLink (or Infinity Fabric) connects
    peak: dict[Dtype, PositiveFloat]  # dense FLOP a second, nominal
    gemm: Gemm
    memory: DeviceMemory
    nvlink: Links
    network: Network
    host: Host

    def on_one_host(self, ranks: int) -> "Cluster":
        """The same with so many ranks on its one host: where they are more than its cores, each is slower by that."""
        crowd = max(1.0, ranks / (self.host.cores or ranks))
        host = {"launch": self.host.launch * crowd, "turn": self.host.turn * (crowd > 1)}
        return self.model_copy(
            update={
                "devices_per_node": ranks,
                "domain": ranks,
                "peak": {dtype: rate / crowd for dtype, rate in self.peak.items()},
                "memory": self.memory.model_copy(update={"bandwidth": self.memory.bandwidth / crowd}),
                "host": self.host.model_copy(update=host),
            }
        )

    def product_seconds(self, flops: float, rows: float, width: float, dtype: str, segments: float = 1) -> float:
        """Seconds of `flops` in products of `rows` rows in `segments` groups, weights of geometric mean `width`."""
        if flops <= 0 or rows <= 0:
            return 0.0
        rate = self.peak_of(dtype) * self.gemm.share
        return flops / rate * (1 + self.gemm.half_rows * segments / rows) * (1 + self.gemm.half_width / width)

    def memory_seconds(self, num_bytes: float) -> float:
        """Seconds of an operation that is bound by memory."""
        return num_bytes / (self.memory.bandwidth * self.memory.share)

    def peak_of(self, dtype: str) -> float:
        if dtype not in self.peak:
            raise ConfigError(f"train.dtype={dtype}: {self.name} has peaks for {', '.join(self.peak)} only")
        return self.peak[dtype]


def known_clusters() -> list[str]:
    return sorted(path.stem for path in (config_dir() / "cluster").glob("*.yaml"))


def split_name(text: str) -> tuple[str, int | None]:
    """`h100x64` -> ("h100", 64); `h100` -> ("h100", None). Raises `ConfigError` for a cluster that there is not."""
    known = known_clusters()
    if text in known or Path(text).suffix == ".yaml":
        return text, None
    found = re.fullmatch(r"(.+)x(\d+)", text)
    if found is None or (found[1] not in known and Path(found[1]).suffix != ".yaml") or int(found[2]) < 1:
        raise ConfigError(
            f"cluster={text}: must be NAMExDEVICES, where NAME is a YAML file or one of {', '.join(known)}"
        )
    return found[1], int(found[2])


def load_cluster(name: str, overrides: Mapping[str, str] | None = None) -> Cluster:
    """The cluster `name`, a shipped one or a YAML file, with `field: value` overrides as the command line has them.

    Raises `ConfigError`.
    """
    path = Path(name) if Path(name).suffix == ".yaml" else config_dir() / "cluster" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"cluster={name}: there is no such file; shipped are {', '.join(known_clusters())}")
    try:
        tree = yaml.safe_load(path.read_text())
        if not isinstance(tree, dict):
            raise ConfigError(f"cluster={name}: must be a mapping of fields")
        tree.setdefault("name", path.stem)
        for field, value in (overrides or {}).items():
            _put(tree, field, yaml.safe_load(value))
        return Cluster.model_validate(tree)
    except yaml.YAMLError as error:
        raise ConfigError(f"cluster={name}: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"cluster.{field}: no such field") from None
        raise ConfigError(f"cluster.{field}={short(first['input'])}: {messages.plain(first['msg'])}") from None


def _put(tree: dict[str, Any], field: str, value: Any) -> None:
    *sections, last = field.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            raise ConfigError(f"cluster.{field}: no such field")
        tree = tree[section]
    tree[last] = value
