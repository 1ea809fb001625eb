"""``DiminishingBatchNorm`` against Algorithm 1 written out, batch norm as torch has it, and finite differences."""

import pytest
import torch
from torch import nn

from lib import networks, schedules
from lib.ensemble import Ensemble
from lib.normalization import BatchRenorm, DiminishingBatchNorm, recompute_statistics
from lib.optimizers import SGD
from lib.training import Batches, train

F64 = torch.float64
ALPHAS = {
    "constant": (0.3, lambda m: 0.3),
    "zero": (0.0, lambda m: 0.0),
    "1/m": (schedules.Power(1, 1), lambda m: 1 / m),
    "c/m^2": (schedules.Power(0.7, 2), lambda m: 0.7 / m**2),
    "own": (lambda m: 1 / (m + 1), lambda m: 1 / (m + 1)),
}


def in_double(*arguments, **settings):
    """A layer whose every tensor, its alpha too, is made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        return DiminishingBatchNorm(*arguments, **settings)
    finally:
        torch.set_default_dtype(before)


def batches(shape, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [m + 2 * torch.randn(shape, generator=generator, dtype=F64) for m in range(count)]


def columns(x):
    """A batch of vectors or images as (values of a feature, features)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 5)])
def test_forward_is_the_definition(name, shape):
    alpha, weight_of = ALPHAS[name]
    layer = in_double(3, alpha, eps=0.01)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -1.0, 0.5]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    mean, std = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    for m, x in enumerate(batches(shape), start=1):
        a = weight_of(m)
        mean = a * columns(x).mean(0) + (1 - a) * mean
        std = a * columns(x).std(0, correction=0) + (1 - a) * std
        want = layer.weight * (columns(x) - mean) / (std + 0.01) + layer.bias
        torch.testing.assert_close(columns(layer(x)), want, rtol=1e-12, atol=1e-12)
    layer.eval()
    x = batches(shape, seed=1)[0]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    want = layer.weight * (columns(x) - mean) / (std + 0.01) + layer.bias
    torch.testing.assert_close(columns(layer(x)), want, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert layer.num_batches_tracked == 4


def test_1_over_m_is_the_plain_average():
    layer = DiminishingBatchNorm(3, schedules.Power(1, 1)).double()
    data = batches((5, 3), count=7)
    for x in data:
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in data]).mean(0))


@pytest.mark.parametrize("shape", [(8, 3), (2, 3, 4, 4)])
def test_alpha_one_has_the_forward_pass_of_batch_norm_and_not_its_gradient(shape):
    x = batches(shape)[1]
    upstream = batches(shape, seed=5)[0]

    def gradients(layer):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        return out.detach(), torch.autograd.grad(out, (inputs, layer.weight, layer.bias), upstream)

    peer = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3, eps=1e-300).double()
    out, (dx, dweight, dbias) = gradients(peer)
    for through in (False, True):
        ours, (du, dgamma, dbeta) = gradients(DiminishingBatchNorm(3, 1.0, eps=0.0, through=through).double())
        torch.testing.assert_close(ours, out, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dgamma, dweight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dbeta, dbias, rtol=1e-10, atol=1e-12)
        close = torch.allclose(du, dx, rtol=1e-8, atol=1e-12)
        assert close == through


@pytest.mark.parametrize("through", [False, True])
def test_gradient_by_differences(through):
    """Without ``through`` the averages after the batch are constants; with it they are functions of the input."""
    x = batches((5, 2))[1]

    def outputs(inputs, frozen=None):
        layer = in_double(2, 0.4, through=through)
        if frozen is not None:
            layer.eval()
            layer.running_mean, layer.running_std = frozen
            return layer(inputs)
        out = layer(inputs)
        return out, (layer.running_mean.clone(), layer.running_std.clone())

    _, averages = outputs(x)
    function = (lambda u: outputs(u)[0]) if through else (lambda u: outputs(u, averages))
    inputs = x.clone().requires_grad_()
    out, _ = outputs(inputs)
    upstream = batches((5, 2), seed=9)[0]
    (found,) = torch.autograd.grad(out, inputs, upstream)
    h = 1e-6
    for n, c in ((0, 0), (3, 1)):
        up, down = x.clone(), x.clone()
        up[n, c] += h
        down[n, c] -= h
        slope = ((function(up) - function(down)) * upstream).sum().item() / (2 * h)
        assert found[n, c].item() == pytest.approx(slope, rel=1e-7, abs=1e-9)


def test_a_constant_feature_has_a_finite_gradient():
    inputs = torch.zeros(4, 2, requires_grad=True)  # two units of a ReLU layer that are off for the whole batch
    DiminishingBatchNorm(2, 0.5, through=True)(inputs).sum().backward()
    assert inputs.grad.isfinite().all()


def _network(alpha, **settings):
    generator = torch.Generator().manual_seed(0)
    make = lambda width: DiminishingBatchNorm(width, alpha, **settings)  # noqa: E731
    return networks.mlp((4, 5, 6, 3), generator, normalization=make)


def test_the_network_normalizes_after_the_activation_of_hidden_layers():
    names = [type(layer).__name__ for layer in _network(1.0)]
    assert names == ["Linear", "ReLU", "DiminishingBatchNorm"] * 2 + ["Linear"]
    weights, normalization = networks.split_parameters(_network(1.0))
    assert (len(weights), len(normalization)) == (6, 4)
    generator = torch.Generator().manual_seed(0)
    net = networks.conv_net((1, 8, 8), (5,), generator, normalization=lambda c: DiminishingBatchNorm(c, 0.1))
    assert sum(isinstance(layer, DiminishingBatchNorm) for layer in net) == 3
    assert net(torch.randn(6, 1, 8, 8)).shape == (6, 10)


def test_runs_of_an_ensemble_differ_in_alpha_and_train_as_alone():
    alphas = [1.0, 0.25, 0.0, schedules.Power(1, 1), schedules.Power(1, 2)]
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 4, generator=generator), torch.randint(3, (40,), generator=generator)
    data = Batches(x, y, batch_size=8, seed=1)
    together = Ensemble([_network(alpha) for alpha in alphas])
    loss = nn.functional.cross_entropy
    train(together, lambda part: SGD(part.parameters(), lr=0.02), loss, data, 30, progress=False)
    for s, alpha in enumerate(alphas):
        alone = Ensemble([_network(alpha)])
        train(alone, lambda part: SGD(part.parameters(), lr=0.02), loss, data, 30, progress=False)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(together.state_dict()[name][s], value[0], rtol=2e-4, atol=1e-5)
    means = together.copies[2].running_mean
    assert torch.equal(means[2], torch.zeros(5))  # alpha = 0 never learns its statistics
    assert not torch.allclose(means[1], means[3])


def test_a_restored_state_continues_the_schedule():
    data = batches((6, 3), count=6)
    whole, first, second = (DiminishingBatchNorm(3, schedules.Power(1, 1)).double() for _ in range(3))
    for x in data:
        whole(x)
    for x in data[:3]:
        first(x)
    second.load_state_dict(first.state_dict())
    for x in data[3:]:
        second(x)
    assert torch.equal(second.running_mean, whole.running_mean)


@pytest.mark.parametrize("runs", [None, 2])
def test_recomputed_statistics_are_those_of_all_inputs(runs):
    net = _network(schedules.Power(1, 1))
    module = net if runs is None else Ensemble([_network(schedules.Power(1, 1)) for _ in range(runs)])
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    module(x[:8])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    recompute_statistics(module, x)
    after = module.state_dict()
    changed = {key.rsplit(".", 1)[1] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"running_mean", "running_std"}
    assert module.training
    one = net if runs is None else module.module(1)
    one.eval()
    hidden = one[1](one[0](x))
    torch.testing.assert_close(one[2].running_mean, hidden.mean(0))
    torch.testing.assert_close(one[2].running_std, hidden.std(0, correction=0))
    second = one[4](one[3](one[2](hidden)))
    torch.testing.assert_close(one[5].running_std, second.std(0, correction=0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"eps": -1e-3}, ValueError, "eps must be finite and at least 0, got -0.001"),
        ({"alpha": 1.5}, ValueError, "alpha must lie between 0 and 1 for every batch, got 1.5"),
        ({"alpha": float("nan")}, ValueError, "alpha must lie between 0 and 1"),
        ({"alpha": schedules.Power(2, 1)}, ValueError, r"alpha must lie .* got Power\(c=2, p=1\)"),
        ({"alpha": schedules.Geometric(1)}, TypeError, "alpha must be a number, a Power or a function"),
        ({"alpha": "1/m"}, TypeError, "alpha must be a number, a Power or a function of a tensor, got '1/m'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        DiminishingBatchNorm(**{"num_features": 3} | arguments)


@pytest.mark.parametrize("shape", [(3,), (5, 4), (2, 3, 4)])
def test_bad_inputs_are_named(shape):
    with pytest.raises(ValueError, match=r"inputs must have shape \(N, 3\) or \(N, 3, H, W\), got"):
        DiminishingBatchNorm(3)(torch.zeros(shape))


def test_unclipped_batch_renormalization_has_the_forward_pass_of_averages():
    ours, peer = BatchRenorm(3, 0.2, r_max=1e9, d_max=1e9).double(), DiminishingBatchNorm(3, 0.2).double()
    for x in batches((7, 3)):
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.running_std, peer.running_std)
    ours.eval(), peer.eval()
    torch.testing.assert_close(ours(x), peer(x))


def test_batch_renormalization_with_tight_limits_is_batch_norm():
    x, upstream = batches((7, 3))[1], batches((7, 3), seed=5)[0]
    results = []
    for layer in (BatchRenorm(3, 0.2, eps=0.0, r_max=1.0, d_max=0.0), nn.BatchNorm1d(3, eps=1e-300)):
        inputs = x.clone().requires_grad_()
        out = layer.double()(inputs)
        results.append((out.detach(), torch.autograd.grad(out, inputs, upstream)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_gradient_of_batch_renormalization_by_differences():
    """r and d held at their values; the statistics of the batch move."""
    x, upstream = batches((6, 2))[2], batches((6, 2), seed=9)[0]
    layer = BatchRenorm(2, 0.5, eps=0.01).double()
    inputs = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(inputs), inputs, upstream)
    std, mean = x.std(0, correction=0) + 0.01, x.mean(0)
    sigma = layer.running_std + 0.01
    r = (std / sigma).clamp(1 / 3, 3)
    d = ((mean - layer.running_mean) / sigma).clamp(-5, 5)

    def frozen(u):
        return (((u - u.mean(0)) / (u.std(0, correction=0) + 0.01) * r + d) * upstream).sum().item()

    h = 1e-6
    for n, c in ((0, 0), (4, 1)):
        shift = torch.zeros_like(x)
        shift[n, c] = h
        slope = (frozen(x + shift) - frozen(x - shift)) / (2 * h)
        assert found[n, c].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("name", "value"), [("r_max", 0.5), ("d_max", -1.0), ("ramp", 0), ("r_max", float("nan"))])
def test_bad_limits_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        BatchRenorm(3, **{name: value})
