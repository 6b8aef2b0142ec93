"""Faults, drawn from a seed, against one long run; a table of what they cost.

    python scripts/soak.py --dir FOLDER [--faults 50] [--seed 0] [field=value ...]

A fault strikes a random worker at a random moment of a random step: it is killed, killed during a save, stopped, or
asked to end; or the launcher is killed with all workers, the host's memory is lost and a shard of the newest checkpoint
is damaged. The run is started again where that is a user's part. At the end every loss is compared with that of the
same run without faults. Markdown on standard output.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from moetrain.checkpoint import manifest
from moetrain.launch.exits import REQUEUE
from moetrain.recovery import memory

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.system.faults.faults import Job, last_step, steps, wait

JOB = [
    "model=tiny",
    "train.dtype=fp32",
    "train.seq_len=64",
    "train.global_batch=8",
    "track.wandb=false",
    "planner=llep",
]
JOB += ["planner.min_rows=1", "router.skew=0.5", "train.threads=1", "parallel.nproc=2", "recovery.timeout=5"]
JOB += ["recovery.restarts=9", "recovery.snapshot_every=10", "checkpoint.every=25", "eval.tokens_per_domain=64"]
JOB += ["generate.tokens=2", "track.trace_every=0"]
KINDS = ("kill", "kill while saving", "stop", "ask to end", "kill the launcher, damage a shard")
GAP = 12  # steps of progress between two faults, at most


class Cost(NamedTuple):
    kind: str
    lost: int  # steps done again
    seconds: float  # to the next step that had not been done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="for the runs; an empty folder")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    options = parser.parse_args()
    length = GAP * options.faults + 3 * GAP
    overrides = [*JOB, f"train.steps={length}", f"run.dir={options.dir}", *options.overrides]
    with Job([*overrides, "run.name=sound"]) as sound:
        assert sound.process.wait() == 0, sound.said
    costs = strike_all([*overrides, "run.name=struck"], options.faults, random.Random(options.seed))
    found, wanted = steps(Path(options.dir, "struck")), steps(sound.folder)
    table(costs)
    missing = sorted(wanted.keys() - found.keys())
    apart = [step for step in wanted if step in found and found[step] != wanted[step]]
    print(f"\n{len(found)} of {len(wanted)} losses are there, {len(found) - len(apart)} of them equal bit for bit.")
    if missing or apart:
        gap = max((abs(found[step] / wanted[step] - 1) for step in apart), default=0)
        raise SystemExit(f"missing: {missing}; apart: {apart[:9]}, by {gap:.1e} at most")


def strike_all(overrides: list[str], faults: int, draw: random.Random) -> list[Cost]:
    """The run, struck so many times, to its end."""
    costs: list[Cost] = []
    job = Job(overrides)
    try:
        for number in range(faults):
            kind = KINDS[number] if number < len(KINDS) else draw.choice(KINDS)
            first = last_step(job.folder) if costs else 0
            job.at(first + draw.randrange(1, GAP))
            with (job.folder / "metrics.jsonl").open() as before:
                if kind == KINDS[1]:
                    job.saving()
                time.sleep(draw.random() * 0.05)
                began = time.monotonic()
                job = strike(job, kind, draw, overrides)
                goes_on_from = begun_again(job.folder, before)
                seconds = time.monotonic() - began
                reached = json.loads(before.read().rpartition("\n")[0].splitlines()[-1])["step"]
            costs.append(Cost(kind, max(0, reached - goes_on_from), seconds))
            print(f"{number + 1:3} {kind}: {reached} -> {goes_on_from}, {seconds:.1f} s", file=sys.stderr, flush=True)
        assert job.process.wait() == 0, job.said
    finally:
        job.__exit__(None, None, None)
    return costs


def strike(job: Job, kind: str, draw: random.Random, overrides: list[str]) -> Job:
    """Let it happen. The job that goes on."""
    rank = draw.choice(sorted(job.ranks()))
    if kind in KINDS[:2]:
        job.strike(rank, signal.SIGKILL)
        return job
    if kind == "stop":
        job.strike(rank, signal.SIGSTOP)
        return job
    if kind == "ask to end":
        job.process.terminate()
        assert job.end() == REQUEUE, job.said
        return Job(overrides)
    job.__exit__(None, None, None)
    shutil.rmtree(memory.root() / (job.folder / "recovery" / "run").read_text(), ignore_errors=True)
    paths = [path for path in manifest.folders(job.folder) if manifest.problem(path) is None]
    whole = [path for path in paths if not manifest.damaged(path, manifest.share_of(path, 0, 1))]
    if len(whole) > 1:  # with none left the run would refuse to begin anew, and rightly
        shard = draw.choice(sorted(whole[0].glob("*.safetensors")))
        data = bytearray(shard.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        shard.write_bytes(data)
    return Job(overrides)


def begun_again(folder: Path, before: TextIO) -> int:
    """The step that the run goes on from, once it has written the next one."""
    metrics = folder / "metrics.jsonl"
    old = os.fstat(before.fileno()).st_ino
    wait(lambda: metrics.stat().st_ino != old)
    first = last_step(folder)
    wait(lambda: last_step(folder) > first)
    return first


def table(costs: list[Cost]) -> None:
    print("| fault | injected | survived | steps done again: median, most | seconds to the next step: median, most |")
    print("|---|---|---|---|---|")
    for kind in (*KINDS, "all"):
        those = [cost for cost in costs if kind in (cost.kind, "all")]
        if those:
            lost, seconds = [c.lost for c in those], [c.seconds for c in those]
            again = f"{statistics.median(lost):.0f}, {max(lost)}"
            took = f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"
            print(f"| {kind} | {len(those)} | {len(those)} | {again} | {took} |")


if __name__ == "__main__":
    main()
