"""Train, stop, go on at other layouts, and compare every loss with those of a run that was never stopped.

    python scripts/resume_table.py --dir FOLDER [field=value ...]

Each run starts from a checkpoint of the one before it, and trains to the end. Prints a table for `docs/results`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

JOB = [
    "model=tiny",
    "train.dtype=fp32",
    "train.seq_len=64",
    "train.global_batch=8",
    "planner=llep",
    "track.wandb=false",
]
JOB += ["planner.min_rows=1", "router.skew=0.5", "checkpoint.keep=99", "eval.tokens_per_domain=64", "generate.tokens=2"]
ZERO1, ZERO2 = ["engine=deepspeed"], ["engine=deepspeed", "engine.zero_stage=2", "engine.offload=cpu"]
LEGS = (  # first step, ranks, ep, replicas, engine
    (0, 2, 2, 1, []),
    (4, 1, 1, 1, []),
    (8, 4, 4, 1, []),
    (12, 2, 2, 1, ZERO1),
    (16, 4, 2, 2, []),
    (20, 4, 2, 1, ZERO2),
    (24, 2, 2, 1, []),
)
STEPS, EVERY = 56, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="for the runs; an empty folder")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    options = parser.parse_args()
    print("| steps done before | trained on at | loaded from | first 5 losses differ by | first 40 by | the rest by |")
    print("|---|---|---|---|---|---|")
    whole: dict[int, float] = {}
    before = ("", "nothing")
    for number, (first, ranks, ep, replicas, engine) in enumerate(LEGS):
        layout = f"{ranks} ranks, ep {ep}" + (f", {replicas} replicas" if replicas > 1 else "")
        overrides = [f"parallel.nproc={ranks}", f"parallel.ep={ep}", f"parallel.dp_replicate={replicas}"]
        layout += "".join(f", {option}" for option in engine)
        overrides += [*engine, f"run.dir={options.dir}", f"run.name=leg-{number}"]
        overrides += [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.threads=1"]
        overrides += [f"checkpoint.resume={before[0]}/checkpoints/step_{first}"] if first else []
        subprocess.run(
            [sys.executable, "-m", "moetrain", "train", *JOB, *overrides, *options.overrides],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = losses(Path(options.dir, f"leg-{number}"))
        whole = whole or found
        gaps = [abs(loss / whole[step] - 1) for step, loss in sorted(found.items())]
        parts = [f"{max(part):.1e}" if part else "" for part in (gaps[:5], gaps[:40], gaps[40:])]
        print(f"| {first} | {layout} | {before[1]} | {' | '.join(parts)} |", flush=True)
        before = (f"{options.dir}/leg-{number}", layout)


def losses(run: Path) -> dict[int, float]:
    """Step -> cross entropy."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}


if __name__ == "__main__":
    main()
