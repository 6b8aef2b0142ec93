"""Two results of the same optimizer step, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

LIMIT = 1e-5  # of the largest element
ROUNDING = 2.0**-8  # of bf16, likewise
ROUNDED = 3.0  # times: ranks and micro-steps round their parts of a sum, and the sum once more
KINDS = ("loss", "norm", "counts", "gradient", "next")  # what a name in a result begins with

Result = dict[str, Tensor]  # "loss", "norm", "counts of LAYER", "gradient of NAME", "next NAME"


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from that of one process."""

    name: str
    largest: float  # difference, as a share of the largest element of that of one process
    is_good: bool


@dataclass(frozen=True)
class Case:
    """One way to run the step, and what was found."""

    about: dict[str, Any]  # recompute, micro_steps, planner
    guests: int  # copies of experts on other ranks
    flips: int | None  # tokens that would choose other experts, were the choices not pinned; None: not counted
    tokens: int  # over all layers
    differences: list[Difference] = field(default_factory=list)

    @property
    def bad(self) -> list[Difference]:
        """The differences above the limit, the largest first."""
        return sorted((each for each in self.differences if not each.is_good), key=lambda each: -each.largest)

    def worst(self, kind: str) -> float | None:
        """The largest difference of one of KINDS; None: there is none of them."""
        return max((each.largest for each in self.differences if each.name.split()[0] == kind), default=None)

    def to_json(self) -> dict[str, Any]:
        """All of it, with the worst of each kind."""
        found = asdict(self) | {"worst": {kind: self.worst(kind) for kind in KINDS}, "good": not self.bad}
        return found | {"num_compared": len(self.differences), "differences": [asdict(each) for each in self.bad]}


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float = LIMIT) -> list[Difference]:
    """Compare every tensor of `expected`; one that is missing, or has another shape, is infinitely far."""
    return [_compare(name, found.get(name), value, limit) for name, value in expected.items()]


def compare_rounded(
    found: Mapping[str, Tensor], rounded: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> list[Difference]:
    """Compare a result in bf16 with that in fp32, tensor by tensor: it may be `ROUNDED` times as far from it as
    `rounded`, the result in bf16 in one process, and one rounding of the largest element farther."""
    alone = {each.name: each for each in compare(rounded, exact)}
    differences = []
    for each in compare(found, exact):
        limit = ROUNDED * alone[each.name].largest + ROUNDING
        is_good = each.is_good if each.name.startswith("counts") else each.largest <= limit
        differences.append(replace(each, is_good=is_good))
    return differences


def _compare(name: str, found: Tensor | None, expected: Tensor, limit: float) -> Difference:
    if found is None or found.shape != expected.shape:
        return Difference(name, float("inf"), False)
    if not expected.numel():
        return Difference(name, 0.0, True)
    found, expected = found.double(), expected.double()
    largest = float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if name.startswith("counts"):
        return Difference(name, difference / max(largest, 1.0), difference == 0)
    share = difference / largest if largest else difference
    return Difference(name, share, share <= limit)  # false for what is not a number


def render_table(cases: list[Case], limit: float) -> str:
    """A Markdown table, one row a case, and the tensors that differ."""
    is_rounded = cases[0].about.get("dtype", "fp32") != "fp32"
    head = ["recompute", "micro-steps", "planner", "guests", *KINDS, "flips", "verdict"]
    rows = [head, ["---"] * len(head)]
    for case in cases:
        worst = [case.worst(kind) for kind in KINDS]
        flips = "-" if case.flips is None else f"{case.flips} of {case.tokens}"
        rows.append(
            [
                str(case.about["recompute"]),
                str(case.about["micro_steps"]),
                str(case.about["planner"]),
                str(case.guests),
                *("-" if each is None else "equal" if each == 0 else f"{each:.1e}" for each in worst),
                flips,
                "DIFFERS" if case.bad else "equal",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines += [
        "",
        "Largest difference as a share of the largest element of the tensor in one process; limit "
        + (f"{limit:g}." if not is_rounded else f"{ROUNDED:g} times that of one process in bf16, and {ROUNDING:g}."),
    ]
    for case in cases:
        if case.bad:
            lines.append(f"{', '.join(f'{k}={v}' for k, v in case.about.items())}: {len(case.bad)} tensors differ:")
            lines += [f"  {each.name}: {each.largest:.1e}" for each in case.bad[:8]]
    return "\n".join(lines)
