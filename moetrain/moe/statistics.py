"""What each MoE layer of a module has done in an optimizer step: the rows of its experts, the guests, ranks' loads.

E experts, R ranks of the group.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.planning.plan import Ints, Plan, imbalance


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer has done since `begin_step`, or in its last forward where there is no step."""

    name: str  # of the layer in the module
    counts: Ints  # [E] rows of each expert, of all ranks of the group
    guests: tuple[tuple[int, int, int], ...]  # (expert, its home rank, the rank that it was lent to), sorted
    loads_before: Ints  # [R] rows, of slices if experts are cut, that each rank would compute without moved load
    loads_after: Ints  # [R] rows that it did compute
    probs_E: Tensor | None = None  # each expert's probability, summed over the tokens of this rank; None: not known

    @classmethod
    def from_plan(cls, name: str, plan: Plan, probs_E: Tensor | None, slices: int = 1) -> "LayerStatistics":
        """Return the statistics of one forward of the layer `name`, computed by `plan`, which counts slices."""
        num_experts, guests = plan.num_experts // slices, plan.guests()
        counts = plan.counts[:, :num_experts].sum(0)
        if slices > 1:
            guests = sorted({(number % num_experts, home, guest) for number, home, guest in guests})
        return cls(name, counts, tuple(guests), plan.home_loads(), plan.loads(), probs_E)

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        """Return the statistics of both forwards of the layer together."""
        return LayerStatistics(
            self.name,
            self.counts + other.counts,
            tuple(sorted({*self.guests, *other.guests})),
            self.loads_before + other.loads_before,
            self.loads_after + other.loads_after,
            None if self.probs_E is None or other.probs_E is None else self.probs_E + other.probs_E,
        )

    @property
    def imbalance_before(self) -> float:
        """The largest over the mean load of `loads_before`; 1 is perfect balance."""
        return imbalance(self.loads_before)

    @property
    def imbalance_after(self) -> float:
        """The largest over the mean load of `loads_after`."""
        return imbalance(self.loads_after)


class StatisticsOfStep:
    """Adds up what layers do in the forwards of one optimizer step; without a step, keeps their last forward."""

    def __init__(self) -> None:
        self._is_in_step = False
        self._by_layer: dict[str, LayerStatistics] = {}

    def begin_step(self) -> None:
        """Forget what was added; add up from now on."""
        self._is_in_step = True
        self._by_layer.clear()

    def end_step(self) -> None:
        """Keep what was added until a layer's next forward, which takes its place."""
        self._is_in_step = False

    def add_forward(self, name: str, plan: Plan, probs_E: Tensor | None = None, slices: int = 1) -> None:
        """Add a forward of the layer `name`, computed by `plan`.

        `probs_E`: the sums of probabilities, if known; `slices`: of an expert, which the plan counts.
        """
        new, old = LayerStatistics.from_plan(name, plan, probs_E, slices), self._by_layer.get(name)
        self._by_layer[name] = old + new if old is not None and self._is_in_step else new

    def list_layers(self, names: Iterable[str]) -> list[LayerStatistics]:
        """Return the statistics of those layers of `names`, in their order, that have had a forward."""
        return [self._by_layer[name] for name in names if name in self._by_layer]
