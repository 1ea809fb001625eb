r"""The objective of Ghauch et al. as a function of one block, all others held fixed: eq. (4).

A block problem has batch dimensions, the shape of ``value(V)``: ``()`` for one run, ``(S,)`` for an ensemble. A block
``V`` has them in front of its own shape, whatever that is: a matrix, a vector, a number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib import backpropagation


@dataclass(frozen=True)
class BlockProblem:
    """The smooth part of the objective as a function of one block, the others held fixed, eq. (4).

    Attributes:
        value: from V to ``(...)``.
        gradient: from V to a tensor like V.
        hessian: from V to ``(..., n, n)`` over the n entries of the block in row-major order; None if nobody asks.
        broadcasts: whether ``value`` also takes many blocks at once, along further leading dimensions.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor] | None = None
    broadcasts: bool = True

    @classmethod
    def of(cls, value: Callable[[Tensor], Tensor]) -> "BlockProblem":
        """The problem of any function that autograd understands and that broadcasts over leading dimensions; run s of the
        value must depend on run s of V alone."""

        def gradient(V: Tensor) -> Tensor:
            with torch.enable_grad():
                V = V.detach().requires_grad_()
                return torch.autograd.grad(value(V).sum(), V)[0]

        def hessian(V: Tensor) -> Tensor:
            with torch.enable_grad():
                V = V.detach().requires_grad_()
                f = value(V)
                (g,) = torch.autograd.grad(f.sum(), V, create_graph=True)
                columns = g.reshape(*f.shape, -1).unbind(-1)
                rows = [torch.autograd.grad(column.sum(), V, retain_graph=True)[0] for column in columns]
                return torch.stack([row.reshape(*f.shape, -1) for row in rows], -2)

        return cls(value, gradient, hessian)


def layer_problem(
    weights: Sequence[Tensor], j: int, X: Tensor, Y: Tensor, loss, activation, ridge=0.0, *, gauss_newton: bool = False
) -> BlockProblem:
    """Block j of a feedforward network, as ``lib.backpropagation`` has it; the layers below j are evaluated once.

    ``value`` is the whole objective: the ridge terms of the other blocks are constants of the block problem.
    """
    backpropagation.check_block(j, weights)
    before, after = list(weights[: j - 1]), list(weights[j:])
    activations = backpropagation.as_activations(activation, len(weights))
    Z = backpropagation.forward(before, X, activations[: j - 1])[-1][1] if j > 1 else X
    ridges = [backpropagation.ridge_of(ridge, i, len(weights)) for i in range(1, len(weights) + 1)]
    constant = sum(r * W.square().sum((-2, -1)) for r, W in zip(ridges[: j - 1], before, strict=True))
    rest = (Z, Y, loss, activations[j - 1 :], ridges[j - 1 :])

    def value(V: Tensor) -> Tensor:
        return constant + backpropagation.objective([V, *after], *rest)

    def gradient(V: Tensor) -> Tensor:
        return backpropagation.block_gradient([V, *after], 1, *rest)

    def hessian(V: Tensor) -> Tensor:
        return backpropagation.block_hessian([V, *after], 1, *rest, gauss_newton=gauss_newton)

    return BlockProblem(value, gradient, hessian)
