"""The convergence certificates of chapter 3 against brute force, and the exact step against the float one."""

from fractions import Fraction
from math import isqrt

import mpmath
import pytest
import torch

from lib import least_squares as ols


def instances(seed: int, runs: int = 60, dimension: int = 5, kappa: float = 30.0):
    draw = torch.Generator().manual_seed(seed)
    problem = ols.LeastSquares(ols.log_spectrum(dimension, kappa), ols.sphere((runs, dimension), draw))
    a = torch.randn(runs, generator=draw, dtype=torch.float64) * problem.energy.sqrt()
    step = 10 ** (5 * torch.rand(runs, generator=draw, dtype=torch.float64) - 3)
    return problem, a, ols.sphere((runs, dimension), draw), step


@pytest.mark.parametrize("step_a", [0.1, 0.5, 1.0])
def test_effective_step_bound_holds_at_all_later_steps(step_a):
    problem, a, w, step = instances(0)
    bounds, effective = [], []

    def watch(k, a, w):
        bounds.append(ols.effective_step_bound(problem, a, w, step))
        effective.append(ols.observe(problem, a, w, step).effective_step)

    ols.bngd(problem, a, w, step_a, step, 400, watch=watch)
    bounds, effective = torch.stack(bounds), torch.stack(effective)
    later = effective.flip(0).cummax(0).values.flip(0)
    proven = bounds * problem.eigenvalues.max() < 2
    assert proven[-1].float().mean() > 0.5
    assert (later <= bounds * (1 + 1e-12))[proven].all()
    assert (effective > 0)[proven].all()


def test_effective_step_bound_is_infinite_with_opposite_signs():
    problem = ols.LeastSquares(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    a, w = torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    bound = ols.effective_step_bound(problem, a, w, 0.1)
    assert torch.isinf(bound[0])
    # w = u: q = 0 and the stretch is |u|^2 / U = 2/3; max(|a|, sqrt U) sqrt U = 3, |w|^2 = 2
    assert float(bound[1]) == pytest.approx(0.1 * 3 * (2 / 3) / 2, rel=1e-14)


@pytest.mark.parametrize("step_a", [0.05, 0.7, 1.0, 1.5, 1.9])
def test_norm_bound_is_never_exceeded(step_a):
    problem, a, w, step = instances(1)
    end = ols.bngd(problem, a, w, step_a, step, 3000)
    assert (torch.linalg.vecdot(end.w, end.w) <= ols.norm_bound(problem, a, w, step_a, step)).all()


def test_exact_step_agrees_with_the_reference_in_every_arithmetic():
    lam, u, w, a = [1.0, 4.0, 9.0], [0.5, -1.0, 0.25], [1.0, 2.0, -1.0], 0.75
    problem = ols.LeastSquares(torch.tensor(lam, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
    a_ref, w_ref = ols.bngd_step(
        problem, torch.tensor([a], dtype=torch.float64), torch.tensor([w], dtype=torch.float64), 0.5, 0.25
    )
    g = [x * y for x, y in zip(lam, u, strict=True)]
    for number, sqrt in ((mpmath.mpf, mpmath.sqrt), (mpmath.iv.mpf, mpmath.iv.sqrt)):
        args = [[number(x) for x in lam], [number(x) for x in g], number(a), [number(x) for x in w]]
        a_new, w_new, y, sigma = ols.bngd_step_exact(*args, number(0.5), number(0.25), sqrt)
        middle = [float(getattr(x, "mid", x)) for x in (a_new, *w_new)]
        assert middle == pytest.approx([float(a_ref[0]), *w_ref[0].tolist()], rel=1e-14)

    def root(x):  # sigma^2 = 1 + 16 + 9 is no square: make it one with w = (3, 2, 0): 9 + 16 = 25
        return Fraction(isqrt(x.numerator), isqrt(x.denominator))

    F = Fraction
    _, w_new, y, sigma = ols.bngd_step_exact(
        [F(1), F(4), F(9)], [F(1), F(4), F(0)], F(5), [F(3), F(2), F(0)], F(1), F(1), root
    )
    assert (y, sigma) == (11, 5)
    assert w_new == [3 + (1 - F(33, 25)), 2 + (4 - F(88, 25)), 0]


def test_exact_step_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="zip"):
        ols.bngd_step_exact([1.0, 2.0], [1.0], 1.0, [1.0, 1.0], 1.0, 1.0, lambda x: x**0.5)
