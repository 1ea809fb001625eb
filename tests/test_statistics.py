import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib.statistics import (
    bootstrap,
    geometric_mean,
    loglog_slope,
    paired_smaller,
    proportion_below,
    rank_correlation,
)


@settings(deadline=None, max_examples=30)
@given(st.floats(-5, 5), st.floats(1e-3, 1e3))
def test_the_slope_of_a_power_law_is_its_exponent(exponent, factor):
    x = np.array([1.0, 2.0, 5.0, 30.0])
    slope = loglog_slope(x, factor * x**exponent)
    assert slope.estimate == pytest.approx(exponent, abs=1e-12)
    assert slope.high - slope.low < 1e-6


def test_the_slope_and_its_interval_equal_those_of_scipy():
    x, y = np.array([1.0, 2.0, 4.0, 9.0, 10.0]), np.array([3.0, 5.0, 20.0, 60.0, 150.0])
    fit = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.95, 3) * fit.stderr
    slope = loglog_slope(x, y, confidence=0.9)
    assert (slope.estimate, slope.low, slope.high) == pytest.approx((fit.slope, fit.slope - half, fit.slope + half))
    assert slope.confidence == 0.9


def test_slope_intervals_cover_the_exponent_as_often_as_they_say():
    rng, x = np.random.default_rng(0), np.geomspace(1, 100, 8)
    hits = 0
    for _ in range(1000):
        slope = loglog_slope(x, x**1.5 * np.exp(rng.normal(0, 0.3, 8)), confidence=0.9)
        hits += slope.low <= 1.5 <= slope.high
    assert 870 <= hits <= 930  # three standard errors


def test_bootstrap_equals_all_resamples_of_a_tiny_sample():
    values = np.array([1.0, 4.0, 10.0])
    for statistic in (np.mean, np.median, geometric_mean):
        every = [statistic(np.array(r), axis=-1) for r in itertools.product(values, repeat=3)]
        result = bootstrap(values, statistic, seed=0, confidence=0.7)
        assert result.estimate == pytest.approx(statistic(values, axis=-1))
        # The extreme resamples hold 1 / 27 each: the 15 and 85 % points lie on known atoms.
        assert result.low == pytest.approx(np.quantile(every, 0.15, method="inverted_cdf"))
        assert result.high == pytest.approx(np.quantile(every, 0.85, method="inverted_cdf"))


def test_bootstrap_is_a_function_of_the_seed_and_of_the_level():
    values = np.random.default_rng(1).lognormal(size=20)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    narrow, wide = bootstrap(values, seed=3, confidence=0.5), bootstrap(values, seed=3, confidence=0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    same = bootstrap([2.0, 2.0, 2.0], seed=0)
    assert (same.low, same.high) == (2.0, 2.0)


def signed_rank_by_enumeration(difference):
    """P-value of the signed-rank statistic under all sign patterns; no ties, no zeros."""
    ranks = stats.rankdata(np.abs(difference))
    observed = ranks[difference > 0].sum()
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in patterns(len(ranks))]
    return np.mean(np.array(sums) <= observed)


def patterns(n):
    return itertools.product((0, 1), repeat=n)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.7])
def test_paired_p_values_from_the_definition(shift):
    rng = np.random.default_rng(5)
    a, b = rng.normal(shift, 1, 9), rng.normal(0, 1, 9)
    d = a - b
    assert paired_smaller(a, b).p_value == pytest.approx(signed_rank_by_enumeration(d))
    smaller = int((d < 0).sum())
    sign = sum(math.comb(9, k) for k in range(smaller, 10)) / 2**9
    assert paired_smaller(a, b, test="sign").p_value == pytest.approx(sign)
    t = d.mean() / (d.std(ddof=1) / 3)
    result = paired_smaller(a, b, test="t")
    assert result.p_value == pytest.approx(stats.t.cdf(t, 8))
    assert result.estimate == pytest.approx(d.mean())


@pytest.mark.parametrize("test", ["wilcoxon", "sign"])
def test_rank_intervals_are_the_inverted_exact_tests(test):
    """A shift is inside the interval exactly when neither one-sided test rejects it."""
    rng = np.random.default_rng(2)
    d = rng.normal(0.5, 1, 10)
    result = paired_smaller(d, np.zeros(10), test=test, confidence=0.9)
    for shift in np.linspace(d.min() - 0.1, d.max() + 0.1, 400):
        p = [paired_smaller(sign * (d - shift), np.zeros(10), test=test).p_value for sign in (1, -1)]
        assert (result.low <= shift <= result.high) == (min(p) > 0.05)


def test_five_pairs_that_all_agree():
    a, b = [1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 2.3, 3.2, 4.4, 5.5]
    for test in ("wilcoxon", "sign"):
        result = paired_smaller(a, b, test=test)
        assert result.p_value == pytest.approx(1 / 32)
        assert (result.low, result.high) == (-math.inf, math.inf)  # five pairs cannot give 95 %
        assert paired_smaller(b, a, test=test).p_value > 0.9
        assert paired_smaller(a, a, test=test).p_value == 1
    ninety = paired_smaller(a, b, confidence=0.9)
    assert (ninety.low, ninety.high) == pytest.approx((-0.5, -0.1))
    assert paired_smaller(a, a, test="t").p_value == 1


def test_upper_bound_of_an_event_never_seen():
    for n in (1, 10, 100, 3000):
        bound = proportion_below(0, n)
        assert bound.high == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)
        assert bound.estimate == bound.low == 0
        assert bound.high <= 3 / n  # the rule of three
    assert proportion_below(0, 3000).high == pytest.approx(3 / 3000, rel=2e-3)
    assert proportion_below(4, 4).high == 1


def test_upper_bound_from_the_definition():
    """At the bound, as few events as were seen have probability 1 - confidence."""
    for events, trials in ((1, 10), (7, 30)):
        high = proportion_below(events, trials, confidence=0.99).high
        assert stats.binom.cdf(events, trials, high) == pytest.approx(0.01)


def test_rank_correlation_from_the_definition():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 1.0, 40.0, 3.0, 50.0, 60.0]
    squares = sum((a - b) ** 2 for a, b in zip(stats.rankdata(x), stats.rankdata(y), strict=True))
    rho = 1 - 6 * squares / (6 * 35)
    result = rank_correlation(x, y)
    half = 1.959963984540054 * math.sqrt((1 + rho**2 / 2) / 3)
    expected = rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)
    assert (result.estimate, result.low, result.high) == pytest.approx(expected)
    monotone = rank_correlation(x, np.exp(x))
    assert (monotone.estimate, monotone.low, monotone.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loglog_slope([1, 2, 3], [1, 0, 2]), r"y must be positive, got 0\.0"),
        (lambda: loglog_slope([2, 2, 2], [1, 3, 2]), r"x must hold two different values, got 2\.0 alone"),
        (lambda: loglog_slope([1, 2, 3], [1, 2, 3, 4]), "y must be as many as x, got 4 for 3"),
        (lambda: loglog_slope([1, 2], [1, 2]), r"x must be a list of at least 3 numbers, got shape \(2,\)"),
        (lambda: loglog_slope([1, 2, 3], [1, 2, 3], 95), "confidence must be between 0 and 1, got 95"),
        (lambda: bootstrap([1, math.nan], seed=0), "values must be finite, got nan"),
        (lambda: bootstrap([1, -2], geometric_mean, seed=0), r"values must be positive .* got -2\.0"),
        (lambda: paired_smaller([1, 2], [1, 2], test="z"), "test must be 'wilcoxon', 'sign' or 't', got 'z'"),
        (lambda: proportion_below(3, 2), "events must be between 0 and 2, got 3"),
        (lambda: proportion_below(0, 0), "trials must be at least 1, got 0"),
        (lambda: rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]), r"x must hold two different values, got 1\.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
