r"""Gradient descent on scale-invariant blocks: problems whose constants are known, and the bounds of Theorem 3.1.

A block :math:`w^{(i)} \in \mathbb R^2` of which the loss sees only the direction is an angle :math:`\theta_i` and a
squared norm :math:`N_i`. With :math:`F_i = \partial F / \partial \theta_i` the gradient is :math:`F_i / \sqrt{N_i}` along
the circle, so gradient descent on the weights is, exactly,

.. math:: \theta_i \leftarrow \theta_i - \arctan(\eta_w F_i / N_i), \qquad N_i \leftarrow N_i + \eta_w^2 F_i^2 / N_i .

Arrays are NumPy's. The last axis of ``theta`` and ``norms`` is the block; everything before it is a run.

Source: Arora, Li and Lyu (2019), Sections 2.4 and 3, Appendix A. The improved bound is the book's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Constants:
    r"""What Section 2.4 assumes of a loss: bounds that hold at unit blocks and at every g.

    Attributes:
        vv: :math:`L^{vv}_{ij}`, ``(m, m)``: norms of the Hessian blocks of the loss as a function of the weights.
        vg: :math:`L^{vg}_i`, ``(m,)``.
        gg: :math:`L^{gg}`.
        gradient: a bound :math:`G_i` of the norm of the gradient in block i, ``(m,)``; :math:`L^{vv}_{ii}` is one.
        low: a lower bound of the loss.
    """

    vv: np.ndarray
    vg: np.ndarray
    gg: float
    gradient: np.ndarray
    low: float

    def curvature(self, c_g: float = 0.5) -> np.ndarray:
        r"""Lemma 3.2's :math:`C_i = \frac12 \sum_j L^{vv}_{ij} + m (L^{vg}_i)^2 / (c_g L^{gg})`, ``(m,)``.

        A loss without g has ``gg = 0`` and ``vg = 0``: the second term is absent.
        """
        if not 0 < c_g < 1:
            raise ValueError(f"c_g must be between 0 and 1, got {c_g}")
        if not self.gg and np.any(self.vg):
            raise ValueError("a loss with gg = 0 has vg = 0 too")
        mixed = len(self.vg) * self.vg**2 / (c_g * self.gg) if self.gg else np.zeros(len(self.vg))
        return self.vv.sum(-1) / 2 + mixed


class State(NamedTuple):
    """Where the runs are: angles and squared norms ``(..., m)``, the other parameter ``g`` ``(...)``."""

    theta: np.ndarray
    norms: np.ndarray
    g: np.ndarray


@dataclass(frozen=True)
class AngleProblem:
    """A loss of m planar blocks, through their angles, and of one number g (which a loss may ignore).

    Attributes:
        blocks: their number m.
        value: from ``theta (..., m)`` and ``g (...)`` to the loss ``(...)``.
        gradient: from the same to the derivatives ``(..., m)`` and ``(...)``.
        constants: its constants.
    """

    blocks: int
    value: Callable[[np.ndarray, np.ndarray], np.ndarray]
    gradient: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    constants: Constants

    def start(
        self, theta: Sequence[float], norms: Sequence[float], g: float = 0.0, runs: tuple[int, ...] = ()
    ) -> State:
        """The same start for all runs: angles and squared norms of the m blocks, and g."""
        return State(
            np.broadcast_to(np.asarray(theta, float), (*runs, self.blocks)).copy(),
            np.broadcast_to(np.asarray(norms, float), (*runs, self.blocks)).copy(),
            np.full(runs, float(g)),
        )


def cosine(shift: np.ndarray | float = 0.0) -> AngleProblem:
    r"""Problem A, :math:`F(\theta) = -\cos(\theta - z) = -\langle e_z, w \rangle / \|w\|`: one block, no g.

    Its constant is :math:`2/\sqrt3`, its gradient at most 1. With a ``shift`` z that is drawn anew in every step,
    ``+delta`` or ``-delta``, it is the stochastic problem C; z broadcasts against ``theta[..., 0]``.

    >>> float(cosine().value(np.array([0.0]), np.array(0.0)))
    -1.0
    """

    def value(theta, g):
        return -np.cos(theta[..., 0] - shift)

    def gradient(theta, g):
        return np.sin(theta - np.asarray(shift)[..., None]), np.zeros_like(g)

    constants = Constants(np.array([[2 / np.sqrt(3)]]), np.zeros(1), 0.0, np.ones(1), -1.0)
    return AngleProblem(1, value, gradient, constants)


def coupled(
    p: Sequence[float] = (1.0, 0.5), q: Sequence[float] = (0.3, 0.0), r: float = 0.2, tolerance: float = 0.03
) -> AngleProblem:
    r"""Problem B, :math:`\log\cosh(g - \sum_i p_i \cos\theta_i) + \sum_i q_i \sin 2\theta_i + r \sin \sum_i \theta_i`.

    The constants are certified: suprema over all angles and all :math:`z = \tanh(g - \dots) \in [-1, 1]` by
    :func:`supremum`, and in closed form where there is one (:math:`L^{vg}_i = |p_i|`, :math:`L^{gg} = 1`).

    Args:
        p, q: m numbers each, m at most 2 (the certificate is a search in m + 1 dimensions).
        r: the coupling.
        tolerance: by how much the constants may exceed the suprema.
    """
    p, q = np.asarray(p, float), np.asarray(q, float)
    m = len(p)
    if m > 2:
        raise ValueError(f"at most two blocks, got {m}")

    def parts(theta, z):
        """First and second derivatives at given z, the mixed ones only for i = 0, j = 1."""
        total, sine = theta.sum(-1), np.sin(theta)
        slope = 1 - z**2
        first = z[..., None] * p * sine + 2 * q * np.cos(2 * theta) + (r * np.cos(total))[..., None]
        bend = r * np.sin(total)
        second = (
            slope[..., None] * (p * sine) ** 2
            + z[..., None] * p * np.cos(theta)
            - 4 * q * np.sin(2 * theta)
            - bend[..., None]
        )
        mixed = slope * (p[0] * sine[..., 0]) * (p[-1] * sine[..., -1]) - bend
        return first, second, mixed

    def value(theta, g):
        u = g - (p * np.cos(theta)).sum(-1)
        wave = (q * np.sin(2 * theta)).sum(-1) + r * np.sin(theta.sum(-1))
        return np.logaddexp(u, -u) - np.log(2) + wave

    def gradient(theta, g):
        z = np.tanh(g - (p * np.cos(theta)).sum(-1))
        wave = 2 * q * np.cos(2 * theta) + (r * np.cos(theta.sum(-1)))[..., None]
        return z[..., None] * p * np.sin(theta) + wave, z

    low, high = np.array([0.0] * m + [-1.0]), np.array([2 * np.pi] * m + [1.0])
    P, Q, R = abs(p), abs(q), abs(r)
    vv, slopes = np.empty((m, m)), np.empty(m)
    for i in range(m):
        # Bounds of the derivatives of the first and the second derivative along each of the m + 1 coordinates.
        first = np.array([R] * m + [P[i]])
        second = np.array([R] * m + [2 * P[i] ** 2 + P[i]])
        first[i], second[i] = P[i] + 4 * Q[i] + R, P[i] ** 2 + P[i] + 8 * Q[i] + R

        def slope_of(x, i=i):
            return np.abs(parts(x[..., :m], x[..., m])[0][..., i])

        def norm_of(x, i=i):
            first, second, _ = parts(x[..., :m], x[..., m])
            return planar_norm(first[..., i], second[..., i])

        slopes[i] = supremum(slope_of, first, low, high, tolerance)
        vv[i, i] = supremum(norm_of, first + second, low, high, tolerance)
    if m == 2:
        along = np.array([P[0] * P[1] + R, P[0] * P[1] + R, 2 * P[0] * P[1]])
        vv[0, 1] = vv[1, 0] = supremum(lambda x: np.abs(parts(x[..., :m], x[..., m])[2]), along, low, high, tolerance)
    constants = Constants(vv, P.copy(), 1.0, slopes, float(-Q.sum() - R))
    return AngleProblem(m, value, gradient, constants)


def planar_norm(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    r"""The norm of the Hessian of :math:`w \mapsto f(\text{angle of } w)` at a unit vector, from the derivatives of f.

    Euler's identity makes it :math:`\begin{pmatrix} 0 & -f' \\ -f' & f'' \end{pmatrix}` in the radial and the
    tangential direction, so its norm is :math:`\frac12 (|f''| + \sqrt{f''^2 + 4 f'^2})`.
    """
    return (np.abs(second) + np.hypot(second, 2 * first)) / 2


def supremum(
    function: Callable[[np.ndarray], np.ndarray],
    slopes: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    tolerance: float,
) -> float:
    """An upper bound of a function on a box that exceeds its supremum by at most ``tolerance``, by bisection.

    Cells that cannot hold a value above the best one seen are dropped, the others are split in two along their longest
    side (measured by what the function can gain along it). Certain up to rounding.

    Args:
        function: from points ``(n, d)`` to values ``(n,)``.
        slopes: bounds of the partial derivatives, ``(d,)``.
        low, high: corners of the box, ``(d,)``.
        tolerance: positive.

    >>> bound = supremum(lambda x: np.sin(x[..., 0]), [1.0], [0.0], [3.0], 1e-3)
    >>> 0 <= bound - 1 <= 1e-3
    True
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    slopes, low, high = (np.asarray(x, float) for x in (slopes, low, high))
    half = (high - low) / 2
    centers = ((low + high) / 2)[None]
    best = -np.inf
    while True:
        values = function(centers)
        best = max(best, values.max())
        gain = slopes * half
        if gain.sum() <= tolerance:
            return float(best + gain.sum())
        centers = centers[values + gain.sum() > best]
        longest = int(gain.argmax())
        half = half.copy()
        half[longest] /= 2
        move = np.zeros_like(half)
        move[longest] = half[longest]
        centers = np.concatenate([centers - move, centers + move])


def step(problem: AngleProblem, state: State, eta_w: np.ndarray | float, eta_g: np.ndarray | float = 0.0) -> State:
    """One step of gradient descent on the weights; the rates are numbers or ``(...)``, one a run."""
    first, slope = problem.gradient(state.theta, state.g)
    move = np.asarray(eta_w)[..., None] * first / state.norms
    return State(state.theta - np.arctan(move), state.norms * (1 + move**2), state.g - eta_g * slope)


class Track(NamedTuple):
    """What a run of :func:`descend` leaves; ``...`` are the runs.

    ``state``: after the last step. ``squares_v`` ``(..., m)`` and ``squares_g`` ``(...)``: sums of the squared
    intrinsic gradients. ``entered`` ``(..., m)``: the squared norm after the last step of phase one. ``least``
    ``(K, ...)``: the smallest intrinsic gradient norm of the first ``times`` ``(K,)`` steps, which are evenly spaced on
    a logarithmic axis. ``best`` ``(...)``: the largest value of T times the smallest squared gradient of the first T
    steps, over all T. ``increments`` ``(..., m)``: the sum of the squared increments of N. ``phase_one`` ``(..., m)``:
    the part of ``squares_v`` that belongs to phase one.
    """

    state: State
    squares_v: np.ndarray
    squares_g: np.ndarray
    entered: np.ndarray
    times: np.ndarray
    least: np.ndarray
    best: np.ndarray
    increments: np.ndarray
    phase_one: np.ndarray


def descend(
    problem: AngleProblem,
    state: State,
    steps: int,
    eta_w: np.ndarray | float,
    eta_g: np.ndarray | float = 0.0,
    threshold: np.ndarray | float = 0.0,
) -> Track:
    """``steps`` steps of gradient descent, and what Theorem 3.1 is about.

    Args:
        problem, state: the loss and the start.
        steps: the number T of steps.
        eta_w, eta_g: rates, numbers or ``(...)``.
        threshold: phase one of block i lasts while N_i is at most this; ``(..., m)``, Lemma A.2 takes 2 C_i eta_w.
    """
    theta, norms, g = state
    eta_w = np.asarray(eta_w, float)[..., None]
    squares_v, increments, phase_one = (np.zeros_like(norms) for _ in range(3))
    squares_g, best = np.zeros_like(g), np.zeros_like(g)
    smallest = np.full_like(g, np.inf)
    entered = norms
    times = np.unique(np.geomspace(1, steps, 60).astype(int))
    due, least = set(times.tolist()), []
    for t in range(1, steps + 1):
        first, slope = problem.gradient(theta, g)
        square_v, square_g = first**2, slope**2
        squares_v += square_v
        squares_g += square_g
        np.minimum(smallest, square_v.sum(-1) + square_g, out=smallest)
        np.maximum(best, t * smallest, out=best)
        move = eta_w * first / norms
        theta = theta - np.arctan(move)
        growth = norms * move**2
        increments += growth**2
        grown = norms + growth
        early = norms <= threshold
        entered = np.where(early, grown, entered)
        phase_one += early * square_v
        norms = grown
        g = g - eta_g * slope
        if t in due:
            least.append(np.sqrt(smallest))
    last = State(theta, norms, g)
    return Track(last, squares_v, squares_g, entered, times, np.array(least), best, increments, phase_one)


class Bounds(NamedTuple):
    """Bounds for a whole run: of the sums of squares, of the norms after phase one and at the end.

    ``v`` ``(...)``: of the summed squared gradients of all blocks; ``g`` ``(...)``: of the same in g (0 if there is
    none). ``entered``, ``final`` ``(..., m)``: of the squared norms. ``energy`` ``(...)``: what all are made of.
    ``phase_one`` ``(...)``: the part of ``v`` that bounds the gradients of phase one (of the improved bound only).
    """

    v: np.ndarray
    g: np.ndarray
    entered: np.ndarray
    final: np.ndarray
    energy: np.ndarray
    phase_one: np.ndarray | None = None


def _g_bound(energy, constants, c_g, eta_g):
    return 2 * energy / (c_g * eta_g) if constants.gg else np.zeros_like(energy)


def theorem_bounds(
    constants: Constants,
    gap: np.ndarray | float,
    norms: np.ndarray,
    eta_w: np.ndarray | float,
    eta_g: np.ndarray | float = 0.0,
    c_g: float = 0.5,
) -> Bounds:
    r"""Theorem 3.1 with every constant, as its proof gives it.

    :math:`\mathrm{energy} = \Delta + \sum_i K_i` with :math:`K_i` from (20), and
    :math:`\sum_t \sum_i \|\nabla_{v^{(i)}}\|^2 \le 4 (\mathrm{energy} + \sum_i N_i / \eta_w)\, \mathrm{energy}`,
    :math:`\sum_t \|\nabla_g\|^2 \le 2\, \mathrm{energy} / (c_g \eta_g)`.

    Args:
        constants: of the loss.
        gap: :math:`\Delta`, first loss minus its lower bound, ``(...)``.
        norms: squared norms at the start, ``(..., m)``.
        eta_w, eta_g: rates, ``(...)``.
        c_g: in (0, 1), with :math:`\eta_g \le 2 (1 - c_g) / L^{gg}`.
    """
    eta = np.asarray(eta_w, float)[..., None]
    C, gradient = constants.curvature(c_g), np.pi * np.diagonal(constants.vv)
    jump = 2 * C + gradient**2 * eta / norms
    energy = gap + ((C * eta / norms + 0.5) * jump).sum(-1)
    v = 4 * (energy + (norms / eta).sum(-1)) * energy
    final = norms + 2 * eta * energy[..., None]
    return Bounds(v, _g_bound(energy, constants, c_g, eta_g), norms + eta * jump, final, energy)


def improved_bounds(
    constants: Constants,
    gap: np.ndarray | float,
    norms: np.ndarray,
    eta_w: np.ndarray | float,
    eta_g: np.ndarray | float = 0.0,
    c_g: float = 0.5,
) -> Bounds:
    r"""Theorem 3.1 with blocks that travel along arcs in phase one: of order :math:`1/\eta_w + \eta_w`, up to logarithms.

    With :math:`S_i = \max(N_i, 2 C_i \eta_w + \eta_w^2 G_i^2 / N_i)` and
    :math:`\mathrm{energy} = \Delta + \sum_i C_i \ln(S_i / N_i)`,

    .. math:: \sum_t \sum_i \|\nabla_{v^{(i)}}\|^2 \le \sum_i 2 C_i \frac{S_i - N_i}{\eta_w}
              + 2\, \mathrm{energy} \Big( \max_i \frac{S_i}{\eta_w} + \mathrm{energy} \Big), \qquad
              \sum_t \|\nabla_g\|^2 \le \frac{2\, \mathrm{energy}}{c_g \eta_g} .

    Arguments as in :func:`theorem_bounds`.
    """
    eta = np.asarray(eta_w, float)[..., None]
    C = constants.curvature(c_g)
    entered = np.maximum(norms, 2 * C * eta + eta**2 * constants.gradient**2 / norms)
    energy = gap + (C * np.log(entered / norms)).sum(-1)
    phase_one = (2 * C * (entered - norms) / eta).sum(-1)
    v = phase_one + 2 * energy * ((entered / eta).max(-1) + energy)
    final = entered + 2 * eta * energy[..., None]
    return Bounds(v, _g_bound(energy, constants, c_g, eta_g), entered, final, energy, phase_one)
