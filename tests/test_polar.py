import math

import numpy as np
import pytest
import torch

from lib import duality, polar


def factors(batch=24, n_out=40, n_in=60, decay=4.0, dtype=torch.float32, seed=0, repeated=False):
    """Factors whose product has singular values that fall over several decades, as gradients do."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(batch, n_out, generator=generator, dtype=torch.float64)
    deltas = deltas * torch.logspace(0, -decay, batch, dtype=torch.float64)[:, None]
    inputs = torch.rand(batch, n_in, generator=generator, dtype=torch.float64)
    if repeated:
        inputs[1], deltas[1] = inputs[0], deltas[0]
    return deltas.to(dtype), inputs.to(dtype)


def errors(direction, g):
    """Norm of the map above 1, share of the nuclear norm that is missed, and the error of the stated norm."""
    m = (direction.left.double() @ direction.right.double()).double()
    nuclear = torch.linalg.svdvals(g.double()).sum(-1)
    attained = (g.double() * m).sum((-2, -1))
    return (
        (torch.linalg.matrix_norm(m, 2) - 1).max().item(),
        (1 - attained / nuclear).max().item(),
        ((direction.norm - attained) / nuclear).abs().max().item(),
    )


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("decay", [0.0, 2.0, 6.0])
@pytest.mark.parametrize(
    ("method", "above", "missed"), [("svd", 1e-5, 1e-3), ("gram", 1e-4, 1e-3), ("polynomial", 5e-3, 2e-3)]
)
def test_every_map_attains_the_nuclear_norm_with_norm_one(method, above, missed, decay, repeated):
    deltas, inputs = factors(decay=decay, repeated=repeated)
    for g in (deltas.mT @ inputs, inputs.mT @ deltas):
        over, short, stated = errors(getattr(polar, method)(g), g)
        assert over < above
        assert short < missed
        assert stated < 1e-3
    if method != "svd":
        over, short, stated = errors(getattr(polar, f"factored_{method}")(deltas, inputs), deltas.mT @ inputs)
        assert over < max(above, 1e-3)
        assert short < missed
        assert stated < 1e-3


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 3), (10, 300), (5, 2, 3)])
@pytest.mark.parametrize("method", ["gram", "polynomial"])
def test_against_the_singular_value_decomposition(method, shape):
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact, fast = polar.svd(g), getattr(polar, method)(g)
    tolerance = 1e-6 if method == "gram" else 1e-3
    torch.testing.assert_close(fast.left @ fast.right, exact.left @ exact.right, rtol=0, atol=tolerance)
    torch.testing.assert_close(fast.norm, exact.norm, rtol=tolerance, atol=0)


@pytest.mark.parametrize("method", ["svd", "gram", "polynomial"])
def test_zero_goes_to_zero(method):
    direction = getattr(polar, method)(torch.zeros(3, 4))
    assert direction.norm == 0
    assert not (direction.left @ direction.right).any()
    if method != "svd":
        direction = getattr(polar, f"factored_{method}")(torch.zeros(2, 3), torch.zeros(2, 4))
        assert direction.norm == 0
        assert not (direction.left @ direction.right).any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["gram", "polynomial"])
def test_factored_maps_take_a_batch_of_runs(method, shared):
    pairs = [factors(seed=s) for s in range(3)]
    deltas, inputs = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    inputs = inputs[0] if shared else inputs
    together = getattr(polar, f"factored_{method}")(deltas, inputs)
    for s in range(3):
        one = getattr(polar, f"factored_{method}")(deltas[s], inputs if shared else inputs[s])
        torch.testing.assert_close(together.norm[s], one.norm, rtol=1e-5, atol=0)
        right = together.right if shared else together.right[s]
        torch.testing.assert_close(together.left[s] @ right, one.left @ one.right, rtol=0, atol=2e-3)


def test_spectral_norm():
    w = torch.randn(4, 10, 30, generator=torch.Generator().manual_seed(0))
    for x in (w, w.mT):
        torch.testing.assert_close(polar.spectral_norm(x), torch.linalg.matrix_norm(x, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("low", [1e-3, 0.1, 0.9])
def test_the_best_odd_polynomial_errs_equally_at_enough_points(low, count):
    """Chebyshev's criterion: count + 1 alternating errors of equal size prove that none is better."""
    values, error = polar.minimax(low, 1.0, count)
    x = np.linspace(low, 1, 400_001)
    residual = x[:, None] ** (2 * np.arange(count) + 1) @ values - 1
    assert np.abs(residual).max() == pytest.approx(error, rel=1e-4, abs=1e-12)
    at = np.abs(residual) > error * (1 - 1e-3) - 1e-13
    assert 1 + np.count_nonzero(np.diff(np.sign(residual[at]))) >= count + 1


def test_the_composition_stays_below_one_and_reaches_it():
    x = np.r_[np.linspace(0, 1, 100_001), np.geomspace(1e-6, 1, 100_001)]
    y = x
    for terms in polar.coefficients(polar.LOWEST, polar.TERMS):
        y = y[:, None] ** (2 * np.arange(len(terms)) + 1) @ np.array(terms)
    assert y.max() <= 1 + 1e-9
    assert y.min() >= 0
    assert y[x >= polar.LOWEST].min() > 1 - 2e-5


@pytest.mark.parametrize("seed", range(5))
def test_bounds_are_above_the_nuclear_norm(seed):
    deltas, inputs = factors(decay=seed, dtype=torch.float64, seed=seed)
    g = deltas.mT @ inputs
    nuclear = torch.linalg.svdvals(g).sum()
    assert polar.factored_bound(deltas, inputs) >= nuclear
    basis = torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64))[0]
    first, part = polar.deflated_bound(g, basis, torch.linalg.matrix_norm(g))
    second, _ = polar.deflated_bound(g, torch.linalg.qr(g @ part.mT)[0], torch.linalg.matrix_norm(g))
    assert first >= nuclear
    assert second >= nuclear
    whole, _ = polar.deflated_bound(g, torch.eye(40, dtype=torch.float64), torch.linalg.matrix_norm(g))
    assert whole.item() == pytest.approx(nuclear.item(), rel=1e-6)
    assert second < first


def test_the_inexact_map_is_a_certified_direction():
    """<g, m> is at most the nuclear norm: N^2 / 2 p^2 does not promise more than the theory gives."""
    deltas, inputs = factors()
    g = deltas.mT @ inputs
    direction = polar.factored_polynomial(deltas, inputs)
    assert direction.norm <= duality.dual_norm(g, 2) * (1 + 1e-4)
    assert math.isclose(direction.norm, duality.dual_norm(g, 2), rel_tol=2e-3)
