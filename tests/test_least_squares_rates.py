"""The cancellation-free recursion against arithmetic with many digits, and against the plain iteration where that is exact."""

import mpmath
import pytest
import torch

from lib import least_squares as ols


def instances(seed: int, runs: int = 6, dimension: int = 4, kappa: float = 20.0):
    draw = torch.Generator().manual_seed(seed)
    problem = ols.LeastSquares(ols.log_spectrum(dimension, kappa), ols.sphere((runs, dimension), draw))
    a = torch.randn(runs, generator=draw, dtype=torch.float64)
    step = 10 ** (2 * torch.rand(runs, generator=draw, dtype=torch.float64) - 2)
    return problem, a, ols.sphere((runs, dimension), draw), step


def oracle(lam, u, a, w, step_a, step, steps):
    """(q, loss, gap) after ``steps`` steps of the definition with 400 digits."""
    with mpmath.workdps(400):
        lam, u, w = ([mpmath.mpf(x) for x in v.tolist()] for v in (lam, u, w))
        g = [x * y for x, y in zip(lam, u, strict=True)]
        a, step_a, step = mpmath.mpf(a.item()), mpmath.mpf(step_a), mpmath.mpf(step.item())
        for _ in range(steps):
            a, w, _, _ = ols.bngd_step_exact(lam, g, a, w, step_a, step, mpmath.sqrt)
        _, _, y, sigma = ols.bngd_step_exact(lam, g, a, w, step_a, step, mpmath.sqrt)
        q = sum(x * y for x, y in zip(u, g, strict=True)) - (y / sigma) ** 2
        return float(q), float((q + (a - y / sigma) ** 2) / 2), float(a - y / sigma)


@pytest.mark.parametrize("step_a", [1.0, 0.25, 1.5])
def test_recursion_agrees_with_400_digits_far_below_the_float_floor(step_a):
    problem, a, w, step = instances(1)
    steps = 800
    beta, end = ols.residual_recursion(problem, a, w, step_a, step, steps)
    expected = [
        oracle(problem.eigenvalues, problem.minimizer[i], a[i], w[i], step_a, step[i], steps) for i in range(len(a))
    ]
    assert min(q for q, _, _ in expected) < 1e-60  # far below what u - t w can resolve
    for i, (q, loss, gap) in enumerate(expected):
        assert end.q[i].item() == pytest.approx(q, rel=1e-9)
        assert end.loss[i].item() == pytest.approx(loss, rel=1e-9)
        assert beta[i].item() == pytest.approx(gap, rel=1e-8)


def test_recursion_is_the_plain_iteration_where_that_has_digits():
    problem, a, w, step = instances(2, runs=200)
    seen = []
    ols.residual_recursion(problem, a, w, 0.5, step * 100, 30, watch=lambda k, beta, now: seen.append((beta, now)))
    plain = ols.bngd(problem, a, w, 0.5, step * 100, 30)
    expected = ols.observe(problem, plain.a, plain.w, step * 100)
    beta, end = seen[-1]
    assert len(seen) == 31
    assert torch.allclose(end.e, expected.e, atol=1e-9)
    assert torch.allclose(end.alpha + beta, plain.a, atol=1e-9)
    assert torch.allclose(end.effective_step, expected.effective_step, rtol=1e-7)
    assert torch.allclose(end.loss, expected.loss, atol=1e-10)


def test_recursion_starts_on_a_saddle_without_dividing_by_zero():
    problem = ols.LeastSquares(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    w = torch.tensor([2.0, -1.0], dtype=torch.float64)  # w.g = 0
    _, end = ols.residual_recursion(problem, 1.0, w, 0.5, 0.1, 200)
    assert torch.isfinite(end.loss).all()
    assert float(end.loss) < 1e-8
