"""Every family: outputs and all gradients equal one process, wherever rows are computed."""

import pytest

from tests.grid import on_grid
from tests.hf import exact
from tests.hf.families import FAMILIES
from tests.pool import Pool

# Both paths, biases, transposed and interleaved weights, no gate, a norm after the experts, group-limited routers,
# sparse attention, experts looked up by token.
SAMPLE = ("qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v4", "aria", "nemotron_h", "muse_spark", "phimoe")
LAYOUTS = ((2, 2), (4, 2), (4, 4))
NOT_RECOMPUTED = {"diffusion_gemma"}  # transformers refuses gradient checkpointing for it
CASES = [
    (name, *layout) if name in SAMPLE and layout == (4, 2) else on_grid((name, *layout))
    for name in FAMILIES
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("name", "ranks", "ep"), CASES)
def test_outputs_and_gradients_equal_one_process(pool: Pool, name: str, ranks: int, ep: int) -> None:
    """Plain and recomputed, with all ranks at work and with one that has no tokens."""
    cases = [(recompute, idle) for recompute in (False, True) for idle in (False, True)]
    cases = [case for case in cases if not (case[0] and name in NOT_RECOMPUTED)]
    for differences in pool.run(exact.compare, ranks, name, cases, ep=ep):
        assert [each for each in differences if each[0] > 1e-5] == []
