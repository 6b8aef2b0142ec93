"""The checker of shapes finds what it is for, in functions of `moetrain/moe` alone, in this process and in ranks."""

from typing import Any

import numpy as np
import pytest
import torch

from moetrain.distributed.mesh import Mesh
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.routing.capacity import room
from tests.shapes import are_checked, find_disagreement, find_named


def disagree(**variables: Any) -> str:
    return find_disagreement(variables, find_named(variables))


def test_names_that_agree() -> None:
    x_TD, counts_E = torch.zeros(4, 8), np.zeros(3)
    assert disagree(x_TD=x_TD, probs_TE=torch.zeros(4, 3), counts_E=counts_E, count=torch.zeros(7)) == ""
    assert disagree(links_C2=torch.zeros(5, 2), inner_MH2=torch.zeros(6, 16), outer_MH=torch.zeros(6, 8)) == ""
    assert disagree(x_TD=x_TD, kept_TD=torch.zeros(0, 8), given_TD=None) == ""


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"probs_TE": torch.zeros(4)}, "probs_TE has the shape (4,)"),
        ({"x_TD": torch.zeros(4, 8), "y_TD": np.zeros((4, 6))}, "D is 8 in x_TD and 6 in y_TD (4, 6)"),
        ({"x_TD": torch.zeros(4, 8), "swapped_DT": torch.zeros(4, 8)}, "D is 8 in x_TD and 4 in swapped_DT (4, 8)"),
        ({"links_C2": torch.zeros(5, 3)}, "links_C2 has the shape (5, 3)"),
        ({"inner_MH2": torch.zeros(6, 7)}, "inner_MH2 has the shape (6, 7)"),
    ],
)
def test_names_that_do_not(variables: dict[str, Any], says: str) -> None:
    assert disagree(**variables) == says


def test_a_function_of_moe_with_a_wrong_shape_fails() -> None:
    assert are_checked()
    with pytest.raises(AssertionError, match=r"capacity.py:room: counts_E has the shape \(2, 3\)"):
        room(torch.ones(2, 3, dtype=torch.int64), 1.0, [1.0, 1.0])


def group_wrongly(mesh: Mesh) -> str:
    try:
        Bags.group(torch.zeros(2, 3, dtype=torch.int64), 1, 3)
    except AssertionError as error:
        return str(error)
    return "nothing was found"


def test_ranks_check_too(pool: Any) -> None:
    assert pool.run(group_wrongly, 1) == ["bags.py:group: bag_M has the shape (2, 3)"]
