r"""Gradient descent with and without batch normalization on ordinary least squares, exactly and for many runs at once.

The problem is :math:`\min_w \tfrac12 E[(y-x^Tw)^2]` with :math:`H=E[xx^T]`, :math:`g=E[xy]`, :math:`u=H^{-1}g`. By the
rotation law (Proposition 3.2 (1) of Cai, Li and Shen, as corrected in chapter 3) :math:`H` is diagonal without loss of
generality. Layout: the last dimension is the coordinate (``d``), every leading one is a run. All is float64.

Notation of the paper: :math:`\sigma=\sqrt{w^THw}`, :math:`y=w^Tg`, :math:`\alpha=y/\sigma`, :math:`U=u^THu`,
:math:`e=u-(y/\sigma^2)w`, :math:`q=\|e\|_H^2`, :math:`\hat\varepsilon=\varepsilon a y/\sigma^3`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

CHUNK_BYTES_PER_VALUE = 32  # the iterate, H times it, and two temporaries of the same shape while a chunk starts


@dataclass(frozen=True)
class LeastSquares:
    """A least-squares problem in the eigenbasis of H.

    ``eigenvalues``: ``(d,)``, positive. ``minimizer``: ``(d,)``, or ``(B, d)`` for one minimizer a run; not zero. Raises
    ``ValueError`` for anything else.
    """

    eigenvalues: Tensor
    minimizer: Tensor

    def __post_init__(self):
        lam, u = self.eigenvalues, self.minimizer
        if lam.dim() != 1 or not (lam.device.type == "meta" or bool((torch.isfinite(lam) & (lam > 0)).all())):
            raise ValueError(f"eigenvalues must be a vector of positive numbers, got {lam}")
        if u.shape[-1] != len(lam):
            raise ValueError(
                f"minimizer must have {len(lam)} entries in its last dimension, got shape {tuple(u.shape)}"
            )
        if lam.device.type != "meta" and not bool((u != 0).any(-1).all()):
            raise ValueError("minimizer must not be zero: with u = 0 there is nothing to learn (g = 0)")
        if lam.dtype != torch.float64 or u.dtype != torch.float64:
            raise ValueError(f"eigenvalues and minimizer must be float64, got {lam.dtype} and {u.dtype}")

    @property
    def correlation(self) -> Tensor:
        """:math:`g=Hu`, eq. (1); shape of ``minimizer``."""
        return self.eigenvalues * self.minimizer

    @property
    def energy(self) -> Tensor:
        """:math:`U=u^THu`, twice the excess loss at :math:`a=0`."""
        return torch.linalg.vecdot(self.minimizer, self.correlation)

    @property
    def condition_number(self) -> float:
        r""":math:`\kappa=\lambda_{max}/\lambda_{min}`."""
        return float(self.eigenvalues.max() / self.eigenvalues.min())

    @property
    def optimal_step(self) -> float:
        r""":math:`\varepsilon_{opt}=2/(\lambda_{max}+\lambda_{min})`, eq. (5): best for :math:`k\to\infty`, not for each k."""
        return float(2 / (self.eigenvalues.max() + self.eigenvalues.min()))

    def norm_squared(self, x: Tensor) -> Tensor:
        """:math:`\\|x\\|_H^2=x^THx` over the last dimension."""
        return torch.linalg.vecdot(x, self.eigenvalues * x)


def log_spectrum(dimension: int, condition_number: float, device: torch.device | str = "cpu") -> Tensor:
    r"""Eigenvalues ``logspace(0, log10(kappa), d)``, Figures 1 and 5 of the paper; shape ``(d,)``."""
    _check_spectrum(dimension, condition_number)
    exponents = torch.linspace(0, 1, dimension, dtype=torch.float64, device=device)
    return condition_number**exponents


def linear_spectrum(dimension: int, condition_number: float, device: torch.device | str = "cpu") -> Tensor:
    """Eigenvalues ``linspace(1, kappa, d)``, Figures 6 to 8 of the paper; shape ``(d,)``."""
    _check_spectrum(dimension, condition_number)
    return torch.linspace(1, condition_number, dimension, dtype=torch.float64, device=device)


def sphere(shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Points uniform on the unit sphere of the last dimension, drawn on the CPU so that a seed means the same everywhere."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)).to(device)


@dataclass(frozen=True)
class State:
    """Iterates of ``B`` runs: ``a`` ``(B,)``, ``w`` ``(B, d)``, ``diverged_at`` ``(B,)`` (the step at which a non-finite
    iterate was seen, at most one step late; -1 for none)."""

    a: Tensor
    w: Tensor
    diverged_at: Tensor

    @property
    def ok(self) -> Tensor:
        """``(B,)`` booleans: the run stayed finite."""
        return self.diverged_at < 0


@dataclass(frozen=True)
class Observables:
    r"""What the paper reads off an iterate, each ``(B,)`` but ``e`` ``(B, d)``: ``sigma``, ``y``, ``alpha``, ``e``,
    ``q`` = :math:`\|e\|_H^2` (from e itself: :math:`U-\alpha^2` cancels), ``effective_step`` =
    :math:`\varepsilon a y/\sigma^3` (11), and ``loss`` = the excess loss :math:`\tfrac12(q+(a-\alpha)^2)` (70)."""

    sigma: Tensor
    y: Tensor
    alpha: Tensor
    e: Tensor
    q: Tensor
    effective_step: Tensor
    loss: Tensor


def observe(problem: LeastSquares, a: Tensor, w: Tensor, step: Tensor | float) -> Observables:
    """The paper's observables at the iterate ``a`` ``(B,)``, ``w`` ``(B, d)``, with ``step`` ``(B,)`` or a number."""
    sigma = problem.norm_squared(w).sqrt()
    y = torch.linalg.vecdot(w, problem.correlation)
    alpha = y / sigma
    e = problem.minimizer - (y / sigma**2).unsqueeze(-1) * w
    q = problem.norm_squared(e)
    return Observables(sigma, y, alpha, e, q, step * (a / sigma) * (y / sigma**2), (q + (a - alpha) ** 2) / 2)


def bngd_step(
    problem: LeastSquares, a: Tensor, w: Tensor, step_a: Tensor | float, step: Tensor | float
) -> tuple[Tensor, Tensor]:
    r"""One step of batch-normalized gradient descent, eqs. (9)-(10), both updates from the old iterates.

    :math:`a'=a+\varepsilon_a(\alpha-a)`, :math:`w'=w+\varepsilon\frac a\sigma(g-\frac y{\sigma^2}Hw)`. ``a``, ``step_a``,
    ``step``: ``(B,)`` (steps may be numbers); ``w``: ``(B, d)``. Returns ``(a', w')``. This is the reference;
    :func:`bngd` runs the same step in place on many runs.
    """
    Hw = problem.eigenvalues * w
    sigma_squared = torch.linalg.vecdot(w, Hw)
    sigma = sigma_squared.sqrt()
    y = torch.linalg.vecdot(w, problem.correlation)
    c = step * a / sigma
    w_new = w + c.unsqueeze(-1) * (problem.correlation - (y / sigma_squared).unsqueeze(-1) * Hw)
    return a + step_a * (y / sigma - a), w_new


def bngd(
    problem: LeastSquares,
    a: Tensor,
    w: Tensor,
    step_a: Tensor | float,
    step: Tensor | float,
    steps: int,
    *,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
    max_memory: int = 2**30,
    progress: bool = False,
) -> State:
    r"""``steps`` steps of batch-normalized gradient descent, eqs. (9)-(10), on ``B`` independent runs.

    ``a``: ``(B,)``; ``w``: ``(B, d)`` or ``(d,)`` (shared start); ``step_a``, ``step``: ``(B,)`` or numbers. A run's
    trajectory does not depend on the others. Runs are taken in chunks that need at most ``max_memory`` bytes. ``watch``
    is called with ``(k, a, w)`` before each step and once at the end, with live tensors that it must not keep or change
    (only when all runs fit in one chunk). A run that leaves the floating-point range gets ``diverged_at`` and stays
    non-finite; it disturbs no other. Raises ``ValueError`` for bad shapes or values, before any work.
    """
    a, w, step_a, step, u = _broadcast_runs(problem, a, w, step_a, step)
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be a whole number, at least 0, got {steps!r}")
    runs, dimension = w.shape
    chunk = max(1, int(max_memory // (CHUNK_BYTES_PER_VALUE * dimension)))
    if watch is not None and chunk < runs:
        raise ValueError(
            f"watch needs all runs in one chunk: {runs} runs of dimension {dimension} need max_memory of "
            f"at least {runs * dimension * CHUNK_BYTES_PER_VALUE} bytes, got {max_memory}"
        )
    parts = []
    bar = tqdm(total=runs * steps, unit="step", unit_scale=True, disable=not progress, desc="BNGD", leave=False)
    for first in range(0, runs, chunk):
        part = slice(first, first + chunk)
        minimizer = u if u.dim() == 1 else u[part]
        local = LeastSquares(problem.eigenvalues, minimizer)
        parts.append(_run_chunk(local, a[part].clone(), w[part].clone(), step_a[part], step[part], steps, watch, bar))
    bar.close()
    return State(*(torch.cat([getattr(p, name) for p in parts]) for name in ("a", "w", "diverged_at")))


def gradient_descent(problem: LeastSquares, w: Tensor, step: Tensor | float, steps: int) -> Tensor:
    r"""The iterate of gradient descent (3) after ``steps`` steps, in closed form: :math:`u+(I-\varepsilon H)^k(w_0-u)`.

    ``w``: ``(..., d)``; ``step``: a number or ``(...)``. Returns ``(..., d)``.
    """
    step = torch.as_tensor(step, dtype=w.dtype, device=w.device).unsqueeze(-1)
    return problem.minimizer + (1 - step * problem.eigenvalues) ** steps * (w - problem.minimizer)


def pseudo_spectrum(problem: LeastSquares) -> Tensor:
    r"""Eigenvalues, ascending, of :math:`H^*=H-Huu^TH/(u^THu)` (14), the zero one left out; shape ``(..., d-1)``.

    Calls ``torch.linalg.eigvalsh``, which may synchronize on a GPU.
    """
    g = problem.correlation
    projection = g.unsqueeze(-1) * g.unsqueeze(-2) / problem.energy[..., None, None]
    return torch.linalg.eigvalsh(torch.diag(problem.eigenvalues) - projection)[..., 1:]


def saddle_multipliers(
    problem: LeastSquares, w: Tensor, step_a: Tensor | float, step: Tensor | float
) -> tuple[Tensor, Tensor]:
    r"""The two eigenvalues other than 1 of BNGD linearized at the saddle ``(0, w)``, :math:`w^Tg=0`.

    :math:`1-\frac{\varepsilon_a}2\mp\frac12\sqrt{\varepsilon_a^2+4\varepsilon\varepsilon_a\|g\|^2/\sigma^2}`; the second is
    above 1 for all positive steps. Derived in chapter 3.
    """
    g = problem.correlation
    root = torch.sqrt(step_a**2 + 4 * step * step_a * torch.linalg.vecdot(g, g) / problem.norm_squared(w))
    return 1 - step_a / 2 - root / 2, 1 - step_a / 2 + root / 2


def _advance(a: Tensor, v: Tensor, step_a: Tensor, step: Tensor, eigenvalues, target, pull, work: Tensor) -> None:
    r""":func:`bngd_step` in place, on :math:`v=H^{1/2}w`: there :math:`\sigma=\|v\|` and :math:`y=v^TH^{1/2}u`.

    ``target`` is :math:`H^{1/2}u`, ``pull`` is :math:`H^{1/2}g`, ``work`` is space of the shape of ``v``.
    """
    sigma = torch.linalg.vector_norm(v, dim=-1)
    y = torch.linalg.vecdot(v, target)
    c = step * a / sigma
    a += step_a * (y / sigma - a)
    torch.mul(v, eigenvalues, out=work)
    v.addcmul_((c * y / sigma**2).unsqueeze(-1), work, value=-1)
    v.addcmul_(c.unsqueeze(-1), pull)


def _run_chunk(problem, a, w, step_a, step, steps, watch, bar) -> State:
    root = problem.eigenvalues.sqrt()
    target, pull = root * problem.minimizer, root * problem.correlation
    v = root * w
    work = torch.empty_like(v)
    diverged_at = torch.full(a.shape, -1, dtype=torch.int64, device=a.device)
    for k in range(steps):
        if watch is not None:
            watch(k, a, v / root)
        _advance(a, v, step_a, step, problem.eigenvalues, target, pull, work)
        # A non-finite w makes a non-finite one step later and stays so, hence one test of (B,) values a step is enough.
        diverged_at = torch.where((diverged_at < 0) & ~torch.isfinite(a), k + 1, diverged_at)
        if (k + 1) % 64 == 0:
            bar.update(64 * len(a))
    w = v / root
    if watch is not None:
        watch(steps, a, w)
    return State(a, w, torch.where((diverged_at < 0) & ~torch.isfinite(w).all(-1), steps, diverged_at))


def _broadcast_runs(problem, a, w, step_a, step):
    lam, u = problem.eigenvalues, problem.minimizer
    made = {"a": a, "step_a": step_a, "step": step}
    made = {name: torch.as_tensor(value, dtype=torch.float64, device=lam.device) for name, value in made.items()}
    for name, value in made.items():
        if value.dim() > 1:
            raise ValueError(
                f"{name} must be a number or a vector with one entry a run, got shape {tuple(value.shape)}"
            )
        if lam.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite, got {value[~torch.isfinite(value)][:3].tolist()}")
    w = torch.as_tensor(w, dtype=torch.float64, device=lam.device)
    if w.dim() not in (1, 2) or w.shape[-1] != len(lam):
        raise ValueError(f"w must have shape (d,) or (B, d) with d = {len(lam)}, got {tuple(w.shape)}")
    if lam.device.type != "meta" and not bool((w != 0).any(-1).all()):
        raise ValueError("w must not be zero: batch normalization divides by its H-norm")
    sizes = {
        len(v)
        for v in (*made.values(), w if w.dim() == 2 else w.new_empty(1), u if u.dim() == 2 else u.new_empty(1))
        if v.dim() and len(v) != 1
    }
    if len(sizes) > 1:
        raise ValueError(f"a, w, step_a, step and the minimizer must agree on the number of runs, got {sorted(sizes)}")
    runs = sizes.pop() if sizes else 1
    a, step_a, step = (made[name].expand(runs) for name in ("a", "step_a", "step"))
    u = u if u.dim() == 1 else u.expand(runs, -1)
    return a, w.expand(runs, -1), step_a, step, u


def _check_spectrum(dimension: int, condition_number: float) -> None:
    if not isinstance(dimension, int) or dimension < 1:
        raise ValueError(f"dimension must be a whole number, at least 1, got {dimension!r}")
    if not condition_number >= 1:
        raise ValueError(f"condition_number must be at least 1, got {condition_number!r}")


def normalized_objective(
    covariance: Tensor, correlation: Tensor, second_moment: Tensor, a: Tensor, w: Tensor
) -> Tensor:
    r"""The objective (7), :math:`J(a,w)=\frac c2-\frac{w^Tg}\sigma a+\frac12a^2`, for any positive definite H.

    ``covariance`` H ``(..., d, d)``; ``correlation`` g and ``w`` ``(..., d)``; ``second_moment`` c and ``a`` ``(...)``.
    """
    sigma = torch.linalg.vecdot(w, torch.linalg.vecdot(covariance, w.unsqueeze(-2))).sqrt()
    return second_moment / 2 - torch.linalg.vecdot(w, correlation) / sigma * a + a**2 / 2


def objective_hessian(covariance: Tensor, correlation: Tensor, a: Tensor, w: Tensor) -> Tensor:
    r"""The Hessian (19)-(21) of (7) in the variables (a, w); shape ``(..., d+1, d+1)``, arguments as in
    :func:`normalized_objective`.

    Blocks 1, :math:`A_{21}=-\frac1\sigma(g-\frac y{\sigma^2}Hw)` and :math:`A_{22}=\frac a{\sigma^3}[yH+Hw\,g^T+g(Hw)^T
    -\frac{3y}{\sigma^2}Hw(Hw)^T]`. The paper factors y out of the last one, which needs :math:`y\ne0`.
    """
    Hw = torch.linalg.vecdot(covariance, w.unsqueeze(-2))
    sigma = torch.linalg.vecdot(w, Hw).sqrt()[..., None, None]
    y = torch.linalg.vecdot(w, correlation)[..., None, None]
    g, Hw = correlation.unsqueeze(-1), Hw.unsqueeze(-1)
    corner = -(g - y / sigma**2 * Hw) / sigma
    bracket = y * covariance + Hw @ g.mT + g @ Hw.mT - 3 * y / sigma**2 * (Hw @ Hw.mT)
    lower = torch.cat([corner, a[..., None, None] / sigma**3 * bracket], -1)
    upper = torch.cat([torch.ones_like(sigma), corner.mT], -1)
    return torch.cat([upper, lower], -2)


def dense_bngd(
    covariance: Tensor,
    correlation: Tensor,
    a: Tensor,
    w: Tensor,
    step_a: Tensor | float,
    step: Tensor | float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    r"""Iterates 0 to ``steps`` of (9)-(10) for any positive definite H, where :func:`bngd` needs a diagonal one.

    Arguments as in :func:`normalized_objective`, ``step_a`` and ``step`` numbers or ``(...)``. Returns ``a`` of shape
    ``(steps + 1, ...)`` and ``w`` of shape ``(steps + 1, ..., d)``.
    """
    path_a, path_w = [a], [w]
    for _ in range(steps):
        Hw = torch.linalg.vecdot(covariance, w.unsqueeze(-2))
        sigma_squared = torch.linalg.vecdot(w, Hw)
        y = torch.linalg.vecdot(w, correlation)
        c = step * a / sigma_squared.sqrt()
        w = w + c.unsqueeze(-1) * (correlation - (y / sigma_squared).unsqueeze(-1) * Hw)
        a = a + step_a * (y / sigma_squared.sqrt() - a)
        path_a.append(a)
        path_w.append(w)
    return torch.stack(path_a), torch.stack(path_w)


def loss_bngd(
    inputs: Tensor,
    slope: Callable[[Tensor], Tensor],
    a: Tensor,
    w: Tensor,
    step_a: Tensor | float,
    step: Tensor | float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    r"""Iterates 0 to ``steps`` of gradient descent on :math:`E[f(y,aN_{BN}(x^Tw))]` (30), for any loss f.

    :math:`a'=a-\varepsilon_a\frac{w^T\tilde h}\sigma`, :math:`w'=w-\varepsilon\frac a\sigma(\tilde h-\frac{w^T\tilde h}
    {\sigma^2}Hw)` with :math:`\tilde h=E[xf_2'(y,\frac a\sigma x^Tw)]`: (31)-(33) with the signs that descend.
    ``inputs``: ``(n, d)`` points of mean zero, whose averages are the expectations; ``slope``: from predictions
    ``(B, n)`` to :math:`f_2'` ``(B, n)``; ``a``: ``(B,)``; ``step_a``, ``step``: ``(B,)`` or numbers; ``w``: ``(B, d)``.
    Returns ``a`` ``(steps + 1, B)`` and ``w`` ``(steps + 1, B, d)``.
    """
    path_a, path_w = [a], [w]
    for _ in range(steps):
        outputs = w @ inputs.T
        Hw = outputs @ inputs / len(inputs)
        sigma = outputs.square().mean(-1).sqrt()
        h = slope((a / sigma).unsqueeze(-1) * outputs) @ inputs / len(inputs)
        along = torch.linalg.vecdot(w, h)
        move_w = h - (along / sigma**2).unsqueeze(-1) * Hw
        a, w = a - step_a * along / sigma, w - (step * a / sigma).unsqueeze(-1) * move_w
        path_a.append(a)
        path_w.append(w)
    return torch.stack(path_a), torch.stack(path_w)


def equivalence_deviation(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], transform: Tensor, factor: Tensor
) -> Tensor:
    r"""How far ``second`` is from :math:`a'_k=ta_k`, :math:`w'_k=Tw_k` for all k (Definition 3.1); shape ``(B,)``.

    The larger of :math:`\max_k|a'_k-ta_k|/\max_k|ta_k|` and :math:`\max_k\|w'_k-Tw_k\|/\|Tw_k\|`; infinite for a run
    that is not finite. ``first``, ``second``: trajectories ``(a, w)`` of shapes ``(K, B)`` and ``(K, B, d)``;
    ``transform`` T: ``(B, d, d)`` or ``(d, d)``; ``factor`` t: ``(B,)`` or a number.
    """
    a, w = first[0] * factor, torch.linalg.vecdot(transform, first[1].unsqueeze(-2))
    off_a = (second[0] - a).abs().amax(0) / a.abs().amax(0)
    off_w = (torch.linalg.vector_norm(second[1] - w, dim=-1) / torch.linalg.vector_norm(w, dim=-1)).amax(0)
    return torch.nan_to_num(torch.maximum(off_a, off_w), nan=torch.inf)


def prescribed_sample(
    covariance: Tensor, minimizer: Tensor, noise: float, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""``size`` points (x, y) with prescribed averages, exact up to rounding.

    :math:`E[x]=0`, :math:`E[xx^T]=H`, :math:`E[xy]=Hu`, :math:`E[y]=0` and :math:`E[y^2]=u^THu+\text{noise}^2`.

    Gaussian points, centred and made orthonormal by QR, then coloured by a Cholesky factor of H; drawn on the CPU.
    ``covariance`` ``(..., d, d)``, ``minimizer`` ``(..., d)``. Returns x ``(..., size, d)`` and y ``(..., size)``.
    Raises ``ValueError`` if ``size`` is below d + 2 (the mean takes one dimension, the noise another).
    """
    d = covariance.shape[-1]
    if size < d + 2:
        raise ValueError(f"size must be at least d + 2 = {d + 2}, got {size}")
    white = torch.randn((*minimizer.shape[:-1], size, d + 1), generator=generator, dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(-2, keepdim=True)).Q.to(minimizer.device) * size**0.5
    x = white[..., :d] @ torch.linalg.cholesky(covariance).mT
    return x, (x @ minimizer.unsqueeze(-1)).squeeze(-1) + noise * white[..., d]


def effective_step_bound(problem: LeastSquares, a: Tensor, w: Tensor, step: Tensor | float) -> Tensor:
    r"""A bound on the effective step now and at all later steps, for :math:`\varepsilon_a\in(0,1]`; below
    :math:`2/\lambda_{max}` it proves convergence to a global minimizer (the trap lemma of chapter 3).

    :math:`\varepsilon\max(|a|,\sqrt U)\sqrt U\,\varrho(q)/\|w\|^2` where :math:`ay>0`, else infinite, with
    :math:`\varrho(q)=\min\{1/\lambda_{min},\ (\|u\|+\sqrt{q/\lambda_{min}})^2/(U-q)\}\ge\|w\|^2/\sigma^2`. ``a``: ``(B,)``;
    ``w``: ``(B, d)``; ``step``: ``(B,)`` or a number. Returns ``(B,)``.
    """
    now = observe(problem, a, w, step)
    U, smallest = problem.energy, problem.eigenvalues.min()
    farthest = torch.linalg.vector_norm(problem.minimizer, dim=-1) + (now.q / smallest).sqrt()
    stretch = torch.minimum(1 / smallest, farthest**2 / now.alpha**2)  # U - q = alpha^2
    bound = step * torch.maximum(a.abs(), U.sqrt()) * U.sqrt() * stretch / torch.linalg.vecdot(w, w)
    return torch.where(a * now.y > 0, bound, torch.inf)


def norm_bound(problem: LeastSquares, a: Tensor, w: Tensor, step_a: Tensor | float, step: Tensor | float) -> Tensor:
    r"""A bound on :math:`\|w_k\|^2` for all k, from the start alone, for :math:`\varepsilon_a\in(0,2)` and every step.

    With :math:`r=|1-\varepsilon_a|`, :math:`A\ge|a_k|`, :math:`B=A+\sqrt U`,
    :math:`\eta=(1-r)/(\kappa U(5-r))`: :math:`\max\{\|w_0\|^2,\ \varepsilon/\eta+\varepsilon^2A^2\kappa U/\|w_0\|^2\}
    +\varepsilon(B/\sqrt5+\sqrt{B^2/5+U})^2`. Derived in chapter 3. Shapes as in :func:`effective_step_bound`.
    """
    U, kappa = problem.energy, problem.condition_number
    step_a = torch.as_tensor(step_a, dtype=a.dtype, device=a.device)
    r = (1 - step_a).abs()
    A = torch.where(step_a <= 1, torch.maximum(a.abs(), U.sqrt()), a.abs() + step_a * U.sqrt() / (1 - r))
    B = A + U.sqrt()
    eta = (1 - r) / (kappa * U * (5 - r))
    start = torch.linalg.vecdot(w, w)
    entry = torch.maximum(start, step / eta + step**2 * A**2 * kappa * U / start)
    return entry + step * (B / 5**0.5 + (B**2 / 5 + U).sqrt()) ** 2


def bngd_step_exact(eigenvalues, correlation, a, w, step_a, step, sqrt):
    r"""One BNGD step (9)-(10) in any arithmetic: ``Fraction``, ``Decimal``, ``mpmath.mpf`` or intervals ``mpmath.iv.mpf``.

    ``eigenvalues``, ``correlation``, ``w``: lists of ``d`` numbers; ``sqrt``: the square root of that arithmetic. Returns
    ``(a', w', y, sigma)``, the last two at the old iterate.

    >>> from fractions import Fraction as F
    >>> bngd_step_exact([F(1), F(4)], [F(1), F(4)], F(1), [F(1), F(0)], F(1, 2), F(1), lambda x: x)  # sigma = 1 here
    (Fraction(1, 1), [Fraction(1, 1), Fraction(4, 1)], Fraction(1, 1), Fraction(1, 1))
    """
    Hw = [scale * x for scale, x in zip(eigenvalues, w, strict=True)]
    sigma_squared = sum(x * h for x, h in zip(w, Hw, strict=True))
    y = sum(x * g for x, g in zip(w, correlation, strict=True))
    sigma = sqrt(sigma_squared)
    c, t = step * a / sigma, y / sigma_squared
    w_new = [x + c * (g - t * h) for x, g, h in zip(w, correlation, Hw, strict=True)]
    return a + step_a * (y / sigma - a), w_new, y, sigma


def mbngd_step(problem: LeastSquares, w: Tensor, step: Tensor | float) -> Tensor:
    r"""One step of modified batch-normalized gradient descent, eq. (81): (10) with :math:`a=\alpha(w)`.

    :math:`w'=w+\varepsilon t(g-tHw)` with :math:`t=y/\sigma^2`. ``w``: ``(B, d)``; ``step``: ``(B,)`` or a number. This
    is the reference; :func:`mbngd` runs the same step in place on many runs.
    """
    Hw = problem.eigenvalues * w
    t = (torch.linalg.vecdot(w, problem.correlation) / torch.linalg.vecdot(w, Hw)).unsqueeze(-1)
    return w + torch.as_tensor(step, dtype=w.dtype, device=w.device).unsqueeze(-1) * t * (problem.correlation - t * Hw)


def mbngd(problem: LeastSquares, w: Tensor, step: Tensor | float, steps: int, *, max_memory: int = 2**20) -> State:
    r"""``steps`` steps of modified batch-normalized gradient descent, eq. (81), on ``B`` independent runs.

    Arguments as in :func:`bngd`; there is no ``a``: the result's is :math:`\alpha(w)`, so that :func:`observe` reads off
    :math:`\hat\varepsilon=\varepsilon(y/\sigma^2)^2` and the loss :math:`q/2`. Inside, a run is a column, so that products
    run along contiguous memory also for small ``d``; the default chunk fits the cache. Raises ``ValueError`` for bad shapes
    or values, before any work.
    """
    _, w, _, step, u = _broadcast_runs(problem, 0.0, w, 0.0, step)
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be a whole number, at least 0, got {steps!r}")
    runs, dimension = w.shape
    chunk = max(1, int(max_memory // (CHUNK_BYTES_PER_VALUE * dimension)))
    eigenvalues = problem.eigenvalues.unsqueeze(-1)
    parts, finite = [], []
    for first in range(0, runs, chunk):
        part = slice(first, first + chunk)
        x, size = w[part].T.contiguous().clone(), step[part].contiguous()
        g = (eigenvalues * (u[part].T if u.dim() == 2 else u.unsqueeze(-1))).contiguous()
        Hx, product = torch.empty_like(x), torch.empty_like(x)
        t, c, finite_steps = torch.empty_like(size), torch.empty_like(size), torch.zeros_like(size)
        for _ in range(steps):
            torch.mul(x, eigenvalues, out=Hx)
            torch.sum(torch.mul(x, Hx, out=product), 0, out=c)
            torch.sum(torch.mul(x, g, out=product), 0, out=t)
            t /= c
            finite_steps += t.abs() < torch.inf  # a non-finite x stays so: the count is the first such step
            torch.mul(size, t, out=c)
            t *= c
            x.addcmul_(Hx, t, value=-1)
            x.addcmul_(g, c)
        finite.append((finite_steps + torch.isfinite(x).all(0)).long())
        parts.append(x.T.contiguous())
    x, finite_steps = torch.cat(parts), torch.cat(finite)
    alpha = torch.linalg.vecdot(x, problem.correlation) / problem.norm_squared(x).sqrt()
    return State(alpha, x, torch.where(finite_steps <= steps, finite_steps, -1))


def residual_recursion(
    problem: LeastSquares,
    a: Tensor | float,
    w: Tensor,
    step_a: Tensor | float,
    step: Tensor | float,
    steps: int,
    *,
    watch: Callable[[int, Tensor, Observables], None] | None = None,
) -> tuple[Tensor, Observables]:
    r"""BNGD with the residual e and the gap :math:`\beta=a-\alpha` carried along: no cancellation however small they get.

    With :math:`P=(I-\hat\varepsilon H)e`, :math:`b=g^TP`, :math:`p=\|P\|_H^2`, :math:`\omega=\frac{p-b}{U-2b+p}`:
    :math:`e'=\omega u+(1-\omega)P`, :math:`w'=w+\varepsilon\frac a\sigma He` and, as :math:`\alpha^2=U-q`,
    :math:`\beta'=(1-\varepsilon_a)\beta+\frac{q'-q}{\alpha+\alpha'}`. Where :math:`q\ge U/2` (near a saddle) e and
    :math:`\alpha-\alpha'` are taken from their definitions, which do not cancel there. Arguments as in :func:`bngd`; ``watch``
    is called with ``(k, beta, observables)`` for k from 0 to ``steps``. Returns the last ``(beta, observables)``.
    """
    a, w, step_a, step, u = _broadcast_runs(problem, a, w, step_a, step)
    lam, g, U = problem.eigenvalues, problem.correlation, problem.energy
    now = observe(problem, a, w, step)
    beta = a - now.alpha
    for k in range(steps + 1):
        if watch is not None:
            watch(k, beta, now)
        if k == steps:
            break
        P = now.e - now.effective_step.unsqueeze(-1) * lam * now.e
        b, p = torch.linalg.vecdot(P, g), problem.norm_squared(P)
        omega = ((p - b) / (U - 2 * b + p)).unsqueeze(-1)
        w = w + (step * (now.alpha + beta) / now.sigma).unsqueeze(-1) * lam * now.e
        plain = observe(problem, now.alpha, w, step)
        near = now.q < U / 2
        e = torch.where(near.unsqueeze(-1), omega * u + (1 - omega) * P, plain.e)
        q = problem.norm_squared(e)
        direct = now.alpha - plain.alpha
        smooth = near & (q < U / 2) & (now.alpha * plain.alpha > 0)
        drop = torch.where(smooth, (q - now.q) / (now.alpha + plain.alpha), direct)
        beta = (1 - step_a) * beta + drop
        effective = step * ((plain.alpha + beta) / plain.sigma) * (plain.y / plain.sigma**2)
        now = Observables(plain.sigma, plain.y, plain.alpha, e, q, effective, (q + beta**2) / 2)
    return beta, now
