"""Budgets over depth: the sum is kept, every layer gets its least, each shape has its shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.schedules import SHAPES, spread


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 30), st.integers(1, 12), st.integers(1, 8))
def test_a_budget_is_spread_whole_and_in_multiples(shape: str, layers: int, mean: int, least: int) -> None:
    found = spread(shape, layers, mean * least, least)
    assert len(found) == layers
    assert sum(found) == layers * mean * least
    assert all(n >= least and n % least == 0 for n in found)
    if shape == "uniform" or layers == 1:
        assert found == [mean * least] * layers
    if shape == "descending":
        assert found == sorted(found, reverse=True)
    if shape == "ascending":
        assert found == sorted(found)
    if shape == "pyramid_up":
        top = found.index(max(found))
        assert found[: top + 1] == sorted(found[: top + 1])
        assert found[top:] == sorted(found[top:], reverse=True)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("uniform", [8, 8, 8, 8, 8]),
        ("descending", [15, 12, 8, 4, 1]),
        ("ascending", [1, 5, 8, 11, 15]),
        ("pyramid_up", [1, 10, 18, 10, 1]),
        ("pyramid_down", [13, 7, 1, 7, 12]),
        ("wave_up", [13, 1, 13, 1, 12]),
        ("wave_down", [1, 19, 1, 18, 1]),
    ],
)
def test_the_shapes(shape: str, expected: list[int]) -> None:
    assert spread(shape, 5, 8, 1) == expected
