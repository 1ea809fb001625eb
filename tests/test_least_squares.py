"""Least squares: every routine against its definition in plain NumPy or autograd, and the identities it must obey."""

import numpy as np
import pytest
import torch
from device import assert_stays_on_device
from hypothesis import given
from hypothesis import strategies as st

from lib import least_squares as ols

seeds = st.integers(0, 2**31 - 1)


def instance(seed, runs=7, dimension=6, condition=50.0):
    """A problem and starts away from the degenerate ones, steps over four decades."""
    draw = torch.Generator().manual_seed(seed)
    problem = ols.LeastSquares(ols.log_spectrum(dimension, condition), ols.sphere((runs, dimension), draw))
    w = ols.sphere((runs, dimension), draw)
    a = torch.randn(runs, generator=draw, dtype=torch.float64)
    step_a = torch.rand(runs, generator=draw, dtype=torch.float64)
    step = 10 ** (4 * torch.rand(runs, generator=draw, dtype=torch.float64) - 2)
    return problem, a, w, step_a, step


def numpy_bngd(lam, u, a, w, step_a, step, steps):
    """Equations (9)-(10) for one run, written out with a full matrix."""
    H, w = np.diag(lam), w.copy()
    g = H @ u
    for _ in range(steps):
        sigma = np.sqrt(w @ H @ w)
        a, w = (a + step_a * (w @ g / sigma - a), w + step * a / sigma * (g - (w @ g) / sigma**2 * (H @ w)))
    return a, w


@given(seeds)
def test_bngd_agrees_with_the_definition(seed):
    problem, a, w, step_a, step = instance(seed)
    state = ols.bngd(problem, a, w, step_a, step, 5)
    for i in range(len(a)):
        expected_a, expected_w = numpy_bngd(
            problem.eigenvalues.numpy(), problem.minimizer[i].numpy(), a[i].item(), w[i].numpy(), step_a[i].item(),
            step[i].item(), 5,
        )  # fmt: skip
        assert state.a[i].item() == pytest.approx(expected_a, rel=1e-8, abs=1e-10)
        assert state.w[i].numpy() == pytest.approx(expected_w, rel=1e-7, abs=1e-9 * abs(expected_w).max())


@given(seeds)
def test_one_step_is_a_gradient_step_on_the_objective(seed):
    problem, a, w, step_a, step = instance(seed)
    a, w = a.requires_grad_(), w.requires_grad_()
    sigma = problem.norm_squared(w).sqrt()
    objective = -torch.linalg.vecdot(w, problem.correlation) / sigma * a + a**2 / 2  # eq. (7) without c/2
    grad_a, grad_w = torch.autograd.grad(objective.sum(), (a, w))
    new_a, new_w = ols.bngd_step(problem, a, w, step_a, step)
    assert torch.allclose(new_a, a - step_a * grad_a, rtol=1e-12, atol=1e-12)
    assert torch.allclose(new_w, w - step[:, None] * grad_w, rtol=1e-10, atol=1e-10)


def test_many_steps_are_the_reference_step_repeated():
    problem, a, w, step_a, step = instance(3, runs=50)
    state = ols.bngd(problem, a, w, step_a, step, 40)
    for _ in range(40):
        a, w = ols.bngd_step(problem, a, w, step_a, step)
    assert torch.allclose(state.w, w, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_does_not_depend_on_its_company(seed):
    """Alone, in a crowd, and in chunks: 200 steps to 1e-9, and the same verdict on divergence."""
    problem, a, w, step_a, step = instance(seed, runs=60)
    step[10], step_a[11] = 1e300, 3.0  # neighbours that overflow or blow up
    crowd = ols.bngd(problem, a, w, step_a, step, 200)
    needed = 9 * 6 * ols.CHUNK_BYTES_PER_VALUE
    chunks = ols.bngd(problem, a, w, step_a, step, 200, max_memory=needed)
    assert torch.allclose(crowd.w, chunks.w, rtol=1e-9, atol=0, equal_nan=True)
    assert torch.equal(crowd.diverged_at, chunks.diverged_at)
    for i in (0, 10, 11, 59):
        lone = ols.LeastSquares(problem.eigenvalues, problem.minimizer[i])
        alone = ols.bngd(lone, a[i : i + 1], w[i], step_a[i : i + 1], step[i : i + 1], 200)
        assert torch.allclose(crowd.w[i], alone.w[0], rtol=1e-9, atol=0, equal_nan=True)
        assert crowd.diverged_at[i] == alone.diverged_at[0]


def test_a_repeated_command_is_bit_identical():
    first, second = (ols.bngd(*instance(5), 300) for _ in range(2))
    assert torch.equal(first.w, second.w)
    assert torch.equal(first.a, second.a)


def test_a_diverged_run_says_when_and_disturbs_no_other():
    problem, a, w, _, _ = instance(1, runs=3)
    step_a = torch.tensor([0.5, 1e200, 0.5], dtype=torch.float64)
    state = ols.bngd(problem, a, w, step_a, 0.1, 50)
    alone = ols.bngd(ols.LeastSquares(problem.eigenvalues, problem.minimizer[2]), a[2], w[2], 0.5, 0.1, 50)
    assert state.ok.tolist() == [True, False, True]
    assert 0 < state.diverged_at[1] <= 5
    assert torch.equal(state.w[2], alone.w[0])


def test_watch_sees_every_iterate_and_needs_one_chunk():
    problem, a, w, step_a, step = instance(2)
    seen = []
    state = ols.bngd(problem, a, w, step_a, step, 6, watch=lambda k, a, w: seen.append((k, w.clone())))
    assert [k for k, _ in seen] == list(range(7))
    assert torch.allclose(seen[0][1], w, rtol=1e-15, atol=0)
    assert torch.equal(seen[-1][1], state.w)
    with pytest.raises(ValueError, match="watch needs all runs in one chunk: 7 runs"):
        ols.bngd(problem, a, w, step_a, step, 6, watch=print, max_memory=1)


@given(seeds, st.integers(0, 40))
def test_gradient_descent_closed_form(seed, steps):
    problem, _, w, _, _ = instance(seed)
    step = 0.9 * problem.optimal_step
    expected = w.clone()
    for _ in range(steps):
        expected = expected - step * (problem.eigenvalues * expected - problem.correlation)
    assert torch.allclose(ols.gradient_descent(problem, w, step, steps), expected, rtol=1e-9, atol=1e-11)


@given(seeds)
def test_observables_against_their_definitions(seed):
    problem, a, w, _, step = instance(seed)
    seen = ols.observe(problem, a, w, step)
    H, g = torch.diag(problem.eigenvalues), problem.minimizer @ torch.diag(problem.eigenvalues)
    sigma = torch.einsum("bi,ij,bj->b", w, H, w).sqrt()
    y = (w * g).sum(1)
    assert torch.allclose(seen.effective_step, step * a * y / sigma**3, rtol=1e-12)
    assert torch.allclose(seen.q, problem.energy - (y / sigma) ** 2, rtol=1e-8, atol=1e-10)  # this form cancels
    excess = problem.norm_squared(problem.minimizer - (a / sigma)[:, None] * w) / 2
    assert torch.allclose(seen.loss, excess, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_pseudo_spectrum_interlaces_and_is_that_of_the_definition(seed):
    problem, *_ = instance(seed, runs=1)
    u, H = problem.minimizer[0], torch.diag(problem.eigenvalues)
    full = torch.linalg.eigvalsh(H - torch.outer(H @ u, H @ u) / (u @ H @ u))
    assert abs(full[0]) < 1e-12 * full[-1]
    pseudo = ols.pseudo_spectrum(ols.LeastSquares(problem.eigenvalues, u))
    assert torch.allclose(pseudo, full[1:], rtol=1e-12, atol=1e-12)
    lam = problem.eigenvalues
    assert bool((pseudo >= lam[:-1] * (1 - 1e-12)).all())
    assert bool((pseudo <= lam[1:] * (1 + 1e-12)).all())


def test_saddle_multipliers_against_the_jacobian():
    problem = ols.LeastSquares(ols.log_spectrum(5, 20.0), ols.sphere((5,), torch.Generator().manual_seed(0)))
    g, w = problem.correlation, ols.sphere((5,), torch.Generator().manual_seed(1))
    w = w - (w @ g) / (g @ g) * g

    def step(x):
        a, w = ols.bngd_step(problem, x[0], x[1:], 0.7, 0.3)
        return torch.cat([a.reshape(1), w])

    jacobian = torch.autograd.functional.jacobian(step, torch.cat([torch.zeros(1, dtype=torch.float64), w]))
    eigenvalues = torch.linalg.eigvals(jacobian).real.sort().values
    low, high = ols.saddle_multipliers(problem, w, 0.7, 0.3)
    assert eigenvalues[0] == pytest.approx(low.item(), abs=1e-10)
    assert eigenvalues[-1] == pytest.approx(high.item(), abs=1e-10)
    assert torch.allclose(eigenvalues[1:-1], torch.ones(4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(6)}, "w must not be zero"),
        ({"w": torch.ones(5)}, r"w must have shape \(d,\) or \(B, d\) with d = 6"),
        ({"a": torch.ones(2, 2)}, "a must be a number or a vector"),
        ({"a": torch.ones(4)}, "must agree on the number of runs"),
        ({"step": float("nan")}, "step must be finite"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"steps": 1.5}, "steps must be a whole number"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    problem, a, w, step_a, step = instance(0)
    arguments = {"a": a, "w": w, "step_a": step_a, "step": step, "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        ols.bngd(problem, **arguments)


@pytest.mark.parametrize(
    ("eigenvalues", "minimizer", "message"),
    [
        ([1.0, -1.0], [1.0, 1.0], "eigenvalues must be a vector of positive numbers"),
        ([1.0, 2.0], [1.0], "minimizer must have 2 entries"),
        ([1.0, 2.0], [0.0, 0.0], "minimizer must not be zero"),
    ],
)
def test_a_bad_problem_is_refused(eigenvalues, minimizer, message):
    with pytest.raises(ValueError, match=message):
        ols.LeastSquares(torch.tensor(eigenvalues, dtype=torch.float64), torch.tensor(minimizer, dtype=torch.float64))


def test_single_precision_is_refused():
    with pytest.raises(ValueError, match="must be float64"):
        ols.LeastSquares(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("chunked", [False, True])
def test_every_trainer_keeps_to_its_device(chunked):
    """No host sync and no CPU operand: on ``meta`` every ``.item()`` and every Python branch on a tensor would raise."""

    def empty(*shape):
        return torch.empty(*shape, dtype=torch.float64, device="meta")

    problem = ols.LeastSquares(empty(6), empty(4, 6))
    a, w = empty(4), empty(4, 6)
    memory = 2 * 6 * ols.CHUNK_BYTES_PER_VALUE if chunked else 2**30

    def everything():
        state = ols.bngd(problem, a, w, a, a, 3, max_memory=memory)
        assert state.w.device.type == "meta"
        assert ols.observe(problem, state.a, state.w, a).loss.shape == (4,)
        assert ols.mbngd(problem, w, a, 3).w.shape == (4, 6)
        ols.gradient_descent(problem, w, a, 3)

    assert_stays_on_device(everything)
