from itertools import pairwise

import pytest
import torch

from lib import backpropagation as bp
from lib import schedules
from lib.block_runs import BlockRuns
from lib.block_training import Minibatches, by_rate, certified, train_blocks, train_full
from lib.losses import CrossEntropy, Exponential, Squared
from lib.optimizers import BSUM, SGD
from lib.surrogates import FirstOrder, Linear, Proximal, SecondOrder, SparseFirstOrder

RUNS, SAMPLES, STEPS, RIDGE = 4, 15, 10, 1e-3


def start(seed=0, widths=(4, 5, 3, 1), activation=bp.LOGISTIC, loss=None):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(RUNS, b, a, generator=generator, dtype=torch.float64) for a, b in pairwise(widths)]
    X = torch.randn(widths[0], SAMPLES, generator=generator, dtype=torch.float64)
    Y = torch.rand(widths[-1], SAMPLES, generator=generator, dtype=torch.float64)
    return weights, X, Y, {"loss": loss or Squared(), "activation": activation, "ridge": RIDGE}


def objective(weights, X, Y, loss, activation, ridge):
    return bp.objective(weights, X, Y, loss, activation, ridge)


SETTINGS = {
    "first order": (FirstOrder(torch.tensor([0.1, 0.2, 0.5, 1.0])), {"schedule": schedules.InverseSquareRoot(0.9)}),
    "unit step": (FirstOrder(0.5), {}),
    "backtracked": (FirstOrder(1.0), {"backtracking": True}),
    "second order": (SecondOrder(1.0, convexify=True), {}),
    "second order, backtracked": (SecondOrder(1.0), {"backtracking": True}),
    "proximal": (Proximal(0.1), {}),
    "L1": (SparseFirstOrder(0.5, 1e-2), {}),
    "linear": (Linear(2.0), {"schedule": schedules.Harmonic(1.0)}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("activation", [bp.LOGISTIC, bp.TANH, bp.SOFTPLUS], ids=lambda a: a.name)
def test_the_fast_trainer_is_the_optimizer(name, activation):
    surrogate, settings = SETTINGS[name]
    weights, X, Y, network = start(activation=activation)
    mine = train_blocks(
        weights, X, Y, surrogate=surrogate, steps=STEPS, record_at=range(STEPS + 1), **network, **settings
    )
    parameters = [W.clone().requires_grad_() for W in weights]
    optimizer = BSUM(parameters, surrogate, **settings)
    values = [optimizer.step(lambda: objective(parameters, X, Y, **network)) for _ in range(STEPS)]
    for W, p in zip(mine.weights, parameters, strict=True):
        torch.testing.assert_close(W, p.detach(), rtol=1e-9, atol=1e-9)
    recorded = mine.objective[:-1]
    if name == "L1":
        recorded = recorded[:1]
        values = [values[0] + sum(surrogate.penalty(W, 1) for W in weights)]
    torch.testing.assert_close(recorded, torch.stack(values), rtol=1e-9, atol=1e-9)
    assert mine.steps.tolist() == list(range(STEPS + 1))


def test_records_are_what_they_say():
    weights, X, Y, network = start()
    history = train_blocks(weights, X, Y, surrogate=FirstOrder(0.3), steps=STEPS, record_at=[0, STEPS], **network)
    for row, W in ((0, weights), (1, history.weights)):
        f = objective(W, X, Y, **network)
        squares = sum(g.square().sum((1, 2)) for g in bp.gradients(W, X, Y, *network.values()))
        torch.testing.assert_close(history.objective[row], f)
        torch.testing.assert_close(history.loss[row], f - RIDGE * sum(V.square().sum((1, 2)) for V in W))
        torch.testing.assert_close(history.gradient_norm[row], squares.sqrt())
    values = train_blocks(weights, X, Y, surrogate=FirstOrder(0.01), steps=40, record_at=range(41), **network)
    change = values.objective.diff(dim=0)
    assert torch.equal(values.increases, (change > 1e-12).sum(0))
    assert values.increases.any()
    torch.testing.assert_close(values.largest_increase, change.amax(0))


@pytest.mark.parametrize("name", ["first order", "backtracked", "second order"])
def test_a_run_does_not_depend_on_its_chunk(name):
    surrogate, settings = SETTINGS[name]
    weights, X, Y, network = start()
    if "schedule" in settings:
        settings = {"schedule": [schedules.Harmonic(c) for c in (0.5, 1.0, 1.5, 1.9)]}
    batches = None if "backtracking" in settings else Minibatches(5, seeds=(3, 1, 3, 2))
    whole, parts = (
        train_blocks(
            weights, X, Y, surrogate=surrogate, steps=STEPS, chunk=chunk, batches=batches, **network, **settings
        )
        for chunk in (None, 3)
    )
    for one, other in zip(whole.weights, parts.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(whole.objective, parts.objective, rtol=1e-12, atol=1e-13)
    assert torch.equal(whole.diverged_at, parts.diverged_at)
    assert (whole.gamma is None) == ("backtracking" not in settings)


def test_a_schedule_for_each_run():
    weights, X, Y, network = start()
    rules = [schedules.Harmonic(1.0), schedules.Constant(0.3), schedules.Recursion(0.9, 0.5), schedules.Geometric(1.0)]
    settings = {"surrogate": FirstOrder(0.3), "steps": STEPS, **network}
    mine = train_blocks(weights, X, Y, schedule=rules, **settings)
    for s, rule in enumerate(rules):
        alone = train_blocks([W[s : s + 1] for W in weights], X, Y, schedule=rule, **settings)
        torch.testing.assert_close(mine.objective[:, s], alone.objective[:, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("loss", "activation"), [(Squared(), bp.LOGISTIC), (Squared(), bp.TANH)], ids=["l", "t"])
def test_certified_unit_steps_never_raise_the_objective(loss, activation):
    weights, X, Y, network = start(activation=activation, loss=loss)
    history = train_blocks(weights, X, Y, surrogate=certified, steps=60, **network)
    assert not history.increases.any()
    assert (history.largest_increase <= 0).all()
    assert (history.objective[-1] < history.objective[0]).all()


def test_backtracking_counts_its_trials_and_keeps_its_constants():
    weights, X, Y, network = start()
    history = train_blocks(weights, X, Y, surrogate=FirstOrder(1.0), steps=60, backtracking=True, **network)
    assert history.gamma.shape == (3, RUNS)
    assert (history.trials >= 60).all()
    assert (history.largest_increase <= 1e-16).all()


def test_minibatches_are_drawn_without_replacement_from_the_seed_alone():
    X = torch.arange(7.0)[None]
    walks = [list(Minibatches(lambda k: k, seeds).walk(X, -X, 9)) for seeds in (5, (5, 6, 5))]
    for k, ((x, y), (many, _)) in enumerate(zip(*walks, strict=True), start=1):
        assert x.shape == (1, min(k, 7))
        assert torch.equal(y, -x)
        assert len(x.unique()) == min(k, 7)
        assert many.shape == (3, 1, min(k, 7))
        assert torch.equal(many[0], x)
        assert torch.equal(many[2], x)
    assert not torch.equal(walks[1][3][0][0], walks[1][3][0][1])
    with pytest.raises(ValueError, match="size must be at least 1, got 0 in iteration 1"):
        list(Minibatches(0).walk(X, X, 1))


def test_a_batch_of_all_samples_is_no_batch():
    weights, X, Y, network = start()
    settings = {"surrogate": FirstOrder(0.3), "steps": STEPS, **network}
    full = train_blocks(weights, X, Y, **settings)
    for seeds in (0, (0, 1, 2, 3)):
        batched = train_blocks(weights, X, Y, batches=Minibatches(SAMPLES, seeds), **settings)
        torch.testing.assert_close(batched.objective, full.objective, rtol=1e-11, atol=1e-13)
        assert batched.increases.tolist() == [-1] * RUNS
        assert batched.largest_increase.isnan().all()


def test_the_literal_rule_never_trains_the_last_layer():
    weights, X, Y, network = start()
    history = train_blocks(weights, X, Y, surrogate=FirstOrder(0.3), steps=9, order=(1, 2, 0), **network)
    assert torch.equal(history.weights[2], weights[2])
    assert history.minimizers[2] is None
    assert not torch.equal(history.weights[1], weights[1])


def test_a_diverged_run_has_a_status_and_disturbs_no_other():
    weights, X, Y, network = start(activation=bp.IDENTITY)
    gamma = torch.tensor([1e3, 1e-6, 1e3, 1e3], dtype=torch.float64)
    history = train_blocks(weights, X, Y, surrogate=FirstOrder(gamma), steps=60, **network)
    others = train_blocks([W[[0, 2, 3]] for W in weights], X, Y, surrogate=FirstOrder(1e3), steps=60, **network)
    assert (history.diverged_at >= 0).tolist() == [False, True, False, False]
    torch.testing.assert_close(history.objective[:, [0, 2, 3]], others.objective)


# ---------------------------------------------------------------------------------------------------- all layers


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adadelta])
def test_the_baselines_are_the_optimizers_of_torch(rule):
    weights, X, Y, network = start()
    rates = [0.5, 0.5, 0.1, 0.5]
    mine = train_full(weights, X, Y, optimizer=by_rate(rule), rates=rates, steps=STEPS, chunk=3, **network)
    for s, rate in enumerate(rates):
        parameters = [W[s].clone().requires_grad_() for W in weights]
        optimizer = rule(parameters, lr=rate)
        for _ in range(STEPS):
            optimizer.zero_grad()
            objective(parameters, X, Y, **network).backward()
            optimizer.step()
        for W, p in zip(mine.weights, parameters, strict=True):
            torch.testing.assert_close(W[s], p.detach(), rtol=1e-11, atol=1e-13)


def test_a_baseline_with_a_rate_for_each_run():
    weights, X, Y, network = start()
    rates = [0.1, 0.2, 0.3, 0.4]
    settings = {"rates": rates, "steps": STEPS, **network}
    grouped = train_full(weights, X, Y, optimizer=by_rate(torch.optim.SGD), **settings)
    stacked = train_full(weights, X, Y, optimizer=lambda params, lr: SGD(params, lr=lr), **settings)
    torch.testing.assert_close(grouped.objective, stacked.objective, rtol=1e-13, atol=0)


# ---------------------------------------------------------------------------------------------------------- caching


@pytest.mark.parametrize("loss", [Squared(), Exponential(2.0), CrossEntropy()], ids=lambda loss: type(loss).__name__)
def test_what_is_remembered_is_right(loss):
    weights, X, Y, network = start(loss=loss, widths=(4, 5, 3, 2))
    runs = BlockRuns(weights, X, Y, *network.values())
    generator = torch.Generator().manual_seed(1)
    for j in (1, 3, 2, 2, 1, 3):
        problem = runs.problem(j)
        V = runs.weights[j - 1] + 0.1 * torch.randn(runs.weights[j - 1].shape, generator=generator, dtype=torch.float64)
        trial = [*runs.weights[: j - 1], V, *runs.weights[j:]]
        rest = (X, Y, *network.values())
        torch.testing.assert_close(problem.value(V), bp.objective(trial, *rest), rtol=1e-13, atol=0)
        torch.testing.assert_close(problem.gradient(V), bp.block_gradient(trial, j, *rest), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(problem.hessian(V), bp.block_hessian(trial, j, *rest), rtol=1e-12, atol=1e-15)
        if j == 2:  # what the trial has evaluated is of no use: this is not what it tried
            V = V / 2
            trial[1] = V
        runs.replace(j, V)
        torch.testing.assert_close(runs.objective(), bp.objective(trial, *rest), rtol=1e-13, atol=0)
        for mine, expected in zip(runs.gradients(), bp.gradients(trial, *rest), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(runs.hessian(j), bp.block_hessian(trial, j, *rest), rtol=1e-12, atol=1e-15)


def test_one_run_one_sample_one_layer_no_step():
    weights, X, Y, network = start(widths=(4, 1))
    one, x, y = [W[:1] for W in weights], X[:, :1], Y[:, :1]
    history = train_blocks(one, x, y, surrogate=FirstOrder(1.0), backtracking=True, steps=5, **network)
    assert (history.objective.diff(dim=0) <= 0).all()
    assert history.objective.shape == (6, 1)
    still = train_blocks(one, x, y, surrogate=FirstOrder(1.0), steps=0, **network)
    assert torch.equal(still.weights[0], one[0])
    assert still.increases.tolist() == [0]


def test_bad_settings_are_named():
    weights, X, Y, network = start()

    def fails(message, **settings):
        with pytest.raises(ValueError, match=message):
            train_blocks(weights, X, Y, **{"surrogate": FirstOrder(1.0), "steps": 1, **network, **settings})

    fails(r"order must hold blocks between 1 and 3, or 0, got \(4,\)", order=[4])
    fails("surrogate must be one, or one for each of the 3 blocks, got 2", surrogate=[FirstOrder(1.0)] * 2)
    fails("schedule must be one, or one for each of the 4 runs, got 2", schedule=[schedules.Constant(0.1)] * 2)
    fails("backtracking must be False with batches", backtracking=True, batches=Minibatches(3))
    fails("backtracking must be False with a function", backtracking=True, surrogate=certified)
    fails("surrogate must have a gamma to be backtracked", backtracking=True, surrogate=Linear(1.0))
    fails("steps must be a whole number, at least 0, got -1", steps=-1)
    fails(r"record_at must hold numbers between 0 and 1, got \[0, 2\]", record_at=[0, 2])
    with pytest.raises(ValueError, match=r"X must be one matrix for all runs, got shape \(4, 4, 15\)"):
        train_blocks(weights, X.expand(4, 4, 15), Y, surrogate=FirstOrder(1.0), steps=1, **network)
    with pytest.raises(ValueError, match=r"rates must have one entry for each of the 4 runs, got shape \(2,\)"):
        train_full(weights, X, Y, optimizer=by_rate(torch.optim.SGD), rates=[1.0, 2.0], steps=1, **network)
    with pytest.raises(ValueError, match="weights must be .S, d_j, d_.j-1.. with one S for all layers"):
        BlockRuns([W[0] for W in weights], X, Y, *network.values())
