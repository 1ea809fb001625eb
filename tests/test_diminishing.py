"""Algorithm 1: gradients against autograd, the redundancy identity, and runs against a loop written from the paper."""

import math

import pytest
import torch

from lib import diminishing as dbn
from lib.schedules import Constant, Power

CASES = [
    (dbn.TANH, None, "squared"),
    (dbn.LOGISTIC, dbn.IDENTITY, "logistic"),
    (dbn.SOFTPLUS, dbn.IDENTITY, "softmax"),
    (dbn.RELU, dbn.TANH, "squared"),
]


def _case(activation, output, loss, runs=3, N=7, d=3, D=4, K=2):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets = {"squared": draw(N, K), "logistic": draw(N, K).sign(), "softmax": draw(N, K).softmax(1)}[loss]
    problem = dbn.Problem(draw(N, d), targets, activation, output, loss, eps=0.05)
    theta = dbn.Theta(draw(runs, D, d), draw(runs, K, D), draw(runs, D), draw(runs, D))
    return problem, theta, dbn.Statistics(draw(runs, D), draw(runs, D).abs())


@pytest.mark.parametrize(("activation", "output", "loss"), CASES)
def test_gradients_are_those_of_autograd(activation, output, loss):
    problem, theta, lam = _case(activation, output, loss)
    leaves = [leaf.clone().requires_grad_() for leaf in (*theta, *lam)]
    value = dbn.objective(problem, dbn.Theta(*leaves[:4]), dbn.Statistics(*leaves[4:])).sum()
    expected = torch.autograd.grad(value, leaves)
    found = (*dbn.gradient(problem, theta, lam), *dbn.lambda_gradient(problem, theta, lam))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    moving = dbn.Theta(*leaves[:4])
    through = dbn.objective(problem, moving, dbn.statistics(problem, moving.W1)).sum()
    for one, other in zip(dbn.true_gradient(problem, theta), torch.autograd.grad(through, moving), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("activation", "output", "loss"), CASES)
def test_moving_the_averages_is_moving_gain_and_offset(activation, output, loss):
    problem, theta, lam = _case(activation, output, loss)
    gain, offset = dbn.gain_offset(theta, lam, problem.eps)
    plain = dbn.Statistics(torch.zeros_like(gain), torch.ones_like(gain) - problem.eps)
    same = theta._replace(gamma=gain, beta=offset)
    torch.testing.assert_close(dbn.outputs(problem, theta, lam), dbn.outputs(problem, same, plain))
    by_theta, by_lam = dbn.gradient(problem, theta, lam), dbn.lambda_gradient(problem, theta, lam)
    torch.testing.assert_close(by_lam.mean, -gain * by_theta.beta)
    torch.testing.assert_close(by_lam.std, -gain * by_theta.gamma)


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_objective_is_the_sum_of_the_losses(loss):
    problem, theta, lam = _case(dbn.TANH, dbn.IDENTITY, loss, runs=1)
    total = 0.0
    for x, target in zip(problem.inputs, problem.targets, strict=True):
        z = torch.tanh(theta.W1[0] @ x)
        y = theta.gamma[0] * (z - lam.mean[0]) / (lam.std[0] + 0.05) + theta.beta[0]
        o = theta.W2[0] @ y
        if loss == "squared":
            total += float(((o - target) ** 2).sum()) / 2
        elif loss == "logistic":
            total += sum(math.log1p(math.exp(-float(t * v))) for t, v in zip(target, o, strict=True))
        else:
            total -= float((target * torch.log(torch.exp(o) / torch.exp(o).sum())).sum())
    assert float(dbn.objective(problem, theta, lam)) == pytest.approx(total, rel=1e-13)


def _literal(problem, theta, lam, eta, alpha, steps):
    """One run of Algorithm 1, line by line, with autograd for line 3; states for m = 1, ..., steps + 1."""
    theta, lam = [part.clone() for part in theta], [part.clone() for part in lam]
    states, norms = [(theta, lam)], []
    for m in range(1, steps + 1):
        leaves = [part.clone().requires_grad_() for part in theta]
        value = dbn.objective(problem, dbn.Theta(*leaves), dbn.Statistics(*lam))
        slopes = torch.autograd.grad(value, leaves)
        norms.append(math.sqrt(sum(float((slope**2).sum()) for slope in slopes)))
        theta = [part - eta(m) * slope for part, slope in zip(theta, slopes, strict=True)]
        units = problem.activation.value(problem.inputs @ theta[0].T)
        mean = units.sum(0) / len(units)
        fresh = mean, ((units - mean) ** 2).sum(0).div(len(units)).sqrt()
        weight = min(1.0, alpha(m + 1))
        lam = [weight * new + (1 - weight) * old for new, old in zip(fresh, lam, strict=True)]
        states.append((theta, lam))
    return states, norms


@pytest.mark.parametrize(("activation", "output", "loss"), CASES)
def test_runs_are_those_of_the_literal_loop(activation, output, loss):
    problem, theta, lam = _case(activation, output, loss)
    eta = [Power(0.02, 0.6), Power(0.03, 1.0), dbn.ShiftedPower(0.2, 0.75, 10)]
    alpha = [0.3, Power(3.0, 2.0), dbn.LogPower(1.0, 2.0)]
    record = dbn.run(
        problem, theta, lam, eta, alpha, 12, record_every=[1, 4, 13], quantities=["gradient_norm", "increment"]
    )
    assert record.iterations.tolist() == [1, 4, 13]
    for r in range(3):
        one, start = dbn.Theta(*(part[r] for part in theta)), dbn.Statistics(*(part[r] for part in lam))
        weight = alpha[r] if r else Constant(0.3)
        states, norms = _literal(problem, one, start, eta[r], weight, 12)
        torch.testing.assert_close(record.gradient_norm[:, r], torch.tensor(norms, dtype=torch.float64))
        for t, m in enumerate([1, 4, 13]):
            found = [part[t, r] for part in (*record.theta, *record.lam)]
            for value, expected in zip(found, [*states[m - 1][0], *states[m - 1][1]], strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        moves = [
            max(float((new - old).abs().max()) for new, old in zip(after[1], before[1], strict=True))
            for before, after in zip(states, states[1:], strict=False)
        ]
        torch.testing.assert_close(record.increment[:, r], torch.tensor(moves, dtype=torch.float64))


def test_the_default_averages_are_the_batch_statistics_and_tables_are_taken_as_they_are():
    problem, theta, _ = _case(dbn.TANH, None, "squared")
    alpha = torch.zeros(5, 3, dtype=torch.float64)
    record = dbn.run(problem, theta, None, torch.full((5,), 0.01, dtype=torch.float64), alpha, 5, record_every=1)
    start = dbn.statistics(problem, theta.W1)
    assert record.iterations.tolist() == [1, 2, 3, 4, 5, 6]
    for found, expected in zip(record.lam, start, strict=True):
        assert torch.equal(found, expected.expand(6, -1, -1))  # weight 0: the averages never move
    assert record.increment is None


def test_a_dead_unit_has_no_derivative_of_its_deviation():
    problem = dbn.Problem(torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64), eps=0.1)
    mean, std = dbn.statistics_gradients(problem, torch.ones(1, 3, 2, dtype=torch.float64))
    assert bool((mean > 0).all())
    assert bool((std == 0).all())


def test_wrong_arguments_are_named():
    problem, theta, lam = _case(dbn.TANH, None, "squared")
    with pytest.raises(ValueError, match="loss must be one of"):
        dbn.Problem(problem.inputs, problem.targets, loss="hinge")
    with pytest.raises(ValueError, match="inputs must be"):
        dbn.Problem(problem.inputs, problem.targets[:3])
    with pytest.raises(ValueError, match="quantities"):
        dbn.run(problem, theta, lam, Power(0.1, 1), Constant(1), 3, quantities=["loss"])
    with pytest.raises(ValueError, match="a table must be"):
        dbn.run(problem, theta, lam, torch.ones(4, dtype=torch.float64), Constant(1), 3)
    with pytest.raises(ValueError, match="recorded iterations"):
        dbn.run(problem, theta, lam, Power(0.1, 1), Constant(1), 3, record_every=[5])
