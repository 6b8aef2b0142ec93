"""The planner `static` on the device: the numbers of `planning.static` bit for bit; the host waits for none of them.

What a rank needs to know of the plan is a tensor of a size that is known before: the rows of each expert on each rank,
and how many of them every source sends there.

R ranks, E experts; counts and rows are int64.
"""

import torch
from torch import Tensor


def share_rows(counts_RE: Tensor, home_E: Tensor) -> Tensor:
    """Return [E, R] the rows of each expert that each rank computes, as `planning.static.share_rows` does."""
    num_ranks = len(counts_RE)
    total_E, rank_R = counts_RE.sum(0), torch.arange(num_ranks, device=counts_RE.device)
    is_home_ER = home_E[:, None] == rank_R
    load_R = (is_home_ER * total_E[:, None]).sum(0)
    order_R = torch.argsort(load_R, descending=True, stable=True)
    rows = load_R.sum()
    surplus_R = load_R[order_R] - rows // num_ranks - (rank_R < rows % num_ranks).long()

    given_R, missing_R = surplus_R.clamp(min=0), (-surplus_R).clamp(min=0)
    given_end_R, missing_end_R = given_R.cumsum(0), missing_R.cumsum(0)
    first_R = torch.searchsorted(missing_end_R, given_end_R).clamp(max=num_ranks - 1)
    amount_R = torch.where(given_R > 0, missing_end_R[first_R] - given_end_R, missing_R)
    begin_R = torch.where(given_R > 0, given_end_R, missing_end_R - missing_R)
    giver_R = torch.searchsorted(given_end_R, begin_R, right=True).clamp(max=num_ranks - 1)

    place_R = torch.argsort(order_R, stable=True)
    by_size_E = torch.argsort(total_E, descending=True, stable=True)
    by_size_E = by_size_E[torch.argsort(home_E[by_size_E], stable=True)]
    sorted_E = total_E[by_size_E]
    begin_E = torch.empty_like(total_E).scatter_(0, by_size_E, sorted_E.cumsum(0) - sorted_E)
    begin_E = begin_E + ((given_end_R - given_R)[place_R] - (load_R.cumsum(0) - load_R))[home_E]
    first_ER = torch.maximum(begin_E[:, None], begin_R[place_R])
    last_ER = torch.minimum((begin_E + total_E)[:, None], (begin_R + amount_R)[place_R])
    moved_ER = (last_ER - first_ER).clamp(min=0) * (place_R[home_E][:, None] == giver_R[place_R])
    return moved_ER + is_home_ER * (total_E - moved_ER.sum(1))[:, None]


def split_sources(counts_RE: Tensor, rows_ER: Tensor) -> Tensor:
    """Return [R, E, R] how many of its rows of each expert a source sends to each rank: `Plan.rows` of all sources.

    A rank takes its own rows first; the others' in the order of sources and ranks.
    """
    own_RE = torch.minimum(counts_RE, rows_ER.T)
    left_RE, wanted_ER = counts_RE - own_RE, rows_ER - own_RE.T
    left_end_RE, wanted_end_ER = left_RE.cumsum(0), wanted_ER.cumsum(1)
    last = torch.minimum(left_end_RE[:, :, None], wanted_end_ER)
    first = torch.maximum((left_end_RE - left_RE)[:, :, None], wanted_end_ER - wanted_ER)
    is_own = torch.eye(len(counts_RE), dtype=torch.bool, device=counts_RE.device)[:, None]
    return (last - first).clamp(min=0) + is_own * own_RE[:, :, None]
