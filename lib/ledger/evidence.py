"""Checks and the rules that turn them into a verdict.

A :class:`Check` compares a measured value with a threshold. It passes only if the comparison is certainly true: NaN
never passes, and an interval (``mpmath.iv``) passes only if every point of it does. Integers, rationals and intervals
are *exact* evidence; floats are not.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import sympy

HOLDS = "holds"
CORRECTED = "holds as corrected"
REFUTED = "refuted"
REPRODUCED = "reproduced"
PARTLY = "partly reproduced"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided"
OPEN = "open"
VERDICTS = (HOLDS, CORRECTED, REFUTED, REPRODUCED, PARTLY, NOT_REPRODUCED, UNDECIDED, OPEN)

_RELATIONS = {
    "≤": lambda low, high, limit: high <= limit,
    "<": lambda low, high, limit: high < limit,
    "≥": lambda low, high, limit: low >= limit,
    ">": lambda low, high, limit: low > limit,
    "=": lambda low, high, limit: low == limit and high == limit,
    "in": lambda low, high, limit: limit[0] <= low and high <= limit[1],
}


@dataclass(frozen=True)
class Check:
    """``measured relation threshold``, for instance ``Check("largest deviation", 3e-16, "≤", 1e-12)``.

    ``interval`` is the statistical interval of ``measured`` where there is one; it is shown, and with
    ``by_interval=True`` the whole of it must satisfy the relation. Raises ``ValueError`` for an unknown relation and
    ``TypeError`` for a value that is not a number (a bare ``True`` is not evidence).
    """

    name: str
    measured: Any
    relation: str
    threshold: Any
    interval: tuple[float, float] | None = None
    by_interval: bool = False

    def __post_init__(self):
        if self.relation not in _RELATIONS:
            raise ValueError(f"relation must be one of {', '.join(_RELATIONS)}, got {self.relation!r}")
        if self.relation == "in":
            low, high = self.threshold
            limits = (_number(low, "threshold"), _number(high, "threshold"))
        else:
            limits = _number(self.threshold, "threshold")
        object.__setattr__(self, "measured", _number(self.measured, "measured"))
        object.__setattr__(self, "threshold", limits)
        if self.by_interval and self.interval is None:
            raise ValueError(f"check {self.name!r}: by_interval needs an interval")

    @property
    def exact(self) -> bool:
        """Whether the measured value is exact or enclosed: an integer, a rational or an ``mpmath.iv`` interval."""
        return isinstance(self.measured, (int, Fraction)) or _is_interval(self.measured)

    @property
    def passed(self) -> bool:
        low, high = _ends(self.interval if self.by_interval else self.measured)
        limit = self.threshold
        if any(isinstance(v, float) and math.isnan(v) for v in (low, high, *np.atleast_1d(limit))):
            return False
        return bool(_RELATIONS[self.relation](low, high, limit))

    @property
    def text(self) -> str:
        """``name: measured [interval] relation threshold``, with three significant digits."""
        interval = f" [{show(self.interval[0])}, {show(self.interval[1])}]" if self.interval else ""
        return f"{self.name}: {show(self.measured)}{interval} {self.relation} {show(self.threshold)}"


def at_most(name: str, measured: Any, threshold: Any, **options: Any) -> Check:
    """The check ``measured ≤ threshold``."""
    return Check(name, measured, "≤", threshold, **options)


def below(name: str, measured: Any, threshold: Any, **options: Any) -> Check:
    """The check ``measured < threshold``."""
    return Check(name, measured, "<", threshold, **options)


def at_least(name: str, measured: Any, threshold: Any, **options: Any) -> Check:
    """The check ``measured ≥ threshold``."""
    return Check(name, measured, "≥", threshold, **options)


def above(name: str, measured: Any, threshold: Any, **options: Any) -> Check:
    """The check ``measured > threshold``."""
    return Check(name, measured, ">", threshold, **options)


def equals(name: str, measured: Any, threshold: Any, **options: Any) -> Check:
    """The check ``measured = threshold``, exactly: for counts, rationals, and floats that must agree bit for bit."""
    return Check(name, measured, "=", threshold, **options)


def between(name: str, measured: Any, low: Any, high: Any, **options: Any) -> Check:
    """The check ``low ≤ measured ≤ high``."""
    return Check(name, measured, "in", (low, high), **options)


def verdict_of_statement(
    printed: Sequence[Check], corrected: Sequence[Check] = (), counterexample: Sequence[Check] = ()
) -> tuple[str, str]:
    """(verdict, reason) of a derived statement.

    - *holds*: every check of the printed statement passes;
    - *holds as corrected*: one of them fails, and every check of the corrected statement passes;
    - *refuted*: one of them fails, every check of the counterexample passes and is exact, and there is no correction;
    - *undecided* otherwise, with the checks that stand in the way.

    Raises ``ValueError`` without a check of the printed statement.
    """
    if not printed:
        raise ValueError("printed must hold at least one check of the statement as the paper prints it")
    failed = [check.text for check in printed if not check.passed]
    if not failed:
        return HOLDS, "every check of the printed statement passed"
    if corrected:
        broken = [check.text for check in corrected if not check.passed]
        if not broken:
            return CORRECTED, f"as printed: {'; '.join(failed)} fails; as corrected every check passed"
        return UNDECIDED, f"neither form passed: {'; '.join(failed + broken)}"
    if counterexample:
        broken = [check.text for check in counterexample if not (check.passed and check.exact)]
        if not broken:
            return REFUTED, f"an exact counterexample: {'; '.join(check.text for check in counterexample)}"
        return UNDECIDED, f"the counterexample is not verified exactly: {'; '.join(broken)}"
    return UNDECIDED, f"the check failed, without an exact counterexample: {'; '.join(failed)}"


def verdict_of_experiment(findings: Sequence[Check]) -> tuple[str, str]:
    """(verdict, reason) of an experiment: all, some or none of its findings appear. Raises ``ValueError`` for none."""
    if not findings:
        raise ValueError("findings must hold at least one check")
    missing = [check.text for check in findings if not check.passed]
    if not missing:
        return REPRODUCED, f"all {len(findings)} findings appear"
    if len(missing) < len(findings):
        return PARTLY, f"{len(missing)} of {len(findings)} findings do not appear: {'; '.join(missing)}"
    return NOT_REPRODUCED, f"no finding appears: {'; '.join(missing)}"


def show(value: Any) -> str:
    """A number as a reader wants it: exact integers and small rationals whole, floats to three or four digits."""
    if isinstance(value, tuple):
        return f"[{show(value[0])}, {show(value[1])}]"
    if _is_interval(value):
        low, high = _ends(value)
        if isinstance(low, float) or isinstance(high, float):
            return f"[{low}, {high}]"
        middle, radius = (low + high) / 2, (high - low) / 2
        return f"{float(middle):.12g} ± {mpmath.nstr(mpmath.mpf(radius.numerator) / radius.denominator, 2)}"
    if isinstance(value, Fraction):
        text = str(value)
        return text if len(text) <= 24 else f"{float(value):.6g} (exact rational)"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if abs(value) < 10**9 else f"{value:.3e}"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    return f"{value:.4g}"


def _number(value: Any, what: str) -> Any:
    """A plain int, Fraction, float or mpmath interval; anything else (booleans above all) is not evidence."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{what} must be a number, got the bare truth value {value!r}")
    if _is_interval(value):
        return value
    if isinstance(value, sympy.Rational):
        value = Fraction(int(value.p), int(value.q))
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, Fraction):
        return value
    if isinstance(value, (numbers.Real, mpmath.mpf)):
        return float(value)
    raise TypeError(f"{what} must be an integer, a rational, a float or an mpmath interval, got {value!r}")


def _is_interval(value: Any) -> bool:
    return isinstance(value, mpmath.iv.mpf)


def _ends(value: Any) -> tuple[Any, Any]:
    """The two ends of a value; those of an interval as exact rationals, so that no comparison rounds."""
    if isinstance(value, tuple):
        return value
    if _is_interval(value):
        return _rational(value._mpi_[0]), _rational(value._mpi_[1])
    return value, value


def _rational(raw: tuple[int, int, int, int]) -> Any:
    """mpmath's raw (sign, mantissa, exponent, bits) as a ``Fraction``; infinities and NaN as floats."""
    sign, mantissa, exponent, _ = raw
    if not mantissa and exponent:
        return float(mpmath.mpf(raw))
    return Fraction(-int(mantissa) if sign else int(mantissa)) * Fraction(2) ** exponent
