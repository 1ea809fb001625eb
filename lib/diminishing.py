r"""Algorithm 1 of Ma and Klabjan, literally: the full gradient, two layers, any number of runs at once.

The network is :math:`z = a(W_1x)`, :math:`y_j = \gamma_j(z_j-\mu_j)/(\sigma_j+\varepsilon_B) + \beta_j`,
:math:`o = a_2(W_2y)`, eqs. (3)-(4), and the objective :math:`\bar f(\theta,\lambda) = \sum_i l_i(o_i)` is a SUM over the
N samples. The trained parameters are :math:`\theta = (W_1, W_2, \beta, \gamma)`; the averages
:math:`\lambda = (\mu, \sigma)` are not trained. The batch statistics of a :math:`\theta` are :math:`s(\theta)`, and
:math:`V(\theta) = \bar f(\theta, s(\theta))` is what batch normalization minimizes.

Shapes: every function takes runs as leading axes ``...``. ``W1`` is ``(..., D, d)``, ``W2`` ``(..., K, D)``, and ``beta``,
``gamma``, ``mean``, ``std`` are ``(..., D)``. float64 is meant. All functions but ``run`` are differentiable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.backpropagation import IDENTITY, LOGISTIC, SOFTPLUS, TANH, Activation
from lib.schedules import Schedule

__all__ = [
    "IDENTITY", "LOGISTIC", "RELU", "SOFTPLUS", "TANH", "Activation", "LogPower", "Problem", "Record", "ShiftedPower",
    "Statistics", "Theta", "gain_offset", "gradient", "lambda_gradient", "objective", "outputs", "run", "statistics",
    "statistics_gradients", "true_gradient",
]  # fmt: skip

RELU = Activation("relu", torch.relu, lambda z: (z > 0).to(z.dtype), torch.zeros_like)


class Theta(NamedTuple):
    r"""The trained parameters :math:`\theta`, or a gradient of their shape."""

    W1: Tensor
    W2: Tensor
    beta: Tensor
    gamma: Tensor

    def flat(self) -> Tensor:
        """All entries of a run in one row, ``(..., D d + K D + 2 D)``, in the order of the fields."""
        return torch.cat([self.W1.flatten(-2), self.W2.flatten(-2), self.beta, self.gamma], -1)

    def norm(self) -> Tensor:
        """The Euclidean norm over all entries of a run, ``(...)``."""
        return torch.linalg.vector_norm(self.flat(), dim=-1)


class Statistics(NamedTuple):
    r"""The averages :math:`\lambda = (\mu, \sigma)`, or batch statistics."""

    mean: Tensor
    std: Tensor

    def flat(self) -> Tensor:
        """``(..., 2 D)``: the means, then the deviations."""
        return torch.cat([self.mean, self.std], -1)


class _Loss(NamedTuple):
    value: Callable[[Tensor, Tensor], Tensor]  # (..., K, N) and (K, N) to (..., N)
    slope: Callable[[Tensor, Tensor], Tensor]  # by the outputs, (..., K, N)


_LOSSES = {
    "squared": _Loss(lambda o, y: (o - y).square().sum(-2) / 2, torch.sub),
    "logistic": _Loss(lambda o, y: F.softplus(-y * o, threshold=50).sum(-2), lambda o, y: -y * torch.sigmoid(-y * o)),
    "softmax": _Loss(lambda o, y: -(y * o.log_softmax(-2)).sum(-2), lambda o, y: o.softmax(-2) - y),
}


@dataclass(frozen=True)
class Problem:
    r"""Samples, activations and a loss.

    Args:
        inputs: ``(N, d)``.
        targets: ``(N, K)``: numbers for ``squared``, :math:`\pm1` for ``logistic``, rows that sum to 1 for ``softmax``.
        activation: a, of the hidden layer.
        output_activation: of the output layer; None: a, as in the paper.
        loss: ``squared`` (:math:`\frac12\|o-y\|^2`), ``logistic`` (:math:`\sum_k\ln(1+e^{-y_ko_k})`) or ``softmax``.
        eps: :math:`\varepsilon_B`, added to :math:`\sigma`.

    Raises:
        ValueError: for a loss of another name, or inputs and targets that are not two matrices with the same N.
    """

    inputs: Tensor
    targets: Tensor
    activation: Activation = TANH
    output_activation: Activation | None = None
    loss: str = "squared"
    eps: float = 1e-5

    def __post_init__(self):
        if self.loss not in _LOSSES:
            raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {self.loss!r}")
        if self.inputs.ndim != 2 or self.targets.ndim != 2 or len(self.inputs) != len(self.targets):
            shapes = tuple(self.inputs.shape), tuple(self.targets.shape)
            raise ValueError(f"inputs must be (N, d) and targets (N, K), got shapes {shapes[0]} and {shapes[1]}")

    @property
    def last(self) -> Activation:
        """The activation of the output layer."""
        return self.activation if self.output_activation is None else self.output_activation


def statistics(problem: Problem, W1: Tensor) -> Statistics:
    r""":math:`s(\theta)`: mean and standard deviation (with 1/N) of each hidden unit, lines 5 and 6 of Algorithm 1."""
    return _statistics_of(problem.activation.value(W1 @ problem.inputs.mT))


def statistics_gradients(problem: Problem, W1: Tensor) -> tuple[Tensor, Tensor]:
    r"""The derivatives of a unit's mean and deviation by its own weights, each ``(..., D, d)``.

    :math:`\nabla\mu = \frac1N\sum_ia'(u_i)x_i` and :math:`\nabla\sigma = \frac1{N\sigma}\sum_i(z_i-\mu)a'(u_i)x_i`. Where
    :math:`\sigma = 0` there is no derivative, and the second one is given as 0.
    """
    N = len(problem.inputs)
    z = problem.activation.value(W1 @ problem.inputs.mT)
    mean, std = _statistics_of(z)
    slope = problem.activation.slope_at_output(z)
    std_gradient = ((z - mean.unsqueeze(-1)) * slope) @ problem.inputs / (N * std.unsqueeze(-1))
    return slope @ problem.inputs / N, torch.where(std.unsqueeze(-1) > 0, std_gradient, 0.0)


def gain_offset(theta: Theta, lam: Statistics, eps: float) -> tuple[Tensor, Tensor]:
    r"""The affine map :math:`y = \hat g z + \hat b` that the layer is: :math:`\hat g = \gamma/(\sigma+\varepsilon_B)`,
    :math:`\hat b = \beta - \hat g\mu`; each ``(..., D)``."""
    gain = theta.gamma / (lam.std + eps)
    return gain, theta.beta - gain * lam.mean


def outputs(problem: Problem, theta: Theta, lam: Statistics) -> Tensor:
    """The outputs of the network, eq. (4); ``(..., N, K)``."""
    return _forward(problem, theta, lam)[-1].mT


def objective(problem: Problem, theta: Theta, lam: Statistics) -> Tensor:
    r""":math:`\bar f(\theta, \lambda)`, eq. (1), the sum over the samples; ``(...)``."""
    return _LOSSES[problem.loss].value(_forward(problem, theta, lam)[-1], problem.targets.mT).sum(-1)


def gradient(problem: Problem, theta: Theta, lam: Statistics) -> Theta:
    r""":math:`\nabla_\theta\bar f(\theta, \lambda)` with :math:`\lambda` held fixed, eq. (2)."""
    z, normal, y, o = _forward(problem, theta, lam)
    do, dy = _backward(problem, theta, y, o)
    dz = dy * (theta.gamma / (lam.std + problem.eps)).unsqueeze(-1) * problem.activation.slope_at_output(z)
    return Theta(dz @ problem.inputs, do @ y.mT, dy.sum(-1), (dy * normal).sum(-1))


def lambda_gradient(problem: Problem, theta: Theta, lam: Statistics) -> Statistics:
    r""":math:`\nabla_\lambda\bar f(\theta, \lambda)`, by the chain rule through :math:`(z-\mu)/(\sigma+\varepsilon_B)`."""
    _, normal, y, o = _forward(problem, theta, lam)
    _, dy = _backward(problem, theta, y, o)
    scale = theta.gamma / (lam.std + problem.eps)
    return Statistics(-(dy * scale.unsqueeze(-1)).sum(-1), -(dy * normal * scale.unsqueeze(-1)).sum(-1))


def true_gradient(problem: Problem, theta: Theta) -> Theta:
    r""":math:`\nabla V(\theta)`, through the batch statistics, as batch normalization differentiates.

    Only :math:`W_1` enters :math:`s(\theta)`, so only that block of :math:`\nabla_\theta\bar f` changes: its row j gets
    :math:`\partial_{\mu_j}\bar f\,\nabla\mu_j + \partial_{\sigma_j}\bar f\,\nabla\sigma_j`.
    """
    lam = statistics(problem, theta.W1)
    plain, through = gradient(problem, theta, lam), lambda_gradient(problem, theta, lam)
    mean, std = statistics_gradients(problem, theta.W1)
    return plain._replace(W1=plain.W1 + through.mean.unsqueeze(-1) * mean + through.std.unsqueeze(-1) * std)


@dataclass(frozen=True)
class ShiftedPower(Schedule):
    r""":math:`c\,(m+m_0)^{-p}`: a power that starts late, so that its first step can be small and its decay slow."""

    c: float
    p: float
    shift: float

    def __call__(self, k: int) -> float:
        return float(self.c * (k + self.shift) ** -self.p)

    def first(self, K: int) -> Tensor:
        return self.c * (torch.arange(1, K + 1, dtype=torch.float64) + self.shift) ** -self.p


@dataclass(frozen=True)
class LogPower(Schedule):
    r""":math:`m^{-h}(\ln m)^{-p}`, the borderline of power laws; 1 at m = 1, where the formula has no value."""

    h: float
    p: float

    def __call__(self, k: int) -> float:
        return float(self.first(k)[-1])

    def first(self, K: int) -> Tensor:
        m = torch.arange(1, K + 1, dtype=torch.float64)
        return torch.where(m > 1, m**-self.h * m.log() ** -self.p, 1.0)


class Record(NamedTuple):
    r"""What ``run`` has seen of R runs of M steps.

    ``iterations`` ``(T,)`` lists the recorded m; ``theta`` and ``lam`` hold :math:`\theta^{(m)}`, :math:`\lambda^{(m)}`
    there, with the leading axes ``(T, R)``, so that every function of this module evaluates all of them at once.
    ``gradient_norm`` ``(M, R)`` is :math:`\|\nabla\bar f(\theta^{(m)},\lambda^{(m)})\|` at every step, ``increment``
    ``(M, R)`` is :math:`\|\lambda^{(m+1)}-\lambda^{(m)}\|_\infty`; each None unless asked for. ``eta`` and ``alpha``
    ``(M, R)`` are :math:`\eta^{(m)}` and :math:`\alpha^{(m+1)}` of the M steps.
    """

    iterations: Tensor
    theta: Theta
    lam: Statistics
    gradient_norm: Tensor | None
    increment: Tensor | None
    eta: Tensor
    alpha: Tensor


@torch.no_grad()
def run(
    problem: Problem,
    theta: Theta,
    lam: Statistics | None,
    eta: Tensor | Schedule | float | Sequence[Schedule | float],
    alpha: Tensor | Schedule | float | Sequence[Schedule | float],
    steps: int,
    *,
    record_every: int | Sequence[int] | None = None,
    quantities: Sequence[str] = ("gradient_norm",),
) -> Record:
    r"""R runs of Algorithm 1.

    Args:
        problem: the samples, shared by all runs.
        theta: :math:`\theta^{(1)}`, with the leading axis R.
        lam: :math:`\lambda^{(1)}`, ``(R, D)`` each; None: the batch statistics of :math:`\theta^{(1)}`.
        eta: :math:`\eta^{(1)}, \dots, \eta^{(M)}` as a schedule or a number, one of these for each run, or a
            table ``(M,)`` or ``(M, R)``.
        alpha: likewise :math:`\alpha^{(2)}, \dots, \alpha^{(M+1)}` (:math:`\alpha^{(1)}` is never used). Schedules are
            cut off at 1; the first row of a table is :math:`\alpha^{(2)}`.
        steps: M.
        record_every: record :math:`m = 1, 1+r, 1+2r, \dots` up to M + 1, or the m of a list; None: the first and the last.
        quantities: of ``gradient_norm`` and ``increment``, those to keep at every step.

    Raises:
        ValueError: for a quantity of another name, recorded m outside 1 to M + 1, or tables that do not fit.
    """
    if unknown := set(quantities) - {"gradient_norm", "increment"}:
        raise ValueError(f"quantities must be gradient_norm or increment, got {', '.join(sorted(unknown))}")
    R, D, d = theta.W1.shape
    K, X, Y = theta.W2.shape[1], problem.inputs, problem.targets.mT
    sizes, like = [D * d, K * D, D, D], {"dtype": theta.W1.dtype, "device": theta.W1.device}
    etas = _table(eta, steps, R, 0).to(**like)
    alphas = _table(alpha, steps, R, 1).to(**like)
    iterations = _iterations(record_every, steps)

    flat = theta.flat().clone()  # one row a run: the update is then one operation, and so is the norm
    W1, W2, beta, gamma = _blocks(flat, D, d, K)
    beta, gamma = beta.unsqueeze(-1), gamma.unsqueeze(-1)
    inputs, transposed = X.expand(R, *X.shape), X.mT.expand(R, *X.mT.shape)
    act, act_slope = problem.activation.value, problem.activation.slope_at_output
    last, last_slope = problem.last.value, problem.last.slope_at_output
    slope = _LOSSES[problem.loss].slope
    z = act(torch.bmm(W1, transposed))
    averages = torch.stack(_statistics_of(z) if lam is None else lam).clone()  # (2, R, D)
    mean, std = averages.unsqueeze(-1)

    kept = {name: torch.empty(steps, R, **like) for name in quantities}
    norms, increments = kept.get("gradient_norm"), kept.get("increment")
    wanted = set(iterations.tolist())
    seen_theta, seen_lam = [], []
    negative = [row.unsqueeze(-1) for row in (-etas).unbind()]
    weights = [row.unsqueeze(-1) for row in alphas.unbind()]
    for m in range(1, steps + 2):
        if m in wanted:
            seen_theta.append(flat.clone())
            seen_lam.append(averages.clone())
        if m > steps:
            break
        scale = (std + problem.eps).reciprocal_()
        normal = (z - mean).mul_(scale)
        y = torch.addcmul(beta, gamma, normal)
        o = last(torch.bmm(W2, y))
        do = slope(o, Y).mul_(last_slope(o))
        dy = torch.bmm(W2.mT, do)
        dz = (dy * scale.mul_(gamma)).mul_(act_slope(z))
        parts = torch.bmm(dz, inputs), torch.bmm(do, y.mT), dy.sum(-1), normal.mul_(dy).sum(-1)
        g = torch.cat([part.view(R, size) for part, size in zip(parts, sizes, strict=True)], 1)
        flat.addcmul_(negative[m - 1], g)
        if norms is not None:
            torch.linalg.vector_norm(g, dim=1, out=norms[m - 1])
        z = act(torch.bmm(W1, transposed))
        step = torch.stack(_statistics_of(z)).sub_(averages).mul_(weights[m - 1])
        averages.add_(step)
        if increments is not None:
            torch.amax(step.abs_(), dim=(0, 2), out=increments[m - 1])

    seen, lams = torch.stack(seen_theta), torch.stack(seen_lam, 1)
    return Record(
        iterations, Theta(*_blocks(seen, D, d, K)), Statistics(*lams), norms, increments, etas, alphas
    )  # fmt: skip


def _statistics_of(z: Tensor) -> Statistics:
    variance, mean = torch.var_mean(z, -1, correction=0)
    return Statistics(mean, variance.sqrt())


def _forward(problem: Problem, theta: Theta, lam: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden units, normalized units, y, and outputs; samples last."""
    z = problem.activation.value(theta.W1 @ problem.inputs.mT)
    normal = (z - lam.mean.unsqueeze(-1)) / (lam.std + problem.eps).unsqueeze(-1)
    y = theta.gamma.unsqueeze(-1) * normal + theta.beta.unsqueeze(-1)
    return z, normal, y, problem.last.value(theta.W2 @ y)


def _backward(problem: Problem, theta: Theta, y: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives by the arguments of the output activation, and by y."""
    do = _LOSSES[problem.loss].slope(o, problem.targets.mT) * problem.last.slope_at_output(o)
    return do, theta.W2.mT @ do


def _blocks(flat: Tensor, D: int, d: int, K: int) -> list[Tensor]:
    W1, W2, beta, gamma = flat.split([D * d, K * D, D, D], -1)
    return [W1.unflatten(-1, (D, d)), W2.unflatten(-1, (K, D)), beta, gamma]


def _table(values: Tensor | Schedule | float | Sequence[Schedule | float], steps: int, R: int, later: int) -> Tensor:
    """``(M, R)``; of a schedule the entries from m = 1 + later on, and those of weights (later = 1) are cut off at 1."""
    if not isinstance(values, Tensor):
        several = values if isinstance(values, (list, tuple)) else [values]
        columns = [
            one.first(steps + later)[later:] if isinstance(one, Schedule) else _full(steps, one) for one in several
        ]
        values = torch.stack(columns, 1)
        values = values.clamp(max=1.0) if later else values
    if values.ndim == 1:
        values = values.unsqueeze(1)
    if len(values) != steps or values.shape[1] not in (1, R):
        raise ValueError(f"a table must be ({steps},) or ({steps}, {R}), got shape {tuple(values.shape)}")
    return values.expand(steps, R)


def _full(steps: int, value: float) -> Tensor:
    return torch.full((steps,), float(value), dtype=torch.float64)


def _iterations(record_every: int | Sequence[int] | None, steps: int) -> Tensor:
    if record_every is None:
        return torch.tensor([1, steps + 1])
    if isinstance(record_every, int):
        return torch.arange(1, steps + 2, record_every)
    found = torch.as_tensor(sorted(set(record_every)))
    if not len(found) or found[0] < 1 or found[-1] > steps + 1:
        raise ValueError(f"recorded iterations must be between 1 and {steps + 1}, got {record_every}")
    return found
