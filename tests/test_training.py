"""The training loop against loops written out by hand, and against being killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.ensemble import Ensemble
from lib.networks import mlp
from lib.optimizers import SGD
from lib.training import Batches, PeakMemory, load_checkpoint, runs_that_fit, save_checkpoint, train, train_step


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Scalar(nn.Module):
    """The function x -> w x: gradient descent on (w x)^2 / 2 multiplies w by 1 - lr x^2."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        return self.w * x


def half_square(out, _):
    return out.square().mean() / 2


ONES = Batches(torch.ones(1), torch.zeros(1))


def rated(rates):
    return lambda part: SGD(part.parameters(), lr=rates[part.runs])


def problem(runs=4, seed=0, batch_size=8):
    ensemble = Ensemble([mlp((6, 5, 3), seeded(s), batch_norm=True) for s in range(runs)])
    x = torch.randn(30, 6, generator=seeded(9))
    y = torch.randint(3, (30,), generator=seeded(8))
    return ensemble, Batches(x, y, batch_size, seed), torch.logspace(-2, 0, runs)


def run_problem(steps=20, runs=4, seed=0, ensemble=None, **options):
    fresh, batches, rates = problem(runs, seed)
    ensemble = ensemble or fresh
    history = train(ensemble, rated(rates), F.cross_entropy, batches, steps, **{"progress": False} | options)
    return ensemble, history


def assert_identical(first, second):
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    pd.testing.assert_frame_equal(first[1].records, second[1].records, check_exact=True)
    pd.testing.assert_frame_equal(first[1].runs, second[1].runs)


# ---------------------------------------------------------------------------------------------------------- batches


def test_an_epoch_visits_every_example_once_and_the_next_in_another_order():
    batches = Batches(torch.arange(12.0), torch.arange(12), 3, seed=5)
    visited = [x.tolist() for _, x, _ in batches.walk(range(1), 0, 7)]
    assert sorted(sum(visited[:4], [])) == sorted(sum(visited[4:], [])) == list(range(12))
    assert visited[:4] != visited[4:]
    assert [x.tolist() for _, x, _ in batches.walk(range(1), 3, 7)] == visited[3:]  # resuming at batch 3
    assert [x.tolist() for _, x, _ in Batches(torch.arange(12.0), torch.arange(12), 3, 6).walk([0], 0, 7)] != visited


def test_inputs_and_targets_stay_together_and_the_incomplete_batch_is_dropped():
    batches = Batches(torch.arange(11.0), torch.arange(11), 4, seed=1)
    assert batches.per_epoch == 2
    for _, x, y in batches.walk(range(1), 0, 9):
        assert x.tolist() == y.tolist()
        assert len(set(x.tolist())) == 4


def test_a_run_with_its_own_order_sees_what_it_would_see_alone():
    x, y = torch.arange(12.0), torch.arange(12)
    together = Batches(x, y, 3, seed=[7, 5, 7])
    for step, xs, ys in together.walk([0, 1, 2], 0, 9):
        assert xs.shape == (3, 3)
        for s, seed in enumerate(together.seed):
            alone = next(Batches(x, y, 3, seed).walk([0], step, step))
            assert torch.equal(xs[s], alone[1])
            assert torch.equal(ys[s], alone[2])
    assert [xs.tolist() for _, xs, _ in together.walk([1], 0, 0)] == [
        [x.tolist()] for _, x, _ in Batches(x, y, 3, 5).walk([0], 0, 0)
    ]


def test_the_order_is_fixed_for_good():
    """A change of this order would silently change every published number."""
    assert Batches(torch.zeros(8), torch.zeros(8), 4, seed=0).order(0, [0]).tolist() == ORDER_OF_SEED_0


ORDER_OF_SEED_0 = [[3, 2, 5, 1], [7, 4, 6, 0]]


def test_without_batch_size_every_step_sees_all():
    batches = Batches(torch.arange(5.0), torch.arange(5))
    assert [x.tolist() for _, x, _ in batches.walk([0], 0, 2)] == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), "targets must be as many as inputs, got 4 for 3 inputs"),
        ((torch.zeros(3), torch.zeros(3), 4), "batch_size must be between 1 and 3, got 4"),
        ((torch.zeros(3), torch.zeros(3), 0), "batch_size must be between 1 and 3, got 0"),
    ],
)
def test_bad_batches_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(*arguments)


# ---------------------------------------------------------------------------------------------- records and results


def test_training_is_the_loop_one_would_write():
    ensemble, history = run_problem(steps=12, record_every=5, quantities={"norm": lambda e: first_norm(e)})
    fresh, batches, rates = problem()
    rows = []
    for s in range(4):
        module = fresh.module(s)
        optimizer = torch.optim.SGD(module.parameters(), lr=float(rates[s]))
        for step, x, y in batches.walk([0], 0, 12):
            loss = F.cross_entropy(module(x), y)
            if step in (0, 5, 10, 12):
                rows += [(s, step, "loss", loss.item()), (s, step, "norm", module[0].weight.square().sum().item())]
            if step < 12:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for a, b in zip(ensemble.module(s).parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    expected = pd.DataFrame(rows, columns=["run", "step", "quantity", "value"])
    pd.testing.assert_frame_equal(history.records, expected, rtol=1e-4)
    assert history.runs.status.tolist() == ["ok"] * 4
    assert history.runs.diverged_at.isna().all()


def first_norm(ensemble):
    return ensemble.copies[0].weight.square().sum((1, 2))


def test_no_step_at_all_records_the_start():
    ensemble, history = run_problem(steps=0)
    assert history.records.step.tolist() == [0] * 4
    assert torch.equal(ensemble.copies[0].weight, problem()[0].copies[0].weight)


def test_a_repeated_command_is_bit_identical():
    for options in ({"seed": 3}, {"seed": (1, 2, 3, 4)}, {"max_memory": 20_000}):
        assert_identical(run_problem(**options), run_problem(**options))


def test_the_progress_bar_is_shown_only_when_asked(capsys):
    run_problem(progress=True)
    assert "80/80" not in capsys.readouterr().err
    run_problem(progress=True, steps=7)
    assert "7/7" in capsys.readouterr().err
    run_problem(progress=False)
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------- divergence


def first_bad_step(lr, steps):
    """When float32 gradient descent on w^2 / 2 from w = 1 first has a loss or gradient that is not finite."""
    w, lr = np.float32(1), np.float32(lr)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps + 1):
            if not np.isfinite(w * w / np.float32(2)) or not np.isfinite(w):
                return step
            w = w - lr * w
    return pd.NA


def test_divergence_is_dated_by_its_first_step_and_harms_nobody():
    rates = torch.tensor([0.5, 3.0, 1e3, 1e30, 2.0])
    ensemble = Ensemble([Scalar() for _ in rates])
    history = train(ensemble, rated(rates), half_square, ONES, 100, record_every=10, progress=False)
    expected = [first_bad_step(float(rate), 100) for rate in rates]
    assert history.runs.diverged_at.tolist() == expected
    assert expected[1] > 50
    assert expected[2] < expected[1]
    assert history.runs.status.tolist() == ["ok", "diverged", "diverged", "diverged", "ok"]
    values = history.records.pivot(index="step", columns="run", values="value")
    for run, bad in enumerate(expected):
        dead = np.zeros(len(values), bool) if bad is pd.NA else values.index >= bad
        assert (values[run].isna() == dead).all()
    assert values[0].iloc[1] == 0.5 * 0.5**20
    assert (values[4] == 0.5).all()


def test_a_diverged_run_stands_still_and_no_optimizer_meets_a_bad_gradient():
    seen = []

    class Watching(SGD):
        def step(self):
            seen.append(all(bool(p.grad.isfinite().all()) for g in self.param_groups for p in g["params"]))
            super().step()

    # sqrt has a finite value and an infinite slope at zero.
    ensemble = Ensemble([Scalar(0.0), Scalar(4.0)])
    loss = lambda out, _: out.sqrt().sum()  # noqa: E731
    history = train(ensemble, lambda p: Watching(p.parameters(), lr=0.1), loss, ONES, 3, progress=False)
    assert history.runs.diverged_at.tolist() == [0, pd.NA]
    assert seen == [True] * 3
    assert ensemble.copies.w[0] == 0
    assert ensemble.copies.w[1] < 4


def test_a_parameter_that_no_loss_shows_is_found_at_a_record_point():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.hidden = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.seen * x

    ensemble = Ensemble([Hidden(), Hidden()])
    with torch.no_grad():
        ensemble.copies.hidden[1] = -torch.inf
    history = train(ensemble, lambda p: SGD(p.parameters(), lr=0.1), half_square, ONES, 3, progress=False)
    assert history.runs.diverged_at.tolist() == [pd.NA, 0]


def test_a_step_returns_the_losses_before_it():
    ensemble = Ensemble([Scalar(2.0), Scalar(float("nan"))])
    optimizer = SGD(ensemble.parameters(), lr=0.5)
    losses, alive = train_step(ensemble, optimizer, half_square, *ONES.inputs[None], ONES.targets, torch.ones(2) > 0)
    assert losses[0] == 2.0
    assert alive.tolist() == [True, False]
    assert ensemble.copies.w[0] == 1.0


# ------------------------------------------------------------------------------------------------------------ memory


def test_peak_memory_counts_what_is_alive_at_once():
    with PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        a.add_(b)
        b.view(10, 100)
        del b
        c = torch.zeros(250)
    assert memory.peak == 8000
    assert memory.live == 5000
    del a, c
    assert memory.live == 0


def memory_of_a_process(max_memory):
    """Peak resident memory, in bytes, that training adds in a process of its own."""
    script = f"""
        import re
        import torch
        import torch.nn.functional as F
        torch.set_num_threads(1)
        from lib.ensemble import Ensemble
        from lib.networks import mlp
        from lib.optimizers import SGD
        from lib.training import Batches, train

        def peak():  # unlike ru_maxrss it starts anew in a new program
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

        def sweep(runs, steps, max_memory):
            generator = torch.Generator().manual_seed(0)
            ensemble = Ensemble([mlp((40, 300, 10), generator) for _ in range(runs)])
            batches = Batches(torch.randn(4000, 40), torch.randint(10, (4000,)), 2000)
            before = peak()
            train(ensemble, lambda part: SGD(part.parameters(), lr=0.1), F.cross_entropy, batches, steps,
                  max_memory=max_memory, progress=False)
            return peak() - before

        sweep(2, 2, None)  # code and caches that any training loads
        print(sweep(25, 2, {max_memory}))
    """
    # Otherwise the C library keeps freed blocks, and the peak says more about it than about the training.
    give_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.check_output([sys.executable, "-c", textwrap.dedent(script)], env=give_back))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_memory_stays_below_the_bound():
    bound = 40_000_000
    assert 0.4 * bound < memory_of_a_process(bound) < 1.1 * bound
    assert memory_of_a_process(None) > 2 * bound


def test_the_number_of_runs_that_fit_is_predicted_from_a_measured_step():
    ensemble, batches, rates = problem(runs=12)

    def peak(runs):
        part = problem(runs)[0]
        with PeakMemory() as memory:
            clone = part.select(torch.arange(runs))
            optimizer = SGD(clone.parameters(), lr=rates[:runs])
            for _, x, y in batches.walk(range(runs), 0, 1):
                train_step(clone, optimizer, F.cross_entropy, x, y, torch.ones(runs) > 0)
        return memory.peak

    for bound in (peak(3), peak(5) + 100, peak(9)):
        fit = runs_that_fit(ensemble, rated(rates), F.cross_entropy, batches, bound)
        assert peak(fit) <= bound
        assert fit == 12 or peak(fit + 2) > bound
    assert runs_that_fit(ensemble, rated(rates), F.cross_entropy, batches, 10**9) == 12
    with pytest.raises(ValueError, match=r"max_memory must be at least \d+ bytes to hold one run, got 100"):
        train(ensemble, rated(rates), F.cross_entropy, batches, 3, max_memory=100, progress=False)


def test_chunks_give_every_run_its_own_settings_and_order():
    whole = run_problem(seed=(4, 5, 6, 7), record_every=4)
    chunked = run_problem(seed=(4, 5, 6, 7), record_every=4, max_memory=5_000)
    fit = runs_that_fit(problem()[0], rated(problem()[2]), F.cross_entropy, problem(seed=(4, 5, 6, 7))[1], 5_000)
    assert fit < 4
    for a, b in zip(whole[0].parameters(), chunked[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(whole[1].records, chunked[1].records, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- checkpoints

KILLED = """
    import json, sys, torch
    import torch.nn.functional as F
    sys.path.insert(0, {tests!r})
    from test_training import problem, rated, slow_norm
    from lib.training import train

    ensemble, batches, rates = problem(4, seed=(1, 2, 3, 4))
    train(
        ensemble, rated(rates), F.cross_entropy, batches, 60, quantities={{"norm": slow_norm}}, record_every=3,
        max_memory={max_memory}, checkpoint=sys.argv[1], checkpoint_seconds=0, progress=False
    )
"""


calls = []


def slow_norm(ensemble):
    calls.append(1)
    time.sleep(0.05)
    return first_norm(ensemble)


def test_a_killed_training_resumes_to_the_same_bits(tmp_path):
    max_memory = 5_000  # two chunks: it is killed in the first and in the second
    script = textwrap.dedent(KILLED).format(tests=os.path.dirname(__file__), max_memory=max_memory)
    path = tmp_path / "run.pt"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    while process.poll() is None:
        time.sleep(0.02)
        if path.exists() and torch.load(path, weights_only=True)["chunk"] == 1:
            time.sleep(0.3)
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    state = torch.load(path, weights_only=True)
    assert state["chunk"] == 1
    assert 0 < state["step"] < 60
    options = {"seed": (1, 2, 3, 4), "record_every": 3, "max_memory": max_memory, "quantities": {"norm": slow_norm}}
    calls.clear()
    resumed = run_problem(60, checkpoint=path, **options)
    assert len(calls) < 25  # of 42 record points, and four more to measure the memory of a run
    assert_identical(resumed, run_problem(60, **options))


def test_a_finished_training_answers_from_its_checkpoint(tmp_path):
    options = {"record_every": 5, "quantities": {"norm": slow_norm}}
    calls.clear()
    first = run_problem(checkpoint=tmp_path / "run.pt", **options)
    trained = len(calls)
    again = run_problem(checkpoint=tmp_path / "run.pt", **options)
    assert len(calls) == trained > 0
    assert_identical(first, again)
    assert_identical(first, run_problem(**options))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"steps": 21}, "steps was 20, is 21"),
        ({"seed": 1}, "batch seed was 0, is 1"),
        ({"record_every": 2}, "record_every was 5, is 2"),
        ({"quantities": {"norm": first_norm}}, r"quantities was \[\], is \['norm'\]"),
        ({"max_memory": 5_000}, r"runs at once \(max_memory\) was 4"),
        ({"runs": 3}, "network was 4 x (?s:.*) is 3 x "),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, change, names):
    options = {"checkpoint": tmp_path / "run.pt", "record_every": 5}
    run_problem(**options)
    with pytest.raises(ValueError, match=f"belongs to other settings: .*{names}(?s:.*)Choose another path"):
        run_problem(**options | change)


def test_a_checkpoint_of_other_rates_values_loss_or_data_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    ensemble, batches, rates = problem()

    def attempt(ensemble, rates, loss, batches):
        return train(ensemble, rated(rates), loss, batches, 4, checkpoint=path, progress=False)

    attempt(ensemble, rates, F.cross_entropy, batches)
    fresh = problem()[0]
    other = Batches(batches.inputs + 1, batches.targets, 8)
    with pytest.raises(ValueError, match="optimizer was SGD"):
        attempt(fresh, 2 * rates, F.cross_entropy, batches)
    with pytest.raises(ValueError, match="loss was cross_entropy, is half_square"):
        attempt(fresh, rates, half_square, batches)
    with pytest.raises(ValueError, match="data was"):
        attempt(fresh, rates, F.cross_entropy, other)
    with pytest.raises(ValueError, match="initial values was"):
        attempt(ensemble, rates, F.cross_entropy, batches)  # it has been trained meanwhile


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_a_truncated_checkpoint_is_set_aside(tmp_path, kept):
    options = {"checkpoint": tmp_path / "run.pt", "record_every": 5}
    first = run_problem(**options)
    content = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(content[: int(kept * len(content))])
    with pytest.warns(UserWarning, match=r"run\.pt cannot be read .* kept as .*run\.pt\.damaged, starting over"):
        again = run_problem(**options)
    assert_identical(first, again)
    assert (tmp_path / "run.pt.damaged").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_problem(**options)  # the new file is sound


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"settings": {}, "value": torch.ones(1)})

    def crash(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"settings": {}, "value": torch.zeros(1)})
    assert load_checkpoint(path, {}, torch.device("cpu"))["value"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"record_every": 0}, "record_every must be at least 1, got 0"),
        ({"seed": (1, 2)}, "seed must have one entry for each of 4 runs, got 2"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run_problem(**options)
