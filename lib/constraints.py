r"""Closed convex sets of weight matrices, by their exact projections, and the soft threshold.

A projection maps ``(..., d, e)`` to the nearest point of the set in the Frobenius norm, matrix by matrix; leading
dimensions are runs. On an affine set or a convex one the minimizer of the surrogate (9) is the projection of its
unconstrained minimizer, because (9) is isotropic: :math:`g(V) = \frac\gamma2 \|V - D\|_F^2 + \text{const}`.
"""

import torch
from torch import Tensor


def project_nonnegative(V: Tensor) -> Tensor:
    """The nearest entrywise nonnegative matrix: negative entries become zero."""
    return V.clamp(min=0)


def project_toeplitz(V: Tensor) -> Tensor:
    r"""The nearest Toeplitz matrix: each entry becomes the mean of its diagonal.

    Toeplitz matrices of ``(d, e)`` are a subspace of dimension d + e - 1 with the diagonals as an orthogonal basis; they
    are linear convolutions.
    """
    rows, columns = V.shape[-2:]
    diagonal = _arange(rows, V)[:, None] - _arange(columns, V) + (columns - 1)
    return _average_over(V, diagonal, rows + columns - 1)


def project_circulant(V: Tensor) -> Tensor:
    r"""The nearest circulant matrix: each entry becomes the mean of its wrapped diagonal.

    Circulant matrices are the Toeplitz matrices of circular convolution, a subspace of dimension d.

    Raises:
        ValueError: unless the matrices are square.
    """
    if V.shape[-2] != V.shape[-1]:
        raise ValueError(f"V must be square to be circulant, got shape {tuple(V.shape)}")
    size = V.shape[-1]
    wrapped = (_arange(size, V)[:, None] - _arange(size, V)) % size
    return _average_over(V, wrapped, size)


def project_l1_ball(V: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    r"""The nearest matrix with :math:`\|V\|_1 = \sum |V_{ab}| \le` ``radius``.

    Outside of the ball it is a soft threshold at the :math:`\tau` for which the sum is the radius: with the absolute values
    in decreasing order :math:`u_1 \ge u_2 \ge \dots`, :math:`\tau = \max_m \frac1m (\sum_{i \le m} u_i - r)`. (The quotient
    is the threshold that m entries alone would need; it increases with m as long as :math:`u_m` exceeds it.)

    Args:
        radius: positive, a number or ``(...)``.

    Raises:
        ValueError: if ``radius`` is a number that is not positive and finite.
    """
    if isinstance(radius, Tensor):
        radius = radius[..., None]
    elif not 0 < radius < float("inf"):
        raise ValueError(f"radius must be positive and finite, got {radius}")
    flat = V.flatten(-2)
    sums = flat.abs().sort(dim=-1, descending=True).values.cumsum(-1)
    count = 1 + torch.arange(flat.shape[-1], device=V.device, dtype=V.dtype)
    tau = ((sums - radius) / count).amax(-1, keepdim=True).clamp(min=0)
    return soft_threshold(flat, tau).view_as(V)


def project_ball(V: Tensor, radius: float | Tensor = 1.0) -> Tensor:
    r"""The nearest matrix with :math:`\|V\|_F \le` ``radius``: V, or V scaled back to the sphere.

    Args:
        radius: positive, a number or ``(...)``.
    """
    if isinstance(radius, Tensor):
        radius = radius[..., None, None]
    elif not 0 < radius < float("inf"):
        raise ValueError(f"radius must be positive and finite, got {radius}")
    norm = torch.linalg.matrix_norm(V, keepdim=True)
    return torch.where(norm > radius, V * (radius / norm), V)


def soft_threshold(V: Tensor, threshold: float | Tensor) -> Tensor:
    r""":math:`\mathrm{sign}(v)\, (|v| - \tau)_+`, the proximal operator of :math:`\tau\|\cdot\|_1`.

    The paper's third case (A.5) needs :math:`v \le -\tau`, not :math:`v \le \tau`.

    Args:
        threshold: :math:`\tau \ge 0`, a number or a tensor that broadcasts with ``V``.

    >>> soft_threshold(torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0]), 1.0).tolist()
    [-1.0, 0.0, 0.0, 0.0, 1.0]
    """
    return V - V.clamp(-threshold, threshold)


def _arange(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


def _average_over(V: Tensor, group: Tensor, groups: int) -> Tensor:
    """Each entry replaced by the mean over the entries of equal ``group`` ``(d, e)``."""
    index = group.flatten().expand(*V.shape[:-2], -1)
    flat = V.flatten(-2)
    sums = V.new_zeros(*V.shape[:-2], groups).scatter_add(-1, index, flat)
    counts = V.new_zeros(groups).scatter_add(0, group.flatten(), V.new_ones(group.numel()))
    return (sums / counts).gather(-1, index).view_as(V)
