import copy
import io

import pytest
import torch
from torch import nn

from lib import backpropagation as bp
from lib import schedules
from lib.ensemble import Ensemble
from lib.losses import Squared
from lib.networks import feedforward, mlp
from lib.optimizers import BSUM
from lib.surrogates import (
    FirstOrder,
    Linear,
    Proximal,
    SecondOrder,
    SparseFirstOrder,
    project_l1_ball,
    project_nonnegative,
    project_toeplitz,
)

RIDGE = 1e-3
WIDTHS = (4, 5, 3, 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


X = torch.randn(20, 4, dtype=torch.float64, generator=seeded())
Y = torch.rand(20, 1, dtype=torch.float64, generator=seeded(1))


def network(seed=0, widths=WIDTHS):
    return feedforward(widths, seeded(seed), start="glorot").double()


def loss(net):
    return (net(X) - Y).square().mean() + RIDGE * sum(p.square().sum() for p in net.parameters())


def gradients(net):
    return torch.autograd.grad(loss(net), list(net.parameters()))


def train(net, steps, blocks=None, *args, **settings):
    optimizer = BSUM(net.parameters() if blocks is None else blocks, *args, **settings)
    return torch.stack([optimizer.step(lambda: loss(net)) for _ in range(steps)]), optimizer


def assert_same(mine, theirs, tolerance=1e-15):
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- special cases


def test_one_block_is_the_sgd_of_torch():
    mine, theirs = network(), network()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3 / 2.0)
    for _ in range(10):
        theirs.load_state_dict(mine.state_dict())  # each step from the same point: rounding does not add up
        sgd.zero_grad()
        loss(theirs).backward()
        sgd.step()
        train(mine, 1, [list(mine.parameters())], FirstOrder(2.0), schedule=schedules.Constant(0.3))
        assert_same(mine, theirs)


def test_a_decaying_step_is_the_sgd_of_torch_with_a_scheduler():
    mine, theirs = network(), network()
    sgd = torch.optim.SGD(theirs.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(sgd, lambda k: 0.5 / (k + 1))
    train(mine, 12, [list(mine.parameters())], FirstOrder(1.0), schedule=schedules.Harmonic(1.0))
    for _ in range(12):
        sgd.zero_grad()
        loss(theirs).backward()
        sgd.step()
        scheduler.step()
    assert_same(mine, theirs, 1e-14)


def test_one_parameter_a_block_is_block_cyclic_back_propagation():
    mine, theirs = network(), network()
    parameters = list(theirs.parameters())
    train(mine, 9, None, FirstOrder(1.0), schedule=lambda k: 0.7 / k)
    for k in range(1, 10):
        j = (k - 1) % 3
        g = gradients(theirs)[j]
        with torch.no_grad():
            parameters[j] -= 0.7 / k * g
    assert_same(mine, theirs, 1e-14)


def test_second_order_is_damped_newton():
    mine, theirs = network(), network()
    train(mine, 4, None, SecondOrder(0.5))
    for j in (0, 1, 2, 0):
        parameters = list(theirs.parameters())

        def f(V, j=j, parameters=parameters):
            names = [name for name, _ in theirs.named_parameters()]
            values = dict(zip(names, [*parameters[:j], V, *parameters[j + 1 :]], strict=True))
            out = torch.func.functional_call(theirs, values, X)
            return (out - Y).square().mean() + RIDGE * sum(p.square().sum() for p in values.values())

        W = parameters[j].detach()
        n = W.numel()
        H = torch.autograd.functional.hessian(f, W).reshape(n, n) + 0.5 * torch.eye(n, dtype=torch.float64)
        step = torch.linalg.solve(H, torch.autograd.functional.jacobian(f, W).flatten())
        with torch.no_grad():
            parameters[j].sub_(step.view_as(W))
    assert_same(mine, theirs, 1e-13)


def test_the_gauss_newton_matrix_makes_it_levenberg_marquardt():
    mine = network()
    weights = [p for p in mine.parameters()]

    def gauss_newton(j):
        with torch.no_grad():
            return bp.block_hessian(weights, j, X.mT, Y.mT, Squared(), bp.LOGISTIC, RIDGE, gauss_newton=True)

    before = weights[0].detach().clone()

    def residuals(v):
        out = bp.forward([v, *weights[1:]], X.mT, bp.LOGISTIC)[-1][1]
        return torch.cat([((out - Y.mT) / 20**0.5).flatten(), RIDGE**0.5 * v.flatten()])

    r, jacobian = residuals(before).detach(), torch.autograd.functional.jacobian(residuals, before).flatten(1)
    eye = torch.eye(20, dtype=torch.float64)
    expected = before.flatten() - torch.linalg.solve(2 * jacobian.mT @ jacobian + 0.1 * eye, 2 * jacobian.mT @ r)
    train(mine, 1, None, SecondOrder(0.1), curvature=gauss_newton)
    torch.testing.assert_close(weights[0].detach().flatten(), expected, rtol=1e-12, atol=1e-13)


def test_proximal_is_an_implicit_gradient_step():
    net = network()
    before = [p.detach().clone() for p in net.parameters()]
    train(net, 1, None, Proximal(0.2))
    W = next(net.parameters())
    torch.testing.assert_close(W, before[0] - gradients(net)[0] / 0.2, rtol=1e-9, atol=1e-9)


def test_linear_is_the_method_of_frank_and_wolfe():
    V = nn.Parameter(torch.tensor([[0.3, -0.2]], dtype=torch.float64))
    Q = torch.tensor([2.0, 0.5], dtype=torch.float64)
    optimizer = BSUM([V], Linear(1.0), schedule=lambda k: 2 / (k + 1))
    for _ in range(400):
        optimizer.step(lambda: -(Q * V.square()).sum() / 2)
    assert V.detach().abs().flatten().tolist() == pytest.approx([1.0, 0.0], abs=1e-4)


def test_sparse_is_iterative_soft_thresholding_and_keeps_zeros_at_the_unit_step():
    mine = network()
    W = next(mine.parameters())
    expected = W.detach() - gradients(mine)[0] / 0.5
    expected = expected.sign() * (expected.abs() - 0.3 / 0.5).clamp(min=0)
    train(mine, 1, None, SparseFirstOrder(0.5, 0.3))
    torch.testing.assert_close(W.detach(), expected, rtol=1e-14, atol=1e-15)
    assert ((W == 0) == (expected == 0)).all()
    assert (W == 0).any()


@pytest.mark.parametrize("project", [project_toeplitz, project_l1_ball, project_nonnegative])
def test_constraints_hold_and_the_step_is_projected_gradient_descent(project):
    net = network()
    parameters = list(net.parameters())
    with torch.no_grad():
        for p in parameters:
            p.copy_(project(p))
    before, g = parameters[0].detach().clone(), gradients(net)[0]
    _, optimizer = train(net, 1, None, FirstOrder(0.5, project))
    torch.testing.assert_close(parameters[0].detach(), project(before - g / 0.5))
    for _ in range(20):
        optimizer.step(lambda: loss(net))
    for p in parameters:
        torch.testing.assert_close(p.detach(), project(p.detach()), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------- rules and backtracking


@pytest.mark.parametrize("rule", ["cyclic", "random", "greedy"])
@pytest.mark.parametrize("surrogate", [FirstOrder(1e-6), SecondOrder(1e-6), SparseFirstOrder(1e-6, 1e-3)], ids=repr)
@pytest.mark.parametrize("trials", [None, 3])
def test_backtracked_unit_steps_never_raise_the_objective(rule, surrogate, trials):
    ensemble = Ensemble([network(s) for s in range(3)])
    parameters = list(ensemble.parameters())

    def closure():
        ridge = RIDGE * sum(p.square().sum((-2, -1)) for p in parameters)
        return ensemble.losses(lambda out, y: (out - y).square().mean(), X, Y) + ridge

    def full():
        with torch.no_grad():
            return closure() + sum(surrogate.penalty(p, 1) for p in parameters)

    optimizer = BSUM(parameters, surrogate, rule=rule, backtracking=True, trials=trials)
    values = [full()]
    for _ in range(30):
        optimizer.step(closure)
        values.append(full())
    values = torch.stack(values)
    assert (values[1:] <= values[:-1]).all()
    assert (values[-1] < 0.95 * values[0]).all()


def test_greedy_takes_the_block_that_promises_most_in_each_run():
    ensemble = Ensemble([network(s) for s in range(5)])
    before = copy.deepcopy(ensemble)
    gammas = [0.1, 1.0, 3.0]
    groups = [{"params": [p], "surrogate": FirstOrder(g)} for p, g in zip(ensemble.parameters(), gammas, strict=True)]
    square = lambda out, y: (out - y).square().mean()  # noqa: E731
    g = torch.autograd.grad(before.losses(square, X, Y).sum(), list(before.parameters()))
    promised = torch.stack([part.square().sum((1, 2)) / (2 * c) for part, c in zip(g, gammas, strict=True)])
    BSUM(groups, FirstOrder(1.0), rule="greedy").step(lambda: ensemble.losses(square, X, Y))
    moved = torch.stack(
        [(p != q).flatten(1).any(1) for p, q in zip(ensemble.parameters(), before.parameters(), strict=True)]
    )
    assert moved.sum(0).tolist() == [1] * 5
    assert torch.equal(moved.int().argmax(0), promised.argmax(0))


def test_random_blocks_are_a_function_of_the_seed():
    def moved(seed):
        net, blocks = network(), []
        optimizer = BSUM(net.parameters(), FirstOrder(1.0), rule="random", seed=seed)
        for _ in range(12):
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step(lambda: loss(net))
            blocks += [j for j, (p, q) in enumerate(zip(net.parameters(), before, strict=True)) if not p.equal(q)]
        return blocks

    assert moved(1) == moved(1)
    assert moved(1) != moved(2)
    assert set(moved(1)) == {0, 1, 2}


# --------------------------------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize(
    ("surrogate", "settings"),
    [
        (FirstOrder(torch.tensor([0.1, 0.2, 0.5])), {"schedule": schedules.InverseSquareRoot(0.9)}),
        (FirstOrder(1.0), {"backtracking": True}),
        (FirstOrder(1.0), {"backtracking": True, "rule": "greedy"}),
        (SecondOrder(0.05, convexify=True), {}),
        (Proximal(0.1), {}),
    ],
    ids=lambda x: str(x),
)
def test_a_run_does_not_depend_on_the_others(surrogate, settings):
    ensemble = Ensemble([network(s) for s in range(3)])
    alone = [network(s) for s in range(3)]

    def closure():
        ridge = RIDGE * sum(p.square().sum((-2, -1)) for p in ensemble.parameters())
        return ensemble.losses(lambda out, y: (out - y).square().mean(), X, Y) + ridge

    optimizer = BSUM(ensemble.parameters(), surrogate, **settings)
    for _ in range(12):
        optimizer.step(closure)
    for s, net in enumerate(alone):
        train(net, 12, None, surrogate.select(s) if surrogate.gamma is not None else surrogate, **settings)
        assert_same(net, ensemble.module(s), 1e-9)


def test_ordinary_modules_with_biases_and_blocks_of_several_parameters():
    net = mlp((4, 6, 3), seeded(), activation=nn.Tanh).double()
    blocks = [list(layer.parameters()) for layer in net if isinstance(layer, nn.Linear)]
    for surrogate in (FirstOrder(1.0), SecondOrder(1.0)):
        optimizer = BSUM(blocks, surrogate, backtracking=True)
        values = [float(optimizer.step(lambda: net(X).square().mean())) for _ in range(8)]
        assert values == sorted(values, reverse=True)
        assert values[-1] < values[0]


def test_a_parameter_that_the_objective_does_not_use_stays():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = BSUM([p, q], FirstOrder(2.0))
    for _ in range(2):
        optimizer.step(lambda: p.square().sum())
    assert p.tolist() == [0.0, 0.0]
    assert q.tolist() == [1.0, 1.0]


def test_a_diverged_run_stands_still_and_disturbs_no_other():
    p = nn.Parameter(torch.tensor([[1.0], [1.0]], dtype=torch.float64))
    scale = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    optimizer = BSUM([p], FirstOrder(1.0), backtracking=True)
    for _ in range(3):
        optimizer.step(lambda: scale * p.square().sum(1))
    assert abs(p[0].item()) < 0.3
    assert p[1].item() == 1.0


# ---------------------------------------------------------------------------------------------------- state, errors


@pytest.mark.parametrize("rule", ["cyclic", "random", "greedy"])
def test_state_survives_a_file_read_without_code(rule):
    settings = {"rule": rule, "backtracking": True, "schedule": schedules.InverseSquareRoot(0.9)}
    straight, stopped = network(), network()
    train(straight, 10, None, FirstOrder(1.0), **settings)
    _, optimizer = train(stopped, 5, None, FirstOrder(1.0), **settings)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = BSUM(stopped.parameters(), FirstOrder(1.0), **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        resumed.step(lambda: loss(stopped))
    assert_same(straight, stopped, 0.0)


def test_bad_arguments_are_named():
    p = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match="rule must be one of cyclic, random, greedy, got 'best'"):
        BSUM([p], FirstOrder(1.0), rule="best")
    with pytest.raises(ValueError, match="trials must be a whole number, at least 1, or None, got 0"):
        BSUM([p], FirstOrder(1.0), trials=0)
    with pytest.raises(ValueError, match="surrogate must be one of lib.surrogates, got 1.0"):
        BSUM([p], 1.0)
    with pytest.raises(ValueError, match="backtracking must be False for a surrogate without gamma, got Linear"):
        BSUM([p], Linear(1.0), backtracking=True)
    with pytest.raises(ValueError, match="project must be None for a block of 2 parameters"):
        BSUM([[p, nn.Parameter(torch.ones(2))]], FirstOrder(1.0, project_toeplitz))
    with pytest.raises(ValueError, match="blocks must be parameters, lists of parameters or groups, got one tensor"):
        BSUM(p, FirstOrder(1.0))
    with pytest.raises(ValueError, match=r"closure must return a scalar or \(S,\) losses"):
        BSUM([p], FirstOrder(1.0)).step(lambda: p)
    with pytest.raises(ValueError, match=r"run axis \(2,\) of the losses in front, got \[\(3, 2\)\]"):
        BSUM([p], FirstOrder(1.0)).step(lambda: p.sum(0))
