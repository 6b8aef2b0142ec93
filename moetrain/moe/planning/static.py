"""static: every rank computes exactly its even share of the rows, whatever the router does (as MoonEP has it).

Shapes are known before the router has run: N / R rows on each rank, and guests on at most ⌈E / R⌉ slots. There is no
loop: sums, sorts and searches alone, so that a device plans by itself (`exchange.static_plan`, the same bit for bit).

The rule is the alias method (Walker 1977), in the order of a sweep, so that prefix sums find all partners at once.
Ranks are taken by falling load. Those above their share give; each of those below it receives from one giver, the one
whose surplus its place on the line of all missing rows falls in. That may take more than the giver's surplus: what it
then lacks it receives from the next giver. So every rank receives from one other at most, hence at most as many guests
as that one has experts. A giver's largest experts go first.

R ranks, E experts.
"""

import numpy as np

from moetrain.moe.planning.cost import Costs, Limits, State, default_costs, layer_time
from moetrain.moe.planning.makespan import makespan
from moetrain.moe.planning.plan import Ints, Plan


def share_rows(counts: Ints, home: Ints) -> Ints:
    """Return [E, R] the rows of each expert that each rank computes. counts [R, E], home [E].

    Ranks differ by one row where the ranks do not divide the rows: the most loaded ones compute it.
    """
    num_ranks = len(counts)
    total_E, rank_R = counts.sum(0), np.arange(num_ranks)
    is_home_ER = home[:, None] == rank_R
    load_R = (is_home_ER * total_E[:, None]).sum(0)
    order_R = np.argsort(-load_R, kind="stable")
    share, odd = divmod(load_R.sum(), num_ranks)
    surplus_R = load_R[order_R] - share - (rank_R < odd)

    # In that order: how much is given and missing up to each rank, who gives to it, from where on its line, how much.
    given_R, missing_R = np.maximum(surplus_R, 0), np.maximum(-surplus_R, 0)
    given_end_R, missing_end_R = given_R.cumsum(), missing_R.cumsum()
    lacking_R = missing_end_R[np.searchsorted(missing_end_R, given_end_R).clip(max=num_ranks - 1)] - given_end_R
    amount_R = np.where(given_R > 0, lacking_R, missing_R)
    begin_R = np.where(given_R > 0, given_end_R, missing_end_R - missing_R)
    giver_R = np.searchsorted(given_end_R, begin_R, side="right").clip(max=num_ranks - 1)

    # Each rank's experts on its line, the largest first; what lies in a receiver's part of the line goes there.
    place_R = np.argsort(order_R, kind="stable")
    by_size_E = np.lexsort((-total_E, home))
    begin_E = np.empty_like(total_E)
    begin_E[by_size_E] = total_E[by_size_E].cumsum() - total_E[by_size_E]
    begin_E += ((given_end_R - given_R)[place_R] - (load_R.cumsum() - load_R))[home]
    first_ER = np.maximum(begin_E[:, None], begin_R[place_R])
    last_ER = np.minimum((begin_E + total_E)[:, None], (begin_R + amount_R)[place_R])
    moved_ER = np.maximum(last_ER - first_ER, 0) * (place_R[home][:, None] == giver_R[place_R])
    rows_ER: Ints = moved_ER + is_home_ER * (total_E - moved_ER.sum(1))[:, None]
    return rows_ER


def static(
    counts: Ints,
    home: Ints,
    costs: Costs | None = None,
    limits: Limits | None = None,
    state: State | None = None,
) -> Plan:
    """Return the plan in which all ranks compute equally many rows, or one more. counts [R, E] rows, home [E].

    Every rank has at most as many guests as a rank has experts: that cannot be limited. Sources are local first.
    """
    rows_ER = share_rows(np.ascontiguousarray(counts, np.int64), home)
    expert, rank = np.nonzero(rows_ER)
    return Plan(counts, home, expert, rank, rows_ER[expert, rank], (np.arange(len(counts)),))


def auto(
    counts: Ints,
    home: Ints,
    costs: Costs | None = None,
    limits: Limits | None = None,
    state: State | None = None,
) -> Plan:
    """Return the plan of `makespan` or `static`, whichever has the smaller predicted time; within `limits` where
    `makespan` is. counts [R, E] rows, home [E]."""
    costs, limits = costs or default_costs(), limits or Limits()
    found, even = makespan(counts, home, costs, limits, state), static(counts, home)
    guests = np.bincount([guest for _, _, guest in even.guests()], minlength=len(counts))
    if limits.guests is not None and guests.max() > limits.guests:
        return found
    if limits.rows is not None and even.loads().max() > max(limits.rows, found.loads().max()):
        return found
    resident = None if state is None else state.resident
    return min(found, even, key=lambda plan: layer_time(plan, counts, home, costs, resident).total)
