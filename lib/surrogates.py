r"""The upper bounds of Ghauch et al. on the objective of one block, their minimizers, and when they really are upper bounds.

A surrogate :math:`g(V; W)` touches the objective at the base point: :math:`g(W; W) = f(W)`, :math:`\nabla g(W; W) =
\nabla f(W)`. It *majorizes* f if :math:`g(V; W) \ge f(V)` for all V. If it does (at the minimizer D is enough) and is
convex, then for every :math:`\alpha \in [0, 1]`

.. math:: f(W + \alpha(D - W)) \le g(W + \alpha(D - W)) \le (1 - \alpha)\, g(W) + \alpha\, g(D) \le f(W):

monotone descent without any schedule. (The first inequality needs the bound at the point reached; for :math:`\alpha = 1`
that is D.)

Shapes: a block has the batch dimensions of its problem in front, ``(...)``; see ``lib.block_problems``.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lib.block_problems import BlockProblem, layer_problem
from lib.constraints import (
    project_ball,
    project_circulant,
    project_l1_ball,
    project_nonnegative,
    project_toeplitz,
    soft_threshold,
)
from lib.majorization import (
    backtrack,
    block_lipschitz,
    certified_last_layer,
    certified_lipschitz,
    required_gamma,
    smallest_majorizing,
)

__all__ = [
    "BlockProblem", "FirstOrder", "Linear", "Proximal", "SecondOrder", "SparseFirstOrder", "Surrogate", "backtrack",
    "block_lipschitz", "certified_last_layer", "certified_lipschitz", "layer_problem", "project_ball",
    "project_circulant", "project_l1_ball", "project_nonnegative", "project_toeplitz", "required_gamma",
    "smallest_majorizing", "soft_threshold",
]  # fmt: skip


class Surrogate:
    """A convex model of a block problem around W.

    ``value(problem, W, V)`` is :math:`g(V; W)`, ``(...)``; ``minimizer(problem, W)`` is D, like W.
    """

    def at(self, gamma: float | Tensor) -> "Surrogate":
        """The same with another, unchecked, ``gamma``."""
        other = copy(self)
        object.__setattr__(other, "gamma", gamma)
        return other

    def select(self, part: slice | Tensor) -> "Surrogate":
        """The same for the runs at ``part`` alone: settings with one entry a run are cut to them."""
        return self._with_tensors(lambda value: value[part] if value.ndim else value)

    def to(self, like: Tensor) -> "Surrogate":
        """The same with settings of the device and type of ``like``."""
        return self._with_tensors(lambda value: value.to(like))

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Surrogate":
        other = copy(self)
        for field in fields(self):
            if isinstance(getattr(self, field.name), Tensor):
                object.__setattr__(other, field.name, change(getattr(self, field.name)))
        return other

    def value(self, problem: BlockProblem, W: Tensor, V: Tensor) -> Tensor:
        raise NotImplementedError

    def minimizer(self, problem: BlockProblem, W: Tensor) -> Tensor:
        raise NotImplementedError

    def penalty(self, V: Tensor, batch: int) -> Tensor | float:
        """The part of the objective that is not in ``problem`` (an L1 norm), for a block with ``batch`` batch dimensions."""
        return 0.0

    def excess(self, problem: BlockProblem, W: Tensor, V: Tensor) -> Tensor:
        r""":math:`f(V) - g(V; W)`, positive where the surrogate fails to be an upper bound; ``(...)``."""
        f = problem.value(V)
        return f + self.penalty(V, f.ndim) - self.value(problem, W, V)


@dataclass(frozen=True)
class FirstOrder(Surrogate):
    r"""The first-order proximal surrogate (9).

    .. math:: g(V; W) = f(W) + \langle \nabla f(W), V - W \rangle + \frac\gamma2 \|V - W\|_F^2, \qquad
              D = W - \gamma^{-1} \nabla f(W) \quad (10).

    Strongly convex with modulus :math:`\gamma`. Majorizes if :math:`\gamma \ge L`, the Lipschitz constant of
    :math:`\nabla f` (the descent lemma: with :math:`S = V - W`, :math:`f(V) - f(W) - \langle \nabla f(W), S \rangle =
    \int_0^1 (1 - t) \langle S, \nabla^2 f(W + tS) S \rangle dt \le \frac L2 \|S\|^2`); the largest eigenvalue of the
    Hessian over the segment is enough.

    Args:
        gamma: positive, a number or one for each run.
        project: projection onto a closed convex set (``lib.constraints``); D is then the projection of the D above, the
            exact minimizer on the set.

    Raises:
        ValueError: if ``gamma`` is not positive and finite.
    """

    gamma: float | Tensor
    project: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        _check_positive("gamma", self.gamma)

    def value(self, problem: BlockProblem, W: Tensor, V: Tensor) -> Tensor:
        f = problem.value(W)
        S = V - W
        return f + _inner(problem.gradient(W), S, f.ndim) + self.gamma / 2 * _inner(S, S, f.ndim)

    def minimizer(self, problem: BlockProblem, W: Tensor) -> Tensor:
        D = W - problem.gradient(W) / _like(self.gamma, W)
        return D if self.project is None else self.project(D)


@dataclass(frozen=True)
class SecondOrder(Surrogate):
    r"""The second-order proximal surrogate (A.1), with vec(V) where the paper's trace does not type-check.

    .. math:: g(V; W) = f(W) + \langle \nabla f, S \rangle + \tfrac12 \langle S, (\nabla^2 f + \gamma I) S \rangle,
              \quad S = V - W, \qquad D = W - (\nabla^2 f + \gamma I)^{-1} \nabla f \quad (A.2).

    Convex exactly for :math:`\gamma \ge -\lambda_{min}(\nabla^2 f(W))`, and D is its minimizer only for a strict
    inequality: below, D is a saddle of the model, and D - W can be an ascent direction. Majorizes if
    :math:`\gamma \ge \sup_V \lambda_{max}(\nabla^2 f(V) - \nabla^2 f(W))`, at most 2L. With the Gauss-Newton matrix as
    the problem's ``hessian`` the unit step is Levenberg and Marquardt's.

    Args:
        gamma: not negative, a number or one for each run.
        convexify: use :math:`\gamma - \min(0, \lambda_{min})` for :math:`\gamma`. Calls ``torch.linalg.eigvalsh``, which
            may synchronize on a GPU.

    Raises:
        ValueError: if ``gamma`` is negative or not finite.
    """

    gamma: float | Tensor
    convexify: bool = False

    def __post_init__(self):
        _check_positive("gamma", self.gamma, or_zero=True)

    def value(self, problem: BlockProblem, W: Tensor, V: Tensor) -> Tensor:
        f = problem.value(W)
        H = self._matrix(problem, W)
        S = V - W
        s = S.reshape(*f.shape, -1)
        quadratic = torch.linalg.vecdot(s, (H @ s.unsqueeze(-1)).squeeze(-1))
        return f + _inner(problem.gradient(W), S, f.ndim) + quadratic / 2

    def minimizer(self, problem: BlockProblem, W: Tensor) -> Tensor:
        H = self._matrix(problem, W)
        g = problem.gradient(W).reshape(*H.shape[:-1], 1)
        return W - torch.linalg.solve_ex(H, g).result.reshape(W.shape)

    def _matrix(self, problem: BlockProblem, W: Tensor) -> Tensor:
        H = problem.hessian(W)
        gamma = self.gamma
        if self.convexify:
            gamma = gamma - torch.linalg.eigvalsh(H.nan_to_num(0.0, 0.0, 0.0))[..., 0].clamp(max=0)
        eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
        return H + (gamma[..., None, None] if isinstance(gamma, Tensor) and gamma.ndim else gamma) * eye


@dataclass(frozen=True)
class Proximal(Surrogate):
    r"""The proximal surrogate (14).

    .. math:: g(V; W) = f(V) + \frac\gamma2 \|V - W\|_F^2.

    Majorizes every f, for every :math:`\gamma \ge 0`. Convex, with a unique minimizer, if :math:`\gamma >
    -\inf \lambda_{min}(\nabla^2 f)`; otherwise ``minimizer`` returns a stationary point of g with :math:`g(D) \le g(W)`.

    The minimizer comes from damped Newton steps on g: the matrix :math:`\nabla^2 f + \gamma I` is shifted until it is
    positive definite, and a step is halved until it satisfies Armijo's condition. Reads from the device after each of
    these, to stop when all runs have arrived, and calls ``torch.linalg.eigh``, which may synchronize.

    Args:
        gamma: positive, a number or one for each run.
        tolerance: stop at :math:`\|\nabla g\| \le` this.
        steps: most Newton steps.

    Raises:
        ValueError: if ``gamma`` is not positive and finite.
    """

    gamma: float | Tensor
    tolerance: float = 1e-11
    steps: int = 100

    def __post_init__(self):
        _check_positive("gamma", self.gamma)

    def value(self, problem: BlockProblem, W: Tensor, V: Tensor) -> Tensor:
        f = problem.value(V)
        S = V - W
        return f + self.gamma / 2 * _inner(S, S, f.ndim)

    def minimizer(self, problem: BlockProblem, W: Tensor) -> Tensor:
        V = W
        g = self.value(problem, W, V)
        for _ in range(self.steps):
            slope = problem.gradient(V) + _like(self.gamma, W) * (V - W)
            size = _inner(slope, slope, g.ndim).sqrt()
            if bool((~(size > self.tolerance)).all()):
                break
            direction = -self._newton(problem, V, slope, g)
            V, g = self._search(problem, W, V, g, direction, _inner(slope, direction, g.ndim))
        return V

    def _newton(self, problem: BlockProblem, V: Tensor, slope: Tensor, g: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(problem.hessian(V).nan_to_num(0.0, 0.0, 0.0))
        values = values + (self.gamma[..., None] if isinstance(self.gamma, Tensor) and self.gamma.ndim else self.gamma)
        floor = 1e-8 * values.abs().amax(-1, keepdim=True)
        coordinates = vectors.mT @ slope.reshape(*g.shape, -1, 1)
        return (vectors @ (coordinates / values.abs().maximum(floor).unsqueeze(-1))).reshape(V.shape)

    def _search(self, problem, W, V, g, direction, slope_along):
        """Armijo's rule, run by run: halve the step until g falls by 1e-4 of what its slope promises."""
        t = torch.ones_like(g)
        rounding = 4 * torch.finfo(g.dtype).eps * g.abs()
        for _ in range(40):
            trial = V + _like(t, V) * direction
            value = self.value(problem, W, trial)
            accepted = value <= g + 1e-4 * t * slope_along + rounding
            if bool(accepted.all()):
                break
            t = torch.where(accepted, t, t / 2)
        accepted = _like(accepted, V)
        return torch.where(accepted, trial, V), torch.where(accepted.reshape(g.shape), value, g)


@dataclass(frozen=True)
class Linear(Surrogate):
    r"""The linear surrogate of appendix A.5, on the ball :math:`\|V\|_F \le` ``radius``.

    .. math:: g(V; W) = f(W) + \langle \nabla f(W), V - W \rangle, \qquad
              D = -\mathrm{radius}\, \nabla f(W) / \|\nabla f(W)\|_F.

    Majorizes if f is concave. Never strongly convex, and without a bounded set it has no minimizer: the paper's
    :math:`D = \nabla f` has the wrong sign, and (A.3) as printed is gradient descent on :math:`f + \frac12\|W\|^2`. With
    steps (7) this is the method of Frank and Wolfe. Where the gradient is zero, D is the base point, scaled into the ball.

    Args:
        radius: positive, a number or one for each run; :math:`\sqrt{\rho/\lambda}` for :math:`\lambda\|V\|^2 \le \rho`.

    Raises:
        ValueError: if ``radius`` is not positive and finite.
    """

    radius: float | Tensor

    def __post_init__(self):
        _check_positive("radius", self.radius)

    def value(self, problem: BlockProblem, W: Tensor, V: Tensor) -> Tensor:
        f = problem.value(W)
        return f + _inner(problem.gradient(W), V - W, f.ndim)

    def minimizer(self, problem: BlockProblem, W: Tensor) -> Tensor:
        g = problem.gradient(W)
        batch = problem.value(W).ndim
        norm = _like(_inner(g, g, batch).sqrt(), W)
        size = _like(_inner(W, W, batch).sqrt(), W)
        radius = _like(self.radius, W)
        inside = W * (radius / size).nan_to_num(nan=1.0).clamp(max=1)
        return torch.where(norm > 0, -radius * g / norm, inside)


@dataclass(frozen=True)
class SparseFirstOrder(Surrogate):
    r"""The first-order surrogate with an L1 regularizer kept exactly, (A.4) and (A.5).

    For the objective :math:`f(V) + \lambda \|V\|_1`, f the smooth part (``problem``),

    .. math:: g(V; W) = f(W) + \langle \nabla f(W), V - W \rangle + \frac\gamma2 \|V - W\|_F^2 + \lambda\|V\|_1, \qquad
              D = \mathrm{soft}(W - \gamma^{-1} \nabla f(W),\ \lambda/\gamma).

    Strongly convex with modulus :math:`\gamma`. Majorizes under the condition of :class:`FirstOrder` on the smooth part.
    With :math:`\alpha < 1`, (7) averages D with the old weights: exact zeros are then in D, not in W.

    Args:
        gamma: positive, a number or one for each run.
        weight: :math:`\lambda \ge 0`, a number or one for each run.

    Raises:
        ValueError: if ``gamma`` is not positive and finite, or ``weight`` negative or not finite.
    """

    gamma: float | Tensor
    weight: float | Tensor

    def __post_init__(self):
        _check_positive("gamma", self.gamma)
        _check_positive("weight", self.weight, or_zero=True)

    def value(self, problem: BlockProblem, W: Tensor, V: Tensor) -> Tensor:
        f = problem.value(W)
        S = V - W
        smooth = f + _inner(problem.gradient(W), S, f.ndim) + self.gamma / 2 * _inner(S, S, f.ndim)
        return smooth + self.penalty(V, f.ndim)

    def minimizer(self, problem: BlockProblem, W: Tensor) -> Tensor:
        smooth = W - problem.gradient(W) / _like(self.gamma, W)
        return soft_threshold(smooth, _like(self.weight / self.gamma, W))

    def penalty(self, V: Tensor, batch: int) -> Tensor:
        return self.weight * _total(V.abs(), batch)


def _inner(A: Tensor, B: Tensor, batch: int) -> Tensor:
    return _total(A * B, batch)


def _total(A: Tensor, batch: int) -> Tensor:
    """The sum over all but the first ``batch`` dimensions."""
    return A.reshape(*A.shape[:batch], -1).sum(-1)


def _like(value: Tensor | float, V: Tensor) -> Tensor | float:
    """A number for each run, shaped to multiply blocks."""
    return value.reshape(*value.shape, *[1] * (V.ndim - value.ndim)) if isinstance(value, Tensor) else value


def _check_positive(name: str, value: float | Tensor, *, or_zero: bool = False) -> None:
    least = "zero or positive, and finite" if or_zero else "positive and finite"
    if isinstance(value, Tensor):
        if value.is_meta:
            return
        bad = value[~(((value >= 0) if or_zero else (value > 0)) & value.isfinite())]
        if bad.numel():
            raise ValueError(f"{name} must be {least} in every run, got {bad.flatten()[:3].tolist()}")
    elif not (0 <= value < float("inf") if or_zero else 0 < value < float("inf")):
        raise ValueError(f"{name} must be {least}, got {value}")
