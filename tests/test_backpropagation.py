from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import backpropagation as bp
from lib.losses import CrossEntropy, Exponential, Logistic, Squared, SquaredHinge

ACTIVATIONS = [bp.LOGISTIC, bp.SOFTPLUS, bp.TANH, bp.IDENTITY, bp.LOG_SIGMOID]
LOSSES = [Squared(), Exponential(2.0), CrossEntropy(), SquaredHinge(0.5), Logistic()]
WIDTHS = [(5, 4, 3, 2), (6, 4, 3, 2, 1), (3, 2)]
RUNS, SAMPLES, RIDGE = 2, 7, 0.01
seeds = st.integers(0, 2**32 - 1)


def draw(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(widths, activation, loss, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [0.7 * draw((RUNS, b, a), generator) for a, b in pairwise(widths)]
    X, Y = draw((widths[0], SAMPLES), generator), draw((widths[-1], SAMPLES), generator)
    if isinstance(loss, CrossEntropy):
        last = [bp.LOGISTIC]
        return weights, X, (Y > 0).double(), loss, [activation] * (len(weights) - 1) + last
    return weights, X, Y.sign() if isinstance(loss, (SquaredHinge, Logistic)) else Y, loss, activation


def autograd_gradients(weights, *rest):
    weights = [W.clone().requires_grad_() for W in weights]
    f = bp.objective(weights, *rest)
    return weights, torch.autograd.grad(f.sum(), weights, create_graph=True)


def relative(mine, theirs):
    mine, theirs = mine.detach(), theirs.detach()
    return float((mine - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_gradients_and_hessians_are_those_of_autograd(widths, activation, loss):
    given_problem = problem(widths, activation, loss)
    weights, gradients = autograd_gradients(*given_problem, RIDGE)
    mine = bp.gradients(*given_problem, RIDGE)
    for j, (W, expected) in enumerate(zip(weights, gradients, strict=True), start=1):
        assert relative(mine[j - 1], expected) < 1e-13
        one = bp.block_gradient(given_problem[0], j, *given_problem[1:], RIDGE)
        torch.testing.assert_close(one, mine[j - 1], rtol=1e-13, atol=1e-15)
        columns = expected.flatten(1).unbind(1)
        rows = [torch.autograd.grad(entry.sum(), W, retain_graph=True)[0].flatten(1) for entry in columns]
        hessian = bp.block_hessian(given_problem[0], j, *given_problem[1:], RIDGE)
        assert relative(hessian, torch.stack(rows, 1)) < 1e-12


@given(seeds)
@settings(deadline=None, max_examples=15)
def test_forward_is_the_network_sample_by_sample(seed):
    weights, X, *_ = problem((5, 4, 3, 2), bp.LOGISTIC, Squared(), seed)
    mine = bp.forward(weights, X, bp.LOGISTIC)[-1][1]
    for s in range(RUNS):
        for n in range(SAMPLES):
            z = X[:, n]
            for W in weights:
                z = 1 / (1 + torch.exp(-(W[s] @ z)))
            torch.testing.assert_close(mine[s, :, n], z, rtol=1e-14, atol=1e-14)


@given(seeds)
@settings(deadline=None, max_examples=15)
def test_deltas_are_gradients_at_the_preactivations(seed):
    weights, X, Y, loss, activation = problem((5, 4, 3, 2), bp.TANH, Squared(), seed)
    layers = bp.forward(weights, X, activation)
    for j, delta in enumerate(bp.deltas(weights, X, Y, loss, activation), start=1):
        U = layers[j - 1][0].clone().requires_grad_()
        Z = torch.tanh(U)
        for W in weights[j:]:
            Z = torch.tanh(W @ Z)
        (expected,) = torch.autograd.grad(loss.value(Z, Y).sum(), U)
        torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-15)


@given(seeds)
@settings(deadline=None, max_examples=15)
def test_gauss_newton_is_the_jacobian_squared(seed):
    weights, X, Y, loss, activation = problem((4, 3, 2), bp.LOGISTIC, Squared(), seed)
    one = [W[0] for W in weights]
    for j in (1, 2):

        def output(V, j=j):
            return bp.forward([*one[: j - 1], V, *one[j:]], X, activation)[-1][1]

        jacobian = torch.autograd.functional.jacobian(output, one[j - 1]).flatten(0, 1).flatten(1)
        expected = 2 / SAMPLES * jacobian.mT @ jacobian + 2 * RIDGE * torch.eye(jacobian.shape[1], dtype=torch.float64)
        mine = bp.block_hessian(one, j, X, Y, loss, activation, RIDGE, gauss_newton=True)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
        assert torch.linalg.eigvalsh(mine)[0] > 2 * RIDGE - 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.name)
def test_slopes_and_curvatures(activation):
    U = torch.linspace(-30, 30, 301, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(activation.value(U).sum(), U, create_graph=True)
    torch.testing.assert_close(activation.slope(U), slope, rtol=1e-13, atol=1e-15)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), U)
        torch.testing.assert_close(activation.curvature(U), curvature, rtol=1e-9, atol=1e-15)
    else:
        assert not activation.curvature(U).any()


def test_softplus_is_exact_where_that_of_torch_is_cut_off():
    U = torch.tensor([25.0], dtype=torch.float64)
    assert float(bp.SOFTPLUS.value(U) - U) == pytest.approx(torch.exp(-U).item(), rel=1e-3)


def test_runs_and_data_of_their_own():
    weights, X, Y, loss, activation = problem((5, 4, 3, 2), bp.LOGISTIC, Squared())
    ridge = torch.tensor([0.1, 0.3], dtype=torch.float64)
    many = bp.objective(weights, torch.stack((X, -X)), Y, loss, activation, ridge)
    hessian = bp.block_hessian(weights, 2, torch.stack((X, -X)), Y, loss, activation, ridge)
    for s, x in enumerate((X, -X)):
        one = [W[s] for W in weights]
        torch.testing.assert_close(many[s], bp.objective(one, x, Y, loss, activation, float(ridge[s])))
        torch.testing.assert_close(hessian[s], bp.block_hessian(one, 2, x, Y, loss, activation, float(ridge[s])))


def test_a_ridge_for_each_layer():
    weights, X, Y, loss, activation = problem((5, 4, 3, 2), bp.LOGISTIC, Squared())
    plain, mine = (bp.gradients(weights, X, Y, loss, activation, r) for r in (0.0, [0.0, 0.5, 0.0]))
    torch.testing.assert_close(mine[1] - plain[1], weights[1])
    assert torch.equal(mine[0], plain[0])
    assert torch.equal(mine[2], plain[2])


def test_bad_arguments_are_named():
    weights, X, Y, loss, activation = problem((5, 4, 3, 2), bp.LOGISTIC, Squared())
    with pytest.raises(ValueError, match="j must be a block between 1 and 3, got 0"):
        bp.block_gradient(weights, 0, X, Y, loss, activation)
    with pytest.raises(ValueError, match="j must be a block between 1 and 3, got 4"):
        bp.block_hessian(weights, 4, X, Y, loss, activation)
    with pytest.raises(ValueError, match=r"weights of layer 1 must have 4 columns, got shape \(2, 4, 5\)"):
        bp.forward(weights, X[:4], activation)
    with pytest.raises(ValueError, match="weights must hold at least one matrix, got none"):
        bp.forward([], X, activation)
    with pytest.raises(ValueError, match="activation must be one, or one for each of the 3 layers, got 2"):
        bp.forward(weights, X, [activation] * 2)
    with pytest.raises(ValueError, match="ridge must be a number, or one for each of the 3 layers, got 2"):
        bp.gradients(weights, X, Y, loss, activation, [0.1, 0.2])
