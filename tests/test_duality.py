import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch.func import functional_call

from lib import duality, networks
from lib.duality import LOGISTIC, TANH, Activation

QS = [1, 2, math.inf]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def norm_by_definition(w, q):
    """max ||w x||_q over the unit ball, whose maximum is at a vertex for q = 1 and inf."""
    if q == 1:
        vertices = torch.eye(w.shape[1], dtype=w.dtype)
    elif q == math.inf:
        vertices = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=w.shape[1])), dtype=w.dtype)
    else:
        return math.sqrt(np.linalg.eigvalsh((w.T @ w).numpy())[-1])
    return torch.linalg.vector_norm(vertices @ w.T, ord=q, dim=1).max().item()


def dual_by_linear_programming(g, q):
    """max <g, u> with ||u||_q <= 1, as a linear program in u = plus - minus."""
    rows, columns = g.shape
    sums = np.zeros((columns if q == 1 else rows, rows, columns))
    for k in range(len(sums)):
        sums[(k, slice(None), k) if q == 1 else (k, k)] = 1
    sums = sums.reshape(len(sums), -1)
    flat = g.reshape(-1).numpy()
    found = linprog(-np.r_[flat, -flat], A_ub=np.c_[sums, sums], b_ub=np.ones(len(sums)), bounds=(0, None))
    return -found.fun


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 4), (6, 3)])
@pytest.mark.parametrize("q", QS)
def test_norms_are_what_their_definitions_say(q, shape):
    g = matrix(*shape)
    assert duality.matrix_norm(g, q).item() == pytest.approx(norm_by_definition(g, q), rel=1e-12)
    oracle = np.linalg.svd(g.numpy(), compute_uv=False).sum() if q == 2 else dual_by_linear_programming(g, q)
    assert duality.dual_norm(g, q).item() == pytest.approx(oracle, rel=1e-9)


@pytest.mark.parametrize("q", QS)
def test_no_matrix_of_norm_one_beats_the_dual_norm(q):
    g, u = matrix(3, 4), matrix(2000, 3, 4, seed=1)
    pairing = (g * u).sum((-2, -1)) / duality.matrix_norm(u, q)
    assert pairing.max() <= duality.dual_norm(g, q) * (1 + 1e-12)


entries = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3, allow_subnormal=False))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6), columns=st.integers(1, 6), q=st.sampled_from(QS))
def test_a_duality_map_obeys_its_two_identities(data, rows, columns, q):
    values = data.draw(st.lists(entries, min_size=rows * columns, max_size=rows * columns))
    g = torch.tensor(values, dtype=torch.float64).view(rows, columns)
    u = duality.duality_map(g, q)
    dual = duality.dual_norm(g, q).item()
    assert duality.matrix_norm(u, q).item() == pytest.approx(dual, rel=1e-9, abs=1e-300)
    assert (g * u).sum().item() == pytest.approx(dual**2, rel=1e-9, abs=1e-300)
    torch.testing.assert_close(u, dual * duality.unit(g, q), rtol=1e-12, atol=1e-12 * dual)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (100, 700), (700, 100), (65, 600)])
def test_the_identities_hold_at_every_size_and_precision(shape, dtype, q):
    g = matrix(*shape).to(dtype)
    for error in duality.identity_errors(g, duality.duality_map(g, q), q):
        assert error < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_singular_values_do_not_spoil_the_map(dtype, q):
    left, right = torch.linalg.qr(matrix(60, 40))[0], torch.linalg.qr(matrix(90, 40, seed=1))[0]
    g = ((left * torch.logspace(0, -12, 40, dtype=torch.float64)) @ right.T).to(dtype)
    first, second = duality.identity_errors(g, duality.duality_map(g, q), q)
    assert max(first, second) < (1e-4 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("g", [torch.zeros(3, 4), torch.zeros(1, 1), torch.ones(4, 3), torch.eye(3)[:2] * 0 + 7.0])
@pytest.mark.parametrize("q", QS)
def test_degenerate_matrices(q, g):
    """Zero, and constant ones: all entries tie, and the rank is 1."""
    g = g.double()
    u = duality.duality_map(g, q)
    assert max(duality.identity_errors(g, u, q)) < 1e-12
    along = {1: -2, math.inf: -1}.get(q)
    if along is not None:
        assert (duality.unit(g, q) != 0).sum(along).eq(1).all(), "one entry a column or row, whatever the ties"
    assert duality.matrix_norm(duality.unit(g, q), q).item() == pytest.approx(0 if q == 2 and not g.any() else 1)


def test_sgn_of_zero_is_one():
    g = torch.tensor([[0.0, 2.0], [0.0, -3.0]])
    assert duality.unit(g, 1)[:, 0].sum() == 1
    assert duality.unit(torch.zeros(2, 2), math.inf).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("shape", [(3, 5), (40, 900), (900, 40)])
def test_leading_axes_are_a_batch(shape, q):
    g = matrix(2, 3, *shape)
    for function in (duality.matrix_norm, duality.dual_norm, duality.unit, duality.duality_map):
        together = function(g, q)
        for i, j in itertools.product(range(2), range(3)):
            torch.testing.assert_close(together[i, j], function(g[i, j], q), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 7), (20, 3000), (3000, 20), (2, 129, 300), (64, 1024)])
@pytest.mark.parametrize("q", [1, math.inf])
def test_extremes_finds_one_largest_entry(q, shape):
    g = torch.randint(-9, 10, shape, generator=seeded()).float()
    axis, index, values = duality.extremes(g, q)
    torch.testing.assert_close(values.abs(), g.abs().amax(axis, keepdim=True))
    torch.testing.assert_close(values, g.gather(axis, index))


def test_identity_errors_measures_both():
    g = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    first, second = duality.identity_errors(g, 2 * duality.duality_map(g, 2), 2)
    assert (first.item(), second.item()) == pytest.approx((1, 1))
    assert duality.identity_errors(g * 0, g, 2)[0].item() == pytest.approx(4), "absolute where g = 0"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: g[0], ValueError, r"g must have shape \(\.\.\., n_out, n_in\).* got \(3,\)"),
        (lambda g: g[:, :0], ValueError, r"neither of them 0, got \(2, 0\)"),
        (lambda g: g.int(), TypeError, "g must have a floating-point dtype, got torch.int32"),
        (lambda g: g.tolist(), TypeError, "g must be a tensor, got list"),
        (lambda g: g / 0, ValueError, "g must be finite, got 6 entries that are not"),
    ],
)
def test_what_is_no_matrix_is_refused_by_name(change, error, message):
    for function in (duality.dual_norm, duality.unit, duality.duality_map):
        with pytest.raises(error, match=message):
            function(change(torch.ones(2, 3)), 2)


@pytest.mark.parametrize("q", [0, 3, 1.5, -math.inf, "2", None])
def test_other_norms_are_refused(q):
    with pytest.raises(ValueError, match="q must be 1, 2 or inf, got"):
        duality.matrix_norm(torch.ones(2, 2), q)


# -- Layer polynomials and the local norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [LOGISTIC, TANH])
def test_the_activations_constants_are_their_suprema(activation):
    x = torch.linspace(-5, 5, 200_001, dtype=torch.float64, requires_grad=True)
    y = torch.sigmoid(x) if activation is LOGISTIC else torch.tanh(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert slope.max().item() == pytest.approx(activation.slope, rel=1e-8)
    assert curvature.abs().max().item() == pytest.approx(activation.curvature, rel=1e-8)


@pytest.mark.parametrize("q", QS)
def test_two_layers_as_in_equation_24(q):
    """With the widths that the paper's single n stands for: the layer's input in c_q, the output in d_q."""
    n0, n1, n2 = 7, 5, 3
    w1, w2 = matrix(n1, n0), matrix(n2, n1, seed=1)
    c = {1: lambda n: n, 2: lambda n: n**0.5, math.inf: lambda n: 1}[q]
    d1 = {1: 4, 2: 4 * n2**0.5, math.inf: 4 * n2}[q]
    d2 = {1: 2, 2: 2, math.inf: 2 * n2}[q]
    s1, s2, z = 1 / 4, math.sqrt(3) / 18, norm_by_definition(w2, q)
    first = c(n0) ** 2 * ((d2 * s1**4 + d1 * s1**2 * s2) * z**2 + d1 * s2 * s1 * z) + 1
    second = c(n1) ** 2 * (d2 * s1**2 + d1 * s2) + 1
    torch.testing.assert_close(
        duality.layer_polynomials([w1, w2], q), torch.tensor([first, second], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_three_layers_by_the_recursion_written_out():
    w = [matrix(4, 5), matrix(3, 4, seed=1), matrix(2, 3, seed=2)]
    a, b = (norm_by_definition(x, math.inf) for x in w[1:])
    s1, s2 = TANH.slope, TANH.curvature
    r = s1**2 * a * b
    v = s2 * s1**2 * a**2 * b**2 + s1 * b * (s2 * a**2)
    expected = 4 * s1**2 * r**2 + 8 * s1**2 * v + 8 * s2 * r + 1  # n_K = 2: d2 = 4, d1 = 8
    assert duality.layer_polynomials(w, math.inf, TANH)[0].item() == pytest.approx(expected, rel=1e-12)


def test_a_layer_does_not_see_itself_or_the_layers_before():
    w = [matrix(4, 5), matrix(3, 4, seed=1), matrix(2, 3, seed=2)]
    before = duality.layer_polynomials(w, 2)
    after = duality.layer_polynomials([10 * w[0], 10 * w[1], w[2]], 2)
    torch.testing.assert_close(before[1:], after[1:])
    assert after[0] > before[0]


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("q", QS)
def test_the_squares_bound_the_hessian_of_each_layer(q, sharp):
    sizes = (6, 4, 3, 2)
    network = networks.feedforward(sizes, seeded()).double()
    names = [name for name, _ in network.named_parameters()]
    weights = {name: p.detach() for name, p in network.named_parameters()}
    x, target = matrix(8, 6, seed=1).clamp(-1, 1), torch.rand(8, 2, dtype=torch.float64, generator=seeded(2))
    extra = {}
    if sharp:
        layers = [x]
        for name in names:
            layers.append(torch.sigmoid(layers[-1] @ weights[name].T))
        scales = [torch.linalg.vector_norm(y, ord=q, dim=1).square().mean() for y in layers[:-1]]
        extra = {"input_scales": torch.stack(scales), "residual": 1.0}
    squares = duality.layer_polynomials(list(weights.values()), q, **extra)
    for i, name in enumerate(names):

        def loss(w, name=name):
            return (functional_call(network, {**weights, name: w}, (x,)) - target).square().sum(1).mean()

        hessian = torch.autograd.functional.hessian(loss, weights[name]).flatten(2).flatten(0, 1)
        u, v = (matrix(500, *weights[name].shape, seed=s) for s in (3, 4))
        u, v = (t / duality.matrix_norm(t, q)[:, None, None] for t in (u, v))
        for _ in range(20):  # alternating maximization of the bilinear form
            v = duality.unit((u.flatten(1) @ hessian).view_as(u), q)
            u = duality.unit((v.flatten(1) @ hessian).view_as(u), q)
        largest = ((u.flatten(1) @ hessian) * v.flatten(1)).sum(1).max()
        assert 0 < largest <= squares[i]


@pytest.mark.parametrize("q", QS)
def test_polynomials_of_an_ensemble_are_those_of_its_runs(q):
    w = [matrix(3, 4, 5), matrix(3, 2, 4, seed=1)]
    together = duality.layer_polynomials(w, q)
    assert together.shape == (3, 2)
    for s in range(3):
        torch.testing.assert_close(together[s], duality.layer_polynomials([x[s] for x in w], q))


@pytest.mark.parametrize("q", QS)
def test_the_local_dual_norm_is_the_maximum_over_the_local_ball(q):
    gs = [matrix(2, 3), matrix(4, 2, seed=1)]
    squares = torch.tensor([3.0, 7.0], dtype=torch.float64)
    us = [matrix(3000, 2, 3, seed=2), matrix(3000, 4, 2, seed=3)]
    pairing = sum((g * u).sum((-2, -1)) for g, u in zip(gs, us, strict=True))
    dual = duality.finsler_dual_norm(gs, squares, q)
    assert (pairing / duality.finsler_norm(us, squares, q)).max() <= dual
    best = duality.finsler_duality_map(gs, squares, q)
    assert sum((g * u).sum() for g, u in zip(gs, best, strict=True)).item() == pytest.approx(dual.item() ** 2)
    assert duality.finsler_norm(best, squares, q).item() == pytest.approx(dual.item())
    assert sum(bool(u.any()) for u in best) == 1, "one layer moves"


def test_each_run_has_its_own_layer():
    gs = [torch.ones(2, 2, 3), torch.ones(2, 4, 2)]
    squares = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    first, second = duality.finsler_duality_map(gs, squares, 2)
    assert [bool(x.any()) for x in (first[0], second[0], first[1], second[1])] == [True, False, False, True]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "weights must hold at least one matrix"),
        ([torch.ones(3, 4), torch.ones(2, 5)], "number 2 takes 5 inputs, but number 1 has 3 outputs"),
        ([torch.ones(3, 4), torch.ones(2, 2, 3)], "equal leading axes"),
    ],
)
def test_matrices_that_are_no_network_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        duality.layer_polynomials(weights, 2)


def test_an_activation_needs_finite_bounds():
    with pytest.raises(ValueError, match="curvature must be finite and at least 0, got inf"):
        Activation("kink", 1.0, math.inf)
