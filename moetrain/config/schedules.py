"""How a budget of experts, or of a token's experts, is spread over depth.

DynaMoE (Gülmez, 2026) names six shapes; its formulas were not to be had. These are ours. With x = l / (L - 1) the depth
of layer l, a layer gets `least` plus a share of the rest of the budget that is proportional to

| descending | ascending | pyramid_up | pyramid_down | wave_up | wave_down |
|---|---|---|---|---|---|
| 1 - x | x | 1 - abs(2x - 1) | abs(2x - 1) | (1 + cos 4πx) / 2 | (1 - cos 4πx) / 2 |

in whole multiples of `least`, by the method of largest remainders.
"""

import math
from collections.abc import Callable

SHAPES: dict[str, Callable[[float], float]] = {
    "uniform": lambda x: 1.0,
    "descending": lambda x: 1 - x,
    "ascending": lambda x: x,
    "pyramid_up": lambda x: 1 - abs(2 * x - 1),
    "pyramid_down": lambda x: abs(2 * x - 1),
    "wave_up": lambda x: (1 + math.cos(4 * math.pi * x)) / 2,
    "wave_down": lambda x: (1 - math.cos(4 * math.pi * x)) / 2,
}


def spread(shape: str, num_layers: int, mean: int, least: int) -> list[int]:
    """[num_layers] numbers of that shape that sum to num_layers · `mean`: multiples of `least`, which divides `mean`.

    A shape that is flat at so few layers gives every layer the mean.
    """
    depth = [layer / max(num_layers - 1, 1) for layer in range(num_layers)]
    height = [SHAPES[shape](x) if num_layers > 1 else 1.0 for x in depth]
    if sum(height) < 1e-9:
        height = [1.0] * num_layers
    rest = num_layers * (mean // least - 1)
    ideal = [rest * h / sum(height) for h in height]
    parts = [math.floor(x + 1e-9) for x in ideal]
    by_remainder = sorted(range(num_layers), key=lambda layer: (round(parts[layer] - ideal[layer], 9), layer))
    for layer in by_remainder[: rest - sum(parts)]:
        parts[layer] += 1
    return [least * (1 + part) for part in parts]
