"""One layer with experts whole and in slices (`parallel.r`), on two ranks: milliseconds forward and backward, in turns.

  torchrun --nproc-per-node 2 scripts/slices_speed.py

Two huge experts, most tokens to the first: whole at home, whole with guests (what Tutel calls r = 0 where it pays),
and in two slices. One expert on two ranks: in two slices, and whole on each with its gradient summed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist  # noqa: TID251  # a loop of one's own makes its groups itself

import moetrain

Run = Callable[[], None]


def make_run(shape: argparse.Namespace, experts: int, planner: str, r: int, skew: float) -> Run:
    """Return forward and backward of a layer whose experts are spread; r = 0: whole on every rank."""
    torch.manual_seed(0)
    layer = moetrain.MoE(shape.dim, shape.hidden, experts, 1, router_options={"skew": skew}, init_std=0.02)
    x = torch.randn(shape.tokens, shape.dim, generator=torch.Generator().manual_seed(dist.get_rank()))
    if r:
        handle = moetrain.expert_parallel(layer, dist.group.WORLD, planner, r=r)
    else:
        handle = moetrain.expert_parallel(layer, None, replicas=dist.group.WORLD)

    def run() -> None:
        layer.zero_grad()
        with handle.step():
            layer(x).sum().backward()

    return run


def time_in_turns(runs: list[Run], repeats: int) -> list[list[float]]:
    """Return the seconds of the slowest rank for every run, by repeat."""
    for run in runs * 2:
        run()
    found = []
    for _ in range(repeats):
        seconds = torch.zeros(len(runs))
        for number, run in enumerate(runs):
            dist.barrier()
            began = time.perf_counter()
            run()
            seconds[number] = time.perf_counter() - began
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found.append(seconds.tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("dim", 256), ("hidden", 2048), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for experts, cases in (
        (2, (("whole, home", "home", 1), ("whole, makespan", "makespan", 1), ("r = 2, home", "home", 2))),
        (1, (("whole on each rank", "home", 0), ("r = 2", "home", 2))),
    ):
        runs = [make_run(options, experts, planner, r, skew=1.5) for _, planner, r in cases]
        times = time_in_turns(runs, options.repeats)
        for number, (name, _, _) in enumerate(cases):
            ms = 1e3 * statistics.median(row[number] for row in times)
            ratios = sorted(row[0] / row[number] for row in times)
            quartiles = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            if dist.get_rank() == 0:
                speed = f"{statistics.median(ratios):.2f} ({quartiles[0]:.2f} to {quartiles[1]:.2f})"
                print(f"{experts} expert(s), {name}: {ms:.0f} ms, {speed} × as fast as the first")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
