from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import backpropagation as bp
from lib import surrogates as sg
from lib.losses import Exponential, Squared

RUNS = 3
GAMMAS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
seeds = st.integers(0, 2**32 - 1)
cheap = settings(deadline=None, max_examples=15)
SURROGATES = {
    "first order": sg.FirstOrder(GAMMAS),
    "nonnegative": sg.FirstOrder(GAMMAS, sg.project_nonnegative),
    "second order": sg.SecondOrder(GAMMAS),
    "second order, convexified": sg.SecondOrder(GAMMAS / 1000, convexify=True),
    "proximal": sg.Proximal(GAMMAS),
    "L1": sg.SparseFirstOrder(GAMMAS, 0.02),
    "linear": sg.Linear(GAMMAS),
}


def draw(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def network(seed, widths=(4, 5, 3, 1), samples=9, loss=None, activation=bp.LOGISTIC):
    generator = torch.Generator().manual_seed(seed)
    weights = [draw((RUNS, b, a), generator) for a, b in pairwise(widths)]
    X = draw((widths[0], samples), generator)
    return weights, X, torch.rand(widths[-1], samples, generator=generator).double(), loss or Squared(), activation


def block(seed, j=2, ridge=1e-2, **settings):
    weights, *rest = network(seed, **settings)
    return sg.layer_problem(weights, j, *rest, ridge), weights[j - 1]


# ------------------------------------------------------------------------------------------------------- minimizers


@pytest.mark.parametrize("name", SURROGATES)
@given(seed=seeds)
@cheap
def test_the_surrogate_touches_the_objective_with_its_gradient(name, seed):
    problem, W = block(seed)
    surrogate = SURROGATES[name]
    V = W.clone().requires_grad_()
    g = surrogate.value(problem, W, V)
    torch.testing.assert_close(g.detach(), problem.value(W) + surrogate.penalty(W, 1), rtol=1e-13, atol=1e-13)
    (slope,) = torch.autograd.grad((g - surrogate.penalty(V, 1)).sum(), V)
    torch.testing.assert_close(slope, problem.gradient(W), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SURROGATES)
@given(seed=seeds)
@cheap
def test_nothing_feasible_is_below_the_minimizer(name, seed):
    problem, W = block(seed)
    surrogate = SURROGATES[name]
    if name == "nonnegative":
        W = W.abs()
    D = surrogate.minimizer(problem, W)
    best = surrogate.value(problem, W, D)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-4, 1e-2, 1.0):
        V = D + size * draw(D.shape, generator)
        if name == "nonnegative":
            V = sg.project_nonnegative(V)
        if name == "linear":
            V = sg.project_ball(V, GAMMAS)
        assert (surrogate.value(problem, W, V) >= best - 1e-12).all()


def test_the_minimizers_are_stationary():
    problem, W = block(0)
    for name in ("first order", "second order", "second order, convexified", "proximal"):
        surrogate = SURROGATES[name]
        V = surrogate.minimizer(problem, W).requires_grad_()
        (slope,) = torch.autograd.grad(surrogate.value(problem, W, V).sum(), V)
        assert slope.abs().max() < 1e-10


@given(seed=seeds)
@cheap
def test_the_soft_threshold_minimizes_its_definition_on_a_grid(seed):
    a = draw((5,), torch.Generator().manual_seed(seed))
    grid = torch.linspace(-5, 5, 40001, dtype=torch.float64)
    objective = 0.3 * grid.abs() + (grid - a[:, None]).square() / 2
    assert (sg.soft_threshold(a, 0.3) - grid[objective.argmin(1)]).abs().max() < 3e-4


def test_the_convexified_model_goes_down_where_newton_goes_up():
    problem = sg.BlockProblem.of(lambda a: (a**2 - 1) ** 2 / 4)  # f'' < 0 for |a| < 0.577
    a = torch.tensor([0.3], dtype=torch.float64)
    assert problem.value(sg.SecondOrder(0.1).minimizer(problem, a)) > problem.value(a)
    assert problem.value(sg.SecondOrder(1.5, convexify=True).minimizer(problem, a)) < problem.value(a)


def test_linear_at_a_stationary_point_stays():
    problem = sg.BlockProblem.of(lambda V: V.square().sum((-2, -1)) * 0)
    W = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]], [[0.0, 0.0]]])
    D = sg.Linear(1.0).minimizer(problem, W)
    torch.testing.assert_close(D, torch.tensor([[[0.6, 0.8]], [[0.3, 0.4]], [[0.0, 0.0]]]))


def test_scalar_and_vector_blocks():
    scalar = sg.BlockProblem.of(lambda w: (0.5 - torch.sigmoid(5 * w)) ** 2 + 0.01 * w**2)
    w = torch.tensor([0.3, -1.2], dtype=torch.float64)
    assert sg.FirstOrder(1.0).minimizer(scalar, w).shape == (2,)
    assert scalar.hessian(w).shape == (2, 1, 1)
    vector = sg.BlockProblem.of(lambda v: v.square().square().sum(-1))
    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(vector.hessian(v), torch.diag(12 * v**2))
    torch.testing.assert_close(sg.SecondOrder(0.0).minimizer(vector, v), v * 2 / 3)


@pytest.mark.parametrize("j", [1, 2, 3])
def test_a_layer_problem_is_the_objective(j):
    weights, *rest = network(0)
    problem = sg.layer_problem(weights, j, *rest, 0.1)
    by_autograd = sg.BlockProblem.of(lambda V: bp.objective([*weights[: j - 1], V, *weights[j:]], *rest, 0.1))
    V = weights[j - 1] + 0.1
    torch.testing.assert_close(problem.value(V), by_autograd.value(V), rtol=1e-13, atol=0)
    torch.testing.assert_close(problem.gradient(V), by_autograd.gradient(V), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(problem.hessian(V), by_autograd.hessian(V), rtol=1e-12, atol=1e-15)


# ----------------------------------------------------------------------------------------------------- majorization


def test_required_gamma_on_the_block_of_figure_1():
    problem = sg.BlockProblem.of(lambda w: (0.5 - torch.sigmoid(5 * w)) ** 2 + 0.01 * w**2)
    w = torch.tensor([0.3, 0.0], dtype=torch.float64)
    points = torch.linspace(-8, 8, 40001, dtype=torch.float64)[:, None] + 1e-5
    first = sg.smallest_majorizing(problem, w, points.expand(-1, 2))
    some = torch.cat((w[None], points[::99].expand(-1, 2)))
    together, one_by_one = (sg.smallest_majorizing(replace(problem, broadcasts=b), w, some) for b in (True, False))
    assert torch.equal(together, one_by_one)
    assert (0 < together).all()
    assert first.tolist() == pytest.approx([1.5988, 3.1450], abs=1e-3)
    second = sg.smallest_majorizing(problem, w, points.expand(-1, 2), second_order=True)
    # In one dimension the two differ by the second derivative.
    shifted = (first - problem.hessian(w).flatten()).clamp(min=0)
    torch.testing.assert_close(second, shifted, rtol=0, atol=1e-6)


@given(seed=seeds)
@cheap
def test_a_gamma_fails_at_a_point_exactly_if_it_is_below_the_required_one(seed):
    problem, W = block(seed)
    V = W + draw(W.shape, torch.Generator().manual_seed(seed))
    for second in (False, True):
        make = sg.SecondOrder if second else sg.FirstOrder
        needed = sg.required_gamma(problem, W, V, second_order=second)
        for gamma in (1e-4, 1e-2, 1.0):
            excess = make(gamma).excess(problem, W, V)
            clear = (needed - gamma).abs() > 1e-9
            assert ((excess > 0) == (needed > gamma))[clear].all()


@pytest.mark.parametrize("activation", [bp.LOGISTIC, bp.TANH], ids=lambda a: a.name)
@pytest.mark.parametrize("j", [1, 2, 3])
@given(seed=seeds)
@cheap
def test_a_certified_constant_bounds_the_curvature_wherever_the_block_goes(j, activation, seed):
    weights, X, Y, loss, _ = network(seed, widths=(4, 5, 3, 2), activation=activation)
    bound = sg.certified_lipschitz(weights, j, X, Y, activation, 0.01)
    generator = torch.Generator().manual_seed(seed)
    for size in (0.1, 1.0, 5.0):
        weights[j - 1] = size * draw(weights[j - 1].shape, generator)
        assert (sg.block_lipschitz(weights, j, X, Y, loss, activation, 0.01) <= bound).all()


def test_the_certified_constant_of_the_last_layer():
    weights, X, Y, *_ = network(0)
    Z = bp.forward(weights, X, bp.LOGISTIC)[-2][1]
    expected = 2 * 0.0770293 * torch.linalg.matrix_norm(Z @ Z.mT / 9, 2) + 0.02
    torch.testing.assert_close(sg.certified_last_layer(Z, 0.01), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(sg.certified_lipschitz(weights, 3, X, Y, bp.LOGISTIC, 0.01), expected, rtol=1e-5, atol=0)


def test_the_certified_curvature_of_the_last_unit_is_the_largest_on_a_grid():
    h = torch.linspace(0, 1, 100001, dtype=torch.float64)
    for y in (0.0, 0.3, 1.0):
        curvature = (h * (1 - h)) ** 2 + (h - y) * h * (1 - h) * (1 - 2 * h)
        assert curvature.max() <= 0.0770293 + 1e-7
    assert (h**2 * (1 - h) * (2 - 3 * h)).max() == pytest.approx(0.0770293, abs=1e-7)


@pytest.mark.parametrize("activation", [bp.LOGISTIC, bp.TANH], ids=lambda a: a.name)
def test_the_certified_constant_is_its_formula_with_bounds_from_a_grid(activation):
    u = torch.linspace(-9, 9, 200001, dtype=torch.float64)
    h, slope, bend = activation.value(u), activation.slope(u), activation.curvature(u)
    low = 0.0 if activation is bp.LOGISTIC else -1.0
    s, t, width = slope.max(), bend.abs().max(), 1 - low
    top = (slope**2 + (h - low) * bend).max() if activation is bp.LOGISTIC else s**2 + width * t
    weights = [torch.full((1, 1), w, dtype=torch.float64) for w in (0.3, -2.0, 1.5)]
    X, Y = torch.tensor([[0.7, -0.2]], dtype=torch.float64), torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    inner, outer = 1.5**2 * s**2 * 2 * top + t * 1.5 * 2 * width * s, 1.5 * 2 * width * s * s
    expected = (2.0**2 * s**2 * inner + t * 2.0 * outer) * X.square().mean() + 0.02
    mine = sg.certified_lipschitz(weights, 1, X, Y, activation, 0.01)
    torch.testing.assert_close(mine, expected, rtol=1e-7, atol=0)


def test_certificates_refuse_what_they_do_not_cover():
    weights, X, Y, *_ = network(0)
    with pytest.raises(ValueError, match="activation must be one of logistic, tanh from layer j on, got .'softplus'."):
        sg.certified_lipschitz(weights, 2, X, Y, bp.SOFTPLUS)
    with pytest.raises(ValueError, match=r"Y must be in \[0, 1\], got \[2\.0"):
        sg.certified_lipschitz(weights, 2, X, 0 * Y + 2, bp.LOGISTIC)


@pytest.mark.parametrize("name", ["first order", "second order", "L1"])
@given(seed=seeds, first=st.sampled_from([1e-6, 1.0]))
@cheap
def test_backtracking_ends_below_the_objective(name, seed, first):
    problem, W = block(seed, j=3, loss=Exponential(20.0), activation=bp.SOFTPLUS)
    surrogate = SURROGATES[name]
    found = sg.backtrack(surrogate, problem, W, torch.full((RUNS,), first, dtype=torch.float64))
    model = surrogate.at(found.gamma)
    assert found.accepted.all()
    reached = problem.value(found.D) + surrogate.penalty(found.D, 1)
    assert (reached <= problem.value(W) + surrogate.penalty(W, 1)).all()
    assert (model.excess(problem, W, found.D) <= 1e-13 * reached).all()
    torch.testing.assert_close(found.gamma, first * 2.0 ** (found.trials - 2).double())


def test_backtracking_treats_each_run_alone_and_stands_still_without_a_bound():
    problem, W = block(0)
    gamma = torch.tensor([1e-9, 1.0, float("nan")], dtype=torch.float64)
    found = sg.backtrack(sg.FirstOrder(1.0), problem, W, gamma, trials=2)
    assert found.accepted.tolist() == [False, True, False]
    assert torch.equal(found.D[0], W[0])
    assert torch.equal(found.D[2], W[2])
    assert found.gamma[:2].tolist() == [4e-9, 0.5]  # the next call tries 2e-9, after 0.5e-9 and 1e-9
    assert found.trials.tolist() == [2, 1, 2]
    with pytest.raises(ValueError, match="surrogate must have a gamma to be backtracked"):
        sg.backtrack(sg.Linear(1.0), problem, W, gamma)


# ------------------------------------------------------------------------------------------------------ projections


def basis(pattern):
    """The matrices that are constant on the cells of equal label, one for each label."""
    return torch.stack([(pattern == label).double() for label in pattern.unique()])


@pytest.mark.parametrize(("project", "shape"), [(sg.project_toeplitz, (5, 7)), (sg.project_circulant, (5, 5))])
@given(seed=seeds)
@cheap
def test_projections_on_subspaces_are_least_squares(project, shape, seed):
    V = draw((2, *shape), torch.Generator().manual_seed(seed))
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    offset = rows - columns
    span = basis(offset % shape[0] if project is sg.project_circulant else offset).flatten(1).mT
    assert span.shape[1] == (shape[0] if project is sg.project_circulant else sum(shape) - 1)
    expected = span @ torch.linalg.lstsq(span, V.flatten(1).mT).solution
    torch.testing.assert_close(project(V).flatten(1).mT, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("project", "inside"),
    [
        (lambda V: sg.project_l1_ball(V, 1.5), lambda V: V.abs().sum((-2, -1)) <= 1.5 + 1e-12),
        (lambda V: sg.project_ball(V, 1.5), lambda V: torch.linalg.matrix_norm(V) <= 1.5 + 1e-12),
        (sg.project_nonnegative, lambda V: (V >= 0).all(-1).all(-1)),
    ],
    ids=["L1", "Frobenius", "nonnegative"],
)
@given(seed=seeds)
@cheap
def test_projections_on_convex_sets_obey_the_variational_inequality(project, inside, seed):
    generator = torch.Generator().manual_seed(seed)
    V = draw((4, 3, 5), generator) * torch.tensor([0.01, 0.3, 1.0, 10.0])[:, None, None]
    P = project(V)
    assert inside(P).all()
    torch.testing.assert_close(project(P), P, rtol=1e-12, atol=1e-12)
    within = inside(V)
    torch.testing.assert_close(P[within], V[within], rtol=1e-12, atol=1e-12)
    for _ in range(10):
        other = project(draw((4, 3, 5), generator))
        assert (((V - P) * (other - P)).sum((-2, -1)) <= 1e-10).all()


def test_projections_of_zero_and_bad_radii():
    zero = torch.zeros(2, 3)
    assert torch.equal(sg.project_l1_ball(zero), zero)
    assert torch.equal(sg.project_ball(zero), zero)
    with pytest.raises(ValueError, match="radius must be positive and finite, got 0"):
        sg.project_l1_ball(zero, 0)
    with pytest.raises(ValueError, match="radius must be positive and finite, got -1"):
        sg.project_ball(zero, -1)
    with pytest.raises(ValueError, match=r"V must be square to be circulant, got shape \(2, 3\)"):
        sg.project_circulant(zero)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sg.FirstOrder(0.0), r"gamma must be positive and finite, got 0\.0"),
        (lambda: sg.FirstOrder(torch.tensor([1.0, -1.0])), r"gamma must be positive and finite in every run, got \[-1"),
        (lambda: sg.SecondOrder(-0.1), r"gamma must be zero or positive, and finite, got -0\.1"),
        (lambda: sg.Proximal(float("nan")), "gamma must be positive and finite, got nan"),
        (lambda: sg.SparseFirstOrder(1.0, -1.0), r"weight must be zero or positive, and finite, got -1\.0"),
        (lambda: sg.Linear(float("inf")), "radius must be positive and finite, got inf"),
    ],
)
def test_bad_constants_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
