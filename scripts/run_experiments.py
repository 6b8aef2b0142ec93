"""Runs experiments of configs/experiment one after another, every seed of each: what is finished is not run again.

  python scripts/run_experiments.py scope_micro scope_data scope_global --seeds 0,1
  python scripts/run_experiments.py router_topk router_top_p --seeds 0 train.steps=20

Words with = are overrides of the configuration. A run is DIR/EXPERIMENT-sSEED. Seeds go outermost, so that a whole
comparison is there early. A run that was stopped begins anew, or at its last checkpoint where it made some; one that
fails is reported and the others go on. `scripts/tabulate_runs.py DIR/*` makes tables of them.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="EXPERIMENT | field=value")
    parser.add_argument("--seeds", default="0,1", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--dir", default=Path("runs/experiments"), type=Path)
    given = parser.parse_intermixed_args()
    overrides = [word for word in given.words if "=" in word]
    runs = [(name, seed) for seed in given.seeds for name in given.words if name not in overrides]
    waiting = [run for run in runs if not (folder_of(given.dir, *run) / "summary.json").is_file()]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before, in {given.dir}", flush=True)
    began, failed = time.monotonic(), 0
    for number, (name, seed) in enumerate(waiting, 1):
        start = time.monotonic()
        well = train(given.dir, name, seed, overrides)
        failed += not well
        now = time.monotonic()
        left = (now - began) / number * (len(waiting) - number)
        how = "done" if well else f"FAILED, see {folder_of(given.dir, name, seed)}.log,"
        print(f"[{number}/{len(waiting)}] {name}, seed {seed}: {how} in {now - start:.0f} s;", end=" ")
        print(f"about {left / 60:.0f} min left", flush=True)
    return 1 if failed else 0


def folder_of(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}-s{seed}"


def train(runs: Path, name: str, seed: int, overrides: list[str]) -> bool:
    """Whether the run went through. What it prints goes into DIR/NAME.log."""
    folder = folder_of(runs, name, seed)
    runs.mkdir(parents=True, exist_ok=True)
    settings = [f"experiment={name}", f"train.seed={seed}", f"run.dir={runs}", f"run.name={folder.name}"]
    with (runs / f"{folder.name}.log").open("w") as log:
        command = [sys.executable, "-m", "moetrain", "train", *settings, *overrides]
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
