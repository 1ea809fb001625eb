"""WNGrad: a step size that shrinks with the gradients met so far."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lib.optimizers.blocks import BlockSGD, Unit

ORDERS = ("first", "last")


class WNGrad(BlockSGD):
    r"""Gradient descent at the rate :math:`\eta / b`, where b grows with the squared gradients, for each block.

    With :math:`g_t` the gradient in a block, ``accumulate="first"`` is the usual form, which steps with the new b:

    .. math:: b_{t+1} = b_t + \frac{\eta^2 \|g_t\|^2}{b_t}, \qquad x_{t+1} = x_t - \frac{\eta}{b_{t+1}}\, g_t,

    and ``accumulate="last"`` steps with the old one, :math:`x_{t+1} = x_t - (\eta / b_t)\, g_t`. The rate is a matter
    of units: :math:`(\eta, b_0)` and :math:`(1, b_0 / \eta)` give the same iterates, and the method's paper has
    :math:`\eta = 1`. With ``accumulate="last"`` and ``project=True`` it is the recursion (9) that SGD follows on
    scale-invariant blocks (Remark 2.6; ``IntrinsicSGD``), b being :math:`G = \|w\|^2`; in the usual order it is not.

    Groups whose ``"blocks"`` is None take the plain step at ``lr``.

    Args:
        params: parameters, or groups; the parameters of a group without ``"blocks"`` are one block together.
        lr: step size :math:`\eta`: a number, or a tensor of shape ``(S,)``.
        b0: the start of b: a number, or a tensor of shape ``(S,)``.
        accumulate: "first" or "last": whether b grows before or after the step that uses it.
        project: whether every block is divided by its norm after each step; it should then start at norm one.

    Raises:
        ValueError: for an ``lr`` or ``b0`` that is not positive and finite or does not fit the runs, an unknown
            ``accumulate``, or blocks that do not fit the parameters.

    Source: Wu, Ward and Bottou (2018), Algorithms 1 and 2; Arora, Li and Lyu, Remark 2.6.
    """

    def __init__(
        self,
        params: Iterable,
        lr: Tensor | float = 1.0,
        *,
        b0: Tensor | float = 1.0,
        accumulate: str = "first",
        project: bool = False,
    ):
        if accumulate not in ORDERS:
            raise ValueError(f"accumulate must be 'first' or 'last', got {accumulate!r}")
        self.accumulate, self.project = accumulate, project
        super().__init__(params, {"lr": lr, "b0": b0, "blocks": "joint"})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._check_start("b0")

    def _update(self, group: dict, unit: Unit, lr: Tensor | float) -> None:
        gradients = [parameter.grad for parameter in unit.parameters]
        squares = unit.squares(gradients)
        state = self.state[unit.parameters[0]]
        if "b" not in state:
            state["b"] = torch.zeros_like(squares) + self._rate(group, "b0")
        old = state["b"]
        state["b"] = old + lr**2 * squares / old
        rates = lr / (state["b"] if self.accumulate == "first" else old)
        for parameter, gradient in zip(unit.parameters, gradients, strict=True):
            parameter.addcmul_(gradient, unit.spread(rates, parameter), value=-1)
        if self.project:
            unit.normalize()
