"""The two halves of `moetrain verify`: this process alone, then workers that run the step on their ranks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh, start
from moetrain.verify import preset
from moetrain.verify.compare import Case, Difference

if TYPE_CHECKING:  # a model of ours needs no transformers
    from moetrain.verify.huggingface import VerifyStep

ALONE, FOUND = "alone.pt", "found.json"
HF_CASES = ((False, 1), (True, 1), (True, 2))
SEQUENCES_PER_RANK = 2


def hf_step(
    overrides: Sequence[str], layers: int, workers: int, trust: bool, fault: str | None, dtype: str = "fp32"
) -> "VerifyStep":
    """The step that `model=hf model.path=DIR [planner=NAME]` describes. Raises `ConfigError` for other overrides."""
    try:
        from moetrain.verify import huggingface
    except ImportError as error:
        raise ConfigError(f"model=hf: {error}") from error
    values = dict(word.split("=", 1) for word in overrides)
    known = {"model", "model.path", "planner", "parallel.ep", "parallel.nproc"}
    for name in values.keys() - known:
        raise ConfigError(f"{name}: `moetrain verify model=hf` takes {', '.join(sorted(known))}")
    if "model.path" not in values:
        raise ConfigError("model.path: model=hf needs the folder with the model's config.json")
    planner = values.get("planner", huggingface.FORCED)
    return huggingface.VerifyStep(
        folder=values["model.path"],
        layers=layers,
        sequences=SEQUENCES_PER_RANK * workers,
        planner=planner,
        cases=HF_CASES,
        trust_remote_code=trust,
        fault=fault,
        dtype=dtype,
    )


def run_alone(step: "VerifyStep | None", overrides: list[str], layers: int, workers: int, folder: Path) -> None:
    """Run the step in this process and keep the result in `folder`; `step` None: a model of ours."""
    if step is not None:
        from moetrain.verify import huggingface

        alone: Any = huggingface.run_alone(step)
    else:
        config = preset.settle_alone(overrides, layers, SEQUENCES_PER_RANK * workers)
        with start(rank=0, world=1, init_method=f"file://{folder}/rendezvous") as mesh:
            alone, _ = preset.run_step(config, mesh)
    torch.save(alone, folder / ALONE)


def run_rank(step: "VerifyStep | None", overrides: list[str], layers: int, mesh: Mesh, folder: Path) -> None:
    """Run the step on this rank; rank 0 writes what was found into `folder`."""
    alone = torch.load(folder / ALONE, weights_only=False)  # written by the process that started this one
    if step is not None:
        from moetrain.verify import huggingface

        cases: list[Case] = huggingface.run_spread(step, mesh, alone)
    else:
        cases = preset.run_cases(overrides, layers, SEQUENCES_PER_RANK * mesh.world, mesh, alone)
    if mesh.is_main:
        (folder / FOUND).write_text(json.dumps([_to_json(case) for case in cases]))


def _to_json(case: Case) -> dict[str, Any]:
    kept = {"all": [[each.name, each.largest, each.is_good] for each in case.differences]}
    return case.to_json() | kept


def read_cases(folder: Path) -> list[Case]:
    """What rank 0 found."""
    rows = json.loads((folder / FOUND).read_text())
    return [
        Case(row["about"], row["guests"], row["flips"], row["tokens"], [Difference(*each) for each in row["all"]])
        for row in rows
    ]
