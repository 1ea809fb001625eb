"""One step of every trainer on the meta device, and the helper itself on steps that cheat."""

import math

import pytest
import torch
import torch.nn.functional as F
from device import LeftTheDevice, assert_stays_on_device
from torch import nn

from lib.backpropagation import LOGISTIC
from lib.block_records import Recorder
from lib.block_runs import BlockRuns
from lib.block_training import block_step
from lib.ensemble import Ensemble
from lib.factors import Factors
from lib.losses import Squared
from lib.networks import conv_net, feedforward, mlp, softmax_mean_square, split_parameters
from lib.normalization import NormalizedLayer
from lib.optimizers import BSUM, DSGD, SGD, IntrinsicSGD, NormSGD, ProjectedSGD, WNGrad
from lib.scale_invariance import scale_invariant_groups
from lib.surrogates import FirstOrder, SecondOrder, SparseFirstOrder, project_toeplitz
from lib.training import Batches, train_step

RUNS = 3


def networks(batch_norm):
    generator = torch.Generator().manual_seed(0)
    return {
        "one layer": lambda: mlp((64, 10), generator, batch_norm=batch_norm),
        "mlp": lambda: mlp((64, 12, 10), generator, batch_norm=batch_norm),
        "conv": lambda: conv_net((1, 8, 8), (6,), generator, channels=(2, 3), batch_norm=batch_norm),
    }


def sgd(part, rates):
    weights, normalization = split_parameters(part)
    groups = [{"params": weights, "lr": rates[part.runs]}]
    return SGD([*groups, {"params": normalization, "lr": 0.1}] if normalization else groups, lr=0.1)


@pytest.mark.parametrize("loss", [F.cross_entropy, softmax_mean_square])
@pytest.mark.parametrize("seed", [0, (1, 2, 3)], ids=["shared order", "own order"])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["one layer", "mlp", "conv"])
def test_a_training_step_stays_on_its_device(name, batch_norm, seed, loss):
    ensemble = Ensemble([networks(batch_norm)[name]() for _ in range(RUNS)]).to("meta")
    shape = (40, 1, 8, 8) if name == "conv" else (40, 64)
    batches = Batches(torch.empty(shape, device="meta"), torch.zeros(40, dtype=torch.int64, device="meta"), 10, seed)
    optimizer = sgd(ensemble, torch.ones(RUNS, device="meta"))
    alive = torch.ones(RUNS, dtype=torch.bool, device="meta")
    order = batches.order(0, range(RUNS))  # drawn on the CPU, once in an epoch

    def step():
        inputs, targets = batches.take(order[1])
        return train_step(ensemble, optimizer, loss, inputs, targets, alive, per_run=batches.per_run)

    assert_stays_on_device(step)


@pytest.mark.parametrize("rule", ["cyclic", "greedy"])
@pytest.mark.parametrize("kind", ["first order", "second order", "L1"])
def test_a_block_step_stays_on_its_device(kind, rule):
    gamma = torch.ones(RUNS)
    surrogate = {
        "first order": FirstOrder(gamma, project_toeplitz),
        "second order": SecondOrder(gamma),
        "L1": SparseFirstOrder(gamma, 0.1),
    }[kind]
    generator = torch.Generator().manual_seed(0)
    ensemble = Ensemble([feedforward((4, 5, 3, 1), generator) for _ in range(RUNS)]).to("meta")
    x, y = torch.empty(10, 4, device="meta"), torch.empty(10, 1, device="meta")
    alpha = torch.ones(RUNS, device="meta")
    settings = {"schedule": lambda k: alpha, "rule": rule, "backtracking": True, "trials": 2}
    optimizer = BSUM(ensemble.parameters(), surrogate, **settings)
    assert_stays_on_device(lambda: optimizer.step(lambda: ensemble.losses(F.mse_loss, x, y)))

    runs = BlockRuns(list(ensemble.parameters()), x.mT, y.mT, Squared(), LOGISTIC, 1e-4)
    models = [surrogate.to(alpha)] * 3
    recorder = Recorder(runs, models, 3, [0, 1, 2], full_batch=True)

    def fast_step():
        for j in (1, 2, 3):
            recorder.before(j - 1)
            block_step(runs, j, models[j - 1], alpha)

    assert_stays_on_device(fast_step)


@pytest.mark.parametrize("captured", [False, True], ids=["gradients", "factors"])
@pytest.mark.parametrize("runs", [1, RUNS])
@pytest.mark.parametrize(("q", "method"), [(1, None), (math.inf, None), (2, "polynomial"), (2, "gram"), (2, "svd")])
@pytest.mark.parametrize("layers", ["greedy", "all", "sequential", "random"])
def test_a_step_along_duality_maps_stays_on_its_device(layers, q, method, runs, captured):
    """Nothing is read or moved. On a GPU these may still wait for the device, which meta cannot show: ``svd`` (method
    "svd"), ``eigh`` (method "gram") and, in DSGD with q = 2, ``eigvalsh`` (the spectral norms in the layer polynomials).
    """
    if captured and method == "svd":
        pytest.skip("a singular value decomposition needs the gradient itself")
    single = [feedforward((70, 65, 10), torch.Generator()) for _ in range(runs)]
    network = (Ensemble(single) if runs > 1 else single[0]).to("meta")
    x, y = torch.empty(8, 70, device="meta"), torch.empty(8, 10, device="meta")
    factors = Factors(network) if captured else None
    rate = torch.ones(runs, device="meta") if runs > 1 else 1.0
    makers = [lambda: DSGD(network.parameters(), rate, q=q, layers=layers, method=method, factors=factors)]
    if layers != "greedy":
        makers.append(lambda: NormSGD(network.parameters(), rate, q=q, layers=layers, method=method, factors=factors))
    for make in makers:
        optimizer = make()

        def step(optimizer=optimizer):
            optimizer.zero_grad()
            loss = network.losses(F.mse_loss, x, y).sum() if runs > 1 else F.mse_loss(network(x), y)
            loss.backward()
            optimizer.step()

        assert_stays_on_device(step)


@pytest.mark.parametrize("runs", [1, RUNS])
@pytest.mark.parametrize("kind", ["sgd", "projected", "intrinsic", "wngrad"])
def test_a_step_on_scale_invariant_blocks_stays_on_its_device(kind, runs):
    """With every kind of block, the measured intrinsic gradient included."""
    single = [
        nn.Sequential(
            *(nn.Linear(7, 6), nn.GroupNorm(2, 6, eps=0.0), nn.ReLU(), NormalizedLayer(nn.Linear(6, 5), 0.1)),
            *(nn.Tanh(), *mlp((5, 4, 3), torch.Generator(), batch_norm=True, eps=0.0)),
        )
        for _ in range(runs)
    ]
    groups = scale_invariant_groups(single[0])
    assert groups.rows
    assert groups.matrices
    assert groups.slices
    network = (Ensemble(single) if runs > 1 else single[0]).to("meta")
    rate = torch.ones(runs, device="meta") if runs > 1 else 1.0
    x, y = torch.empty(8, 7, device="meta"), torch.empty(8, 3, device="meta")
    parts = groups.parameter_groups(network, rate, 0.1)
    optimizer = {
        "sgd": lambda: SGD(parts, lr=0.1),
        "projected": lambda: ProjectedSGD(parts),
        "intrinsic": lambda: IntrinsicSGD(parts, G0=rate),
        "wngrad": lambda: WNGrad(parts, b0=rate, accumulate="last", project=True),
    }[kind]()

    def step():
        optimizer.zero_grad()
        loss = network.losses(F.mse_loss, x, y).sum() if runs > 1 else F.mse_loss(network(x), y)
        loss.backward()
        groups.intrinsic_gradient(network)
        groups.block_norms(network)
        optimizer.step()

    assert_stays_on_device(step)


def test_the_check_catches_a_value_that_is_read():
    x = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        assert_stays_on_device(lambda: x.sum().item())
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        assert_stays_on_device(lambda: x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    "cheat",
    [
        lambda x: x * torch.tensor(2.0),  # a 0-dim CPU tensor, which meta accepts
        lambda x: x[torch.tensor([0, 1])],  # a CPU index, which meta accepts
        lambda x: x + torch.ones(3).to("meta"),  # a transfer in the middle of a step
    ],
    ids=["scalar", "index", "transfer"],
)
def test_the_check_catches_cpu_tensors(cheat):
    x = torch.ones(3, device="meta")
    with pytest.raises(LeftTheDevice):
        assert_stays_on_device(lambda: cheat(x))


def test_a_loss_that_reads_a_value_is_caught():
    ensemble = Ensemble([mlp((4, 2), torch.Generator()) for _ in range(2)]).to("meta")
    x, y = torch.empty(5, 4, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")
    optimizer = SGD(ensemble.parameters(), lr=0.1)
    alive = torch.ones(2, dtype=torch.bool, device="meta")

    def impatient(outputs, targets):
        loss = F.cross_entropy(outputs, targets)
        return loss if float(loss) < 10 else loss / 2

    with pytest.raises(RuntimeError):
        assert_stays_on_device(lambda: train_step(ensemble, optimizer, impatient, x, y, alive))
