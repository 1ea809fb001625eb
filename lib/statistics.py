"""Intervals and comparisons: every number a chapter reports comes with its spread.

Each function returns a small frozen record with the estimate and its interval ``low`` to ``high``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate between ``low`` and ``high``, at the level ``confidence``."""

    estimate: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Comparison:
    """An estimate between ``low`` and ``high``, at the level ``confidence``, with the p-value of a test."""

    estimate: float
    low: float
    high: float
    confidence: float
    p_value: float


def _sample(name: str, values: ArrayLike, at_least: int) -> np.ndarray:
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or len(sample) < at_least:
        raise ValueError(f"{name} must be a list of at least {at_least} numbers, got shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise ValueError(f"{name} must be finite, got {sample[~np.isfinite(sample)][0]}")
    return sample


def _pair(x_name: str, x: ArrayLike, y_name: str, y: ArrayLike, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = _sample(x_name, x, at_least), _sample(y_name, y, at_least)
    if len(first) != len(second):
        raise ValueError(f"{y_name} must be as many as {x_name}, got {len(second)} for {len(first)}")
    return first, second


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def loglog_slope(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Interval:
    r"""The exponent :math:`p` of a power law :math:`y \approx c\, x^p`, by least squares on the logarithms.

    The interval is Student's, with :math:`n - 2` degrees of freedom; it takes the errors of :math:`\log y` for independent.

    Args:
        x, y: at least three positive numbers each.
        confidence: level of the interval.

    Raises:
        ValueError: if a value is not positive and finite, the lengths differ, or all x are equal.
    """
    _check_confidence(confidence)
    x, y = _pair("x", x, "y", y, at_least=3)
    for name, values in (("x", x), ("y", y)):
        if values.min() <= 0:
            raise ValueError(f"{name} must be positive, got {values.min()}")
    if np.ptp(x) == 0:
        raise ValueError(f"x must hold two different values, got {x[0]} alone")
    u, v = (np.log(values) - np.log(values).mean() for values in (x, y))
    slope = (u @ v) / (u @ u)
    residual_variance = np.square(v - slope * u).sum() / (len(x) - 2)
    half = stats.t.ppf((1 + confidence) / 2, len(x) - 2) * np.sqrt(residual_variance / (u @ u))
    return Interval(float(slope), float(slope - half), float(slope + half), confidence)


def geometric_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The geometric mean of positive numbers along an axis."""
    return np.exp(np.log(values).mean(axis=axis))


def bootstrap(
    values: ArrayLike,
    statistic: Callable = np.mean,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 9999,
) -> Interval:
    """Percentile bootstrap interval of a statistic of one sample.

    Args:
        values: at least two numbers; positive ones for ``geometric_mean``.
        statistic: ``np.mean``, ``np.median``, ``geometric_mean``, or another function of ``(values, axis)``.
        seed: of the resampling.
        confidence: level of the interval.
        resamples: how many samples are drawn.

    Raises:
        ValueError: for fewer than two values, a value that is not finite, or one that ``geometric_mean`` cannot take.

    Source: Efron (1979); ``scipy.stats.bootstrap``.
    """
    _check_confidence(confidence)
    values = _sample("values", values, at_least=2)
    if statistic is geometric_mean and values.min() <= 0:
        raise ValueError(f"values must be positive for a geometric mean, got {values.min()}")
    result = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(statistic(values, axis=-1)), float(low), float(high), confidence)


def paired_smaller(a: ArrayLike, b: ArrayLike, *, test: str = "wilcoxon", confidence: float = 0.95) -> Comparison:
    """Is a smaller than b, pair by pair (the same seed, the same start)?

    ``wilcoxon`` needs differences that are symmetric about their median; ``sign`` needs nothing; ``t`` needs normal ones.
    The estimate and interval are of the difference a - b: its pseudo-median (Hodges-Lehmann, interval by inverting
    the exact test), its median (order statistics), or its mean (Student). The interval covers at least ``confidence``
    and is the whole line where so few pairs cannot give one.

    Args:
        a, b: at least two numbers each.
        test: "wilcoxon", "sign" or "t".
        confidence: level of the two-sided interval.

    Raises:
        ValueError: for another test, or samples that are too short, of different length, or not finite.

    Source: Hollander, Wolfe and Chicken (2014), Chapter 3; ``scipy.stats.wilcoxon``, ``binomtest``, ``ttest_rel``.
    """
    if test not in ("wilcoxon", "sign", "t"):
        raise ValueError(f"test must be 'wilcoxon', 'sign' or 't', got {test!r}")
    _check_confidence(confidence)
    a, b = _pair("a", a, "b", b, at_least=2)
    difference, tail = a - b, (1 - confidence) / 2
    if test == "t":
        p_value = stats.ttest_rel(a, b, alternative="less").pvalue if difference.any() else 1.0
        half = stats.t.ppf(1 - tail, len(a) - 1) * stats.sem(difference)
        return Comparison(
            float(difference.mean()),
            float(difference.mean() - half),
            float(difference.mean() + half),
            confidence,
            float(p_value),
        )
    nonzero = difference[difference != 0]
    if test == "sign":
        candidates = np.sort(difference)
        null = stats.binom.pmf(np.arange(len(a) + 1), len(a), 0.5)
        p_value = (
            stats.binomtest(int((nonzero < 0).sum()), len(nonzero), alternative="greater").pvalue
            if len(nonzero)
            else 1.0
        )
    else:
        first, second = np.triu_indices(len(a))
        candidates = np.sort((difference[first] + difference[second]) / 2)
        null = _signed_rank_null(len(a))
        p_value = stats.wilcoxon(nonzero, alternative="less").pvalue if len(nonzero) else 1.0
    # The largest k with P(statistic < k) <= tail cuts k - 1 candidates from either end.
    cut = int(np.searchsorted(np.cumsum(null), tail, side="right"))
    low, high = (candidates[cut - 1], candidates[-cut]) if cut else (-np.inf, np.inf)
    return Comparison(float(np.median(candidates)), float(low), float(high), confidence, float(p_value))


def _signed_rank_null(n: int) -> np.ndarray:
    """Probabilities of the sums 0, 1, ..., n (n + 1) / 2 of the positive ranks, all signs equally likely."""
    null = np.ones(1)
    for rank in range(1, n + 1):
        with_rank = np.zeros(rank + 1)
        with_rank[[0, rank]] = 0.5
        null = np.convolve(null, with_rank)
    return null


def proportion_below(events: int, trials: int, confidence: float = 0.95) -> Interval:
    """One-sided exact upper bound on a probability (Clopper-Pearson).

    With no event in n trials it is :math:`1 - (1 - c)^{1/n}`, close to the rule of three, :math:`3/n`, at :math:`c = 0.95`.

    Args:
        events: how often it happened.
        trials: out of how many.
        confidence: level of the bound ``high``; ``low`` is 0.

    Raises:
        ValueError: unless 0 <= events <= trials and there is a trial.
    """
    _check_confidence(confidence)
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if not 0 <= events <= trials:
        raise ValueError(f"events must be between 0 and {trials}, got {events}")
    high = stats.binomtest(events, trials, alternative="less").proportion_ci(confidence, method="exact").high
    return Interval(events / trials, 0.0, float(high), confidence)


def rank_correlation(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Comparison:
    r"""Spearman's :math:`\rho`, its two-sided p-value, and an interval from Fisher's z.

    The standard error of :math:`\operatorname{artanh} \rho` is :math:`\sqrt{(1 + \rho^2/2) / (n - 3)}`.

    Args:
        x, y: at least four numbers each.
        confidence: level of the interval.

    Raises:
        ValueError: if a sample is too short, not finite, or constant, or the lengths differ.

    Source: Bonett and Wright (2000); ``scipy.stats.spearmanr``.
    """
    _check_confidence(confidence)
    x, y = _pair("x", x, "y", y, at_least=4)
    for name, values in (("x", x), ("y", y)):
        if np.ptp(values) == 0:
            raise ValueError(f"{name} must hold two different values, got {values[0]} alone")
    rho, p_value = stats.spearmanr(x, y)
    with np.errstate(divide="ignore"):
        center = np.arctanh(np.clip(rho, -1, 1))
    half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return Comparison(
        float(rho), float(np.tanh(center - half)), float(np.tanh(center + half)), confidence, float(p_value)
    )
