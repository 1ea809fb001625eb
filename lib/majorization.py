r"""How large the constant of a surrogate must be for it to be an upper bound: measured, local, and certified.

The surrogates (9) and (A.1) of ``lib.surrogates`` are upper bounds only for a :math:`\gamma` that is large enough.
``backtrack`` finds one by trial for the step at hand.
``smallest_majorizing`` measures how large it must be at given points, ``block_lipschitz`` gives a value below which
the bound fails nearby, and ``certified_last_layer`` and ``certified_lipschitz`` give values that are proved to be enough
everywhere. All eigenvalues come from ``torch.linalg.eigvalsh``, which may synchronize on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lib import backpropagation
from lib.block_problems import BlockProblem

if TYPE_CHECKING:
    from lib.surrogates import Surrogate


POINTS_AT_ONCE = 64  # of smallest_majorizing


class Backtracked(NamedTuple):
    """What :func:`backtrack` found: the minimizer ``D``, like W, where ``accepted`` ``(...)``, and W elsewhere; ``gamma``
    ``(...)``, to be handed to the next call; and the ``trials`` ``(...)`` it took."""

    D: Tensor
    accepted: Tensor
    gamma: Tensor
    trials: Tensor


def backtrack(
    surrogate: Surrogate, problem: BlockProblem, W: Tensor, gamma: Tensor, trials: int | None = None
) -> Backtracked:
    r"""Double :math:`\gamma`, run by run, from half its last value until the surrogate is above the objective at its own
    minimizer.

    A trial is accepted if :math:`f(D) \le g(D; W)` (up to four units of rounding of f) and :math:`f(D) \le f(W)`. Then D
    is a descent step by construction. For (9) and (A.1), trials end once :math:`\gamma` reaches the constant under which
    the surrogate majorizes, so the accepted one is below twice that constant, or the first one tried.

    Args:
        surrogate: one with a ``gamma``, which is not used.
        gamma: the last value, ``(...)``.
        trials: exactly so many trials, and nothing is read from the device; a run that needs more stands still, and its
            next call goes on where this one stopped. None: as many as needed (60 at most), and whether all runs are
            done is read after each.

    Raises:
        ValueError: if the surrogate has no ``gamma``.
    """
    if not hasattr(surrogate, "gamma"):
        raise ValueError(f"surrogate must have a gamma to be backtracked, got {surrogate}")
    f = problem.value(W)
    base = f + surrogate.penalty(W, f.ndim)
    slack = 4 * torch.finfo(f.dtype).eps * base.abs()
    accepted = torch.zeros_like(base, dtype=torch.bool)
    count = torch.zeros_like(base, dtype=torch.int64)
    gamma = gamma / 4
    for _ in range(60 if trials is None else trials):
        gamma = torch.where(accepted, gamma, 2 * gamma)
        count += ~accepted
        model = surrogate.at(gamma)
        D = model.minimizer(problem, W)
        reached = problem.value(D) + surrogate.penalty(D, f.ndim)
        accepted = accepted | ((reached <= base) & (reached <= model.value(problem, W, D) + slack))
        if trials is None and bool((accepted | ~base.isfinite()).all()):
            break
    if trials is None and bool(accepted.all()):
        return Backtracked(D, accepted, gamma, count)  # D itself: whoever evaluated it knows it again
    D = torch.where(accepted.reshape(*f.shape, *[1] * (W.ndim - f.ndim)), D, W)
    return Backtracked(D, accepted, torch.where(accepted, gamma, 4 * gamma), count)


def required_gamma(problem: BlockProblem, W: Tensor, V: Tensor, *, second_order: bool = False) -> Tensor:
    r"""The :math:`\gamma` that (9), or (A.1), needs to be above f at V.

    .. math:: \frac{2}{\|V - W\|^2} \Big( f(V) - f(W) - \langle \nabla f(W), S \rangle
              \big[ - \tfrac12 \langle S, \nabla^2 f(W) S \rangle \big] \Big), \quad S = V - W.

    A chosen :math:`\gamma` fails at V exactly if it is smaller. The difference cancels for short S: rounding is about
    :math:`10^{-16} |f| / \|S\|^2`.

    Args:
        V: a block like W, or many along further leading dimensions, if the problem broadcasts.

    Returns:
        ``(...)``, with the further dimensions of V in front; not a number at V = W.
    """
    f = problem.value(W)
    s, g = (V - W).reshape(*V.shape[: V.ndim - W.ndim], *f.shape, -1), problem.gradient(W).reshape(*f.shape, -1)
    rest = problem.value(V) - f - torch.linalg.vecdot(g, s)
    if second_order:
        rest = rest - torch.linalg.vecdot(s, (problem.hessian(W) @ s.unsqueeze(-1)).squeeze(-1)) / 2
    return 2 * rest / torch.linalg.vecdot(s, s)


def smallest_majorizing(
    problem: BlockProblem, W: Tensor, points: Sequence[Tensor] | Tensor, *, second_order: bool = False
) -> Tensor:
    r"""The smallest :math:`\gamma \ge 0` for which (9), or (A.1), is above f at all of ``points``.

    Any smaller :math:`\gamma` fails to majorize; a larger one is not refuted by these points.

    Args:
        points: blocks like W, in a sequence or along a leading axis.

    Returns:
        ``(...)``.
    """
    points = points if isinstance(points, Tensor) else torch.stack(list(points))
    largest = torch.zeros_like(problem.value(W))
    for some in points.split(POINTS_AT_ONCE if problem.broadcasts else 1):
        needed = required_gamma(problem, W, some if problem.broadcasts else some[0], second_order=second_order)
        needed = needed.nan_to_num(nan=0.0, posinf=float("inf"))
        largest = largest.maximum(needed.amax(0) if problem.broadcasts else needed)
    return largest


def block_lipschitz(weights: Sequence[Tensor], j: int, X: Tensor, Y: Tensor, loss, activation, ridge=0.0) -> Tensor:
    r"""The largest eigenvalue of the Hessian of f in block j at ``weights``, ``(...)``: a lower bound on :math:`L_j`.

    A :math:`\gamma` below it fails arbitrarily close to :math:`W_j`.
    """
    H = backpropagation.block_hessian(weights, j, X, Y, loss, activation, ridge)
    return torch.linalg.eigvalsh(H)[..., -1]


# Bounds of |sigma'| and |sigma''|, the range of sigma, and sup of (sigma'^2 + (sigma - y) sigma'') for y in the range.
_LOGISTIC_H = (15 - 33**0.5) / 24
_BOUNDS = {
    "logistic": (1 / 4, 1 / (6 * 3**0.5), (0.0, 1.0), _LOGISTIC_H**2 * (1 - _LOGISTIC_H) * (2 - 3 * _LOGISTIC_H)),
    "tanh": (1.0, 4 / (3 * 3**0.5), (-1.0, 1.0), 1 + 2 * 4 / (3 * 3**0.5)),
}


def certified_last_layer(Z: Tensor, ridge: float | Tensor = 0.0) -> Tensor:
    r"""A :math:`\gamma_J` that majorizes everywhere: the last block, logistic output, squared loss, targets in [0, 1].

    For one output, :math:`\frac12 \frac{d^2}{du^2} (\sigma(u) - y)^2 = h^2(1-h)^2 + (h - y) h(1-h)(1-2h)` is linear in y,
    so it is largest at y = 0 or 1, which mirror each other: at y = 0 it is :math:`\varphi(h) = h^2 (1-h)(2-3h)`, with the
    maximum :math:`\varphi^* = 0.0770293` at :math:`h = (15 - \sqrt{33})/24`. Rows of :math:`W_J` do not interact, hence
    :math:`\nabla_J^2 f \preceq 2 \varphi^* \lambda_{max}(Z Z^T/N) I + 2\lambda I`.

    Args:
        Z: :math:`Z_{J-1}`, ``(..., d_{J-1}, N)``, whatever the layers below are.

    Returns:
        ``(...)``.
    """
    phi = _BOUNDS["logistic"][3]
    return 2 * phi * _largest_square(Z) / Z.shape[-1] + 2 * ridge


def certified_lipschitz(weights: Sequence[Tensor], j: int, X: Tensor, Y: Tensor, activation, ridge=0.0) -> Tensor:
    r"""A :math:`\gamma_j` for which (9) majorizes everywhere: any block, squared loss, logistic or tanh units.

    With :math:`|\sigma'| \le s`, :math:`|\sigma''| \le t`, outputs and targets in an interval of length R, the terms of
    the recursion in ``backpropagation.block_hessian`` are bounded for all values of :math:`W_j`: entrywise
    :math:`N|\delta_J| \le d_J = 2Rs` and :math:`|\delta_i| \le d_i/N`, :math:`d_i = s |W_{i+1}|^T d_{i+1}`, and

    .. math:: N \lambda_{max}(G_J) \le g_J = 2 \sup(\sigma'^2 + (\sigma - y)\sigma''), \qquad
              g_i = s^2 \|W_{i+1}\|_2^2\, g_{i+1} + t \max(|W_{i+1}|^T d_{i+1}), \qquad
              \gamma_j = g_j \lambda_{max}(Z_{j-1} Z_{j-1}^T / N) + 2\lambda_j.

    For the last block and logistic units it is ``certified_last_layer``. The deeper the block, the looser.

    Returns:
        ``(...)``.

    Raises:
        ValueError: for another activation, or targets outside of its range.
    """
    backpropagation.check_block(j, weights)
    activations = backpropagation.as_activations(activation, len(weights))
    names = {sigma.name for sigma in activations[j - 1 :]}
    if len(names) > 1 or not names <= set(_BOUNDS):
        raise ValueError(f"activation must be one of {', '.join(_BOUNDS)} from layer j on, got {sorted(names)}")
    slope, bend, (low, high), top = _BOUNDS[names.pop()]
    if not Y.is_meta and not bool(((low <= Y) & (high >= Y)).all()):
        raise ValueError(f"Y must be in [{low:g}, {high:g}], got {Y[(low > Y) | (high < Y)][:3].tolist()}")
    last = weights[-1]
    g = torch.full_like(last[..., 0, 0], 2 * top)
    d = torch.full_like(last[..., 0], 2 * (high - low) * slope)
    for W in reversed(weights[j:]):
        pulled = (W.abs().mT @ d.unsqueeze(-1)).squeeze(-1)
        g = slope**2 * _largest_square(W) * g + bend * pulled.amax(-1)
        d = slope * pulled
    Z = X if j == 1 else backpropagation.forward(weights[: j - 1], X, activations[: j - 1])[-1][1]
    ridge = backpropagation.ridge_of(ridge, j, len(weights))
    return g * _largest_square(Z) / Z.shape[-1] + 2 * ridge


def _largest_square(A: Tensor) -> Tensor:
    """The square of the largest singular value."""
    return torch.linalg.eigvalsh(A @ A.mT)[..., -1]
