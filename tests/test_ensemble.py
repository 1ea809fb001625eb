"""An ensemble against the same runs, one at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib.ensemble import Ensemble
from lib.networks import conv_net, mlp
from lib.normalization import BatchNorm
from lib.optimizers import SGD
from lib.training import Batches, train

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


NETWORKS = {
    "mlp": lambda s: mlp((36, 7, 5), seeded(s)),
    "mlp, batch norm": lambda s: mlp((36, 7, 5), seeded(s), batch_norm=True),
    "mlp, batch norm, eps 0": lambda s: mlp((36, 7, 5), seeded(s), activation=nn.Tanh, batch_norm=True, eps=0.0),
    "conv": lambda s: conv_net((1, 6, 6), (4,), seeded(s), channels=(2, 3), classes=5),
    "conv, batch norm": lambda s: conv_net((1, 6, 6), (4,), seeded(s), channels=(2, 3), classes=5, batch_norm=True),
    "torch layers": lambda s: _torch_layers(s),
}


def _torch_layers(s):
    torch.manual_seed(s)
    return nn.Sequential(nn.Linear(36, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))


def data(name, n=40, seed=0, dtype=F64):
    x = torch.randn(n, *((1, 6, 6) if "conv" in name else (36,)), generator=seeded(seed), dtype=dtype)
    return x, torch.randint(5, (n,), generator=seeded(seed + 1))


@pytest.mark.parametrize("per_run", [False, True], ids=["shared input", "own input"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_sum_of_the_losses_has_the_separate_gradients(name, per_run):
    modules = [NETWORKS[name](s).double() for s in range(3)]
    ensemble = Ensemble(modules)
    x, y = data(name, 3 * 10)
    if per_run:
        x, y = x.unflatten(0, (3, 10)), y.unflatten(0, (3, 10))
    losses = ensemble.losses(F.cross_entropy, x, y, per_run=per_run)
    losses.sum().backward()
    outputs = ensemble(x, per_run=per_run)
    for s, module in enumerate(modules):
        xs, ys = (x[s], y[s]) if per_run else (x, y)
        loss = F.cross_entropy(module(xs), ys)
        loss.backward()
        torch.testing.assert_close(losses[s], loss, rtol=1e-12, atol=1e-12)
        for (key, stacked), alone in zip(ensemble.copies.named_parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(stacked.grad[s], alone.grad, rtol=1e-10, atol=1e-12, msg=key)
        torch.testing.assert_close(outputs[s], module(xs), rtol=1e-12, atol=1e-12)


def test_buffers_are_stacked_and_updated_in_place():
    modules = [_torch_layers(s).double() for s in range(3)]
    ensemble = Ensemble(modules)
    buffer = dict(ensemble.copies.named_buffers())["1.running_mean"]
    x = torch.randn(3, 10, 36, generator=seeded(), dtype=F64)
    for _ in range(3):
        ensemble(x, per_run=True)
        for s, module in enumerate(modules):
            module(x[s])
    assert dict(ensemble.copies.named_buffers())["1.running_mean"] is buffer
    for s, module in enumerate(modules):
        assert buffer[s].abs().sum() > 0
        torch.testing.assert_close(buffer[s], module[1].running_mean, rtol=1e-12, atol=1e-12)
        assert ensemble.copies[1].num_batches_tracked[s] == 3
    ensemble.eval()
    torch.testing.assert_close(ensemble(x, per_run=True)[1], modules[1].eval()(x[1]), rtol=1e-12, atol=1e-12)


def test_parameters_are_leaves_with_their_ordinary_names():
    module = mlp((4, 3, 2), seeded())
    ensemble = Ensemble([module] * 5)
    for (name, stacked), (alone_name, alone) in zip(
        ensemble.copies.named_parameters(), module.named_parameters(), strict=True
    ):
        assert name == alone_name
        assert stacked.is_leaf
        assert stacked.requires_grad
        assert stacked.shape == (5, *alone.shape)


def test_a_run_comes_back_as_a_module_of_its_own():
    modules = [NETWORKS["torch layers"](s) for s in range(3)]
    ensemble = Ensemble(modules)
    run = ensemble.module(2)
    assert type(run) is nn.Sequential
    for a, b in zip(run.state_dict().values(), modules[2].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        run[0].weight.zero_()
    assert torch.equal(ensemble.copies[0].weight[2], modules[2][0].weight)
    F.cross_entropy(run(torch.randn(4, 36)), torch.zeros(4, dtype=torch.int64)).backward()
    assert run[0].weight.grad is not None
    for s in (-1, 3):
        with pytest.raises(IndexError, match=f"s must be between 0 and 2, got {s}"):
            ensemble.module(s)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
def test_select_takes_copies_and_put_undoes_it(index):
    ensemble = Ensemble([mlp((4, 3), seeded(s), batch_norm=True) for s in range(5)])
    before = copy.deepcopy(ensemble.state_dict())
    part = ensemble.select(torch.tensor(index))
    assert part.runs.tolist() == index
    assert part.select(torch.tensor([len(index) - 1])).runs.tolist() == index[-1:]
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 1
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ensemble.state_dict().values(), strict=True))
    ensemble.put(torch.tensor(index), part)
    weight, old = ensemble.copies[0].weight, before["copies.0.weight"]
    for s in range(5):
        assert torch.equal(weight[s], old[s] + 1 if s in index else old[s])


def test_runs_may_differ_in_a_buffer_but_not_in_how_they_are_built():
    x = torch.randn(9, 3, generator=seeded(), dtype=F64)
    layers = [BatchNorm(3, eps).double() for eps in (0.0, 1.0)]
    outputs = Ensemble(layers)(x)
    for s, layer in enumerate(layers):
        torch.testing.assert_close(outputs[s], layer(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"modules must be built alike, got LeakyReLU\(negative_slope=0.2\) as number"):
        Ensemble([nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)])
    with pytest.raises(ValueError, match="modules must be built alike"):
        Ensemble([nn.Linear(3, 2), nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="modules must be built alike"):
        Ensemble([nn.Linear(3, 2), nn.Linear(3, 2).eval()])
    with pytest.raises(ValueError, match="at least one module, got none"):
        Ensemble([])


# ---------------------------------------------------------------------------------------- independence of company


def sweep(name, rates, members, steps, *, own_order=False, max_memory=None, dtype=F64):
    """Train the runs `members` of one sweep over `rates`; run s has seed s."""
    everyone = Ensemble([NETWORKS[name](s).to(dtype) for s in range(len(rates))])
    ensemble = everyone.select(torch.tensor(members))
    x, y = data(name, dtype=dtype)
    batches = Batches(x, y, 10, seed=[100 + s for s in members] if own_order else 3)
    history = train(
        ensemble,
        lambda part: SGD(part.parameters(), lr=rates[part.runs]),
        F.cross_entropy,
        batches,
        steps,
        record_every=20,
        max_memory=max_memory,
        progress=False,
    )
    return ensemble, history


def losses_of(history, run):
    records = history.records
    return torch.tensor(records[(records.run == run) & (records.quantity == "loss")].value.to_numpy())


@pytest.mark.parametrize("own_order", [False, True], ids=["shared order", "own order"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "torch layers"])
def test_a_trajectory_does_not_depend_on_the_company(name, own_order):
    rates = torch.tensor([0.05, 0.1, 1e200, 0.2, 0.02], dtype=F64)  # run 2 diverges
    crowd, in_crowd = sweep(name, rates, [0, 1, 2, 3, 4], 200, own_order=own_order)
    chunked, in_chunks = sweep(name, rates, [0, 1, 2, 3, 4], 200, own_order=own_order, max_memory=120_000)
    assert in_crowd.runs.status.tolist() == ["ok", "ok", "diverged", "ok", "ok"]
    assert in_chunks.runs.equals(in_crowd.runs)
    for run in (1, 3):
        alone, by_itself = sweep(name, rates, [run], 200, own_order=own_order)
        here = losses_of(by_itself, run)
        assert here[-1] < here[0]
        for other in (in_crowd, in_chunks):
            torch.testing.assert_close(losses_of(other, run), here, rtol=1e-9, atol=1e-9)
        for a, b, c in zip(alone.parameters(), crowd.parameters(), chunked.parameters(), strict=True):
            torch.testing.assert_close(b[run], a[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(c[run], a[0], rtol=1e-9, atol=1e-9)
    assert losses_of(in_crowd, 2)[-1].isnan()


def test_in_long_float32_runs_status_and_verdict_are_the_same():
    rates = torch.tensor([0.03, 0.3, 1e30, 3.0])
    _, in_crowd = sweep("mlp", rates, [0, 1, 2, 3], 1000, dtype=torch.float32)
    verdicts = {}
    for run in (1, 2, 3):
        _, alone = sweep("mlp", rates, [run], 1000, dtype=torch.float32)
        assert alone.runs.status[0] == in_crowd.runs.status[run]
        verdicts[run] = [bool(losses_of(history, run)[-1] < 0.5) for history in (alone, in_crowd)]
        assert verdicts[run][0] == verdicts[run][1]
    assert verdicts == {1: [True, True], 2: [False, False], 3: [False, False]}
    assert in_crowd.runs.status.tolist()[:3] == ["ok", "ok", "diverged"]
