"""Time the experts of transformers families as we compute them beside transformers' own ways, in one process.

  python scripts/hf_speed.py                          write the table of docs/models.md
  python scripts/hf_speed.py gpt_oss --dtype bf16     print the rows of these families

Forward and backward of one experts module with random routing, one thread, the ways by turns; the ratios are medians
over the turns, of the processor's seconds, so that other work of the machine falls on all ways alike. Above 1: ours is
faster.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # in place of scripts/, whose tabulate.py torch would import
from moetrain.distributed.mesh import ExpertGroup  # noqa: E402
from moetrain.hf.layout import is_experts  # noqa: E402
from moetrain.hf.parallel import expert_parallel  # noqa: E402
from tests.hf.families import build  # noqa: E402

BEGIN, END = "<!-- speed -->\n", "<!-- end of speed -->\n"
TOKENS, DIM, HIDDEN, EXPERTS, TOP_K = 1024, 512, 256, 32, 4
WIDTH = {"hidden_size": DIM, "num_hidden_layers": 1, "head_dim": 64, "vocab_size": 64}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": HIDDEN, "num_experts": EXPERTS},
    "olmoe": {"intermediate_size": HIDDEN, "num_experts": EXPERTS, "num_local_experts": EXPERTS},
    "deepseek_v3": {"moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS},
    "minimax_m2": {"intermediate_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts": EXPERTS},
    "gpt_oss": {"intermediate_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts": EXPERTS},
    "aria": {"intermediate_size": HIDDEN, "moe_num_experts": EXPERTS},
}
OWN = ("eager", "grouped_mm")  # ways of transformers


def make_experts(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model of the family with random weights, and its experts module."""
    values = {key: value for key, value in WIDTH.items() if key != "head_dim" or name != "olmoe"}
    model: Any = build(name, **{**values, **SIZES[name]}).to(dtype)
    return model, next(module for module in model.modules() if is_experts(module))


def make_step(module: Any, dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward on the same tokens, choices and weights."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
    index_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    weight_TK = torch.rand(TOKENS, TOP_K, generator=generator).to(dtype).requires_grad_()
    grad_TD = torch.randn(TOKENS, DIM, generator=generator).to(dtype)

    def step() -> None:
        y_TD: Tensor = module(x_TD, index_TK, weight_TK)
        y_TD.backward(grad_TD)

    return step


def compare(name: str, dtype: torch.dtype, turns: int) -> list[str]:
    """Ours over each way of transformers: the median of the ratios, and their spread."""
    steps = {}
    for way in OWN:
        _, module = make_experts(name, dtype)
        module.config._experts_implementation = way
        steps[way] = make_step(module, dtype)
    model, module = make_experts(name, dtype)
    expert_parallel(model, ExpertGroup.alone(), "home")
    steps["ours"] = make_step(module, dtype)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for turn in range(turns + 2):  # the first two compile and warm up
        for way, step in steps.items():
            began = time.process_time()
            step()
            if turn > 1:
                seconds[way].append(time.process_time() - began)
    shown = []
    for way in OWN:
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds[way], seconds["ours"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        shown.append(f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
    return shown


def main() -> None:
    """Print the rows, and write them into the page where they are all there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: both")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.families or SIZES:
        cells = []
        for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if options.dtype in (None, short):
                cells += compare(name, dtype, options.turns)
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    if options.families or options.dtype:
        return
    page = ROOT / "docs" / "models.md"
    head, _, rest = page.read_text().partition(BEGIN)
    titles = [f"{short}, over {way}" for short in ("fp32", "bf16") for way in OWN]
    about = (
        f"{platform.machine()}, one thread, torch {torch.__version__}; {TOKENS} tokens, width {DIM}, hidden {HIDDEN}, "
    )
    about += f"{EXPERTS} experts, {TOP_K} a token; median of {options.turns} turns and the middle half of them.\n\n"
    table = [f"| family | {' | '.join(titles)} |", f"|{'---|' * (len(titles) + 1)}", *rows]
    page.write_text(head + BEGIN + about + "\n".join(table) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
