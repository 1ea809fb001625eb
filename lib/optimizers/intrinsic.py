"""The adaptive method on the sphere that gradient descent on scale-invariant blocks amounts to."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lib.optimizers.blocks import BlockSGD, Unit, ratio


class IntrinsicSGD(BlockSGD):
    r"""Recursion (9) of Theorem 2.5, on unit vectors v with an accumulator G for each block.

    .. math:: v_{t+1} = \Pi\Bigl(v_t - \frac{\eta}{G_t} \nabla_v F(v_t)\Bigr), \qquad
              G_{t+1} = G_t + \frac{\eta^2}{G_t} \|\nabla_v F(v_t)\|^2, \qquad \Pi(u) = u / \|u\|.

    If the blocks are scale-invariant, v is the direction and G the squared norm of the block that SGD trains at the
    same rate. The theorem does not say so for others: their gradient may have a radial part.

    A block may start with any length: the first step divides it by its norm (the gradient found there is that at v
    over the norm), and G starts from the squared norm unless ``G0`` says otherwise. From then on parameters are unit
    vectors. Groups whose ``"blocks"`` is None take the plain step.

    Args:
        params: groups with ``"blocks"`` and an ``"lr"``, as ``Groups.parameter_groups`` makes them.
        lr: step size :math:`\eta` of groups that do not say theirs: a number, or a tensor of shape ``(S,)``.
        G0: start of G in every block: a number, a tensor of shape ``(S,)``, or None for the squared norm of the block.

    Raises:
        ValueError: if a group has no ``blocks`` or no ``lr``, or if they or ``G0`` do not fit its parameters.

    Source: Arora, Li and Lyu, Theorem 2.5.
    """

    def __init__(self, params: Iterable, lr: Tensor | float | None = None, *, G0: Tensor | float | None = None):
        super().__init__(params, {"lr": lr, "G0": G0})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._check_start("G0")

    def squared_norms(self) -> list[Tensor]:
        """The present G of every block, ``(k,)`` or ``(S, k)`` by parameter or joint block, in order; [] at first."""
        return [state["G"] for state in self.state.values() if "G" in state]

    def _update(self, group: dict, unit: Unit, lr: Tensor | float) -> None:
        state = self.state[unit.parameters[0]]
        gradients = [parameter.grad for parameter in unit.parameters]
        if "G" not in state:
            squares = unit.squares(unit.parameters)
            norms = squares.sqrt()
            unit.scale(ratio(torch.ones_like(norms), norms))
            gradients = [gradient * unit.spread(norms, gradient) for gradient in gradients]
            state["G"] = squares if group["G0"] is None else torch.zeros_like(squares) + self._rate(group, "G0")
        # A block without length has no direction to turn, and stays.
        rates = torch.where(state["G"] > 0, lr / state["G"], 0.0)
        state["G"] = state["G"] + lr * rates * unit.squares(gradients)
        for parameter, gradient in zip(unit.parameters, gradients, strict=True):
            parameter.addcmul_(gradient, unit.spread(rates, parameter), value=-1)
        unit.normalize()
