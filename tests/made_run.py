"""A run's folder in the recorded format (docs/metrics.md), made up: any length and size in a moment."""

import json
from pathlib import Path

import numpy as np

DOMAINS = ["cpp", "prose", "python"]
PHASES = ["route", "plan", "lend", "dispatch", "experts", "combine"]


def write(
    folder: Path, steps: int = 40, layers: int = 2, experts: int = 8, ranks: int = 2, samples: int = 4, seed: int = 0
) -> Path:
    """Expert 0 of the first layer is hot, expert 1 of the last is dead, rank 1 is slow; the plan levels the load."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    model = {"num_layers": layers, "num_experts": experts}
    config = {"run": {"name": folder.name}, "model": model, "router": {"name": "topk", "top_k": 2, "skew": 0.0}}
    config |= {
        "planner": {"name": "makespan"},
        "train": {"steps": steps, "dtype": "bf16"},
        "balance": {"scope": "global"},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    names = [f"layer_{index:02d}" for index in range(layers)]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(_row(rng, step, steps, names, experts, ranks)) + "\n")
            if step in (steps // 2, steps):
                file.write(json.dumps(_evaluation(step, names)) + "\n")
    _trace(rng, folder, np.linspace(1, steps, samples).astype(int), names, experts, ranks)
    _specialisation(rng, folder, steps, names, experts)
    alert = {"step": steps // 2, "kind": "dead_experts", "text": f"{names[-1]}: expert 1 without a token"}
    (folder / "alerts.jsonl").write_text(json.dumps(alert) + "\n")
    expected = {"step_seconds": 0.4, "tokens_per_second": 9000.4, "memory_bytes": 1.3e9, "capacity_bytes": 1e10}
    (folder / "prediction.json").write_text(json.dumps(expected))
    summary = {"parameters": {"total": 8e6, "active": 3e6}, "bigram_bits_per_byte": {"all": 2.3, "cpp": 2.4}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _row(rng: np.random.Generator, step: int, steps: int, names: list[str], experts: int, ranks: int) -> dict:
    fall = 3 + 6 * np.exp(-6 * step / steps)
    row = {"step": step, "train/lm_loss": fall + 0.05 * rng.normal(), "train/loss": fall, "train/tokens": 4096 * step}
    row |= {"train/grad_norm": 1 + rng.uniform(), "train/lr": 1e-3 * min(step / 10, 1 - step / (steps + 1))}
    row |= {"train/balance_loss": 1.1 + 0.01 * rng.normal(), "train/z_loss": 0.5 + 0.01 * rng.normal()}
    row |= {f"train/{name}/loss": fall + 0.3 * i for i, name in enumerate(DOMAINS) if (step + i) % 2}
    row |= {"perf/step_seconds": 0.5, "perf/tokens_per_second": 8192 + 200 * rng.normal(), "perf/mfu": 0.08}
    row |= {"perf/peak_memory_gib": 1.5, "perf/memory_gib": [1.2] * ranks}
    row |= {f"perf/phase/{name}": 0.01 * (1 + i) for i, name in enumerate(PHASES)}
    row |= {f"perf/phase/backward_{name}": 0.01 for name in PHASES[2:]}
    row |= {"perf/time/data": 0.01, "perf/time/forward": 0.25, "perf/time/backward": 0.2, "perf/time/update": 0.03}
    row |= {"balance/imbalance_home": 1.4 + 0.05 * rng.normal(), "balance/imbalance_planned": 1.02}
    row |= {"balance/guests": 3, "balance/rows_moved_fraction": 0.2, "balance/rows_crossing_fraction": 0.4}
    row |= {"balance/lend_bytes": 1e6, "balance/crossing_bytes": 9e6, "balance/saved_seconds": 0.04}
    row |= {"balance/gamma_eff": 9.0 + rng.normal(), "balance/gamma_phase": 2}
    row |= {"balance/device_load_home": [120.0] + [80.0] * (ranks - 1), "balance/device_load_planned": [100.0] * ranks}
    if step % 10 == 1:
        row |= {"perf/waited": [0.02] * ranks, "perf/waited_for": [0.0, 0.04] + [0.0] * (ranks - 2)}
    for index, name in enumerate(names):
        load = rng.uniform(0.5, 1.5, experts)
        load[0] *= 3 if index == 0 else 1
        load[1] *= 0 if index == len(names) - 1 else 1
        load = load / load.sum()
        row |= {f"balance/{name}/load": np.round(load, 6).tolist(), f"balance/{name}/max_vio": load.max() * experts - 1}
        row |= {f"balance/{name}/dead_experts": int((load == 0).sum()), f"balance/{name}/entropy": 0.8}
        row |= {
            f"balance/{name}/max_vio_micro": 1.5,
            f"balance/{name}/logit_norm": 2.0,
            f"balance/{name}/gamma_eff": 9.0,
        }
    return row


def _evaluation(step: int, names: list[str]) -> dict:
    row = {"step": step, "eval/loss": 4.0, "eval/bits_per_byte": 2.2, "specialise/domain_mi": 0.3}
    row |= {f"eval/{name}/bits_per_byte": 2.0 + 0.1 * i for i, name in enumerate(DOMAINS)}
    return row | {f"specialise/{name}/domain_mi": 0.2 + 0.1 * i for i, name in enumerate(names)}


def _trace(
    rng: np.random.Generator, folder: Path, steps: np.ndarray, names: list[str], experts: int, ranks: int
) -> None:
    shape = (len(steps), len(names), ranks, experts)
    counts = rng.integers(20, 60, shape).astype(np.int32)
    counts[..., 0] *= 4
    owner = np.broadcast_to((np.arange(experts) * ranks // experts).astype(np.int16), (*shape[:2], experts))
    own = owner[:, :, None] == np.arange(ranks)[:, None]
    home = np.where(own, counts.sum(2, keepdims=True), 0)
    moved = np.zeros_like(home)
    surplus = (home.sum(-1)[..., 0] - home.sum(-1).mean(-1)).clip(min=0).astype(int) // max(1, ranks - 1)
    moved[..., 1:, 0], moved[..., 0, 0] = surplus[..., None], -surplus * (ranks - 1)
    placed = (home + moved).astype(np.int32)
    traffic = rng.integers(0, 300, (*shape[:2], ranks, ranks)).astype(np.int32)
    waited = rng.uniform(0, 0.01, (len(steps), ranks, ranks)).astype(np.float32)
    waited[:, :, 1] += 0.03
    (folder / "load_trace").mkdir()
    for part, chosen in enumerate(np.array_split(np.arange(len(steps)), 2)):
        np.savez_compressed(
            folder / "load_trace" / f"part_{part:05d}.npz",
            step=steps[chosen], layers=np.array(names), counts=counts[chosen], owner=owner[chosen],
            placed=placed[chosen], traffic=traffic[chosen], home=home.sum(-1)[chosen].astype(np.int32),
            planned=placed.sum(-1)[chosen].astype(np.int32), waited=waited[chosen],
        )  # fmt: skip


def _specialisation(rng: np.random.Generator, folder: Path, step: int, names: list[str], experts: int) -> None:
    layers = []
    for name in names:
        counts = rng.integers(10, 60, (len(DOMAINS), experts))
        counts[0, 2] *= 6
        tokens = [{"text": text, "count": 40, "lift": 7.3} for text in (" const", "->", "\n")]
        best = {"expert": 2, "domain": "cpp", "share": 0.81, "bits": 0.9, "load": 0.11, "tokens": tokens}
        layers.append({"name": name, "counts": counts.tolist(), "domain_mi": 0.3, "experts": [best]})
    (folder / "specialisation").mkdir()
    found = {"step": step, "domains": DOMAINS, "layers": layers}
    (folder / "specialisation" / f"step_{step}.json").write_text(json.dumps(found))
