import math

import pytest
import torch
from torch import nn

from lib.ensemble import Ensemble
from lib.networks import Linear, conv_net, feedforward, mlp, softmax_mean_square, split_parameters, vgg
from lib.normalization import BatchNorm


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kinds(module):
    return [type(layer).__name__ for layer in module]


def test_linear_is_the_fully_connected_layer_of_torch():
    theirs = nn.Linear(5, 3).double()
    mine = Linear(5, 3).double()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 5, dtype=torch.float64, generator=seeded(), requires_grad=True)
    cotangent = torch.randn(7, 3, dtype=torch.float64, generator=seeded(1))
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-13, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad((mine(x) * cotangent).sum(), (x, *mine.parameters())),
        torch.autograd.grad((theirs(x) * cotangent).sum(), (x, *theirs.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_linear_without_bias_is_the_matrix_product():
    mine = Linear(5, 3, bias=False).double()
    x = torch.randn(7, 5, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(mine(x), x @ mine.weight.T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("start", ["uniform", "glorot"])
def test_feedforward_is_a_chain_of_activated_products(start):
    net = feedforward((4, 6, 3), seeded(), activation=nn.Tanh, start=start).double()
    first, second = net.parameters()
    x = torch.randn(5, 4, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(net(x), torch.tanh(torch.tanh(x @ first.T) @ second.T), rtol=1e-13, atol=1e-13)


def test_starts_of_feedforward():
    uniform, glorot = (
        next(feedforward((300, 100), seeded(), start=start).parameters()) for start in ("uniform", "glorot")
    )
    assert 0.99 < uniform.abs().max() <= 1
    assert glorot.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    with pytest.raises(ValueError, match="start must be 'uniform' or 'glorot', got 'zeros'"):
        feedforward((3, 2), seeded(), start="zeros")
    with pytest.raises(ValueError, match="at least two positive widths"):
        feedforward((3,), seeded())


def test_layers_of_the_paper():
    assert kinds(mlp((784, 10), seeded(), batch_norm=True)) == ["Linear", "BatchNorm"]
    assert kinds(mlp((3, 4, 2), seeded(), activation=nn.Tanh)) == ["Linear", "Tanh", "Linear"]
    pools = ["Conv2d", "BatchNorm", "ReLU", "MaxPool2d"] * 2 + ["Flatten"]
    with_norm = conv_net((1, 28, 28), (32,), seeded(), batch_norm=True)
    assert kinds(with_norm) == [*pools, "Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    without = conv_net((3, 32, 32), (32, 16), seeded())
    assert kinds(without).count("Linear") == 3
    assert "BatchNorm" not in kinds(without)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("image_shape", "hidden"), [((1, 28, 28), (32,)), ((3, 32, 32), (16, 16)), ((1, 9, 7), ())])
def test_images_become_logits(image_shape, hidden, batch_norm):
    network = conv_net(image_shape, hidden, seeded(), batch_norm=batch_norm)
    logits = network(torch.randn(6, *image_shape, generator=seeded()))
    assert logits.shape == (6, 10)
    if batch_norm:  # the output is normalized as well
        torch.testing.assert_close(logits.mean(0), torch.zeros(10), atol=1e-5, rtol=0)


def test_glorot_start_has_the_range_and_variance_of_the_scheme():
    network = mlp((300, 200, 100), seeded())
    for layer, fans in ((network[0], 500), (network[2], 300)):
        bound = math.sqrt(6 / fans)
        assert layer.weight.abs().max() <= bound
        assert layer.weight.abs().max() > 0.99 * bound
        assert layer.weight.var().item() == pytest.approx(2 / fans, rel=0.05)
        assert not layer.bias.any()
    kernel = conv_net((3, 8, 8), (), seeded())[0].weight
    assert kernel.abs().max().item() == pytest.approx(math.sqrt(6 / (9 * (3 + 8))), rel=0.05)


@pytest.mark.parametrize("make", [lambda g: mlp((4, 3), g), lambda g: conv_net((1, 8, 8), (4,), g)])
def test_the_start_is_a_function_of_the_seed(make):
    first, again, other = make(seeded(1)), make(seeded(1)), make(seeded(2))
    torch.manual_seed(99)  # the global generator plays no part
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)


@pytest.mark.parametrize("stacked", [False, True])
def test_parameters_split_into_weights_and_normalization(stacked):
    network = conv_net((1, 8, 8), (4,), seeded(), batch_norm=True)
    module = Ensemble([network, network]) if stacked else network
    weights, normalization = split_parameters(module)
    assert len(weights) == len(normalization) == 8  # four layers, each with two tensors of either kind
    assert {id(p) for p in (*weights, *normalization)} == {id(p) for p in module.parameters()}
    assert all(p.shape == q.shape for p, q in zip(weights[1::2], normalization[1::2], strict=True))
    assert split_parameters(mlp((3, 2), seeded()))[1] == []
    assert len(split_parameters(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))[1]) == 2


def test_softmax_mean_square_from_the_definition():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=seeded())
    labels = torch.tensor([0, 2, 1, 2, 2])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        z = sum(math.exp(v) for v in row)
        total += sum((math.exp(v) / z - (k == label)) ** 2 for k, v in enumerate(row))
    assert softmax_mean_square(logits, labels).item() == pytest.approx(total / 15, rel=1e-13)
    certain = torch.nn.functional.one_hot(labels, 3).double() * 1e3
    assert softmax_mean_square(certain, labels) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp((3,), seeded()), r"sizes must be at least two positive widths, got \(3,\)"),
        (lambda: mlp((3, 0, 1), seeded()), "sizes must be at least two positive widths"),
        (lambda: conv_net((1, 3, 28), (4,), seeded()), r"image_shape must be at least 4 .* got \(1, 3, 28\)"),
        (lambda: mlp((3, 2), seeded(), batch_norm=True, eps=-1.0), r"eps must be finite and at least 0, got -1\.0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_a_cpu_generator_is_taken(monkeypatch):
    class ElsewhereGenerator:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator must be on the CPU, got cuda"):
        mlp((3, 2), ElsewhereGenerator())


def test_the_normalization_layers_share_the_given_regularizer():
    layers = [m for m in conv_net((1, 8, 8), (4,), seeded(), batch_norm=True, eps=0.0) if isinstance(m, BatchNorm)]
    assert [float(layer.eps) for layer in layers] == [0.0] * 4


def test_vgg_is_the_network_of_appendix_d():
    net = vgg((3, 32, 32), torch.Generator())
    convolutions = [layer for layer in net if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64] * 2 + [128] * 3 + [256] * 3 + [512] * 6
    assert all(layer.kernel_size == (3, 3) and layer.stride == (1, 1) for layer in convolutions)
    assert [layer.out_features for layer in net if isinstance(layer, nn.Linear)] == [512, 10]
    assert kinds(net[:7]) == ["Conv2d", "BatchNorm", "ReLU"] * 2 + ["MaxPool2d"]
    assert kinds(net[-6:]) == ["Flatten", "Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    assert all(layer.bias is None for layer in net if isinstance(layer, (nn.Conv2d, nn.Linear)))
    assert all(layer.eps == 0 for layer in net if isinstance(layer, BatchNorm))


def test_vgg_without_batch_norm_has_biases_and_without_a_fifth_stage_takes_small_images():
    net = vgg(
        (1, 8, 8), torch.Generator(), width=2, depth=(1, 2), fc=5, classes=3, batch_norm=False, activation=nn.Tanh
    )
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    stages = ["Conv2d", "Tanh", "MaxPool2d", "Conv2d", "Tanh", "Conv2d", "Tanh", "MaxPool2d"]
    assert kinds(net) == [*stages, "Flatten", "Linear", "Tanh", "Linear"]
    assert all(not layer.bias.any() for layer in net if isinstance(layer, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (3, 16, 32)}, r"image_shape must be at least 32 pixels .* got \(3, 16, 32\)"),
        ({"depth": ()}, r"depth must be at least one positive number of convolutions, got \(\)"),
        ({"depth": (2, 0)}, r"depth must be .* got \(2, 0\)"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"fc": -1}, "fc must be at least 1, got -1"),
    ],
)
def test_bad_arguments_of_vgg_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        vgg(**{"image_shape": (3, 32, 32), "generator": torch.Generator(), **settings})


def test_layers_can_have_no_biases_and_the_weights_stay_the_same():
    for make in (
        lambda bias: mlp((4, 3, 2), torch.Generator().manual_seed(0), batch_norm=True, bias=bias),
        lambda bias: conv_net((1, 4, 4), (3,), torch.Generator().manual_seed(0), bias=bias),
    ):
        with_biases, without = (dict(make(bias).named_parameters()) for bias in (True, False))
        assert set(without) < set(with_biases)
        assert all(torch.equal(value, with_biases[name]) for name, value in without.items())
