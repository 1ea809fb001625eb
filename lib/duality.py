r"""Matrix norms, their dual norms and duality maps, and the weights of the layers of a network.

Layout: the last two axes of a tensor are a matrix ``(n_out, n_in)``, all axes before them are a batch, and a number per
matrix has the shape ``(...,)`` of that batch. The norm of a matrix is the one induced by a vector norm
:math:`\|\cdot\|_q` with q in {1, 2, inf}.

A *duality map* :math:`\rho` sends a linear functional :math:`\ell` (here a matrix, by the inner product of the entries)
to a matrix with

.. math:: \|\rho(\ell)\| = \|\ell\|_* \quad (4a), \qquad \langle \ell, \rho(\ell) \rangle = \|\ell\|_*^2 \quad (4b).

Public functions look at the values of their arguments and refuse NaN by name; on a GPU that waits for the device. The
optimizers use the functions without a check (with an underscore), which never do.

Source: Flynn, Sections 3.1, 4.1 and 4.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib import polar

NORMS = (1, 2, math.inf)


def check_q(q: float) -> None:
    """Refuse a q for which no duality map is known here."""
    if q not in NORMS:
        raise ValueError(f"q must be 1, 2 or inf, got {q!r}")


def _check(name: str, matrix: Tensor, q: float) -> None:
    check_q(q)
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}")
    if not matrix.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {matrix.dtype}")
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"{name} must have shape (..., n_out, n_in), neither of them 0, got {tuple(matrix.shape)}")
    if not matrix.is_meta and not matrix.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~matrix.isfinite()).sum())} entries that are not")


# -- Norms -------------------------------------------------------------------------------------------------------------


def matrix_norm(w: Tensor, q: float) -> Tensor:
    r"""The norm induced by the q-norm: the largest column sum (q = 1), singular value (2) or row sum (inf) of :math:`|w|`.

    Args:
        w: ``(..., n_out, n_in)``.
        q: 1, 2 or ``math.inf``.

    Returns:
        ``(...,)``.

    Raises:
        ValueError, TypeError: for another q, a shape without a matrix, an integer dtype, or entries that are not finite.

    Source: Flynn, Section 4.1, after Assumption 4.2.
    """
    _check("w", w, q)
    return _matrix_norm(w, q)


def _matrix_norm(w: Tensor, q: float) -> Tensor:
    if q == 2:
        return torch.linalg.matrix_norm(w, 2)
    return w.abs().sum(-2 if q == 1 else -1).amax(-1)


def dual_norm(g: Tensor, q: float) -> Tensor:
    r"""The norm dual to ``matrix_norm``, :math:`\|g\|_{q*} = \max_{\|u\|_q = 1} \langle g, u \rangle`.

    The sum over columns of the largest :math:`|g_{ij}|` (q = 1), the sum of the singular values (q = 2), or the sum over
    rows of the largest :math:`|g_{ij}|` (q = inf), equation (26).

    Args:
        g: ``(..., n_out, n_in)``.
        q: 1, 2 or ``math.inf``.

    Returns:
        ``(...,)``.

    Raises:
        ValueError, TypeError: as ``matrix_norm``.

    >>> g = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    >>> [float(dual_norm(g, q)) for q in (1, 2, math.inf)]
    [7.0, 7.0, 7.0]

    Source: Flynn, Proposition 4.5.
    """
    _check("g", g, q)
    return _dual_norm(g, q)


def _dual_norm(g: Tensor, q: float) -> Tensor:
    if q == 2:
        return torch.linalg.svdvals(g).sum(-1)
    return g.abs().amax(-2 if q == 1 else -1).sum(-1)


# -- Duality maps ------------------------------------------------------------------------------------------------------


def unit(g: Tensor, q: float) -> Tensor:
    r"""A matrix of norm 1 at which :math:`\langle g, \cdot \rangle` is largest: the duality map without its length.

    For q = 1 each column has :math:`\pm 1` at one row where :math:`|g_{ij}|` is largest, for q = inf each row at one column,
    with sgn(0) = 1 (of several such entries it has one). For q = 2 it is :math:`\sum_{i \le r} u_i v_i^\top`, r the
    numerical rank: singular values up to :math:`\max(n_{out}, n_{in})` times the rounding unit times the largest count as 0.

    Args:
        g: ``(..., n_out, n_in)``.
        q: 1, 2 or ``math.inf``.

    Returns:
        A tensor like ``g``, of norm 1. For q = 2 and g = 0 it is 0: the sum in (28) is empty. For q = 1 and inf an all-zero
        column or row is no exception (it has a 1 in front), so the norm is 1 even for g = 0.

    Raises:
        ValueError, TypeError: as ``matrix_norm``.

    Source: Flynn, equations (27), (28) and (29).
    """
    _check("g", g, q)
    return _unit(g, q)


def _unit(g: Tensor, q: float) -> Tensor:
    if q == 2:
        _, left, right = polar.svd(g)
        return left @ right
    along, index, values = extremes(g, q)
    return torch.zeros_like(g).scatter_(along, index, sign(values))


def sign(values: Tensor) -> Tensor:
    """1 where a value is at least 0, -1 elsewhere: the paper's sgn, with sgn(0) = 1."""
    return 1 - 2 * (values < 0).to(values.dtype)


def extremes(g: Tensor, q: float) -> tuple[int, Tensor, Tensor]:
    r"""Where :math:`|g_{ij}|` is largest in each column (q = 1) or row (q = inf): one entry, whatever the ties.

    (A mask of the entries equal to the maximum would take all of them, and the norm of the map would be too large.)

    Returns:
        The axis, and along it the position and the value of the entry, with length 1.
    """
    axis = -2 if q == 1 else -1
    length, parts = g.shape[axis], 16
    if length < 4 * parts or g.numel() < 2**15:
        index = _argmax(g.abs(), axis)
        return axis, index, g.gather(axis, index)
    # On a CPU ``argmax`` takes ten times as long as ``maximum``: fold the axis to a sixteenth first.
    width = -(-length // parts)
    sizes = g.new_empty(*g.shape[:-2], *((parts * width, g.shape[-1]) if q == 1 else (g.shape[-2], parts * width)))
    torch.abs(g, out=sizes.narrow(axis, 0, length))
    sizes.narrow(axis, length, parts * width - length).fill_(-1)
    sizes = sizes.unflatten(axis, (parts, width))
    top = sizes
    while top.shape[axis - 1] > 1:
        top = torch.maximum(*top.chunk(2, axis - 1))
    inside = _argmax(top.squeeze(axis - 1), axis)
    shape = [*sizes.shape]
    shape[axis] = 1
    index = _argmax(sizes.gather(axis, inside.unsqueeze(axis - 1).expand(shape)).squeeze(axis), axis) * width + inside
    return axis, index, g.gather(axis, index)


def _argmax(values: Tensor, axis: int) -> Tensor:
    """``values.argmax(axis, keepdim=True)``, along contiguous memory."""
    if axis == -2:
        return values.mT.contiguous().argmax(-1, keepdim=True).mT
    return values.argmax(-1, keepdim=True)


def duality_map(g: Tensor, q: float) -> Tensor:
    r""":math:`\rho_q(g) = \|g\|_{q*}\, m` with m = ``unit(g, q)``: equations (27), (28) and (29).

    Args:
        g: ``(..., n_out, n_in)``.
        q: 1, 2 or ``math.inf``.

    Returns:
        A tensor like ``g``; 0 for g = 0.

    Raises:
        ValueError, TypeError: as ``matrix_norm``.

    >>> duality_map(torch.tensor([[3.0, -1.0], [2.0, -4.0]]), 1).tolist()
    [[7.0, 0.0], [0.0, -7.0]]

    Source: Flynn, Proposition 4.5.
    """
    _check("g", g, q)
    if q == 2:  # one factorization serves both
        norm, left, right = polar.svd(g)
        return (norm[..., None, None] * left) @ right
    return _dual_norm(g, q)[..., None, None] * _unit(g, q)


def identity_errors(g: Tensor, u: Tensor, q: float) -> tuple[Tensor, Tensor]:
    r"""How far u is from a value of the duality map at g: the relative errors of (4a) and (4b).

    :math:`\big|\|u\| - \|g\|_*\big| / \|g\|_*` and :math:`|\langle g, u \rangle - \|g\|_*^2| / \|g\|_*^2`, computed in
    float64 with a singular value decomposition. Where g = 0 both are absolute.

    Args:
        g: ``(..., n_out, n_in)``.
        u: the same shape.
        q: 1, 2 or ``math.inf``.

    Returns:
        Two tensors ``(...,)`` in float64.

    Raises:
        ValueError, TypeError: as ``matrix_norm``, or if the shapes differ.
    """
    _check("g", g, q)
    _check("u", u, q)
    if g.shape != u.shape:
        raise ValueError(f"u must have the shape of g, {tuple(g.shape)}, got {tuple(u.shape)}")
    g, u = g.double(), u.double()
    dual = _dual_norm(g, q)
    size = dual.where(dual > 0, 1.0)
    return (_matrix_norm(u, q) - dual).abs() / size, ((g * u).sum((-2, -1)) - dual.square()).abs() / size.square()


# -- A network: layer polynomials and the Finsler structure ------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    r"""What the layer polynomials need to know of :math:`\sigma`, which must have :math:`|\sigma| \le 1`.

    Attributes:
        name: for messages.
        slope: :math:`\sup |\sigma'|`.
        curvature: :math:`\sup |\sigma''|`.
    """

    name: str
    slope: float
    curvature: float

    def __post_init__(self):
        for name in ("slope", "curvature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")


LOGISTIC = Activation("logistic", slope=1 / 4, curvature=math.sqrt(3) / 18)
TANH = Activation("tanh", slope=1.0, curvature=4 / (3 * math.sqrt(3)))


def check_chain(weights: Sequence[Tensor]) -> None:
    """Refuse weight matrices that are not the layers of one network: ``(..., n_i, n_{i-1})`` with equal batch axes."""
    if not weights:
        raise ValueError("weights must hold at least one matrix, got none")
    for i, w in enumerate(weights):
        if w.ndim < 2 or 0 in w.shape[-2:] or w.shape[:-2] != weights[0].shape[:-2]:
            raise ValueError(
                f"weights must have shapes (..., n_i, n_(i-1)) with equal leading axes, got {tuple(w.shape)} "
                f"as number {i + 1} and {tuple(weights[0].shape)} first"
            )
        if i and w.shape[-1] != weights[i - 1].shape[-2]:
            raise ValueError(
                f"weights must fit each other: number {i + 1} takes {w.shape[-1]} inputs, "
                f"but number {i} has {weights[i - 1].shape[-2]} outputs"
            )


def layer_polynomials(
    weights: Sequence[Tensor],
    q: float,
    activation: Activation = LOGISTIC,
    *,
    input_scales: Tensor | None = None,
    residual: float = 2.0,
) -> Tensor:
    r"""The squares :math:`p_i(w)^2`, bounds on the Hessian of the objective (21) in one layer, for general widths.

    With :math:`s_1 = \sup|\sigma'|`, :math:`s_2 = \sup|\sigma''|` and :math:`z_j = \|w_j\|_q` of the *later* layers only,

    .. math:: p_i^2 = c_q(n_{i-1})^2 \left[ d_{q,2}(n_K)\, s_1^2 r^2 + d_{q,1}(n_K)\, (s_1^2 v + s_2 r) \right] + 1,

    where r and v bound the first and second derivative of the output by the output of layer i. They start at r = 1, v = 0,
    and for n = 1, 2, ... with j = i + n: :math:`v \leftarrow s_2 s_1^{2(n-1)} \prod_{k \le j} z_k^2 + s_1 z_j v` and
    :math:`r \leftarrow s_1 z_j r`. The paper writes one n for all widths: :math:`c_q` is the q-norm of the vector of ones
    with the length of the layer's *input*, :math:`d_{q,1}, d_{q,2}` belong to the output (Table 1).

    Args:
        weights: the K matrices in order, ``(..., n_i, n_{i-1})``.
        q: 1, 2 or ``math.inf``.
        activation: bounds on :math:`\sigma', \sigma''`.
        input_scales: in place of :math:`c_q(n_{i-1})^2`, the mean over the samples of :math:`\|y^{i-1}\|_q^2`, ``(..., K)``:
            a smaller bound, valid at these weights and along a step in layer i (for full batches).
        residual: bound on the components of output minus target, 2 by Assumption 4.1; 1 for a logistic output
            with targets in [0, 1].

    Returns:
        ``(..., K)``, each at least 1.

    Raises:
        ValueError, TypeError: as ``matrix_norm``, or if the matrices do not fit each other.

    Source: Flynn, Proposition 4.3 and Table 1.
    """
    for i, w in enumerate(weights):
        _check(f"weights[{i}]", w, q)
    check_chain(weights)
    norms = [_matrix_norm(w, q) for w in weights[1:]]
    widths = [*(w.shape[-1] for w in weights), weights[-1].shape[-2]]
    scales = None if input_scales is None else input_scales.unbind(-1)
    squares = squares_of_norms(norms, widths, q, activation, scales, residual)
    return torch.stack([weights[0].new_zeros(weights[0].shape[:-2]) + square for square in squares], -1)


def squares_of_norms(
    norms: Sequence[Tensor | float],
    widths: Sequence[int],
    q: float,
    activation: Activation,
    input_scales: Sequence[Tensor | float] | None,
    residual: float,
) -> list[Tensor | float]:
    """``layer_polynomials`` from the norms of w_2 to w_K and the widths n_0 to n_K; plain numbers will do."""
    *inputs, outputs = widths
    first, second = 2 * residual * {1: 1, 2: math.sqrt(outputs)}.get(q, outputs), {1: 2, 2: 2}.get(q, 2 * outputs)
    s1, s2 = activation.slope, activation.curvature
    squares = []
    for i, width in enumerate(inputs):
        r, v, product = 1.0, 0.0, 1.0
        for n, z in enumerate(norms[i:]):
            product = product * z * z
            v = s2 * s1 ** (2 * n) * product + s1 * z * v
            r = s1 * z * r
        scale = {1: width**2, 2: width}.get(q, 1) if input_scales is None else input_scales[i]
        squares.append(scale * (second * s1**2 * r * r + first * (s1**2 * v + s2 * r)) + 1)
    return squares


def finsler_norm(us: Sequence[Tensor], squares: Tensor, q: float) -> Tensor:
    r"""The local norm of an update, :math:`\|u\|_w = \sum_i p_i(w) \|u_i\|_q`, equation (25).

    Args:
        us: K matrices ``(..., n_i, n_{i-1})``.
        squares: :math:`p_i(w)^2`, ``(..., K)``.
        q: 1, 2 or ``math.inf``.

    Returns:
        ``(...,)``.
    """
    return (squares.sqrt() * torch.stack([matrix_norm(u, q) for u in us], -1)).sum(-1)


def finsler_dual_norm(gs: Sequence[Tensor], squares: Tensor, q: float) -> Tensor:
    r"""The local norm of a derivative, :math:`\max_i \|g_i\|_{q*} / p_i(w)`, equation (32).

    Args:
        gs: K matrices ``(..., n_i, n_{i-1})``.
        squares: :math:`p_i(w)^2`, ``(..., K)``.
        q: 1, 2 or ``math.inf``.

    Returns:
        ``(...,)``.
    """
    return (torch.stack([dual_norm(g, q) for g in gs], -1) / squares.sqrt()).amax(-1)


def finsler_duality_map(gs: Sequence[Tensor], squares: Tensor, q: float) -> list[Tensor]:
    r"""The duality map of the local norm: :math:`\rho_q(g_i) / p_i(w)^2` in the layer where (32) is attained, 0 elsewhere.

    Args:
        gs: K matrices ``(..., n_i, n_{i-1})``.
        squares: :math:`p_i(w)^2`, ``(..., K)``.
        q: 1, 2 or ``math.inf``.

    Returns:
        K tensors like ``gs``; each member of the batch has its own layer (the first, if several tie).

    Source: Flynn, equation (33), from Proposition 4.6.
    """
    norms = torch.stack([dual_norm(g, q) for g in gs], -1)
    chosen = (norms / squares.sqrt()).argmax(-1)
    scales = [torch.where(chosen == i, 1 / squares[..., i], 0)[..., None, None] for i in range(len(gs))]
    return [scale * duality_map(g, q) for scale, g in zip(scales, gs, strict=True)]
