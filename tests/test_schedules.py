import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.schedules import Constant, Geometric, Harmonic, InverseSquareRoot, Power, Recursion, table

FORMULAS = [
    (Constant(0.3), lambda k: 0.3),
    (Power(0.5, 0.75), lambda k: 0.5 / k**0.75),
    (InverseSquareRoot(0.9), lambda k: 0.9 / math.sqrt(k)),
    (Harmonic(1.5), lambda k: 1.5 / (2 * k)),
    (Geometric(1.0), lambda k: 1 / 2**k),
]


@pytest.mark.parametrize(("schedule", "formula"), FORMULAS, ids=lambda x: str(x) if not callable(x) else "")
def test_a_schedule_is_its_formula(schedule, formula):
    expected = torch.tensor([formula(k) for k in range(1, 41)], dtype=torch.float64)
    torch.testing.assert_close(schedule.first(40), expected, rtol=1e-14, atol=0)
    called = torch.tensor([schedule(k) for k in range(1, 41)], dtype=torch.float64)
    torch.testing.assert_close(called, expected, rtol=1e-14, atol=0)


@given(st.fractions(Fraction(1, 100), Fraction(99, 100)), st.fractions(Fraction(1, 1000), 1))
@settings(deadline=None, max_examples=30)
def test_the_recursion_updates_before_use_and_its_squares_telescope(t, start):
    exact, a = [], start
    for _ in range(6):
        a = a * (1 - t * a)
        exact.append(a)
    schedule = Recursion(float(t), float(start))
    torch.testing.assert_close(
        schedule.first(6), torch.tensor([float(a) for a in exact], dtype=torch.float64), rtol=1e-13, atol=0
    )
    assert [schedule(k) for k in range(1, 7)] == schedule.first(6).tolist()
    assert start**2 + sum(a**2 for a in exact[:-1]) == (start - exact[-1]) / t


@pytest.mark.parametrize(("t", "start"), [(0.99, 1.0), (0.9, 0.001)])
def test_the_asymptotics_of_the_recursion(t, start):
    K = 1_000_000
    a = Recursion(t, start).first(K)
    k = torch.arange(1, K + 1, dtype=torch.float64)
    constant = 1 / a - t * k - t * k.log()
    assert abs(float(constant[-1] - constant[K // 10])) < 2e-2
    assert float(t * k[-1] * a[-1]) == pytest.approx(1, abs=2e-3)
    assert float(start**2 + a.square().sum()) == pytest.approx(start / t, rel=1e-2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.1), (True, False, True, False)),
        (Constant(1.0), (False, False, True, False)),
        (InverseSquareRoot(0.5), (True, True, True, False)),
        (InverseSquareRoot(1.0), (False, True, True, False)),
        (Power(0.9, 0.75), (True, True, True, True)),
        (Power(0.9, 1.0), (True, True, True, True)),
        (Power(0.9, 1.5), (True, True, False, True)),
        (Harmonic(1.9), (True, True, True, True)),
        (Harmonic(2.0), (False, True, True, True)),
        (Geometric(1.0), (True, True, False, True)),
        (Recursion(0.99, 1.0), (True, True, True, True)),
        (Recursion(0.1, 1.9), (False, True, True, True)),
    ],
    ids=str,
)
def test_the_conditions(schedule, expected):
    conditions = schedule.conditions()
    assert tuple(bool(condition) for condition in conditions) == expected
    assert conditions.all() == all(expected)
    assert all(condition.reason for condition in conditions)
    # The partial sums agree: over ten times as many terms a convergent one moves little.
    a = schedule.first(100_000)
    assert bool((a < 1).all()) == expected[0]
    assert (a[-1] < a[0] / 50) == expected[1]
    for sums, converges in ((a.cumsum(0), not expected[2]), (a.square().cumsum(0), expected[3])):
        assert (sums[-1] - sums[9999] < 0.05 * sums[9999]) == converges


def test_a_table_for_runs():
    mine = table([Harmonic(1.0), Constant(0.5)], 3)
    torch.testing.assert_close(mine, torch.tensor([[0.5, 0.5], [0.25, 0.5], [1 / 6, 0.5]], dtype=torch.float64))
    assert table(Constant(0.5), 2).tolist() == [0.5, 0.5]
    assert len(Recursion(0.5, 0.5).first(0)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0.0), r"alpha must be positive and finite, got 0\.0"),
        (lambda: Power(-1.0, 1.0), r"c must be positive and finite, got -1\.0"),
        (lambda: Power(1.0, -0.5), r"p must be zero or positive, and finite, got -0\.5"),
        (lambda: Harmonic(float("nan")), "c must be positive and finite, got nan"),
        (lambda: Geometric(0), "c must be positive and finite, got 0"),
        (lambda: Recursion(1.0, 0.5), r"t must be between 0 and 1, got 1\.0"),
        (lambda: Recursion(0.5, 2.0), r"start must be between 0 and 1/t = 2, got 2\.0"),
        (lambda: Harmonic(1.0)(0), "k must be a whole number, at least 1, got 0"),
        (lambda: Recursion(0.5, 0.5)(1.5), r"k must be a whole number, at least 1, got 1\.5"),
        (lambda: Geometric(1.0).first(-1), "K must be a whole number, at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
