"""The optimizers on blocks: oracles that loop over blocks, and Theorem 2.5."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.ensemble import Ensemble
from lib.networks import Linear
from lib.normalization import BatchNorm, NormalizedLayer
from lib.optimizers import SGD, IntrinsicSGD, ProjectedSGD, WNGrad
from lib.scale_invariance import scale_invariant_groups
from lib.training import Batches, train

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(seed=0):
    """Rows, a joint block, slices and a rest."""
    net = nn.Sequential(
        *(nn.Linear(5, 6), nn.GroupNorm(2, 6, eps=0.0), nn.Softplus(), Linear(6, 4, bias=False), BatchNorm(4, 0.0)),
        *(nn.ReLU(), Linear(4, 2, bias=False), BatchNorm(2, 0.0)),
    )
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in net.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return net


X = torch.randn(16, 5, generator=seeded(50), dtype=F64)
Y = torch.randn(16, 2, generator=seeded(51), dtype=F64)
GROUPS = scale_invariant_groups(make())


def test_the_network_of_these_tests_has_every_kind_of_block():
    assert GROUPS.rows == ("3.weight", "6.weight")
    assert GROUPS.matrices == (("4.weight", "4.bias"),)
    assert GROUPS.slices == ((("0.weight", "0.bias"), 2),)
    assert GROUPS.rest == ("1.weight", "1.bias", "7.weight", "7.bias")


def flat_blocks(net, tensors):
    """Every block of the network above as one vector, in the order rows, joint, slices; oracle."""
    rows = [tensors[name][k].flatten() for name in GROUPS.rows for k in range(len(tensors[name]))]
    joint = [torch.cat([tensors[name].flatten() for name in ("4.weight", "4.bias")])]
    slices = [
        torch.cat([tensors["0.weight"][3 * j : 3 * j + 3].flatten(), tensors["0.bias"][3 * j : 3 * j + 3]])
        for j in (0, 1)
    ]
    return rows + joint + slices


def values(net):
    return flat_blocks(net, {name: parameter.detach().clone() for name, parameter in net.named_parameters()})


def gradients(net):
    return flat_blocks(net, {name: parameter.grad.clone() for name, parameter in net.named_parameters()})


def backward(net):
    net.zero_grad()
    F.mse_loss(net(X), Y).backward()


def backward_all(ensemble):
    ensemble.zero_grad()
    ensemble.losses(F.mse_loss, X, Y).sum().backward()


def optimizers(module, lr, lr_rest):
    groups = GROUPS.parameter_groups(module, lr, lr_rest)
    return {
        "projected": lambda: ProjectedSGD(groups),
        "intrinsic": lambda: IntrinsicSGD(groups),
        "intrinsic from G0": lambda: IntrinsicSGD(groups, G0=2.0),
        "wngrad": lambda: WNGrad(groups, b0=2.0),
        "wngrad last": lambda: WNGrad(groups, accumulate="last"),
        "wngrad projected": lambda: WNGrad(groups, accumulate="last", project=True),
    }


NAMES = list(optimizers(make(), 0.1, 0.1))


def test_projected_sgd_is_a_step_and_a_rescaling_of_every_block():
    net = make()
    optimizer = ProjectedSGD(GROUPS.parameter_groups(net, 3.0, 0.1))
    for _ in range(5):
        backward(net)
        before, slopes, rest = values(net), gradients(net), net[7].weight.detach().clone()
        optimizer.step()
        for old, slope, new in zip(before, slopes, values(net), strict=True):
            moved = old - 3.0 * slope
            torch.testing.assert_close(new, moved * old.norm() / moved.norm(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(net[7].weight.detach(), rest - 0.1 * net[7].weight.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rate", [0.01, 0.3, 5.0])
def test_sgd_on_invariant_blocks_is_the_intrinsic_recursion(rate):
    """Theorem 2.5, over every kind of block: the directions and squared norms of SGD are v and G."""
    by_sgd, on_sphere = make(), make()
    plain = SGD(GROUPS.parameter_groups(by_sgd, rate, 0.05), lr=1.0)
    intrinsic = IntrinsicSGD(GROUPS.parameter_groups(on_sphere, rate, 0.05))
    moved = 0.0
    for _ in range(60):
        backward(by_sgd)
        plain.step()
        backward(on_sphere)
        intrinsic.step()
        for w, v in zip(values(by_sgd), values(on_sphere), strict=True):
            torch.testing.assert_close(v.norm(), torch.tensor(1.0, dtype=F64), rtol=1e-14, atol=0)
            torch.testing.assert_close(w / w.norm(), v, rtol=0, atol=1e-9)
        squares = torch.cat(intrinsic.squared_norms())
        torch.testing.assert_close(squares, torch.stack([w @ w for w in values(by_sgd)]), rtol=1e-9, atol=0)
        moved = max(moved, float((squares - torch.stack([w @ w for w in values(make())])).abs().max()))
    torch.testing.assert_close(by_sgd[7].weight, on_sphere[7].weight, rtol=1e-9, atol=1e-12)
    assert moved > 1e-4


def test_on_a_block_whose_scale_matters_the_recursion_is_not_that_of_sgd():
    nets = [nn.Sequential(nn.Linear(5, 2, bias=False)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    group = {"params": [nets[1][0].weight], "blocks": "rows"}
    for net, optimizer in zip(nets, (SGD(nets[0].parameters(), 0.1), IntrinsicSGD([group], 0.1)), strict=True):
        for _ in range(5):
            backward(net)
            optimizer.step()
    directions = [F.normalize(net[0].weight.detach(), dim=1) for net in nets]
    assert (directions[0] - directions[1]).abs().max() > 1e-3


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.floats(1e-3, 10), st.floats(0.1, 10), st.integers(0, 10**6))
def test_an_initialization_times_c_is_a_rate_divided_by_c_squared(rate, c, seed):
    """Section 2.5: only the effective rate matters, for SGD and for projected SGD."""
    x, y = (torch.randn(12, width, generator=seeded(seed + width), dtype=F64) for width in (4, 3))
    for kind in (SGD, ProjectedSGD):
        ends = []
        for scale, lr in ((1.0, rate), (c, rate * c**2)):
            net = NormalizedLayer(nn.Linear(4, 3, bias=False), 0.1).double()
            with torch.no_grad():
                net.layer.weight.copy_(scale * torch.randn(3, 4, generator=seeded(seed), dtype=F64))
            optimizer = kind([{"params": [net.layer.weight], "blocks": "rows"}], lr=lr)
            for _ in range(4):
                optimizer.zero_grad()
                F.mse_loss(net(x).sin(), y).backward()
                optimizer.step()
            ends.append(net.layer.weight.detach() / scale)
        torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("order", ["first", "last"])
def test_wngrad_is_its_formula_in_plain_numbers(order):
    net, rate = make(), 0.7
    optimizer = WNGrad(GROUPS.parameter_groups(net, rate, 0.1), b0=0.5, accumulate=order)
    b = [0.5] * len(values(net))
    for _ in range(6):
        backward(net)
        before, slopes = values(net), gradients(net)
        optimizer.step()
        for i, (old, slope, new) in enumerate(zip(before, slopes, values(net), strict=True)):
            grown = b[i] + rate**2 * math.fsum(s * s for s in slope.tolist()) / b[i]
            used = grown if order == "first" else b[i]
            b[i] = grown
            torch.testing.assert_close(new, old - rate / used * slope, rtol=1e-12, atol=1e-13)


def test_wngrad_alone_takes_all_parameters_as_one_block_and_finds_its_rate():
    """As in its paper: the rate adapts to a smoothness that nobody told it (here 5 and 1)."""
    curvatures = torch.tensor([5.0, 1.0], dtype=F64)
    point = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = WNGrad([point])
    for _ in range(3000):
        point.grad = curvatures * point.detach()
        optimizer.step()
    assert (curvatures * point.detach()).norm() < 1e-6
    (state,) = optimizer.state.values()
    assert state["b"].shape == (1,)
    assert state["b"].item() > 2.5


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.floats(0.01, 100), st.floats(0.1, 10), st.sampled_from(["first", "last"]))
def test_the_rate_of_wngrad_is_a_unit_of_b(rate, b0, order):
    ends = []
    for settings_ in ({"lr": rate, "b0": b0}, {"lr": 1.0, "b0": b0 / rate}):
        point = nn.Parameter(torch.tensor([3.0, -1.0], dtype=F64))
        optimizer = WNGrad([point], accumulate=order, **settings_)
        for _ in range(5):
            point.grad = point.detach().sin()
            optimizer.step()
        ends.append(point.detach())
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)


def on_the_sphere():
    net = make()
    with torch.no_grad():
        for unit in GROUPS._units(net).values():
            unit.scale(1 / unit.squares(unit.parameters).sqrt())
    return net


@pytest.mark.parametrize(("order", "same"), [("last", True), ("first", False)])
def test_recursion_9_is_wngrad_with_a_projection_if_b_grows_after_the_step(order, same):
    """Remark 2.6, from unit vectors and b0 = G0; with b growing before the step it is another method."""
    nets = on_the_sphere(), on_the_sphere()
    wngrad = WNGrad(GROUPS.parameter_groups(nets[0], 0.8, 0.1), b0=3.0, accumulate=order, project=True)
    intrinsic = IntrinsicSGD(GROUPS.parameter_groups(nets[1], 0.8, 0.1), G0=3.0)
    for _ in range(30):
        for net, optimizer in zip(nets, (wngrad, intrinsic), strict=True):
            backward(net)
            optimizer.step()
    difference = max(float((a - b).abs().max()) for a, b in zip(*map(values, nets), strict=True))
    grown = [state["b"] for state in wngrad.state.values()]
    assert (difference < 1e-10) == same
    if same:
        torch.testing.assert_close(torch.cat(grown), torch.cat(intrinsic.squared_norms()), rtol=1e-10, atol=0)
    else:
        assert difference > 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rates", [torch.tensor([0.05, 0.5, 5.0], dtype=F64), 0.5])
def test_runs_of_an_ensemble_move_as_they_would_alone(name, rates):
    nets = [make(seed) for seed in range(3)]
    ensemble = Ensemble(nets)
    together = optimizers(ensemble, rates, 0.1)[name]()
    for _ in range(4):
        backward_all(ensemble)
        together.step()
    for s, net in enumerate(nets):
        alone = optimizers(net, float(rates[s]) if isinstance(rates, torch.Tensor) else rates, 0.1)[name]()
        for _ in range(4):
            backward(net)
            alone.step()
        for mine, theirs in zip(ensemble.module(s).parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_starts_may_differ_between_runs():
    ensemble, alone = Ensemble([make(), make()]), make()
    starts = torch.tensor([1.0, 4.0], dtype=F64)
    together = IntrinsicSGD(GROUPS.parameter_groups(ensemble, 0.5), G0=starts)
    single = IntrinsicSGD(GROUPS.parameter_groups(alone, 0.5), G0=4.0)
    backward_all(ensemble)
    backward(alone)
    together.step()
    single.step()
    torch.testing.assert_close(ensemble.module(1)[0].weight, alone[0].weight, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ensemble.module(0)[0].weight, alone[0].weight)
    assert together.squared_norms()[0].shape == (2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay(name):
    net = make()
    before = copy.deepcopy(net.state_dict())
    optimizers(net, 0.5, 0.5)[name]().step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_stands_still_keeps_its_length(name):
    """Zero gradients are what a diverged run gets; a block of length zero stays where it is."""
    net = make()
    with torch.no_grad():
        net[3].weight[0] = 0.0
    optimizer = optimizers(net, 0.5, 0.5)[name]()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = values(net)
    optimizer.step()
    for old, new in zip(before, values(net), strict=True):
        assert new.isfinite().all()
        torch.testing.assert_close(F.normalize(old, dim=0), F.normalize(new, dim=0), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_file_read_without_code(name):
    net, other = make(), make()
    optimizer = optimizers(net, 0.5, 0.1)[name]()
    for _ in range(2):
        backward(net)
        optimizer.step()
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    module_state, optimizer_state = torch.load(file, weights_only=True)
    other.load_state_dict(module_state)
    again = optimizers(other, 9.0, 9.0)[name]()
    again.load_state_dict(optimizer_state)
    for module, stepper in ((net, optimizer), (other, again)):
        backward(module)
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_training_continues_from_a_checkpoint_to_the_same_result(tmp_path):
    """The training loop makes the optimizer more than once; that must not count as a step."""
    rates = torch.tensor([0.1, 10.0], dtype=F64)

    def run(checkpoint, steps):
        ensemble = Ensemble([make(0), make(1)])
        train(
            ensemble,
            lambda part: IntrinsicSGD(GROUPS.parameter_groups(part, rates[part.runs], 0.1)),
            F.mse_loss,
            Batches(X, Y, 8),
            steps,
            checkpoint=checkpoint,
            progress=False,
        )
        return ensemble

    straight, saved = run(None, 6), run(tmp_path / "state.pt", 6)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize("kind", [ProjectedSGD, IntrinsicSGD])
def test_bad_groups_are_named(kind):
    weight = nn.Parameter(torch.ones(4, 2))
    for params, lr, message in [
        ([weight], 0.1, "params must be groups with blocks"),
        ([{"params": [weight], "blocks": "rows"}], None, "lr must be given"),
        ([{"params": [weight], "blocks": "columns"}], 0.1, "blocks must be 'rows', 'joint', .* got 'columns'"),
        ([{"params": [weight], "blocks": True}], 0.1, "blocks must be 'rows', 'joint', .* got True"),
        ([{"params": [weight], "blocks": 3}], 0.1, r"blocks must divide the rows of shape \(4, 2\), got 3"),
        (
            [{"params": [nn.Parameter(torch.tensor(1.0))], "blocks": "rows"}],
            0.1,
            r"needs parameters with rows, got shape \(\)",
        ),
        ([{"params": [weight], "blocks": "rows"}], -1.0, "lr must be positive and finite, got -1.0"),
        ([{"params": [weight], "blocks": "rows"}], torch.ones(3), "lr must have one entry for each run"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(params, lr)


def test_groups_can_be_used_by_several_optimizers():
    groups = GROUPS.parameter_groups(make(), 0.1)
    before = [dict(group) for group in groups]
    WNGrad(groups, b0=2.0)
    IntrinsicSGD(groups, G0=2.0)
    assert groups == before


def test_bad_settings_are_named():
    weight = nn.Parameter(torch.ones(4, 2))
    group = [{"params": [weight], "blocks": "rows"}]
    for make_optimizer, message in [
        (lambda: IntrinsicSGD(group, 0.1, G0=0.0), r"G0 must be positive and finite, got 0\.0"),
        (
            lambda: IntrinsicSGD(group, torch.ones(4), G0=torch.ones(3)),
            r"G0 must have one entry for each run, got shape \(3,\)",
        ),
        (lambda: WNGrad([weight], b0=-1.0), r"b0 must be positive and finite, got -1\.0"),
        (lambda: WNGrad([weight], accumulate="before"), "accumulate must be 'first' or 'last', got 'before'"),
        (lambda: WNGrad([weight], lr=0.0), r"lr must be positive and finite, got 0\.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_optimizer()
