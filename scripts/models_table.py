"""Compare every family of experts with one process on three layouts, and write the table of docs/models.md.

  python scripts/models_table.py                            the whole table, ten minutes on two cores
  python scripts/models_table.py qwen3_moe gpt_oss          print the rows of these alone

The comparison is that of tests/hf/test_families.py.
"""

import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from moetrain.hf.layout import ExpertsLayout, has_default_gate, is_experts  # noqa: E402
from tests.hf import exact  # noqa: E402
from tests.hf.families import FAMILIES, build  # noqa: E402
from tests.hf.test_families import LAYOUTS, NOT_RECOMPUTED  # noqa: E402
from tests.hf.test_pinning import LOOKED_UP, ONE_BY_ONE  # noqa: E402
from tests.pool import Pool  # noqa: E402

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def describe(name: str) -> list[str]:
    """The class, the layout of its experts and the path that computes them."""
    model = build(name)
    key, module = next((key, module) for key, module in model.named_modules() if is_experts(module))
    layout = ExpertsLayout.read(key, module)
    words = {
        "[in, out]": layout.transposed,
        "biases": layout.has_bias,
        "no gate": not module.has_gate,
        "interleaved": not module.is_concatenated,
        "own gate": module.has_gate and not has_default_gate(module),
        "norm after": layout.norm is not None,
    }
    form = [word for word, holds in words.items() if holds] or ["SwiGLU" if layout.is_swiglu else "other activation"]
    return [FAMILIES[name].model, ", ".join(form), "fused" if layout.is_swiglu else "grouped"]


def note(name: str) -> str:
    """What differs for the family."""
    notes = {
        "transformers has no gradient checkpointing for it": name in NOT_RECOMPUTED,
        "first layers look experts up by token": name in LOOKED_UP,
        "experts are chosen one by one; its noise in training is off in the comparison": name in ONE_BY_ONE,
        "compared in fp64": name in exact.IN_FP64,
        "text experts; those for images stay whole": name == "ernie4_5_vl_moe",
    }
    return "; ".join(text for text, holds in notes.items() if holds)


def row(pool: Pool, name: str) -> str:
    cases = [(recompute, idle) for recompute in (False, True) for idle in (False, True)]
    cases = [case for case in cases if not (case[0] and name in NOT_RECOMPUTED)]
    worst = []
    for ranks, ep in LAYOUTS:
        found = pool.run(exact.compare, ranks, name, cases, ep=ep)
        worst.append(max(difference for rank in found for difference, _ in rank))
    shown = [f"{each:.0e}" if each <= 1e-5 else f"**{each:.0e}**" for each in worst]
    return f"| {' | '.join([f'`{name}`', *describe(name), *shown, note(name)])} |"


def main(names: list[str]) -> None:
    """Print the rows, and write them into the page where they are all there are."""
    torch.set_num_threads(1)
    pool, rows = Pool(), []
    for name in names or FAMILIES:
        rows.append(row(pool, name))
        print(rows[-1], flush=True)
    pool.stop()
    if names:
        return
    page = ROOT / "docs" / "models.md"
    head, _, rest = page.read_text().partition(BEGIN)
    titles = ["family", "class", "experts", "path", *(f"({ranks}, {ep})" for ranks, ep in LAYOUTS), "notes"]
    table = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *rows]
    about = f"{len(rows)} families, transformers {transformers.__version__}, torch {torch.__version__}.\n\n"
    page.write_text(head + BEGIN + about + "\n".join(table) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(sys.argv[1:])
