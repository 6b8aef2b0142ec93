"""Tests of `moe/` run with the shapes of arrays checked, in this process and in the pool's ranks."""

from collections.abc import Iterator

import pytest

from tests.shapes import check_shapes


@pytest.fixture(autouse=True)
def _shapes_agree(request: pytest.FixtureRequest) -> Iterator[None]:
    if getattr(request.function, "is_hypothesis_test", False):  # its own calls, by the thousand, would each pay
        yield
        return
    with check_shapes():
        yield
