import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.normalization import BatchNorm, batch_norm

F64 = torch.float64


def from_the_definition(x, weight, bias, eps):
    """One feature at a time, in Python floats."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c].flatten().tolist()
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        out[:, c] = weight[c] * (x[:, c] - mean) / math.sqrt(variance + eps) + bias[c]
    return out


def random_case(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(shape, generator=generator, dtype=F64)
    return x, *torch.randn(2, shape[1], generator=generator, dtype=F64)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 5.0])
@pytest.mark.parametrize("shape", [(7, 4), (5, 3, 2, 6), (2, 1)])
def test_equals_the_definition(shape, eps):
    x, weight, bias = random_case(shape)
    torch.testing.assert_close(
        batch_norm(x, weight, bias, eps), from_the_definition(x, weight, bias, eps), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(7, 4), (5, 3, 2, 6)])
def test_gradients_equal_those_of_torch(shape):
    x, weight, bias = (t.requires_grad_() for t in random_case(shape))
    cotangent = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((batch_norm(x, weight, bias, 1e-3) * cotangent).sum(), (x, weight, bias))
    theirs = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
    for a, b in zip(mine, torch.autograd.grad((theirs * cotangent).sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e3), st.floats(-100, 100), st.integers(0, 10**6))
def test_without_regularizer_scale_and_shift_of_the_input_do_not_matter(scale, shift, seed):
    x, weight, bias = random_case((6, 3), seed)
    torch.testing.assert_close(
        batch_norm(scale * x + shift, weight, bias, 0.0), batch_norm(x, weight, bias, 0.0), rtol=1e-6, atol=1e-6
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(-12, 12), st.integers(0, 10**6))
def test_a_power_of_two_and_the_regularizer_together_change_no_bit(m, seed):
    """The joint law behind the scaling property: (r x, r^2 eps) normalizes to the same numbers."""
    x, weight, bias = (t.float() for t in random_case((6, 3), seed))
    layer, scaled = BatchNorm(3, 1e-3), BatchNorm(3, 1e-3)
    scaled.eps *= 4.0**m
    assert torch.equal(layer(x), scaled(x * 2.0**m))
    assert m == 0 or not torch.equal(layer(x), layer(x * 2.0**m))


def test_under_vmap_each_run_has_its_own_batch_and_regularizer():
    x, weight, bias = random_case((4 * 7, 3))
    x, eps = x.view(4, 7, 3), torch.tensor([0.0, 1e-3, 1.0, 1e6], dtype=F64)
    together = torch.func.vmap(batch_norm, in_dims=(0, None, None, 0))(x, weight, bias, eps)
    for s in range(4):
        torch.testing.assert_close(together[s], batch_norm(x[s], weight, bias, eps[s]), rtol=1e-12, atol=1e-12)


def test_starts_from_zero_mean_and_unit_variance_and_says_the_same_in_evaluation():
    x, _, _ = random_case((50, 4))
    layer = BatchNorm(4, eps=0.0).double()
    y = layer(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(4, dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.var(0, unbiased=False), torch.ones(4, dtype=F64), atol=1e-12, rtol=0)
    assert torch.equal(layer.eval()(x), y)


def test_a_constant_feature_is_nan_without_regularizer_and_the_shift_with_it():
    x = torch.full((5, 2), 3.0, dtype=F64)
    weight, bias = torch.ones(2, dtype=F64), torch.full((2,), 0.5, dtype=F64)
    assert batch_norm(x, weight, bias, 0.0).isnan().all()
    assert torch.equal(batch_norm(x, weight, bias, 1e-3), torch.full((5, 2), 0.5, dtype=F64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchNorm(3, eps=-1e-3), r"eps must be finite and at least 0, got -0\.001"),
        (lambda: BatchNorm(3, eps=float("nan")), "eps must be finite and at least 0, got nan"),
        (lambda: BatchNorm(0), "features must be at least 1, got 0"),
        (lambda: BatchNorm(3)(torch.zeros(2, 3, 4)), r"inputs must have shape .* got \(2, 3, 4\)"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
