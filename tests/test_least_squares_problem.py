"""The functions of chapter 3, part A, against definitions written from scratch."""

import pytest
import torch

from lib import least_squares as ols

BATCH, DIMENSION = 5, 4


@pytest.fixture
def configuration():
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(BATCH, DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)).Q
    covariance = rotation @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64)) @ rotation.mT
    u, w = (torch.randn(BATCH, DIMENSION, generator=generator, dtype=torch.float64) for _ in "uw")
    a = torch.randn(BATCH, generator=generator, dtype=torch.float64)
    return covariance, u, a, w


def correlation(covariance, u):
    return (covariance @ u.unsqueeze(-1)).squeeze(-1)


def test_prescribed_sample_has_the_moments(configuration):
    covariance, u, _, _ = configuration
    x, y = ols.prescribed_sample(covariance, u, 0.7, 12, torch.Generator().manual_seed(2))
    g = correlation(covariance, u)
    assert torch.allclose(x.mean(-2), torch.zeros_like(u), atol=1e-13)
    assert torch.allclose(y.mean(-1), torch.zeros(BATCH, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(x.mT @ x / 12, covariance, atol=1e-12)
    assert torch.allclose((x * y.unsqueeze(-1)).mean(-2), g, atol=1e-12)
    assert torch.allclose(y.square().mean(-1), (u * g).sum(-1) + 0.49, atol=1e-12)
    with pytest.raises(ValueError, match="size must be at least d"):
        ols.prescribed_sample(covariance, u, 0.7, 5, torch.Generator())


def test_objective_is_the_mean_of_the_batch_normalized_loss(configuration):
    covariance, u, a, w = configuration
    x, y = ols.prescribed_sample(covariance, u, 0.7, 12, torch.Generator().manual_seed(2))
    z = (x @ w.unsqueeze(-1)).squeeze(-1)
    by_definition = ((y - a.unsqueeze(-1) * z / z.std(-1, correction=0, keepdim=True)) ** 2).mean(-1) / 2
    value = ols.normalized_objective(covariance, correlation(covariance, u), y.square().mean(-1), a, w)
    assert torch.allclose(value, by_definition, rtol=1e-13)


def test_hessian_is_the_one_of_autograd(configuration):
    covariance, u, a, w = configuration
    g = correlation(covariance, u)
    for i, hessian in enumerate(ols.objective_hessian(covariance, g, a, w)):

        def value(p, i=i):
            return ols.normalized_objective(covariance[i], g[i], torch.zeros(()), p[0], p[1:])

        expected = torch.func.hessian(value)(torch.cat([a[i : i + 1], w[i]]))
        assert torch.allclose(hessian, expected, rtol=1e-12, atol=1e-12)


def test_dense_bngd_is_bngd_step_when_h_is_diagonal(configuration):
    _, u, a, w = configuration
    problem = ols.LeastSquares(torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64), u)
    path_a, path_w = ols.dense_bngd(torch.diag(problem.eigenvalues), problem.correlation, a, w, 0.5, 0.1, 6)
    for k in range(6):
        a, w = ols.bngd_step(problem, a, w, 0.5, 0.1)
        assert torch.allclose(path_a[k + 1], a, rtol=1e-12)
        assert torch.allclose(path_w[k + 1], w, rtol=1e-12)


def test_loss_bngd_with_the_squared_loss_is_bngd(configuration):
    covariance, u, a, w = configuration
    x, y = ols.prescribed_sample(covariance[0], u[0], 0.7, 12, torch.Generator().manual_seed(2))
    for_any_loss = ols.loss_bngd(x, lambda prediction: prediction - y, a, w, 0.5, 0.1, 6)
    special = ols.dense_bngd(covariance[0], correlation(covariance, u)[0], a, w, 0.5, 0.1, 6)
    for one, other in zip(for_any_loss, special, strict=True):
        assert torch.allclose(one, other, rtol=1e-11)


def test_equivalence_deviation():
    a = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    w = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    swap = torch.tensor([[0.0, 3.0], [1.0, 0.0]], dtype=torch.float64)
    second = (-a, torch.tensor([[[0.0, 1.0]], [[6.0, 0.0]]], dtype=torch.float64))
    assert ols.equivalence_deviation((a, w), second, swap, -1).tolist() == [0]
    assert ols.equivalence_deviation((a, w), (a, second[1]), swap, -1).tolist() == [2]
    assert ols.equivalence_deviation((a, w), (-a, 2 * second[1]), swap, -1).tolist() == [1]
    assert ols.equivalence_deviation((a, w), (a * torch.nan, second[1]), swap, -1).tolist() == [torch.inf]
