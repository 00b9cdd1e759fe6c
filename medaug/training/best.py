"""The best network of a run so far, by a figure that is measured while it trains."""

from __future__ import annotations

import copy
import math

from torch import nn


class BestNetwork:
    """A copy of the network whose figure was smallest; of equal ones the earlier. Before any figure it is the newest.

    A GAN does not converge: its last weights are not its best.

    Args:
        network: the network that is watched, or its average.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.figure: float | None = None
        self.iteration = 0

    def offer(self, network: nn.Module, figure: float | None, iteration: int) -> bool:
        """Take `network` over if its figure is smaller than all before. A missing or infinite one never beats a number.

        Returns:
            Whether it was taken over.
        """
        known = figure is not None and math.isfinite(figure)
        if self.figure is not None and not (known and figure is not None and figure < self.figure):
            return False
        self.network.load_state_dict(network.state_dict())
        self.figure, self.iteration = figure if known else None, iteration
        return True
