"""Which way the rows of a run travel between nodes: `parallel.exchange=auto`, decided by the measured links.

In one exchange the fullest direction of a rank carries b bytes to other nodes. A link takes latency + b / bandwidth,
where the latency is that of all its messages: flat, one to every rank of every other node, L (N - 1); in two steps one
to every other node, N - 1, after two exchanges inside the node, in which the bytes travel once more. Both links are
measured as they are used, so that the decision holds whatever dominates: messages, copies or the wire.

N nodes of L ranks each.
"""

from moetrain.config import RunSpec
from moetrain.distributed.exchange import ExchangeWay
from moetrain.distributed.mesh import Mesh
from moetrain.moe.planning.cost import Costs, Link


def choose_exchange(costs: Costs, num_bytes: float) -> ExchangeWay:
    """Return the way that is predicted to be faster for exchanges of so many bytes; flat where they are equal, or where
    the other one was not measured.

    `num_bytes`: what a rank sends to other nodes.
    """
    if costs.two_level is None:
        return "flat"
    return (
        "two_level"
        if predict_seconds(costs.two_level, num_bytes) < predict_seconds(costs.between, num_bytes)
        else "flat"
    )


def predict_seconds(link: Link, num_bytes: float) -> float:
    """Return the seconds of an exchange over this link."""
    return link.latency + num_bytes / link.bandwidth


def expect_bytes(costs: Costs, num_selections: int) -> float:
    """Return the bytes that a rank with so many selections sends to other nodes when experts are chosen evenly."""
    num_nodes = len(set(costs.nodes)) or 1
    return num_selections * costs.row_bytes * (1 - 1 / num_nodes)


def settle_exchange(mesh: Mesh, config: RunSpec, costs: Costs) -> list[str]:
    """Have rows travel the faster way from now on where the run leaves it open; return lines that say why.

    All ranks call it with the same costs, so that all come to the same way.
    """
    if mesh.exchange.asked != "auto" or costs.two_level is None or not mesh.exchange.is_two_level_possible:
        return []
    tokens = config.micro_batch * config.train.seq_len
    num_bytes = expect_bytes(costs, tokens * config.router.top_k)
    mesh.exchange.use(choose_exchange(costs, num_bytes))
    flat, steps = (1e3 * predict_seconds(link, num_bytes) for link in (costs.between, costs.two_level))
    amount = f"{num_bytes / 1e6:.2f} MB of a rank to other nodes"
    return [f"exchange: {mesh.exchange.way}; {amount} take {flat:.2f} ms flat, {steps:.2f} ms in two steps"]
