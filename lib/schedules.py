r"""Step-size sequences, and which of them satisfy the conditions (8) of Ghauch et al.

A schedule maps the iteration :math:`k = 1, 2, \dots` to a step :math:`\alpha_k`. The conditions (8) are

.. math:: 0 \le \alpha_k < 1, \qquad \alpha_k \to 0, \qquad \sum_k \alpha_k = \infty, \qquad \sum_k \alpha_k^2 < \infty.

``conditions()`` says which hold, and why. In Algorithm 1 a block moves only when it is active, so the sums must run over
the active iterations (chapter 4). For the sequences here that changes nothing: they do not increase, so each of a block's
turns is at least the mean of the J steps that start with it, and the sum over its turns is at least :math:`1/J` of the sum
from its first turn on.
"""

from dataclasses import dataclass, field
from itertools import accumulate, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Condition(NamedTuple):
    """One of the conditions (8): whether it holds, and why. Its truth value is ``holds``."""

    holds: bool
    reason: str

    def __bool__(self) -> bool:
        return self.holds


class Conditions(NamedTuple):
    """The four conditions (8)."""

    bounded: Condition
    vanishes: Condition
    diverges: Condition
    square_summable: Condition

    def all(self) -> bool:
        """Whether (8) holds."""
        return all(bool(condition) for condition in self)


class Schedule:
    """A step size for each iteration: ``schedule(k)`` for k = 1, 2, ... is a number."""

    def __call__(self, k: int) -> float:
        raise NotImplementedError

    def first(self, K: int) -> Tensor:
        """The first ``K`` steps, ``(K,)`` in float64 on the CPU."""
        raise NotImplementedError

    def conditions(self) -> Conditions:
        """Which of the conditions (8) hold."""
        raise NotImplementedError


@dataclass(frozen=True)
class Power(Schedule):
    r""":math:`\alpha_k = c\, k^{-p}`.

    By comparison with :math:`\int x^{-p} dx` the sum diverges exactly for :math:`p \le 1`, and that of the squares
    converges exactly for :math:`p > 1/2`. So (8) holds exactly for :math:`c < 1` and :math:`1/2 < p \le 1`.

    Args:
        c: positive.
        p: not negative.

    Raises:
        ValueError: for anything else.
    """

    c: float
    p: float

    def __post_init__(self):
        _check_positive("c", self.c)
        if not 0 <= self.p < float("inf"):
            raise ValueError(f"p must be zero or positive, and finite, got {self.p}")

    def __call__(self, k: int) -> float:
        return float(self.c * _index(k) ** -self.p)

    def first(self, K: int) -> Tensor:
        return self.c * _indices(K) ** -self.p

    def conditions(self) -> Conditions:
        c, p = self.c, self.p
        return Conditions(
            Condition(c < 1, f"the largest step is the first, {c:g}"),
            Condition(p > 0, f"k^-p tends to zero exactly for p > 0, and p = {p:g}"),
            Condition(p <= 1, f"the sum of k^-p diverges exactly for p <= 1, and p = {p:g}"),
            Condition(p > 1 / 2, f"the sum of k^-2p converges exactly for p > 1/2, and p = {p:g}"),
        )


class Constant(Power):
    r""":math:`\alpha_k = \alpha`: not square summable, so it never satisfies (8)."""

    def __init__(self, alpha: float):
        _check_positive("alpha", alpha)
        super().__init__(alpha, 0.0)

    def __repr__(self) -> str:
        return f"Constant(alpha={self.c:g})"


class InverseSquareRoot(Power):
    r""":math:`\alpha_k = c/\sqrt k`: the squares sum to :math:`c^2 \sum 1/k = \infty`, so it never satisfies (8)."""

    def __init__(self, c: float):
        super().__init__(c, 0.5)

    def __repr__(self) -> str:
        return f"InverseSquareRoot(c={self.c:g})"


class Harmonic(Power):
    r""":math:`\alpha_k = c/(2k)`: satisfies (8) exactly for :math:`c < 2`."""

    def __init__(self, c: float):
        _check_positive("c", c)
        super().__init__(c / 2, 1.0)

    def __repr__(self) -> str:
        return f"Harmonic(c={2 * self.c:g})"


@dataclass(frozen=True)
class Geometric(Schedule):
    r""":math:`\alpha_k = c/2^k`, the other reading of the paper's "c/2k".

    The sum is :math:`c`, and that of the squares :math:`c^2/3`: all steps together are too short, and (8) never holds.

    Args:
        c: positive.

    Raises:
        ValueError: for anything else.
    """

    c: float

    def __post_init__(self):
        _check_positive("c", self.c)

    def __call__(self, k: int) -> float:
        return self.c * 0.5 ** _index(k)

    def first(self, K: int) -> Tensor:
        return self.c * 0.5 ** _indices(K)

    def conditions(self) -> Conditions:
        return Conditions(
            Condition(self.c < 2, f"the largest step is the first, {self.c / 2:g}"),
            Condition(True, "2^-k tends to zero"),
            Condition(False, f"the sum is c = {self.c:g}"),
            Condition(True, f"the sum of squares is c^2/3 = {self.c**2 / 3:g}"),
        )


@dataclass(frozen=True)
class Recursion(Schedule):
    r""":math:`\alpha_k = \alpha_{k-1} (1 - t\, \alpha_{k-1})` from :math:`\alpha_0` = ``start``, updated before it is used.

    Setting 1 of the paper is ``Recursion(0.99, 1)``, setting 2 is ``Recursion(0.9, 0.001)``. For :math:`0 < t\alpha_0 < 1`:

    - :math:`0 < \alpha_k < \alpha_{k-1}`, since :math:`0 < 1 - t\alpha_{k-1} < 1`; the limit is a fixed point, so it is 0.
    - The squares telescope: :math:`t \alpha_k^2 = \alpha_k - \alpha_{k+1}`, hence
      :math:`\sum_{k \ge 0} \alpha_k^2 = \alpha_0 / t` exactly.
    - With :math:`b_k = 1/\alpha_k` the recursion reads
      :math:`b_{k+1} = b_k/(1 - t/b_k) = b_k + t + \frac{t^2}{b_k} + \frac{t^3}{b_k^2} + \dots`. So :math:`b_{k+1} \ge b_k + t`,
      :math:`b_k \ge tk`, the third term adds up to :math:`t \ln k` and a convergent rest, and
      :math:`1/\alpha_k = tk + t \ln k + C + o(1)`.
    - Therefore :math:`\alpha_k \sim 1/(tk)`, and the sum diverges.

    Args:
        t: between 0 and 1.
        start: positive, with ``t * start < 1``.

    Raises:
        ValueError: for anything else.
    """

    t: float
    start: float
    _known: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not 0 < self.t < 1:
            raise ValueError(f"t must be between 0 and 1, got {self.t}")
        if not 0 < self.start < 1 / self.t:
            raise ValueError(f"start must be between 0 and 1/t = {1 / self.t:g}, got {self.start}")

    def __call__(self, k: int) -> float:
        _index(k)
        while len(self._known) < k:
            last = self._known[-1] if self._known else self.start
            self._known.append(self._next(last))
        return self._known[k - 1]

    def first(self, K: int) -> Tensor:
        _check_count(K)
        steps = accumulate(repeat(None, K), lambda a, _: self._next(a), initial=self.start)
        return torch.from_numpy(np.fromiter(steps, np.float64, K + 1)[1:].copy())

    def _next(self, a: float) -> float:
        return a * (1 - self.t * a)

    def conditions(self) -> Conditions:
        largest = self._next(self.start)
        return Conditions(
            Condition(largest < 1, f"the steps decrease, and the first one used is {largest:g}"),
            Condition(True, "the steps decrease to a fixed point, and zero is the only one"),
            Condition(True, f"1/alpha_k = t k + t ln k + C + o(1), so alpha_k ~ 1/({self.t:g} k)"),
            Condition(True, f"the squares telescope: from alpha_0 on they sum to alpha_0/t = {self.start / self.t:g}"),
        )


def table(schedule: Schedule | list[Schedule] | tuple[Schedule, ...], K: int) -> Tensor:
    """The first ``K`` steps of one schedule, ``(K,)``, or of one for each of S runs, ``(K, S)``."""
    if isinstance(schedule, (list, tuple)):
        return torch.stack([one.first(K) for one in schedule], dim=1)
    return schedule.first(K)


def _index(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a whole number, at least 1, got {k!r}")
    return k


def _check_count(K: int) -> None:
    if isinstance(K, bool) or not isinstance(K, int) or K < 0:
        raise ValueError(f"K must be a whole number, at least 0, got {K!r}")


def _indices(K: int) -> Tensor:
    _check_count(K)
    return torch.arange(1, K + 1, dtype=torch.float64)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
