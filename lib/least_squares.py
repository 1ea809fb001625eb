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
from tqdm.auto import tqdm

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
        r""":math:`\varepsilon_{opt}=2/(\lambda_{max}+\lambda_{min})`, eq. (5): best for :math:`k\to\infty`, not for finite k."""
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
    """Iterates of ``B`` runs: ``a`` ``(B,)``, ``w`` ``(B, d)``, ``diverged_at`` ``(B,)`` (first step with a non-finite
    iterate, -1 for none)."""

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
    """The paper's observables at the iterate ``a`` ``(B,)``, ``w`` ``(B, d)`` with step size ``step`` (``(B,)`` or a number)."""
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
    (only when all runs fit in one chunk). A run that leaves the floating-point range gets ``diverged_at`` and stays non-finite; it disturbs no other.
    Raises ``ValueError`` for bad shapes or values, before any work.
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
        parts.append(
            _run_chunk(local, a[part].clone(), w[part].clone(), step_a[part], step[part], steps, watch, bar)
        )
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


def _advance(
    eigenvalues: Tensor, correlation: Tensor, a: Tensor, w: Tensor, step_a: Tensor, step: Tensor, Hw: Tensor
) -> None:
    """:func:`bngd_step` in place, with ``Hw`` as work space."""
    torch.mul(w, eigenvalues, out=Hw)
    sigma_squared = torch.linalg.vecdot(w, Hw)
    sigma = sigma_squared.sqrt()
    y = torch.linalg.vecdot(w, correlation)
    c = step * a / sigma
    a += step_a * (y / sigma - a)
    w.addcmul_((c * y / sigma_squared).unsqueeze(-1), Hw, value=-1)
    w.addcmul_(c.unsqueeze(-1), correlation)


def _run_chunk(problem, a, w, step_a, step, steps, watch, bar) -> State:
    Hw = torch.empty_like(w)
    correlation = problem.correlation
    diverged_at = torch.full(a.shape, -1, dtype=torch.int64, device=a.device)
    for k in range(steps):
        if watch is not None:
            watch(k, a, w)
        _advance(problem.eigenvalues, correlation, a, w, step_a, step, Hw)
        # a is finite at step k+1 unless w was not at step k, and a non-finite w stays so: one (B,) test is enough.
        diverged_at = torch.where((diverged_at < 0) & ~torch.isfinite(a), k + 1, diverged_at)
        if (k + 1) % 64 == 0:
            bar.update(64 * len(a))
    if watch is not None:
        watch(steps, a, w)
    diverged_at = torch.where((diverged_at < 0) & ~torch.isfinite(w).all(-1), steps, diverged_at)
    return State(a, w, diverged_at)


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
