r"""The duality map for q = 2 without a singular value decomposition.

For g = U S V^T it is the nuclear norm times the *polar factor* U V^T. Both follow from a small matrix that has the squares
of the singular values as eigenvalues: the Gram matrix of the short side, or, if g is known by its factors from
back-propagation, a matrix with the size of the batch. Everything here returns a ``Polar``, whose map is a product
``left @ right`` that a step can subtract without forming it.

Source of what is inexact here: any m with :math:`\|m\|_2 \le 1` is a direction with a certificate. With
:math:`N = \langle g, m \rangle`, the step N m / p^2 lowers the objective by at least :math:`N^2 / 2 p^2` (Proposition 4.4 of
Flynn), which is :math:`\kappa^2` of what the exact map guarantees, :math:`\kappa = N / \|g\|_*`.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

METHODS = ("svd", "gram", "polynomial")
SHIFT = 3e-8  # a share of the largest eigenvalue, above the rounding of a float32 Gram matrix
LOWEST = 2e-3  # singular values from this share of the largest on are mapped to 1 within 1e-5
TERMS = (3, 3, 3, 3, 3, 5)  # odd polynomials of degrees 5, 5, 5, 5, 5, 9


class Polar(NamedTuple):
    r"""A direction m for q = 2.

    ``norm`` ``(...,)`` is :math:`\langle g, m \rangle`, the nuclear norm if the map is exact; ``left`` ``(..., n_out, r)`` and
    ``right`` ``(..., r, n_in)`` are factors of m.
    """

    norm: Tensor
    left: Tensor
    right: Tensor


def svd(g: Tensor) -> Polar:
    """The exact map, by the singular value decomposition. On a GPU it may wait for the device. NaN gives NaN."""
    g, lost = _finite(g)
    left, values, right = torch.linalg.svd(g, full_matrices=False)
    values = values + lost
    return Polar(values.sum(-1), left * counted(values, max(g.shape[-2:]), g.dtype).to(g.dtype).unsqueeze(-2), right)


def counted(values: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Which singular values count towards the numerical rank, ``values`` descending."""
    return values > length * torch.finfo(dtype).eps * values[..., :1]


def gram(g: Tensor) -> Polar:
    r"""The map by the eigenvectors of the Gram matrix of the short side, in float64.

    :math:`g g^\top = Q S^2 Q^\top` gives :math:`U V^\top = Q S^{-1} Q^\top g`. Singular values below 5e-5 of the largest count
    as 0; the identities (4a), (4b) hold to 1e-4 in the worst case, typically to 1e-6. (A float32 Gram matrix would not do:
    it knows singular values only down to about 3e-4 of the largest, and 1/S makes a large error of every wrong one.)
    On a GPU ``eigh`` may wait for the device.
    """
    wide = g.shape[-2] <= g.shape[-1]
    short = (g if wide else g.mT).double()
    norm, root = _inverse_root(short @ short.mT)
    root = root.to(g.dtype)
    return Polar(norm.to(g.dtype), root, g) if wide else Polar(norm.to(g.dtype), g, root)


def _finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """0 in place of a matrix that is not finite, which would stop the factorization of a whole batch; and NaN there, else 0."""
    total = matrix.sum((-2, -1), keepdim=True)
    lost = total - total
    return torch.where(lost == 0, matrix, 0.0), lost.squeeze(-1)


def spectral_norm(w: Tensor) -> Tensor:
    """The largest singular value, from the float64 Gram matrix of the short side, ``(...,)``."""
    short = (w if w.shape[-2] <= w.shape[-1] else w.mT).double()
    square, lost = _finite(short @ short.mT)
    return (torch.linalg.eigvalsh(square)[..., -1].clamp_min(0).sqrt() + lost.squeeze(-1)).to(w.dtype)


def _inverse_root(square: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the roots of the eigenvalues, and the inverse root on the eigenvectors that count."""
    square, lost = _finite(square)
    values, vectors = torch.linalg.eigh(square)
    roots = values.clamp_min(0).sqrt() + lost
    inverse = torch.where(roots > 5e-5 * roots[..., -1:], 1 / roots, 0.0)
    return roots.sum(-1), (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def factored_gram(deltas: Tensor, inputs: Tensor) -> Polar:
    r"""The map at :math:`g = D^\top X` from the two B x B Gram matrices of a batch, never forming g.

    With :math:`X X^\top = L L^\top` and :math:`L^\top D D^\top L = Q S^2 Q^\top`, :math:`\|g\|_* = \sum S` and
    :math:`U V^\top = D^\top (L Q S^{-1} Q^\top L^{-1}) X`. Tolerances as for ``gram``.

    Args:
        deltas: D, ``(..., B, n_out)``: the derivative of the loss by the outputs of the layer before its activation.
        inputs: X, ``(..., B, n_in)`` or ``(B, n_in)``.
    """
    square = (inputs @ inputs.mT).double()
    # Two equal samples make X X^T singular.
    square.diagonal(0, -2, -1).add_(1e-9 * square.diagonal(0, -2, -1).sum(-1, keepdim=True).clamp_min(1e-30))
    lower = torch.linalg.cholesky_ex(square).L
    norm, root = _inverse_root(lower.mT @ (deltas @ deltas.mT).double() @ lower)
    lower, root = lower.to(deltas.dtype), root.to(deltas.dtype)
    core = torch.linalg.solve_triangular(lower, lower @ root, upper=False, left=False)
    return Polar(norm.to(deltas.dtype), (core.mT @ deltas).mT, inputs)


def polynomial(g: Tensor) -> Polar:
    """A certified inexact map by matrix products alone (see ``inverse_root_by_products``); it never waits for the device."""
    wide = g.shape[-2] <= g.shape[-1]
    norm, root = inverse_root_by_products(g @ g.mT if wide else g.mT @ g)
    return Polar(norm, root, g) if wide else Polar(norm, g, root)


def factored_polynomial(deltas: Tensor, inputs: Tensor) -> Polar:
    r"""The same at :math:`g = D^\top X`: with :math:`P = X X^\top D D^\top`, :math:`U V^\top = D^\top P^{-1/2} X`.

    P is not symmetric, but similar to :math:`S^2`: no Cholesky factor is needed.

    Args:
        deltas: ``(..., B, n_out)``.
        inputs: ``(..., B, n_in)`` or ``(B, n_in)``.
    """
    norm, root = inverse_root_by_products((inputs @ inputs.mT) @ (deltas @ deltas.mT))
    return Polar(norm, (root.mT @ deltas).mT, inputs)


def inverse_root_by_products(square: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`H \approx P^{-1/2}` with :math:`0 \le x H(x^2) \le 1` on the spectrum, and :math:`\operatorname{tr} P H`.

    A composition of odd polynomials that each come closest to 1 on what the one before has left (``coefficients``), each
    applied to the squares: with E the present squares and :math:`p(x) = x\, h(x^2)`, :math:`H \leftarrow H h(E)` and
    :math:`E \leftarrow E h(E)^2`. P is scaled by :math:`(\operatorname{tr} P^2)^{1/2}`, at least its largest eigenvalue, and a
    small multiple of the identity keeps rounding from pushing a singular value above 1: on gradients of the chapter's
    network :math:`\|m\|_2 \le 1 + 2 \cdot 10^{-4}`, and :math:`\kappa \ge 0.999`.

    Args:
        square: P, ``(..., n, n)``, similar to a symmetric matrix without negative eigenvalues; 0 gives 0.

    Source: the composition is that of Amsel, Persson, Musco and Gower (2025), "The Polar Express".
    """
    size = (square * square.mT).sum((-2, -1)).clamp_min(torch.finfo(square.dtype).tiny).rsqrt()[..., None, None]
    present = square * size
    present.diagonal(0, -2, -1).add_(SHIFT)
    stages = coefficients(LOWEST, TERMS)
    root = None
    for number, terms in enumerate(stages):
        h = _evaluate(terms, present)
        root = h if root is None else root @ h
        if number + 1 < len(stages):
            present = present @ h @ h
    root = root * size.sqrt()
    return (square * root.mT).sum((-2, -1)), root


def _evaluate(terms: tuple[float, ...], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, lowest first, of degree 2 or 4, at a matrix."""
    if len(terms) == 5:
        square = x @ x
        inner = torch.add(x * terms[3], square, alpha=terms[4])
        inner.diagonal(0, -2, -1).add_(terms[2])
        h = _product(square, inner, x, terms[1], 1.0)
    else:
        h = _product(x, x, x, terms[1], terms[2])
    h.diagonal(0, -2, -1).add_(terms[0])
    return h


def _product(a: Tensor, b: Tensor, x: Tensor, of_x: float, of_product: float) -> Tensor:
    """``of_x * x + of_product * a @ b`` in one pass where torch has one."""
    if x.ndim > 3:
        return torch.add(x * of_x, a @ b, alpha=of_product)
    return (torch.addmm if x.ndim == 2 else torch.baddbmm)(x, a, b, beta=of_x, alpha=of_product)


@cache
def coefficients(lowest: float, terms: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    r"""Odd polynomials whose composition stays in [0, 1] on [0, 1] and is closest to 1 on [lowest, 1].

    Args:
        lowest: :math:`0 < \ell < 1`.
        terms: the number of terms of each, k for degree 2k - 1.

    Returns:
        For each its coefficients, lowest degree first; the last are divided so that the composition does not exceed 1.
    """
    low, high, result = lowest, 1.0, []
    for count in terms:
        values, error = minimax(low, high, count)
        result.append(values)
        low, high = 1 - error, 1 + error
    result[-1] = result[-1] / high
    return tuple(tuple(values.tolist()) for values in result)


def minimax(low: float, high: float, count: int) -> tuple[np.ndarray, float]:
    r"""The odd polynomial :math:`\sum_{j < k} c_j x^{2j+1}` closest to 1 on [low, high], by Remez exchange.

    Returns:
        The coefficients ``(count,)``, and the largest error, attained count + 1 times with alternating signs.
    """
    grid = np.unique(np.concatenate([np.geomspace(low, high, 3000), np.linspace(low, high, 3000)]))
    powers = grid[:, None] ** (2 * np.arange(count) + 1)
    nodes = np.abs(
        grid[:, None] - (low + high + (low - high) * np.cos(np.pi * np.arange(count + 1) / count)) / 2
    ).argmin(0)
    signs = (-1.0) ** np.arange(count + 1)
    for _ in range(100):
        *values, level = np.linalg.solve(np.column_stack((powers[nodes], signs)), np.ones(count + 1))
        error = powers @ values - 1
        # One node in each stretch of equal sign, at its largest error; as many stretches as there are nodes.
        stretches = np.split(np.arange(len(grid)), np.flatnonzero(np.diff(np.sign(error))) + 1)
        peaks = [part[np.abs(error[part]).argmax()] for part in stretches]
        while len(peaks) > count + 1:
            peaks.pop(0 if abs(error[peaks[0]]) < abs(error[peaks[-1]]) else -1)
        if len(peaks) <= count or np.abs(error).max() <= abs(level) * (1 + 1e-6) + 1e-13:
            break
        nodes = np.array(peaks)
    return np.array(values), float(np.abs(error).max())


# -- Bounds of the nuclear norm: they settle the greedy choice without a factorization ----------------------------------


def factored_bound(deltas: Tensor, inputs: Tensor) -> Tensor:
    r""":math:`\|D^\top X\|_* \le \sum_b \|d_b\|\, \|x_b\|`: the gradients of the samples have rank 1. ``(...,)``"""
    return (torch.linalg.vector_norm(deltas, dim=-1) * torch.linalg.vector_norm(inputs, dim=-1)).sum(-1)


def deflated_bound(g: Tensor, basis: Tensor, frobenius: Tensor) -> tuple[Tensor, Tensor]:
    r"""An upper bound of the nuclear norm from the part of g in a subspace.

    :math:`\|g\|_* \le \|Q^\top g\|_* + \sqrt{n - r}\, (\|g\|_F^2 - \|Q^\top g\|_F^2)^{1/2}`, with n the short side: the first
    part is exact, the second is the inequality of Cauchy and Schwarz.

    Args:
        g: ``(..., n_out, n_in)``.
        basis: Q, r orthonormal columns, ``(..., n_out, r)`` with r at most the short side.
        frobenius: :math:`\|g\|_F`, ``(...,)``.

    Returns:
        The bound ``(...,)`` in float64, and :math:`Q^\top g`; ``qr(g (Q^T g)^T).Q`` is a better basis (subspace iteration).
    """
    part = basis.mT @ g
    squares = torch.linalg.eigvalsh((part @ part.mT).double()).clamp_min(0)
    rest = frobenius.double().square() - squares.sum(-1)
    count = min(g.shape[-2:]) - basis.shape[-1]
    return squares.sqrt().sum(-1) + (count * rest.clamp_min(0)).sqrt(), part
