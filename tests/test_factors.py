import pytest
import torch
from torch import nn

from lib.ensemble import Ensemble
from lib.factors import Factors
from lib.networks import conv_net, feedforward, mlp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loss_of(outputs, _=None):
    return outputs.square().mean()


@pytest.mark.parametrize("make", [feedforward, mlp])
def test_the_product_of_the_factors_is_the_gradient(make):
    network = make((6, 5, 3), seeded()).double()
    x = torch.randn(7, 6, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    loss_of(network(x)).backward()
    expected = [p.grad.clone() for p in (*network.parameters(), x)]
    network.zero_grad()
    x.grad = None
    factors = Factors(network)
    loss_of(network(x)).backward()
    for p, gradient in zip((*network.parameters(), x), expected, strict=True):
        if p in factors:
            deltas, inputs = factors.of(p)
            assert deltas.shape == (7, p.shape[0])
            assert inputs.shape == (7, p.shape[1])
            torch.testing.assert_close(deltas.mT @ inputs, gradient, rtol=1e-13, atol=1e-15)
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("per_run", [False, True])
@pytest.mark.parametrize("make", [feedforward, mlp])
def test_an_ensemble_has_the_factors_of_every_run(make, per_run):
    ensemble = Ensemble([make((6, 5, 3), seeded(s)).double() for s in range(3)])
    x = torch.randn(*((3,) if per_run else ()), 7, 6, dtype=torch.float64, generator=seeded())
    ensemble.losses(loss_of, x, x, per_run=per_run).sum().backward()
    expected = [p.grad.clone() for p in ensemble.parameters()]
    ensemble.zero_grad()
    factors = Factors(ensemble)
    ensemble.losses(loss_of, x, x, per_run=per_run).sum().backward()
    for p, gradient in zip(ensemble.parameters(), expected, strict=True):
        if p in factors:
            deltas, inputs = factors.of(p)
            torch.testing.assert_close(deltas.mT @ inputs, gradient, rtol=1e-13, atol=1e-15)
        else:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-13, atol=1e-15)


def test_passes_add_up_until_they_are_cleared():
    network = feedforward((4, 3), seeded()).double()
    weight = network[0].weight
    batches = torch.randn(2, 5, 4, dtype=torch.float64, generator=seeded(1))
    for x in batches:
        loss_of(network(x)).backward()
    expected = weight.grad.clone()
    factors = Factors(network)
    for x in batches:
        loss_of(network(x)).backward()
    deltas, inputs = factors.of(weight)
    assert deltas.shape == (10, 3)
    torch.testing.assert_close(deltas.mT @ inputs, expected)
    factors.clear()
    assert factors.of(weight) is None


def test_evaluation_leaves_nothing_and_removal_restores_the_gradient():
    network = feedforward((4, 3), seeded())
    plain = network(torch.ones(2, 4))
    factors = Factors(network)
    with torch.no_grad():
        torch.testing.assert_close(network(torch.ones(2, 4)), plain)
    assert factors.of(network[0].weight) is None
    factors.remove()
    loss_of(network(torch.ones(2, 4))).backward()
    assert network[0].weight.grad is not None


def test_convolutions_keep_their_gradient():
    network = conv_net((1, 8, 8), (6,), seeded(), channels=(2, 3))
    factors = Factors(network)
    loss_of(network(torch.ones(2, 1, 8, 8))).backward()
    kernels = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert all(k.grad is not None and k not in factors for k in kernels)


def test_a_module_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="must have an nn.Linear layer"):
        Factors(nn.ReLU())
