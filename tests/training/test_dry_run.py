"""Presets at their full world size, in one process."""

import json
import re

import pytest

from moetrain import config
from moetrain.engine.base import guest_bytes
from moetrain.observe.estimate import estimate
from moetrain.training import dry_run

BATCH = ["train.seq_len=4096", "train.micro_batch=1", "train.recompute=selective"]


@pytest.mark.parametrize(
    ("model", "world", "replicate", "ep", "total", "active"),
    [
        ("olmoe_1b7b", 8, 1, 8, 6_919_161_856, 1.28e9),
        ("qwen3_30b_a3b", 64, 1, 8, 30_532_122_624, 3.35e9),  # as Hugging Face counts it
        ("qwen3_235b_a22b", 64, 1, 16, 235_093_634_560, 2.22e10),
        ("deepseek_v3_like", 2048, 8, 64, 6.71e11, 3.78e10),
    ],
)
def test_presets_build_at_full_size(model, world, replicate, ep, total, active, capsys) -> None:
    overrides = [
        f"model={model}",
        f"parallel.nproc={world}",
        f"parallel.dp_replicate={replicate}",
        f"parallel.ep={ep}",
        f"train.global_batch={world}",
        *BATCH,
    ]
    settings = config.load(overrides)
    assert dry_run.show_dry_run(settings, world, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    size = estimate(config.resolve_early(settings, world))
    assert found["gathered_bytes"] == size.gathered
    assert sum(found["parameters"].values()) == size.total == pytest.approx(total, rel=0.01 if "like" in model else 0)
    assert size.active == pytest.approx(active, rel=0.02)
    assert sum(found["per_rank"].values()) == pytest.approx(size.per_rank, rel=1e-3)
    assert found["per_rank"]["experts"] == found["parameters"]["experts"] // (world // replicate)
    expected = found["predicted"]
    tokens = expected["step_seconds"] * expected["tokens_per_second"]
    assert tokens == pytest.approx(world * settings.train.seq_len)
    assert expected["tokens_per_second"] / world < 989e12 / (6 * active)  # the peak of an H100


def test_under_lora_gradients_and_moments_are_those_of_the_adapters() -> None:
    words = ["model=olmoe_1b7b", "parallel.nproc=8", "train.global_batch=8", *BATCH]
    whole, lora = (estimate(config.resolve_early(config.load([*words, *more]), 8)) for more in ([], ["lora.rank=16"]))
    attention, expert = 4 * (2048 + 2048), (2048 + 2 * 1024) + (1024 + 2048)
    adapters = 16 * 16 * (attention + 64 * expert)  # layers × rank
    assert lora.total - whole.total == adapters
    assert lora.moments == 8 * adapters // 8
    assert lora.masters - whole.masters == 4 * adapters // 8
    assert lora.gradients < whole.gradients / 20
    assert lora.flops_per_token < 0.72 * whole.flops_per_token


def test_a_dry_run_shows_memory_and_where_it_lies(capsys, monkeypatch) -> None:
    monkeypatch.setattr(dry_run.console, "quiet", False)  # other tests ask for JSON
    overrides = ["model=tiny", "parallel.nproc=4", "parallel.ep=4", "model.num_experts=6", "engine.offload=disk"]
    dry_run.show_dry_run(config.load(overrides), 4, as_json=False)
    shown = capsys.readouterr().out
    for word in ("4 ranks", "experts", "AdamW's moments, fp32", "disk", "activations", "tokens/s a device"):
        assert word in shown
    assert re.search(r"guest experts kept for a step, at most, of a GPU's 80 GiB +10\.00 +device", shown)
    dry_run.show_dry_run(config.load([*overrides, "engine.guest_memory_mib=512"]), 4, as_json=False)
    assert re.search(r"guest experts kept for a step, at most +0\.50 +device", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("given", "device_bytes", "found"),
    [("null", 80 << 30, 10 << 30), ("null", 0, 1 << 30), ("64", 80 << 30, 64 << 20), ("0", 80 << 30, 0)],
)
def test_guests_get_a_share_of_the_devices_memory(given: str, device_bytes: int, found: int) -> None:
    for engine in ("native", "deepspeed"):
        settings = config.load([f"engine={engine}", f"engine.guest_memory_mib={given}"])
        assert guest_bytes(settings, device_bytes) == found


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.recompute=selective"], r"fits in 80 GiB: about \d+\.\d GiB on a device"),
        (["train.micro_batch=2", "train.global_batch=128"], r"does not fit in 80 GiB: .*; would with train.recompute="),
        (["train.seq_len=131072"], r"does not fit in 80 GiB: .*; would with all of engine."),
        (["train.seq_len=262144"], r"does not fit in 80 GiB: .*; needs more ranks, a smaller train.micro_batch"),
    ],
)
def test_a_dry_run_says_whether_it_fits(overrides: list[str], said: str) -> None:
    words = ["model=qwen3_30b_a3b", "parallel.nproc=64", "parallel.ep=8", "train.seq_len=4096", "train.micro_batch=1"]
    settings = config.load([*words, "train.global_batch=64", "planner=home", *overrides])
    spec = config.resolve_early(settings, 64)
    assert re.fullmatch(said + ".*", dry_run.describe_fit(spec, 80 << 30))
    needed = dry_run.needed_bytes(spec, 80 << 30)
    assert (needed <= 80 << 30) == said.startswith("fits")
    offloaded = config.vary(spec, {"engine.offload": "cpu"})
    assert needed - dry_run.needed_bytes(offloaded, 80 << 30) == estimate(spec).states
