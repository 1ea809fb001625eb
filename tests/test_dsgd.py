import copy
import io
import math

import pytest
import torch
from torch import nn

from lib import duality
from lib.ensemble import Ensemble
from lib.factors import Factors
from lib.networks import conv_net, feedforward, mlp
from lib.optimizers import DSGD, NormSGD
from lib.optimizers.layerwise import random_layer

QS = [1, 2, math.inf]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(sizes=(9, 7, 5, 3), count=20, seed=0, dtype=torch.float64):
    x = torch.rand(count, sizes[0], generator=seeded(seed), dtype=dtype)
    targets = torch.eye(sizes[-1], dtype=dtype)[torch.randint(sizes[-1], (count,), generator=seeded(seed))]
    return feedforward(sizes, seeded(seed)).to(dtype), x, targets


def objective(outputs, targets):
    return (outputs - targets).square().sum(-1).mean()


def backward(network, optimizer, x, targets):
    optimizer.zero_grad()
    loss = objective(network(x), targets)
    loss.backward()
    return loss.item()


def expected_step(before, gradients, q, layers, lr, step=0):
    """The step by the definitions of ``duality``, and the layer that moves."""
    squares = duality.layer_polynomials(before, q)
    norms = torch.stack([duality.dual_norm(g, q) for g in gradients])
    moving = {
        "greedy": [int((norms / squares.sqrt()).argmax())],
        "sequential": [step % len(before)],
        "all": list(range(len(before))),
    }[layers]
    after = [w.clone() for w in before]
    for i in moving:
        after[i] -= lr / squares[i] * duality.duality_map(gradients[i], q)
    return after, moving


@pytest.mark.parametrize("method", ["svd", "gram", "polynomial", "factors", "polynomial factors"])
@pytest.mark.parametrize("layers", ["greedy", "all", "sequential"])
@pytest.mark.parametrize("q", QS)
def test_a_step_is_the_one_of_algorithm_4_1(q, layers, method):
    if q != 2 and method != "svd":
        pytest.skip("the methods are for q = 2")
    network, x, targets = problem()
    weights = list(network.parameters())
    factors = Factors(network) if "factors" in method else None
    settings = {"method": "polynomial" if "polynomial" in method else None if factors else method, "factors": factors}
    optimizer = DSGD(weights, lr=3.0, q=q, layers=layers, **settings)
    for step in range(4):
        before = [w.detach().clone() for w in weights]
        reference = copy.deepcopy(network)
        for layer in reference:
            layer._forward_hooks.clear()
        objective(reference(x), targets).backward()
        gradients = [w.grad for w in reference.parameters()]
        backward(network, optimizer, x, targets)
        optimizer.step()
        after, moving = expected_step(before, gradients, q, layers, 3.0, step)
        assert optimizer.last_layer is None if layers == "all" else optimizer.last_layer.tolist() == moving[0]
        torch.testing.assert_close(optimizer.last_squares, duality.layer_polynomials(before, q))
        for w, new, old in zip(weights, after, before, strict=True):
            scale = (new - old).abs().max().item()
            tolerance = 2e-3 if "polynomial" in method else 1e-5 if "factors" in method else 1e-6
            torch.testing.assert_close(w.detach(), new, rtol=0, atol=tolerance * scale + 1e-12)


@pytest.mark.parametrize("method", ["svd", "polynomial"])
@pytest.mark.parametrize("q", QS)
def test_full_batches_never_ascend_by_more_than_the_certificate_allows(q, method):
    """Proposition 4.4 with step 1: f falls by at least half the squared local norm of the derivative."""
    network, x, targets = problem(count=40)
    optimizer = DSGD(network.parameters(), q=q, method=method)
    for _ in range(30):
        loss = backward(network, optimizer, x, targets)
        local = duality.finsler_dual_norm(
            [w.grad for w in network.parameters()],
            duality.layer_polynomials([w.detach() for w in network.parameters()], q),
            q,
        )
        optimizer.step()
        share = 1 if method == "svd" else 0.995
        assert objective(network(x), targets).item() <= loss - share * local.item() ** 2 / 2 + 1e-12


@pytest.mark.parametrize("layers", ["greedy", "all", "sequential", "random"])
@pytest.mark.parametrize("make", [DSGD, NormSGD])
@pytest.mark.parametrize("q", QS)
def test_every_run_of_an_ensemble_moves_as_on_its_own(q, make, layers):
    if make is NormSGD and layers == "greedy":
        pytest.skip("NormSGD has no certificate to be greedy about")
    sizes, rates, seeds = (9, 7, 3), torch.tensor([0.5, 1.0, 20.0], dtype=torch.float64), torch.tensor([4, 5, 6])
    single = [problem(sizes, seed=s)[0] for s in range(3)]
    _, x, targets = problem(sizes)
    ensemble = Ensemble(single)
    optimizer = make(ensemble.parameters(), rates, q=q, layers=layers, seed=seeds)
    alone = [
        make(n.parameters(), r.item(), q=q, layers=layers, seed=int(s))
        for n, r, s in zip(single, rates, seeds, strict=True)
    ]
    for _ in range(12):
        optimizer.zero_grad()
        ensemble.losses(objective, x, targets).sum().backward()
        optimizer.step()
        for network, own in zip(single, alone, strict=True):
            backward(network, own, x, targets)
            own.step()
        if layers != "all":
            assert optimizer.last_layer.tolist() == [int(own.last_layer) for own in alone]
    for s, network in enumerate(single):
        for together, w in zip(ensemble.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(together[s], w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["gram", "polynomial"])
def test_an_ensemble_moves_by_factors_as_by_gradients(method):
    _, x, targets = problem((40, 30, 3), count=16)
    results = []
    for captured in (False, True):
        ensemble = Ensemble([problem((40, 30, 3), seed=s)[0] for s in range(3)])
        factors = Factors(ensemble) if captured else None
        optimizer = DSGD(ensemble.parameters(), layers="all", method=method, factors=factors)
        for _ in range(5):
            optimizer.zero_grad()
            ensemble.losses(objective, x, targets).sum().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in ensemble.parameters()])
    start = [
        torch.stack(ws) for ws in zip(*(problem((40, 30, 3), seed=s)[0].parameters() for s in range(3)), strict=True)
    ]
    for one, other, old in zip(*results, start, strict=True):
        moved = (one - old).abs().max().item()
        assert moved > 0
        torch.testing.assert_close(one, other, rtol=0, atol=(1e-4 if method == "gram" else 4e-3) * moved)


@pytest.mark.parametrize(("q", "captured"), [(1, False), (2, False), (2, True), (math.inf, False)])
@pytest.mark.parametrize("sizes", [(400, 90, 4), (400, 90, 80, 70)])
def test_bounds_choose_the_layer_that_exact_norms_choose(sizes, q, captured):
    """Layers wider than the batch of 16 and than 64, where the choice goes by bounds until they do not decide."""
    network, x, targets = problem(sizes, count=16, dtype=torch.float32)
    other = Ensemble([network])  # an ensemble computes every norm
    bounded = DSGD(network.parameters(), lr=50.0, q=q, factors=Factors(network) if captured else None)
    exact = DSGD(other.parameters(), lr=50.0, q=q, method="svd")
    for _ in range(25):
        backward(network, bounded, x, targets)
        exact.zero_grad()
        other.losses(objective, x, targets).sum().backward()
        bounded.step()
        exact.step()
        assert bounded.last_layer == exact.last_layer[0]
        for w, v in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(w, v[0], rtol=1e-3, atol=1e-3)
            w.data.copy_(v[0].data)


def test_fixed_squares_let_any_layer_win():
    network, x, targets = problem((120, 90, 4), dtype=torch.float32)
    first, second = network.parameters()
    for squares, winner in (((1.0, 1e6), 0), ((1e6, 1.0), 1)):
        groups = [{"params": [w], "squares": p} for w, p in zip((first, second), squares, strict=True)]
        optimizer = DSGD(groups, lr=1e-3)
        backward(network, optimizer, x, targets)
        before = [first.detach().clone(), second.detach().clone()]
        optimizer.step()
        assert int(optimizer.last_layer) == winner
        torch.testing.assert_close(
            before[winner] - (first, second)[winner],
            1e-3 / squares[winner] * duality.duality_map((first, second)[winner].grad, 2),
            rtol=1e-2,
            atol=1e-6,
        )


def test_ordinary_modules_with_biases_and_convolutions():
    network = conv_net((1, 8, 8), (6,), seeded(), channels=(2, 3)).to(memory_format=torch.channels_last)
    kernels = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    matrices = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    biases = [p for p in network.parameters() if p.ndim == 1]
    for q in QS:
        optimizer = DSGD(
            [
                {"params": kernels, "layout": "kernel", "squares": 100.0},
                {"params": matrices, "squares": 100.0},
                {"params": biases, "layout": "vector", "squares": 10.0},
            ],
            q=q,
            layers="all",
        )
        x = torch.rand(5, 1, 8, 8, generator=seeded()).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.step()
        for p, old in zip(network.parameters(), before, strict=True):
            g = p.grad.reshape(len(p), -1)
            step = duality.duality_map(g, q).view(p.shape) / (10 if p.ndim == 1 else 100)
            torch.testing.assert_close(old - p, step, rtol=1e-3, atol=1e-5 * max(1, step.abs().max().item()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DSGD(mlp((4, 3, 2), seeded()).parameters()),
            r"\(3,\) does not fit layout 'matrix'.* groups of their own",
        ),
        (lambda: DSGD(conv_net((1, 8, 8), (6,), seeded()).parameters()), "put biases and convolutions in groups"),
        (lambda: NormSGD(mlp((4, 2), seeded()).parameters(), 1.0), "does not fit layout 'matrix'"),
        (lambda: DSGD([torch.ones(3, 4), torch.ones(2, 5)]), "number 2 takes 5 inputs"),
        (lambda: DSGD([torch.ones(3, 4)], q=3), "q must be 1, 2 or inf, got 3"),
        (lambda: DSGD([torch.ones(3, 4)], layers="best"), "layers must be one of greedy, all, .* got 'best'"),
        (lambda: NormSGD([torch.ones(3, 4)], 1.0, layers="greedy"), "layers must be one of all, .* got 'greedy'"),
        (lambda: DSGD([torch.ones(3, 4)], lr=0.0), r"lr must be positive and finite, got 0\.0"),
        (lambda: DSGD([torch.ones(2, 3, 4)], lr=torch.ones(3)), r"one entry for each run, got shape \(3,\)"),
        (lambda: DSGD([torch.ones(2, 3, 4)], seed=torch.ones(3).long()), "seed must have one entry for each run"),
        (lambda: DSGD([torch.ones(3, 4)], method="fast"), "method must be one of svd, gram, polynomial, got 'fast'"),
        (
            lambda: DSGD([torch.ones(3, 4)], method="svd", factors=Factors(nn.Linear(4, 3))),
            "method 'svd' needs the gradient itself",
        ),
        (
            lambda: DSGD([{"params": [torch.ones(3)], "layout": "vector"}]),
            "layer polynomials are for layout 'matrix'",
        ),
        (lambda: DSGD([{"params": [torch.ones(3, 3)], "layout": "square"}]), "layout must be one of matrix, vector"),
        (lambda: DSGD([{"params": [torch.ones(3, 3)], "squares": -1.0}]), "squares must be positive and finite"),
        (
            lambda: DSGD([{"params": [torch.ones(3, 3)]}, {"params": [torch.ones(3, 3)]}]),
            "layers of the network must be one group",
        ),
    ],
)
def test_what_has_no_certificate_is_refused_with_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("layers", ["greedy", "sequential", "random"])
def test_state_survives_a_file_read_without_code(layers):
    network, x, targets = problem((120, 90, 4), dtype=torch.float32)
    optimizer = DSGD(network.parameters(), lr=5.0, layers=layers, seed=7)
    for _ in range(3):
        backward(network, optimizer, x, targets)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(network)
    resumed = DSGD(twin.parameters(), lr=1.0, layers=layers, seed=7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["lr"] == 5.0
    for _ in range(5):
        for module, own in ((network, optimizer), (twin, resumed)):
            backward(module, own, x, targets)
            own.step()
        assert optimizer.last_layer == resumed.last_layer
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_without_gradient_stays():
    network, x, targets = problem((4, 3, 2))
    network[0].weight.requires_grad_(False)
    before = [w.detach().clone() for w in network.parameters()]
    for make in (lambda ps: DSGD(ps, layers="all"), lambda ps: NormSGD(ps, 0.1)):
        optimizer = make(network.parameters())
        backward(network, optimizer, x, targets)
        optimizer.step()
    assert torch.equal(network[0].weight, before[0])
    assert not torch.equal(network[2].weight, before[1])


@pytest.mark.parametrize("q", QS)
def test_norm_sgd_moves_every_layer_along_its_duality_map(q):
    network, x, targets = problem()
    optimizer = NormSGD(network.parameters(), 0.3, q=q)
    backward(network, optimizer, x, targets)
    before = [w.detach().clone() for w in network.parameters()]
    optimizer.step()
    for w, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(w.detach(), old - 0.3 * duality.duality_map(w.grad, q), rtol=1e-9, atol=1e-12)
    assert optimizer.last_layer is None


def test_data_dependent_scales_shorten_the_squares():
    network, x, targets = problem((9, 7, 3))
    optimizer = DSGD(network.parameters(), residual=1.0)
    backward(network, optimizer, x, targets)
    hidden = torch.sigmoid(x @ network[0].weight.detach().T)
    scales = torch.stack([y.square().sum(1).mean() for y in (x, hidden)])
    weights = [w.detach().clone() for w in network.parameters()]
    optimizer.step(input_scales=scales)
    expected = duality.layer_polynomials(weights, 2, input_scales=scales, residual=1.0)
    torch.testing.assert_close(optimizer.last_squares, expected)
    assert (expected < duality.layer_polynomials(weights, 2)).all()


@pytest.mark.parametrize("count", [2, 3, 10])
def test_layers_by_lot_are_equally_likely_and_independent(count):
    seeds = torch.arange(400)
    draws = torch.stack([random_layer(seeds, step, count) for step in range(100)])
    assert draws.min() == 0
    assert draws.max() == count - 1
    frequencies = torch.bincount(draws.flatten(), minlength=count) / draws.numel()
    torch.testing.assert_close(frequencies, torch.full((count,), 1 / count), rtol=0, atol=0.012)
    for one, other in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert (one == other).float().mean().item() == pytest.approx(1 / count, abs=0.012)
    assert torch.equal(random_layer(seeds[7:9], 31, count), draws[31, 7:9])


@pytest.mark.parametrize("method", ["svd", "gram", "polynomial"])
def test_a_diverged_run_leaves_the_others_alone(method):
    ensemble = Ensemble([problem((9, 7, 3), seed=s)[0] for s in range(2)])
    _, x, targets = problem((9, 7, 3))
    optimizer = DSGD(ensemble.parameters(), method=method, layers="all")
    ensemble.losses(objective, x, targets).sum().backward()
    for w in ensemble.parameters():
        w.grad[0] = math.nan
    optimizer.step()
    for w in ensemble.parameters():
        assert w[0].isnan().all()
        assert w[1].isfinite().all()


def test_a_diverged_network_shows_it():
    network, x, targets = problem((9, 7, 3))
    optimizer = DSGD(network.parameters())
    backward(network, optimizer, x, targets)
    network[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert network[0].weight.isnan().any()
