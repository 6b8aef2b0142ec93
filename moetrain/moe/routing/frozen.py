"""A random router that never learns, and a K that grows."""

from moetrain.moe.options import FrozenOptions, RouterOptions
from moetrain.moe.routing.topk import TopK


class Frozen(TopK):
    """SMoE-Dropout (Chen et al., ICLR 2023): the router stays as it was drawn; K grows linearly over training from
    `k_start` to `top_k`, k = round((top_k - k_start) · step / steps) + k_start (half to even). Evaluation uses the
    current K.
    """

    Options = FrozenOptions
    options: FrozenOptions

    def __init__(self, dim: int, num_experts: int, options: RouterOptions | None = None, index: int = 0) -> None:
        super().__init__(dim, num_experts, options, index)
        self.weight.requires_grad_(False)

    def at_step(self, step: int, steps: int, seed: int) -> None:
        super().at_step(step, steps, seed)
        start, end = min(self.options.k_start, self.options.top_k), self.options.top_k
        self.k = round((end - start) * min(step, steps) / steps) + start
