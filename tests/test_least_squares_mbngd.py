"""MBNGD against its definition: the gradient of min_a J, the reference step, rational arithmetic, the scaling law."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import least_squares as ols


def instances(seed: int, runs: int = 40, dimension: int = 6, kappa: float = 50.0):
    draw = torch.Generator().manual_seed(seed)
    problem = ols.LeastSquares(ols.log_spectrum(dimension, kappa), ols.sphere((runs, dimension), draw))
    step = 10 ** (5 * torch.rand(runs, generator=draw, dtype=torch.float64) - 3)
    return problem, ols.sphere((runs, dimension), draw), step


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), dimension=st.integers(1, 9), kappa=st.floats(1, 1e4))
def test_one_step_is_gradient_descent_on_the_objective_minimized_over_a(seed, dimension, kappa):
    problem, w, step = instances(seed, 7, dimension, kappa)
    v = w.clone().requires_grad_()
    objective = -((v @ problem.correlation.mT).diagonal() ** 2 / (v**2 @ problem.eigenvalues)) / 2
    (gradient,) = torch.autograd.grad(objective.sum(), v)
    expected = w - step.unsqueeze(-1) * gradient
    scale = 1 + (step * problem.norm_squared(problem.minimizer) * kappa).unsqueeze(-1)
    for found in (ols.mbngd_step(problem, w, step), ols.mbngd(problem, w, step, 1).w):
        assert ((found - expected).abs() <= 1e-12 * scale).all()


def test_many_steps_are_the_reference_step_iterated():
    problem, w, step = instances(0)
    expected = w
    for _ in range(30):
        expected = ols.mbngd_step(problem, expected, step)
    found = ols.mbngd(problem, w, step, 30)
    torch.testing.assert_close(found.w, expected, rtol=1e-9, atol=1e-12)
    assert found.ok.all()
    seen = ols.observe(problem, found.a, found.w, step)
    torch.testing.assert_close(seen.effective_step, step * (seen.y / seen.sigma**2) ** 2)
    torch.testing.assert_close(seen.loss, seen.q / 2)


def test_one_step_is_bngd_with_a_set_to_alpha():
    problem, w, step = instances(1)
    a = ols.observe(problem, torch.ones(len(w), dtype=torch.float64), w, step).alpha
    torch.testing.assert_close(ols.mbngd_step(problem, w, step), ols.bngd_step(problem, a, w, 1.0, step)[1])


def test_a_run_does_not_depend_on_the_others_nor_on_the_chunks():
    problem, w, step = instances(2, runs=37)
    together = ols.mbngd(problem, w, step, 200).w
    chunked = ols.mbngd(problem, w, step, 200, max_memory=5 * 6 * ols.CHUNK_BYTES_PER_VALUE).w
    alone = ols.LeastSquares(problem.eigenvalues, problem.minimizer[11])
    torch.testing.assert_close(chunked, together, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ols.mbngd(alone, w[11], step[11], 200).w[0], together[11], rtol=1e-9, atol=1e-9)


def test_rational_orbit_that_meets_the_saddles():
    F = Fraction
    lam, u, w, step = [F(1), F(4)], [F(-5), F(-5)], [F(-4), F(-5)], F(3364, 275)
    g = [x * y for x, y in zip(lam, u, strict=True)]
    t = sum(x * y for x, y in zip(w, g, strict=True)) / sum(h * x * x for h, x in zip(lam, w, strict=True))
    exact = [x + step * t * (y - t * h * x) for x, y, h in zip(w, g, lam, strict=True)]
    assert exact == [F(-164, 11), F(41, 11)]
    problem = ols.LeastSquares(*(torch.tensor([float(x) for x in v], dtype=torch.float64) for v in (lam, u)))
    start = torch.tensor([[-4.0, -5.0]], dtype=torch.float64)
    assert ols.mbngd_step(problem, start, float(step))[0].tolist() == pytest.approx([float(x) for x in exact])


def test_scaling_law_is_bitwise_for_powers_of_two_of_either_sign():
    problem, w, step = instances(3)
    for r in (-1.0, 2.0**-20, -(2.0**7)):
        assert torch.equal(ols.mbngd(problem, r * w, r**2 * step, 100).w, r * ols.mbngd(problem, w, step, 100).w)


def test_inputs_are_left_alone_and_zero_steps_return_them():
    problem, w, step = instances(4)
    kept = w.clone()
    assert torch.equal(ols.mbngd(problem, w, step, 0).w, kept)
    ols.mbngd(problem, w, step, 5)
    assert torch.equal(w, kept)


def test_a_run_that_overflows_is_marked_and_disturbs_no_other():
    problem, w, step = instances(5)
    step[3] = 1e308
    end = ols.mbngd(problem, w, step, 10)
    assert end.diverged_at[3] in (1, 2)
    assert (end.diverged_at >= 0).sum() == 1
    keep = torch.arange(len(w)) != 3
    fine = ols.LeastSquares(problem.eigenvalues, problem.minimizer[keep])
    torch.testing.assert_close(end.w[keep], ols.mbngd(fine, w[keep], step[keep], 10).w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": -1}, "steps must"), ({"w": torch.zeros(40, 6)}, "w must not be zero"), ({"step": torch.nan}, "step")],
)
def test_bad_arguments_are_refused_by_name(change, message):
    problem, w, step = instances(6)
    with pytest.raises(ValueError, match=message):
        ols.mbngd(**{"problem": problem, "w": w, "step": step, "steps": 3, **change})
