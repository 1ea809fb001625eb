import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.ensemble import Ensemble
from lib.normalization import BatchNorm, NormalizedLayer, batch_norm, invariant_batch_norm

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


# Smoothing that keeps the scale of the layer in front without effect


def layer_case(shape, seed=0):
    """Inputs of a layer with 4 outputs, its weight, scales and shifts."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 + 2 * torch.randn(shape, generator=generator, dtype=F64)
    kernel = (4, shape[1]) if len(shape) == 2 else (4, shape[1], 3, 3)
    layer_weight = torch.randn(kernel, generator=generator, dtype=F64)
    return inputs, layer_weight, *torch.randn(2, 4, generator=generator, dtype=F64)


def apply_layer(inputs, layer_weight):
    return inputs @ layer_weight.T if inputs.ndim == 2 else F.conv2d(inputs, layer_weight)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 5.0])
@pytest.mark.parametrize("shape", [(7, 3), (5, 2, 6, 5)])
def test_smoothed_batch_norm_is_equation_8(shape, eps):
    """With mean u and covariance S of what the layer sees (patches, for a convolution)."""
    inputs, layer_weight, weight, bias = layer_case(shape)
    outputs = invariant_batch_norm(apply_layer(inputs, layer_weight), layer_weight, weight, bias, eps)
    seen = inputs if inputs.ndim == 2 else F.unfold(inputs, 3).mT.flatten(0, 1)
    u, covariance = seen.mean(0), seen.T.cov(correction=0) + eps * torch.eye(seen.shape[1], dtype=F64)
    expected = torch.empty(len(seen), 4, dtype=F64)
    for k, w in enumerate(layer_weight.flatten(1)):
        expected[:, k] = weight[k] * ((seen - u) @ w) / (w @ covariance @ w).sqrt() + bias[k]
    outputs = outputs if inputs.ndim == 2 else outputs.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(outputs, expected, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(-20, 20),
    st.sampled_from([0.0, 1e-3, 0.7]),
    st.integers(0, 10**6),
    st.sampled_from([(6, 3), (3, 2, 5, 5)]),
)
def test_a_power_of_two_times_the_layer_changes_no_bit(m, eps, seed, shape):
    inputs, layer_weight, weight, bias = layer_case(shape, seed)

    def outputs(layer_weight):
        return invariant_batch_norm(apply_layer(inputs, layer_weight), layer_weight, weight, bias, eps)

    assert torch.equal(outputs(layer_weight * 2.0**m), outputs(layer_weight))


def test_the_first_power_of_the_norm_would_not_be_invariant():
    """The sentence before equation (8) as printed."""
    inputs, layer_weight, weight, bias = layer_case((6, 3))

    def printed(layer_weight):
        return batch_norm(inputs @ layer_weight.T, weight, bias, 0.5 * layer_weight.norm(dim=1))

    assert (printed(4 * layer_weight) - printed(layer_weight)).abs().max() > 1e-3


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_the_gradient_of_a_row_is_orthogonal_to_it(eps):
    for make, shape in ((nn.Linear(3, 4), (7, 3)), (nn.Conv2d(2, 4, 3, padding=1), (3, 2, 6, 6))):
        layer = NormalizedLayer(make, eps).double()
        layer(random_case(shape)[0]).sin().sum().backward()
        w, g = layer.layer.weight.flatten(1), layer.layer.weight.grad.flatten(1)
        assert g.abs().max() > 1e-3
        assert (w * g).sum(1).abs().max() < 1e-12
        assert layer.layer.bias.grad.abs().max() < 1e-12  # a bias in front has no effect


def test_a_normalized_layer_starts_as_a_batch_norm_behind_its_layer():
    linear = nn.Linear(3, 4).double()
    layer, (x, _, _) = NormalizedLayer(linear), random_case((8, 3))
    assert layer.layer is linear
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "layer.weight", "layer.bias"]
    torch.testing.assert_close(layer(x), BatchNorm(4, 0.0).double()(linear(x)), rtol=1e-13, atol=1e-13)


def test_a_layer_without_spread_is_smoothed_to_the_shift():
    """Why equation (8) is there at all: without it these are 0 / 0."""
    x = torch.ones(5, 3, dtype=F64)
    assert NormalizedLayer(nn.Linear(3, 2).double(), 0.0)(x).isnan().any()
    assert torch.equal(NormalizedLayer(nn.Linear(3, 2).double(), 0.1)(x), torch.zeros(5, 2, dtype=F64))


def test_runs_of_an_ensemble_differ_in_their_smoothing():
    layers = [NormalizedLayer(nn.Linear(3, 4).double(), eps) for eps in (0.0, 0.1, 10.0)]
    x, _, _ = random_case((6, 3))
    together = Ensemble(layers)(x)
    for outputs, layer in zip(together, layers, strict=True):
        torch.testing.assert_close(outputs, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NormalizedLayer(nn.ReLU()), TypeError, "layer must be an nn.Linear or nn.Conv2d, got ReLU"),
        (lambda: NormalizedLayer(nn.Linear(2, 2), -1.0), ValueError, r"eps must be finite and at least 0, got -1\.0"),
        (
            lambda: invariant_batch_norm(torch.zeros(5, 3), torch.zeros(4, 2), torch.ones(3), torch.zeros(3), 0.1),
            ValueError,
            r"layer_weight must have one row for each of 3 features, got shape \(4, 2\)",
        ),
        (
            lambda: invariant_batch_norm(torch.zeros(5), torch.zeros(5, 2), torch.ones(5), torch.zeros(5), 0.1),
            ValueError,
            r"inputs must have shape .* got \(5,\)",
        ),
    ],
)
def test_bad_arguments_of_the_smoothing_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
