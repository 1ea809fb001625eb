"""Gradient descent that keeps the length of every block."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lib.optimizers.blocks import BlockSGD, ratio


class ProjectedSGD(BlockSGD):
    r"""A step of gradient descent, after which every block is rescaled to the norm it had before (PSGD).

    .. math:: u = w_t - \eta\, \nabla_w F(w_t), \qquad w_{t+1} = \|w_t\|\, u / \|u\|.

    On scale-invariant blocks it is gradient descent on the sphere at the constant effective rate :math:`\eta /
    \|w_0\|^2`: SGD without its automatic tuning. Groups whose ``"blocks"`` is None take the plain step.

    Args:
        params: groups with ``"blocks"`` and an ``"lr"``, as ``Groups.parameter_groups`` makes them.
        lr: step size :math:`\eta` of groups that do not say theirs: a number, or a tensor of shape ``(S,)``.

    Raises:
        ValueError: if a group has no ``blocks`` or no ``lr``, or if they do not fit its parameters.

    Source: Arora, Li and Lyu, Appendix D, setting 2.
    """

    def __init__(self, params: Iterable, lr: Tensor | float | None = None):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient, and rescale its blocks."""
        units = [unit for group in self.param_groups for unit in self._units(group)]
        before = [unit.squares(unit.parameters) for unit in units]
        for group in self.param_groups:
            self._step_plainly(group)
        for unit, squares in zip(units, before, strict=True):
            unit.scale(ratio(squares.sqrt(), unit.squares(unit.parameters).sqrt()))
