"""Gradient descent on angles against gradient descent on weights, and the bounds of Theorem 3.1 against runs."""

import numpy as np
import pytest
import torch

from lib import rate_bounds


@pytest.fixture(scope="module")
def two_blocks():
    return rate_bounds.coupled(tolerance=0.1)


def loss_on_weights(w, g):
    """Problem B as its formula has it, on weights (2, 2)."""
    angle = torch.atan2(w[:, 1], w[:, 0])
    u = g - torch.cos(angle[0]) - torch.cos(angle[1]) / 2
    return torch.log(torch.cosh(u)) + 0.3 * torch.sin(2 * angle[0]) + 0.2 * torch.sin(angle.sum())


def test_a_step_on_angles_is_a_step_on_weights(two_blocks):
    w = torch.tensor([[1.2, -0.4], [0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    g = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    start = torch.atan2(w[:, 1], w[:, 0]).detach().numpy()
    state = two_blocks.start(start, (w.detach() ** 2).sum(1).numpy(), 0.7)
    for _ in range(5):
        loss = loss_on_weights(w, g)
        assert two_blocks.value(state.theta, state.g) == pytest.approx(loss.item(), abs=1e-12)
        slope_w, slope_g = torch.autograd.grad(loss, (w, g))
        w = (w - 1.7 * slope_w).detach().requires_grad_()
        g = (g - 0.4 * slope_g).detach().requires_grad_()
        state = rate_bounds.step(two_blocks, state, 1.7, 0.4)
    np.testing.assert_allclose(state.norms, (w.detach() ** 2).sum(1).numpy(), rtol=1e-12)
    np.testing.assert_allclose(np.cos(state.theta), (w[:, 0] / w.norm(dim=1)).detach().numpy(), atol=1e-12)
    assert float(state.g) == pytest.approx(g.item(), abs=1e-12)


def test_constants_bound_the_hessian_of_the_weights(two_blocks):
    draw = torch.Generator().manual_seed(0)
    w = torch.randn((4_000, 2, 2), generator=draw, dtype=torch.float64)
    w = w / w.norm(dim=2, keepdim=True)
    points = torch.cat([w.flatten(1), 2 * torch.randn((4_000, 1), generator=draw, dtype=torch.float64)], 1)
    hessian = torch.func.vmap(torch.func.hessian(lambda p: loss_on_weights(p[:4].reshape(2, 2), p[4])))(points)
    for i in range(2):
        for j in range(2):
            block = hessian[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            largest = float(torch.linalg.matrix_norm(block, ord=2).max())
            assert 0.8 <= largest / two_blocks.constants.vv[i, j] <= 1
        assert float(hessian[:, 2 * i : 2 * i + 2, 4].norm(dim=1).max()) <= two_blocks.constants.vg[i]
    assert float(hessian[:, 4, 4].abs().max()) <= two_blocks.constants.gg


def test_planar_norm_is_the_norm_of_the_matrix():
    first, second = np.random.default_rng(1).normal(size=(2, 50))
    matrices = np.stack([np.stack([0 * first, -first], -1), np.stack([-first, second], -1)], -2)
    np.testing.assert_allclose(rate_bounds.planar_norm(first, second), np.linalg.norm(matrices, 2, axis=(1, 2)))


def test_supremum_exceeds_the_maximum_by_at_most_the_tolerance():
    def bump(x):
        return np.sin(3 * x[:, 0]) * np.cos(x[:, 1]) - 0.1 * (x[:, 0] - 2) ** 2

    grid = np.stack(np.meshgrid(np.linspace(0, 4, 801), np.linspace(-2, 2, 401)), -1).reshape(-1, 2)
    bound = rate_bounds.supremum(bump, [3.4, 1.0], [0.0, -2.0], [4.0, 2.0], 1e-2)
    assert bump(grid).max() <= bound <= bump(grid).max() + 1e-2 + 1e-4


def test_supremum_refuses_a_tolerance_of_zero():
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        rate_bounds.supremum(lambda x: x[:, 0], [1.0], [0.0], [1.0], 0)


def test_the_record_of_a_run_is_what_single_steps_give(two_blocks):
    rates, steps = np.array([0.05, 3.0]), 40
    state = start = two_blocks.start([1.0, 2.0], [0.5, 2.0], 0.3, (2,))
    threshold = 2 * two_blocks.constants.curvature() * rates[:, None]
    squares, sums_g, entered, smallest, best, phase_one = 0, 0, start.norms, np.full(2, np.inf), 0, 0
    for t in range(steps):
        first, slope = two_blocks.gradient(state.theta, state.g)
        squares, sums_g = squares + first**2, sums_g + slope**2
        smallest = np.minimum(smallest, (first**2).sum(-1) + slope**2)
        best = np.maximum(best, (t + 1) * smallest)
        after = rate_bounds.step(two_blocks, state, rates, 0.7)
        phase_one = phase_one + np.where(state.norms <= threshold, first**2, 0)
        entered = np.where(state.norms <= threshold, after.norms, entered)
        state = after
    track = rate_bounds.descend(two_blocks, start, steps, rates, 0.7, threshold)
    np.testing.assert_allclose(track.state.theta, state.theta, atol=1e-13)
    np.testing.assert_allclose(track.squares_v, squares)
    np.testing.assert_allclose(track.squares_g, sums_g)
    np.testing.assert_allclose(track.entered, entered)
    np.testing.assert_allclose(track.best, best)
    np.testing.assert_allclose(track.phase_one, phase_one)
    np.testing.assert_allclose(track.least[-1], np.sqrt(smallest))
    grown = track.state.norms**2 - start.norms**2 - track.increments
    np.testing.assert_allclose(2 * rates[:, None] ** 2 * track.squares_v, grown)


@pytest.mark.parametrize("name", ["A", "B"])
def test_both_bounds_hold_and_the_improved_one_is_smaller_for_large_steps(name, two_blocks):
    problem = rate_bounds.cosine() if name == "A" else two_blocks
    rates, rate_g = 10.0 ** np.arange(-3, 5), 0.0 if name == "A" else 1.0
    start = problem.start([1.0] * problem.blocks, [0.7] * problem.blocks, 0.0, (len(rates),))
    threshold = 2 * problem.constants.curvature() * rates[:, None]
    track = rate_bounds.descend(problem, start, 3_000, rates, rate_g, threshold)
    gap = problem.value(start.theta, start.g) - problem.constants.low
    given = (problem.constants, gap, start.norms, rates, rate_g)
    printed, improved = rate_bounds.theorem_bounds(*given), rate_bounds.improved_bounds(*given)
    for bound in (printed, improved):
        assert (track.squares_v.sum(-1) <= bound.v).all()
        assert (track.squares_g <= bound.g).all()
        assert (track.entered <= bound.entered * (1 + 1e-12)).all()
        assert (track.state.norms <= bound.final).all()
        assert (track.best <= bound.v + bound.g).all()
    assert (improved.v[-3:] < 1e-3 * printed.v[-3:]).all()


def test_near_the_minimum_the_energy_needs_its_logarithm():
    problem, rates = rate_bounds.cosine(), 10.0 ** np.arange(1, 6)
    start, threshold = problem.start([0.01], [1.0], 0.0, (5,)), 2 * problem.constants.curvature() * rates[:, None]
    track = rate_bounds.descend(problem, start, 1_000, rates, 0.0, threshold)
    gap = problem.value(start.theta, start.g) - problem.constants.low
    left = ((track.state.norms - track.entered)[:, 0]) / (2 * rates)
    bound = rate_bounds.improved_bounds(problem.constants, gap, start.norms, rates)
    assert (left <= bound.energy).all()
    assert (left / gap).max() > 100


def test_the_bound_of_phase_one_is_attained_at_the_threshold():
    problem, rates = rate_bounds.cosine(), np.array([0.1, 100.0])
    norms = 2 * problem.constants.curvature() * rates[:, None]
    start = problem.start([np.pi / 2], [1.0], 0.0, (2,))._replace(norms=norms)
    track = rate_bounds.descend(problem, start, 50, rates, 0.0, norms)
    bound = rate_bounds.improved_bounds(problem.constants, 1.0, norms, rates)
    np.testing.assert_allclose(track.phase_one[:, 0], bound.phase_one)


def test_a_certificate_for_three_blocks_is_refused():
    with pytest.raises(ValueError, match="at most two blocks, got 3"):
        rate_bounds.coupled((1.0, 0.5, 0.5), (0.0, 0.0, 0.0))


def test_a_loss_without_g_has_no_mixed_derivatives():
    constants = rate_bounds.Constants(np.ones((1, 1)), np.ones(1), 0.0, np.ones(1), 0.0)
    with pytest.raises(ValueError, match="gg = 0"):
        constants.curvature()


def test_a_shift_moves_the_minimum():
    shift = np.array([0.5, -0.5])
    problem = rate_bounds.cosine(shift)
    first, slope = problem.gradient(np.zeros((2, 1)), np.zeros(2))
    np.testing.assert_allclose(first[:, 0], -np.sin(shift))
    np.testing.assert_allclose(problem.value(shift[:, None], np.zeros(2)), -1)
    assert not slope.any()


@pytest.mark.parametrize("c_g", [0.0, 1.0])
def test_curvature_refuses_c_g_outside_the_unit_interval(c_g):
    with pytest.raises(ValueError, match="c_g must be between 0 and 1"):
        rate_bounds.cosine().constants.curvature(c_g)
