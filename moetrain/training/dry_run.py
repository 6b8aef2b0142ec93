"""`moetrain train --dry-run`: what a run would be on its ranks, found out in one process and in seconds.

The engine's own code spreads the model, on the meta device, over a world of ranks that are not there: parameters are
those that rank 0 would hold, which has the most of all. Nothing is allocated, no data is read. Where this host has no
GPU, ranks are taken to have GPUs of ASSUMED_BYTES.
"""

import dataclasses
import json
from collections.abc import Iterator

from rich.table import Table

from moetrain.common.console import console
from moetrain.config import Config, ConfigError, Native, RunSpec, resolve_early, vary
from moetrain.distributed import mesh
from moetrain.engine import native
from moetrain.engine.base import guest_bytes
from moetrain.engine.optim import local
from moetrain.models.base import LanguageModel
from moetrain.observe.estimate import GIB, Estimate, estimate, short
from moetrain.training.prediction import predict_on_gpus
from moetrain.training.step import build

ASSUMED_BYTES = 80 << 30
LIBRARY_BYTES = 2 << 30  # that the driver, communication and the allocator take of a device
REMEDIES: dict[str, dict[str, str | bool]] = {  # what may make a run fit, the cheapest first
    "engine.reshard_after_forward=true": {"engine.reshard_after_forward": True},
    "train.recompute=selective": {"train.recompute": "selective"},
    "train.recompute=full": {"train.recompute": "full"},
    "optim.state_dtype=bf16": {"optim.state_dtype": "bf16"},
    "engine.offload=cpu": {"engine.offload": "cpu"},
}


def show_dry_run(config: Config, world: int, as_json: bool) -> int:
    """Print parameters and memory per rank of `config` on `world` ranks. Raises `ConfigError`."""
    if not isinstance(config.engine, Native):
        raise ConfigError(f"engine={config.engine.name}: --dry-run lays out the native engine only")
    spec = resolve_early(config, world)
    whole = build(spec)
    total = dict(_count(whole))
    with mesh.pretend(rank=0, world=world, ep=spec.ep, dp_replicate=spec.parallel.dp_replicate) as pretended:
        native.shard(whole, pretended, spec)
        own = dict(_count(whole))
    size = estimate(spec)
    device_name, expected = predict_on_gpus(spec)
    if as_json:
        device = _device_bytes()
        needed = needed_bytes(spec, device)
        layout = {**spec.parallel.model_dump(), "dp_shard": spec.dp_shard, "ep": spec.ep, "r": spec.r}
        found = {"world": world, **layout, "parameters": total, "per_rank": own, **_bytes(size)}
        found |= {"device_bytes": device, "needed_bytes": needed, "fits": needed <= device}
        print(
            json.dumps({**found, "predicted_on": device_name, "predicted": expected and dataclasses.asdict(expected)})
        )
        return 0
    cut = f" with every expert in r = {spec.r} slices" if spec.r > 1 else ""
    console.print(
        f"{world} ranks = dp_replicate {spec.parallel.dp_replicate} × dp_shard {spec.dp_shard}; ep {spec.ep}{cut}. "
        f"{short(sum(total.values()))} parameters, {short(size.active)} active per token"
    )
    console.print(_parameters(total, own))
    console.print(_memory(size, spec))
    console.print(describe_fit(spec, _device_bytes()))
    if expected is not None:
        each = f"{expected.tokens_per_second / world:,.0f} tokens/s a device"
        console.print(f"predicted on {world} × {device_name}: {1e3 * expected.step_seconds:,.0f} ms a step, {each}")
    return 0


def _device_bytes() -> int:
    """Memory of a device: this host's, or the assumed one where it has no GPU."""
    return mesh.memory_of(mesh.device_of(0)) or ASSUMED_BYTES


def needed_bytes(config: RunSpec, device_bytes: int) -> int:
    """Returns what lies on a device of a rank, guests and libraries included; activations are good to ±30 %."""
    size = estimate(config)
    guests = guest_bytes(config, device_bytes) if config.planner.name != "home" else 0
    states = size.states if config.engine.offload == "none" else 0
    return states + size.gathered + size.activations + guests + LIBRARY_BYTES


def describe_fit(config: RunSpec, device_bytes: int) -> str:
    """Says whether the run fits into a device's memory; where it does not, which changes would make it fit."""
    needed = needed_bytes(config, device_bytes)
    about = f"in {device_bytes / GIB:.0f} GiB: about {needed / GIB:.1f} GiB on a device"
    if needed <= device_bytes:
        return f"fits {about}"
    is_hf = config.model.source == "hf"  # which recomputes all or nothing
    remedies = {name: change for name, change in REMEDIES.items() if not (is_hf and name.endswith("=selective"))}
    enough = [name for name, change in remedies.items() if _would_fit(config, device_bytes, [change])]
    if enough:
        return f"does not fit {about}; would with {', or with '.join(enough)}"
    steps = [name for name in REMEDIES if name != "train.recompute=selective"]
    for number in range(2, len(steps) + 1):
        if _would_fit(config, device_bytes, [REMEDIES[name] for name in steps[:number]]):
            return f"does not fit {about}; would with all of {', '.join(steps[:number])}"
    return f"does not fit {about}; needs more ranks, a smaller train.micro_batch or a shorter train.seq_len"


def _would_fit(config: RunSpec, device_bytes: int, changes: list[dict[str, str | bool]]) -> bool:
    for change in changes:
        config = vary(config, change)
    return needed_bytes(config, device_bytes) <= device_bytes


def _count(model: LanguageModel) -> Iterator[tuple[str, int]]:
    """Parameters of each kind, as far as this rank holds them."""
    experts, routers = model.expert_parameters(), set(model.replicated())
    numbers = {"dense": 0, "experts": 0, "routers": 0}
    for parameter in model.parameters():
        kind = "experts" if parameter in experts else "routers" if parameter in routers else "dense"
        numbers[kind] += local(parameter).numel()
    yield from numbers.items()


def _bytes(size: Estimate) -> dict[str, int]:
    names = ("masters", "gradients", "moments", "gathered", "activations")
    return {f"{name}_bytes": dataclasses.asdict(size)[name] for name in names}


def _parameters(total: dict[str, int], own: dict[str, int]) -> Table:
    table = Table("parameters", "model", "rank 0", box=None, padding=(0, 2, 0, 0))
    for kind in total:
        table.add_row(kind, short(total[kind]), short(own[kind]))
    table.add_row("all", short(sum(total.values())), short(sum(own.values())))
    return table


def _memory(size: Estimate, config: RunSpec) -> Table:
    """GiB, and where they lie on a GPU machine."""
    offload = config.engine.offload
    host = "device" if offload == "none" else "host"
    device_bytes = _device_bytes()
    guests = guest_bytes(config, device_bytes) if config.planner.name != "home" else 0
    of = f", of a GPU's {device_bytes / GIB:.0f} GiB" if config.engine.guest_memory_mib is None and guests else ""
    table = Table("memory of a rank", "GiB", "on", box=None, padding=(0, 2, 0, 0))
    for name, amount, place in (
        ("masters, fp32", size.masters, host),
        ("gradients, fp32", size.gradients, host),
        (f"AdamW's moments, {config.optim.state_dtype}", size.moments, "disk" if offload == "disk" else host),
        (f"gathered parameters, {config.train.dtype}", size.gathered, "device"),
        (f"activations, recompute {config.train.recompute}, ±30 %", size.activations, "device"),
        (f"guest experts kept for a step, at most{of}", guests, "device"),
    ):
        table.add_row(name, f"{amount / GIB:.2f}", place)
    table.add_row("all", f"{(size.bytes + guests) / GIB:.2f}", "")
    return table
